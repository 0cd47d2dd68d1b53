"""Tuning GPU kernels: their space, their trials on a real OpenCL device (this machine's processor), and their log."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from dance_tvm.artifact.gpu_launches import DeviceCode, Launch, Plan
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.cli import start
from dance_tvm.core.errors import DanceError
from dance_tvm.device.remote import RemoteSession
from dance_tvm.lowering.machine import gpu_of
from dance_tvm.lowering.registry import kernel_of
from dance_tvm.machines.gpu import opencl_devices
from dance_tvm.machines.target import load_target
from dance_tvm.records import kernel_log
from dance_tvm.records.advice import tuned_tiles
from dance_tvm.records.kernel_log import Log, log_path
from dance_tvm.schedules.cpu.choice import Advice
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.gpu.block_space import BlockSpace, decisions_of
from dance_tvm.schedules.gpu.conv3d_kgs import GroupConv
from dance_tvm.schedules.gpu.tiles import BlockTile, default_tile, is_whole
from dance_tvm.schedules.workload import GATHER, Workload
from dance_tvm.tune import app as tune_command
from dance_tvm.tuning import tuner
from dance_tvm.tuning.farm import Farm
from dance_tvm.tuning.instances import Instance, Loaded, build_instance, interleaved
from dance_tvm.tuning.libraries import device_code_of, require_gpu

WINDOW = Window(1, (2, 5, 6), (2, 5, 6), (3, 3, 3), padding=(1, 1, 1))
PLAIN = Workload(WINDOW, 5, 20, residual=True, activation="relu")
THINNED = Workload(WINDOW, 8, 20, lists=("in_frames", "positions", "in_channels", "out_channels"), density=0.5)
GROUPS = THINNED.grouped((16, 4), 0.4)
pytestmark = pytest.mark.usefixtures("small_generations")


@pytest.fixture
def opencl_name() -> str:
    try:
        devices = opencl_devices()
    except DanceError as error:
        pytest.skip(str(error))
    if not devices:
        pytest.skip("no OpenCL device: dance-tvm doctor")
    return devices[0].name


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.score = nn.Conv3d(3, 12, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(torch.relu(self.conv(x)).mean((2, 3, 4)))


CLIP = (torch.randn(1, 3, 2, 5, 6),)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("network") / "small.pt2"
    torch.export.save(torch.export.export(Small().eval(), CLIP), path)
    return path


# -- the space --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["jetson-nano", "jetson-orin-nano", "snapdragon-gpu", "opencl"])
@pytest.mark.parametrize("work", [PLAIN, THINNED, replace(PLAIN, channels_in=256, channels_out=512)])
def test_a_space_holds_its_default_and_only_what_fits_the_gpu(target, work):
    gpu = gpu_of(load_target(target))
    kernel = kernel_of(work, gpu)
    space = kernel.space(gpu, work)
    assert isinstance(space, BlockSpace)
    assert space.default() == decisions_of(space.tiles[0])
    parts = [(part, mr) for part in space.parts() for mr in part["mr"]]
    assert len(parts) == space.size > 10
    for part, mr in parts:
        decisions = {name: values[0] for name, values in part.items()} | {"mr": mr}
        assert space.allows(decisions)
        tile = kernel.sized(decisions).tile
        assert is_whole(tile)
        assert gpu.warp <= tile.threads <= gpu.block_threads
        assert tile.shared_bytes <= gpu.block_shared
        assert tile.registers * tile.threads <= gpu.block_registers


def test_what_exceeds_registers_shared_memory_or_threads_is_not_allowed():
    gpu = gpu_of(load_target("jetson-nano"))
    largest = BlockTile(128, 64, 16, 8, 8)
    assert BlockSpace(gpu, PLAIN).allows(decisions_of(largest))
    for less in ({"block_registers": 16384}, {"block_shared": 16384}, {"block_threads": 64}):
        assert not BlockSpace(replace(gpu, **less), PLAIN).allows(decisions_of(largest)), less
    assert not BlockSpace(gpu, PLAIN).allows({**decisions_of(largest), "mr": 24})
    assert not BlockSpace(gpu, PLAIN).allows({"mr": 4, "vectors": 2})  # a CPU's


def test_kernel_groups_give_a_block_its_output_channels():
    gpu, work = gpu_of(load_target("jetson-nano")), GROUPS
    kernel = kernel_of(work, gpu)
    space = kernel.space(gpu, work)
    assert {tile.nr for tile in space.tiles} == {16}
    assert space.size > 5
    assert space.default() == decisions_of(default_tile(gpu, WINDOW, 20, 16))
    assert space.allows(space.default())
    assert not space.allows(decisions_of(BlockTile(32, 32, 8, 4, 4)))
    assert isinstance(kernel.sized(space.default()), GroupConv)


def test_half_precision_is_another_workload():
    half = replace(PLAIN, dtype="float16")
    assert half.identity != PLAIN.identity
    assert half.distance(PLAIN) == float("inf")
    assert Workload.of(half.facts()) == half
    assert "dtype" not in PLAIN.facts()  # records from before there was a choice stay what they are


class Records:
    def __init__(self, decisions: dict[str, int]) -> None:
        self.decisions = decisions

    def advise(self, workload: Workload) -> Advice:
        return Advice(workload, self.decisions, "a record")


def test_a_build_takes_its_tile_from_the_log(tmp_path):
    tile = BlockTile(64, 16, 8, 4, 4)
    options = Options(tuning=Records(decisions_of(tile)))
    built = build_network(
        Small().eval(), tmp_path / "made", target="snapdragon-gpu", example_inputs=CLIP, options=options, check=False
    )
    layer = next(layer for layer in built.artifact.manifest.layers if layer.kind == "conv3d")
    assert layer.kernel.endswith(tile.name)
    assert layer.tuned == "a record"


# -- the search -------------------------------------------------------------------------------------------------------


def test_the_search_finds_what_is_fastest():
    """The fewer output channels a block has, the faster, says the one who measures."""
    from dance_tvm.tuning.search import LayerSearch, new_cost_model

    target = load_target("jetson-nano")
    space = BlockSpace(gpu_of(target), PLAIN)
    search = LayerSearch(space, target.tvm_target(1), new_cost_model()[0], batch=8)
    seen: list[dict[str, int]] = []
    for _ in range(3):
        batch = search.propose()
        assert all(space.allows(decisions) for decisions in batch)
        search.tell([(decisions, 1e-3 * decisions["nr"]) for decisions in batch])
        seen += batch
    assert len({search.key(decisions) for decisions in seen}) == len(seen) > 12
    assert min(decisions["nr"] for decisions in seen) == min(tile.nr for tile in space.tiles)


# -- trials on a device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [THINNED, GROUPS], ids=["thinned", "groups"])
def test_every_tile_runs_over_opencl_and_tells_the_same(tmp_path, opencl_name, work):
    target = load_target("opencl")
    kernel = kernel_of(work, gpu_of(target))
    space = kernel.space(gpu_of(target), work)
    # Of tiles that differ in every decision the smallest, which PoCL compiles soonest.
    tiles = [BlockTile(32, 16, 8, 4, 4), BlockTile(64, 32, 16, 8, 8)]
    if space.filters is not None:
        tiles[1] = BlockTile(64, space.filters, 16, 4, 4)
    assert all(space.allows(decisions_of(tile)) for tile in tiles)
    instances = [Instance(work, kernel.sized(decisions_of(tile))) for tile in tiles]
    for number, instance in enumerate(instances):
        build_instance(instance, target, tmp_path / f"{number}.so")
    with Farm(["local"], trial_timeout=300) as devices, devices.session(1) as session:
        loaded = [Loaded.on(session, each, tmp_path / f"{n}.so", "opencl") for n, each in enumerate(instances)]
        digests = {each.digest() for each in loaded}
        assert all(min(times) > 0 for times in interleaved(loaded, rounds=2))
        assert {each.library.origin for each in loaded} == {f"local: {opencl_name}"}
    assert len(digests) == 1
    assert None not in digests


def test_a_network_is_tuned_over_opencl_and_built_by_its_records(tmp_path, network, opencl_name, capsys, monkeypatch):
    monkeypatch.setattr(tuner, "DISTURBED", math.inf)  # a layer this small takes less time than its noise
    monkeypatch.setattr(kernel_log, "MOST_SPREAD", math.inf)
    target = load_target("opencl")
    assert target.gpu.name == opencl_name
    command = ["--target", "opencl", "--device", "local", "--model", str(network), "--trials", "2"]
    command += ["--logs", str(tmp_path), "--trial-timeout", "300", "--json"]
    with pytest.raises(SystemExit) as left:
        start(tune_command, "tune", command)
    assert left.value.code in (0, None), capsys.readouterr().err
    facts = json.loads(capsys.readouterr().out)
    (layer,) = facts["layers"]  # the linear layer has nothing to decide
    assert layer["trials"] >= 2
    assert layer["failed"] == 0
    assert layer["verified"]
    assert layer["share_of_peak"] is None  # how fast such a device is at best is not known
    log = Log.read(log_path(target, folder=tmp_path))
    assert not log.problems
    found = list(log.records(target.fingerprint))
    assert {record.status for record in found} == {"trial", "verified"}
    assert {record.origin for record in found} == {f"local: {opencl_name}"}
    assert {record.shape.family for record in found} == {GATHER}
    gpu = {**target.gpu.model_dump(), "name": "another device"}
    other = type(target).model_validate({**target.model_dump(), "gpu": gpu})
    assert not list(log.records(other.fingerprint))

    tuned = tuned_tiles(target, tmp_path)
    built = build_network(str(network), tmp_path / "made", target=target, options=Options(tuning=tuned), check=True)
    conv = next(layer for layer in built.artifact.manifest.layers if layer.kind == "conv3d")
    assert conv.tuned.startswith("tuned ")
    assert opencl_name in conv.tuned
    verified = [record for record in found if record.status == "verified"][-1]
    assert conv.kernel.endswith(BlockTile(**verified.decisions).name)


@pytest.mark.skipif(find_spec("nvidia") is None, reason="no CUDA compiler: pip install 'dance-tvm[gpu]'")
def test_a_trial_for_a_jetson_holds_all_its_functions_as_ptx(tmp_path):
    target = load_target("jetson-nano")
    work = replace(THINNED, dtype="float16")
    instance = Instance(work, kernel_of(work, gpu_of(target)).sized(decisions_of(BlockTile(32, 16, 8, 4, 4))))
    build_instance(instance, target, tmp_path / "trial.so")
    data = (tmp_path / "trial.so").read_bytes()
    assert int.from_bytes(data[18:20], "little") == 183  # EM_AARCH64
    assert b".version 6.5\n.target sm_53\n" in data
    planners = [f"plan{index}" for index in range(len(instance.kernel.lists()))]
    assert len(planners) >= 3  # rows, channels in, channels out
    for function in ("conv", *planners, "fill_x", "fill_weights", "digest"):
        assert f".visible .entry {function}_kernel".encode() in data, function
    assert not device_code_of(tmp_path / "trial.so").exists()


@pytest.mark.parametrize(("target", "kind"), [("cuda", "cuda"), ("jetson-nano", "cuda")])
def test_a_device_without_the_gpu_is_refused_before_anything_is_built(tmp_path, network, target, kind, capsys):
    with pytest.raises(SystemExit) as left:
        start(tune_command, "tune", ["--target", target, "--model", str(network), "--logs", str(tmp_path)])
    assert left.value.code == 2
    assert f"local has no {kind} device to tune on" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_server_without_pyopencl_says_so(monkeypatch):
    class Session(RemoteSession):
        name = "board"

        def __init__(self):
            """Connects to nothing."""

        class connection:  # noqa: N801 - named as the attribute it stands for
            @staticmethod
            def call(_what, function, timeout=None):
                try:
                    return function()
                except ImportError as error:
                    raise DanceError(f"board failed: {error}") from None

            class session:  # noqa: N801 - named as the attribute it stands for
                @staticmethod
                def device(_kind, _number):
                    return type("Absent", (), {"exist": False})

        @staticmethod
        def function(_name):
            def offered(*_arguments):
                raise ImportError("No module named 'dance_tvm'")

            return offered

    class Devices:
        def session(self, _threads):
            from contextlib import nullcontext

            return nullcontext(Session())

    with pytest.raises(DanceError, match=r"board has no opencl device to tune on \(board failed: No module"):
        require_gpu(Devices(), "opencl")
    require_gpu(Devices(), "llvm")


def test_device_code_travels_as_text():
    plan = Plan([Launch("conv_kernel", (0, "workspace 0", 2), (4, 1, 1), (64, 1, 1))], {"workspace 0": 128})
    code = DeviceCode("__kernel void conv_kernel() {}", {"conv": plan})
    assert DeviceCode.from_json(code.to_json()) == code
