"""The build and run commands: reproducible artifacts from real files, and one sentence for each kind of bad input."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from dance_tvm import build, models, run
from dance_tvm.artifact import linker
from dance_tvm.artifact.folder import load_artifact
from dance_tvm.compiler import check
from dance_tvm.compiler.build import build_network, new_manifest
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.agreement import HALF_TOLERANCE
from dance_tvm.core.cli import start
from dance_tvm.core.errors import DanceError
from dance_tvm.frontend import import_model
from dance_tvm.machines.target import load_target


class Tiny(nn.Module):
    """Small enough to build in a second; whole numbers, so that every order of summing gives the same result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 3, padding=1)
        with torch.no_grad():
            for index, tensor in enumerate(self.parameters()):
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) % (5 + index) - 2)

    def forward(self, clip):
        return torch.relu(self.conv(clip))


CLIP = torch.arange(2 * 4 * 5 * 6, dtype=torch.float32).reshape(1, 2, 4, 5, 6) % 7 - 3


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.pt2"
    torch.export.save(torch.export.export(Tiny().eval(), (CLIP,)), path)
    return path


@pytest.fixture(scope="module")
def artifact(program, tmp_path_factory):
    return build_network(program, tmp_path_factory.mktemp("artifact") / "tiny").artifact


def command(module, *arguments):
    """The exit code of a command that runs in this process."""
    with pytest.raises(SystemExit) as ended:
        start(module.app, "test", [str(argument) for argument in arguments])
    return ended.value.code


