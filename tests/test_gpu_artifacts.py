"""Artifacts for GPUs, built and looked into without one: architecture, device code, symbols, and clear refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from dance_tvm.artifact import device_code
from dance_tvm.artifact.folder import Artifact, load_artifact
from dance_tvm.artifact.gpu_launches import DeviceCode as OpenCLCode
from dance_tvm.artifact.gpu_launches import Launch, Plan
from dance_tvm.build import DEFAULT_MODEL
from dance_tvm.build import app as build_command
from dance_tvm.compiler import build as compiler
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.cli import start
from dance_tvm.core.errors import DanceError
from dance_tvm.device.opencl import OpenCLSession
from dance_tvm.machines import gpu
from dance_tvm.machines.target import load_target

HAS_WHEELS = find_spec("nvidia") is not None
needs_nvrtc = pytest.mark.skipif(not HAS_WHEELS, reason="no CUDA compiler: pip install 'dance-tvm[gpu]'")
needs_opencl = pytest.mark.skipif(gpu.detect_opencl() is None, reason="no OpenCL device: dance-tvm doctor")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.score = nn.Conv3d(2, 8, 3, padding=1), nn.MaxPool3d(2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.pool(torch.relu(self.conv(x))).mean((2, 3, 4)))


def built(out: Path, target: str, **options: object) -> Artifact:
    torch.manual_seed(0)
    clip = (torch.randn(1, 2, 4, 6, 6),)
    build = build_network(
        Small().eval(), out, target=target, example_inputs=clip, options=Options(**options), check=False
    )
    return build.artifact


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., Artifact]:
    """Artifacts by target and options, each built once."""
    kept: dict[object, Artifact] = {}

    def make(target: str, **options: object) -> Artifact:
        key = (target, *sorted(options.items()))
        if key not in kept:
            kept[key] = built(tmp_path_factory.mktemp("gpu") / "made", target, **options)
        return kept[key]

    return make


def undefined(library: Path) -> set[str]:
    """What the library asks of those that are loaded beside it, as far as it is TVM's or a driver's."""
    text = library.read_bytes()
    return {name.decode() for name in re.findall(rb"(?:TVM|cu|cl)[A-Z][A-Za-z0-9]+(?=\0)", dynamic_names(text))}


def dynamic_names(data: bytes) -> bytes:
    """The table of names of an ELF file's dynamic symbols."""
    at, size, count = (
        int.from_bytes(data[begin : begin + width], "little") for begin, width in ((40, 8), (58, 2), (60, 2))
    )
    for header in range(at, at + size * count, size):
        kind, address, length = (
            int.from_bytes(data[header + i : header + i + w], "little") for i, w in ((4, 4), (24, 8), (32, 8))
        )
        if kind == 3 and b"\0dance_model_api\0" in data[address : address + length]:
            return data[address : address + length]
    raise AssertionError("no dynamic symbols")


@needs_nvrtc
@pytest.mark.parametrize(
    ("target", "arch", "newest"), [("jetson-nano", "sm_53", "6.5"), ("jetson-orin-nano", "sm_87", "7.4")]
)
def test_a_jetson_library_holds_ptx_that_its_driver_takes(made, target, arch, newest):
    artifact = made(target)
    data = artifact.library.read_bytes()
    assert int.from_bytes(data[18:20], "little") == 183  # EM_AARCH64
    assert f".version {newest}\n.target {arch}\n".encode() in data
    assert b".visible .entry conv3d_gather_gpu" in data
    assert b"__global__" not in data, "CUDA source was left inside"
    assert undefined(artifact.library) == {"TVMFFIErrorSetRaisedFromCStr"}, "it is weak: TVM's loader may be there"
    facts = artifact.manifest.device_code
    assert (facts.format, facts.architecture, facts.version) == ("ptx", arch, newest)
    text = data[data.index(b".version") :].split(b"\0")[0]
    ptx = text[: text.rindex(b"}") + 1].decode()  # whatever lies behind it in the library may follow at once
    kernels = device_code.assemble(ptx, arch)
    assert len(kernels) > 3
    assert not any(kernel.spills for kernel in kernels)


@needs_nvrtc
def test_the_same_network_gives_the_same_bytes(made, tmp_path):
    again = built(tmp_path / "again", "jetson-nano")
    assert again.library.read_bytes() == made("jetson-nano").library.read_bytes()


def test_a_phone_library_holds_opencl_source(made):
    artifact = made("snapdragon-gpu")
    data = artifact.library.read_bytes()
    assert int.from_bytes(data[18:20], "little") == 183
    assert b"__kernel void conv3d_gather_gpu" in data
    assert undefined(artifact.library) == {"TVMFFIErrorSetRaisedFromCStr"}, "it is weak: TVM's loader may be there"
    assert artifact.manifest.device_code.format == "opencl"
    assert "driver" in artifact.manifest.device_code.note