def refused(capsys, out, *arguments):
    """The one sentence of a build that is refused; nothing may be left at or beside ``out``."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    assert command(build, *arguments, "--out", out) == 2
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else []) == before
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    return told[0]


def test_a_built_program_gives_the_sources_numbers(artifact, tmp_path):
    np.savez(tmp_path / "x.npz", whatever=CLIP.numpy())  # a single input may have any name
    assert command(run, artifact.path, "--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz") == 0
    (found,) = np.load(tmp_path / "y.npz").values()
    np.testing.assert_array_equal(found, Tiny()(CLIP).detach().numpy())


def test_the_manifest_tells_what_was_built(artifact):
    manifest = artifact.manifest
    assert [tensor.shape for tensor in manifest.inputs] == [[1, 2, 4, 5, 6]]
    assert manifest.check.status == "passed"
    assert manifest.check.device == "local"
    assert manifest.macs == 3 * 2 * 27 * 4 * 5 * 6
    assert manifest.memory_peak_bytes >= 4 * (3 * 2 * 27 + 3 * 4 * 5 * 6)


def test_two_builds_are_identical(program, artifact, tmp_path):
    """The second in a process of its own, with another seed for hashing."""
    words = ["-m", "dance_tvm.build", "--model", str(program), "--out", str(tmp_path / "again")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, *words], check=True, env=environment, timeout=300, capture_output=True)
    names = sorted(path.name for path in artifact.path.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (artifact.path / name).read_bytes(), name


def test_a_build_is_kept_only_for_the_same_network_target_and_options(program, tmp_path):
    out = tmp_path / "out"
    first = build_network(program, out, check=False)
    before = (out / "model.so").stat().st_ino
    kept = build_network(program, out, check=False, reuse=True)
    assert kept.artifact == first.artifact
    assert "compile" not in kept.seconds
    assert (out / "model.so").stat().st_ino == before
    options = Options(conv="direct")
    for changed in ({"threads": 1}, {"target": "aarch64-linux"}, {"options": options}):
        again = build_network(program, out, check=False, reuse=True, **changed)
        assert "compile" in again.seconds, changed
    raw = (out / "model.so").read_bytes()
    (out / "model.so").write_bytes(raw[:-1])
    assert "compile" in build_network(program, out, check=False, reuse=True, options=options).seconds
    assert (out / "model.so").read_bytes() == raw


def test_weights_in_half_precision_are_told_allowed_for_and_not_kept_for_a_build_in_whole(program, tmp_path):
    halves = Options(weights_dtype="float16")
    built = build_network(program, tmp_path / "out", options=halves)
    check = built.artifact.manifest.check
    assert built.artifact.manifest.options["weights_dtype"] == "float16"
    assert (check.status, check.allowed) == ("passed", HALF_TOLERANCE)
    assert "compile" not in build_network(program, tmp_path / "out", options=halves, reuse=True).seconds
    whole = build_network(program, tmp_path / "out", options=Options(), reuse=True)
    assert "compile" in whole.seconds
    assert whole.artifact.manifest.check.allowed < HALF_TOLERANCE


@pytest.mark.parametrize("changed", [{"memory": "small"}, {"prepared": True}, {"static": True}])
def test_what_an_artifact_follows_from_is_told(changed, program):
    imported, host = import_model(program, check=False), load_target("host")
    usual = new_manifest(imported, host, Options()).options
    (name, value), *_ = changed.items()
    assert new_manifest(imported, host, Options(**changed)).options == usual | {name: str(value)}
    assert new_manifest(imported, host, Options(cache=False)).options == usual


class Gathering(nn.Module):
    """Operators of which TVM warns on standard error: gathering, also from the end, and scattering."""

    def forward(self, clip):
        last = clip[:, :, -1] + clip[:, [0, -1], 1] + clip.index_select(2, torch.tensor([2]))[:, :, 0]
        flat = clip.reshape(1, -1)
        counts = torch.zeros(1, 8).scatter_add(1, (flat > 0).long() * 7, flat)
        return last, counts


def test_a_build_tells_its_phases_and_nothing_else(tmp_path):
    torch.export.save(torch.export.export(Gathering(), (CLIP,)), tmp_path / "net.pt2")
    words = ["-m", "dance_tvm.build", "--model", str(tmp_path / "net.pt2"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("✓ ")] == []
    np.savez(tmp_path / "x.npz", CLIP.numpy())
    assert command(run, tmp_path / "out", "--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz") == 0
    for found, expected in zip(np.load(tmp_path / "y.npz").values(), Gathering()(CLIP), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())


def test_json_and_debug_dump(program, tmp_path, capsys):
    arguments = ["--model", program, "--out", tmp_path / "out", "--json", "--no-check", "--debug-dump", tmp_path / "ir"]
    assert command(build, *arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["manifest"]["check"] == load_artifact(tmp_path / "out").manifest.check.model_dump()
    assert facts["manifest"]["check"]["status"] == "not run"
    assert {"import", "compile"} <= set(facts["seconds"])
    dumps = {path.name for path in (tmp_path / "ir").iterdir()}
    assert {"imported.py", "planned.py", "reasons.txt"} < dumps
    assert len(dumps) > 4


def test_a_dump_that_options_ask_for_makes_its_folder(tmp_path):
    options = Options(debug_dump=tmp_path / "deep" / "ir")
    build_network(nn.Linear(4, 4), tmp_path / "out", example_inputs=(torch.zeros(1, 4),), options=options, check=False)
    assert {"imported.py", "planned.py"} < {path.name for path in (tmp_path / "deep" / "ir").iterdir()}


def test_a_name_of_the_zoo_with_trained_weights(tmp_path):
    from safetensors.torch import save_file

    network = models.create("c3d-mini", seed=3)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    built = build_network("c3d-mini", tmp_path / "out", weights=tmp_path / "w.safetensors")
    other = build_network("c3d-mini", tmp_path / "other", check=False)
    assert built.artifact.manifest.check.status == "passed"
    assert built.artifact.manifest.source_sha256 != other.artifact.manifest.source_sha256


@pytest.mark.parametrize("name", ["clip.pt2", "clip.onnx"])
def test_a_missing_model_file(capsys, tmp_path, name):
    assert f"{name}" in refused(capsys, tmp_path / "out", "--model", tmp_path / name)


@pytest.mark.parametrize("size", [0, 100, 0.5])
def test_a_truncated_model(capsys, tmp_path, program, size):
    raw = program.read_bytes()
    (tmp_path / "torn.pt2").write_bytes(raw[: int(size * len(raw)) if size < 1 else int(size)])
    assert "torn.pt2" in refused(capsys, tmp_path / "out", "--model", tmp_path / "torn.pt2")


@pytest.mark.parametrize("name", ["letter.pt2", "letter.onnx", "letter.txt"])
def test_a_foreign_file(capsys, tmp_path, name):
    (tmp_path / name).write_text("Dear compiler,\n" * 100)
    assert name in refused(capsys, tmp_path / "out", "--model", tmp_path / name)


class Bomb:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (self.witness,)


@pytest.mark.parametrize("as_option", ["--model", "--weights"])
def test_a_pickle_full_of_code_is_not_run(capsys, tmp_path, as_option):
    witness = tmp_path / "exploded"
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(str(witness))))
    torch.save({"conv": Bomb(str(witness))}, tmp_path / "bomb.pth")
    shutil.copy(tmp_path / "bomb.pth", tmp_path / "bomb.pt2")
    for name in ("bomb.pt", "bomb.pth", "bomb.pt2"):
        assert name in refused(capsys, tmp_path / "out", as_option, tmp_path / name)
    assert not witness.exists()


def test_an_unknown_name_suggests_the_nearest(capsys, tmp_path):
    assert "c3d-mini" in refused(capsys, tmp_path / "out", "--model", "c3d-mni")


def test_weights_that_do_not_fit(capsys, tmp_path):
    state = models.create("c3d-mini").state_dict()
    first = next(iter(state))
    state["stranger"] = state.pop(first)
    torch.save(state, tmp_path / "w.pt")
    told = refused(capsys, tmp_path / "out", "--model", "c3d-mini", "--weights", tmp_path / "w.pt")
    assert f"missing: {first}" in told
    assert "unexpected: stranger" in told


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "missing.pt", "."])
def test_weights_that_cannot_be_read(capsys, tmp_path, name):
    from safetensors.torch import save_file

    state = models.create("c3d-mini").state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "whole.pt")
    for suffix in ("safetensors", "pt"):
        raw = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"w.{suffix}").write_bytes(raw[: len(raw) // 2])
    told = refused(capsys, tmp_path / "out", "--model", "c3d-mini", "--weights", tmp_path / name)
    assert str(tmp_path / name) in told


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_an_unsupported_operator_is_named_with_its_layer(capsys, tmp_path):
    network = nn.Sequential(nn.Conv3d(2, 3, 1), nn.Sequential(nn.ReLU(), Bessel()))
    torch.export.save(torch.export.export(network, (CLIP,)), tmp_path / "odd.pt2")
    told = refused(capsys, tmp_path / "out", "--model", tmp_path / "odd.pt2")
    assert "bessel_j0" in told
    assert "'1.1'" in told


def test_dynamic_shapes_are_told(capsys, tmp_path):
    shapes = ({2: torch.export.Dim("frames", min=2, max=32)},)
    exported = torch.export.export(Tiny().eval(), (CLIP,), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "dynamic.pt2")
    assert "dynamic" in refused(capsys, tmp_path / "out", "--model", tmp_path / "dynamic.pt2")


def test_an_unknown_target(capsys, tmp_path, program):
    told = refused(capsys, tmp_path / "out", "--model", program, "--target", "snapdragn")
    assert "did you mean 'snapdragon'" in told


def test_a_place_that_cannot_be_written(capsys, tmp_path, program):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, tmp_path / "file" / "out", "--model", program)
    dump = ["--debug-dump", tmp_path / "file" / "ir"]
    assert "choose another --debug-dump" in refused(capsys, tmp_path / "out", "--model", program, *dump)


def test_a_folder_of_somebody_else(capsys, tmp_path, program):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("keep me")
    assert "is not an artifact" in refused(capsys, tmp_path / "out", "--model", program)
    assert (tmp_path / "out" / "letter").read_text() == "keep me"


def test_a_full_disk(capsys, tmp_path, program, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(linker, "link_shared", full)
    assert "no space left" in refused(capsys, tmp_path / "out", "--model", program)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(capsys, tmp_path, program):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        told = refused(capsys, disk / "out", "--model", program)
        assert "no space left" in told
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_linker(capsys, tmp_path, program, monkeypatch):
    find_spec = linker.importlib.util.find_spec
    monkeypatch.setattr(
        linker.importlib.util, "find_spec", lambda name, *rest: None if name == "ziglang" else find_spec(name, *rest)
    )
    assert "pip install ziglang" in refused(capsys, tmp_path / "out", "--model", program)


def test_a_build_that_differs_from_its_source_is_not_written(program, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "difference", lambda *_arrays: 1.0)
    with pytest.raises(DanceError, match="differs from its source"):
        build_network(program, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_artifact(tmp_path, number):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "dance_tvm.build", "--model", "c3d-mini", "--out", str(out)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    while process.poll() is None and not list(tmp_path.glob(".out.partial-*")):
        time.sleep(0.005)  # until the artifact is being written
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.stderr.read()
    assert process.wait(timeout=120) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert not out.exists()
    assert not psutil.wait_procs(family, timeout=30)[1]
    if number != signal.SIGKILL:
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((1, 2, 4, 5, 7), "float32")}, "float32 of shape (1, 2, 4, 5, 6), not float32 of shape"),
        ({"x": np.zeros((1, 2, 4, 5, 6), "float64")}, "not float64"),
        ({"x": np.zeros((1, 2, 4, 5, 6), "float32"), "y": np.zeros(1)}, "x, y"),
    ],
)
def test_inputs_that_do_not_fit(capsys, artifact, tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", **arrays)
    assert command(run, artifact.path, "--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"words", pickle.dumps([1])])
def test_inputs_that_are_no_arrays(capsys, artifact, tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    assert command(run, artifact.path, "--inputs", tmp_path / "x.npz") == 2
    assert "x.npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inputs", "nowhere.npz"], "no input file"),
        (["--outputs", "nowhere/y.npz"], "there is no folder nowhere"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_a_run_that_cannot_be(capsys, artifact, arguments, said):
    assert command(run, artifact.path, *arguments) == 2
    assert said in capsys.readouterr().err


def test_an_artifact_for_another_machine_is_not_run_here(capsys, program, tmp_path):
    other = "aarch64-linux" if os.uname().machine == "x86_64" else "snapdragon"
    built = build_network(program, tmp_path / "out", target=other, check=False)
    assert built.artifact.manifest.check.reason
    assert command(run, tmp_path / "out", "--device", "local") == 2
    assert "aarch64" in capsys.readouterr().err


@pytest.mark.device
def test_a_build_for_a_phone_is_checked_on_an_emulated_one(program, tmp_path):
    from dance_tvm.device import why_no_emulator

    if reason := why_no_emulator():
        pytest.skip(f"no emulated device: {reason}")
    manifest = build_network(program, tmp_path / "out", target="snapdragon", check=True).artifact.manifest
    assert (manifest.check.status, manifest.check.device) == ("passed", "emulator")
    assert manifest.check.difference == 0 or manifest.check.difference < manifest.check.allowed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"numerics": "Exact"}, "numerics is fast or exact, not 'Exact'"),
        ({"conv": "winogard"}, "conv is auto, direct or winograd"),
        ({"memory": "big"}, "memory is small, balanced or fast"),
        ({"dtype": "int8"}, "dtype is float32, float16 or auto"),
        ({"io": "float32"}, "io is source or float16"),
        ({"prepared": "no"}, "prepared is True or False"),
        ({"threads": 0}, "threads is how many"),
        ({"threads": 1.5}, "threads is how many"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    with pytest.raises(DanceError, match=said):
        Options(**options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threads": 0}, "threads is how many"),
        ({"options": {"conv": "direct"}}, "options must be of the class Options, not dict"),
        ({"options": Options(logs="no/such/logs")}, "no folder of tuning logs"),
        ({"options": Options(kernel_group=(3, 4))}, "kernel_group is filters and channels"),
        ({"options": Options(kernel_group=(16,))}, "kernel_group is filters and channels"),
        ({"preprocess": "preprocess.toml"}, "preprocess must be of the class Preprocess, not str"),
        ({"check_inputs": "clip.npz"}, "check_inputs is a list"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, said, program, tmp_path):
    with pytest.raises(DanceError, match=said):
        build_network(program, tmp_path / "out", check=False, **arguments)
    assert not (tmp_path / "out").exists()


def test_shapes_that_nothing_would_follow_are_refused(tmp_path):
    network, clip = torch.nn.Conv3d(1, 1, 1), torch.zeros(1, 1, 2, 2, 2)
    for given in ({"batch": 2}, {"shapes": {"input": (2, 1, 2, 2, 2)}}):
        with pytest.raises(DanceError, match="leave shapes and batch out"):
            import_model(network, example_inputs=(clip,), **given)
    with pytest.raises(DanceError, match="nothing open but its batch"):
        import_model("c3d-mini", shapes={"x": (1, 1, 16, 32, 32)})
    with pytest.raises(DanceError, match="leave batch out, or them"):
        import_model("c3d-mini", batch=2, example_inputs=(torch.zeros(1, 1, 16, 32, 32),))