@needs_nvrtc
@needs_opencl
def test_a_build_checks_its_kernels_on_the_processor(tmp_path):
    torch.manual_seed(0)
    clip = (torch.randn(1, 2, 4, 6, 6),)
    build = build_network(Small().eval(), tmp_path / "made", target="jetson-nano", example_inputs=clip, check=True)
    check = build.artifact.manifest.check
    assert check.status == "passed"
    assert check.difference <= check.allowed
    assert "the kernels alone" in check.device


@needs_nvrtc
def test_the_commands_of_the_readme_build_the_shipped_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compiler, "_import", lru_cache(compiler._import))  # for both, which takes half of the time
    for target, sign in (("jetson-nano", b".version 6.5\n.target sm_53\n"), ("snapdragon-gpu", b"__kernel void ")):
        out = tmp_path / target
        with pytest.raises(SystemExit) as left:  # unchecked: running all its kernels on a processor takes half a minute
            start(build_command, "build", ["--target", target, "--out", str(out), "--json", "--no-check"])
        assert left.value.code in (0, None)
        manifest = json.loads(capsys.readouterr().out)["manifest"]
        assert manifest["name"] == DEFAULT_MODEL
        assert any("output channels" in layer["skips"] for layer in manifest["layers"])
        artifact = load_artifact(out)
        assert artifact.manifest.target.machine == "aarch64"
        assert artifact.manifest.device_code.architecture == ("sm_53" if target == "jetson-nano" else "any")
        library = artifact.library.read_bytes()
        assert sign in library
        assert b"conv3d_gather_gpu_io_f32" in library


# -- bad input --------------------------------------------------------------------------------------------------------


def test_without_a_cuda_compiler_the_build_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(device_code, "_wheel_file", lambda *_: None)
    with pytest.raises(DanceError, match=r"there is no CUDA compiler: pip install"):
        built(tmp_path / "made", "jetson-nano")
    assert not (tmp_path / "made").exists()


@needs_nvrtc
def test_ptx_that_the_driver_would_refuse_is_refused_here():
    source = 'extern "C" __global__ void k(int* x) { x[0] = 1; }'
    ptx = device_code.compile_ptx(source, "sm_53", "6.5")
    with pytest.raises(DanceError, match=r"ptxas refuses the code for sm_53"):
        device_code.assemble(ptx + "\n.visible .entry k2() { nonsense; }\n", "sm_53")
    with pytest.raises(DanceError, match=r"NVRTC cannot compile for sm_53: .*undefined"):
        device_code.compile_ptx('extern "C" __global__ void k() { y = 1; }', "sm_53")


@needs_opencl
def test_an_opencl_device_says_what_it_cannot_do():
    session = OpenCLSession()
    half = OpenCLCode("#pragma OPENCL EXTENSION cl_khr_fp16 : enable", {})
    if not session.has_fp16:
        with pytest.raises(DanceError, match="has no fp16"):
            session.compile(half)
    many = OpenCLCode("", {"k": Plan([Launch("k", (), (1, 1, 1), (1 << 20, 1, 1))])})
    with pytest.raises(DanceError, match="threads per block, and a kernel needs 1048576"):
        session.compile(many)
    with pytest.raises(DanceError, match="out of memory"):
        session.empty(1 << 50)
    with pytest.raises(DanceError, match=r"no OpenCL device 'adreno'"):
        OpenCLSession("adreno")


# -- detection --------------------------------------------------------------------------------------------------------


def test_a_gpu_is_described_by_its_driver(monkeypatch):
    facts = {
        "block_threads": 1024, "block_shared": 49152, "warp": 32, "khz": 921600, "units": 1, "memory_khz": 1600000,
        "bus_bits": 64, "unit_threads": 2048, "major": 5, "minor": 3, "shared": 65536, "registers": 65536,
        "block_registers": 32768,
    }  # fmt: skip
    described = gpu._described(facts, "NVIDIA Tegra X1", 4 << 30, (10, 2))
    nano = load_target("jetson-nano")
    assert described["tvm"]["arch"] == nano.tvm["arch"]
    for key in ("units", "lanes", "max_ghz", "warp", "unit_threads", "registers", "block_registers", "shared", "ptx"):
        assert described["gpu"][key] == getattr(nano.gpu, key), key
    assert described["memory_gb_per_s"] == pytest.approx(25.6)
    monkeypatch.setattr(gpu, "detect_cuda", lambda: described)
    target = load_target("cuda")
    assert target.tvm["arch"] == "sm_53"
    assert target.gpu.name == "NVIDIA Tegra X1"
    assert target.host["mtriple"].startswith(("x86_64", "aarch64"))


def test_versions_of_ptx_follow_the_driver():
    assert [gpu.driver_ptx(version) for version in ((10, 2), (11, 4), (12, 2), (9, 0))] == ["6.5", "7.4", "7.8", ""]
