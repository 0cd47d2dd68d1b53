"""Artifacts: whole or absent, reproducible, and refused by name for any flipped byte."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest
import tvm
from tvm import relax

from dance_tvm.artifact import folder as artifacts
from dance_tvm.artifact import staging
from dance_tvm.artifact.folder import BuiltFor, Check, Manifest, Tensor, load_artifact, write_artifact
from dance_tvm.artifact.linker import shared_library_linker
from dance_tvm.core.errors import DanceError
from dance_tvm.device import open_device
from dance_tvm.machines.target import load_target

FILES = ["manifest.json", "model.so", "reference.safetensors", "weights.safetensors"]
WEIGHT = np.arange(6, dtype="float32").reshape(2, 3)


def adder():
    """main(x, weight) = x + weight."""
    builder = relax.BlockBuilder()
    kind = relax.TensorType((2, 3), "float32")
    x, weight = relax.Var("x", kind), relax.Var("weight", kind)
    with builder.function("main", [x, weight]):
        builder.emit_func_output(builder.emit(relax.op.add(x, weight)))
    return relax.build(builder.get(), load_target("host").tvm_target(1))


def manifest(**changed):
    target = load_target("host")
    tensor = {"shape": [2, 3], "dtype": "float32", "meaning": ""}
    facts = {
        "name": "adder",
        "source_sha256": "0" * 64,
        "inputs": [Tensor(name="x", **tensor)],
        "outputs": [Tensor(name="y", **tensor)],
        "target": BuiltFor(
            name="host",
            machine=target.link.machine,
            tuning_log="",
            fingerprint="",
            tvm=target.tvm,
            host=None,
            threads=1,
        ),
        "versions": {name: artifacts.version(name) for name in artifacts.RUNTIME_VERSIONS},
        "memory_peak_bytes": 24,
        "check": Check(status="not run"),
    }
    return Manifest(**{**facts, **changed})


def write(out, check=None, **changed):
    linker = shared_library_linker(load_target("host"))
    executable = adder()
    return write_artifact(
        out,
        lambda path: executable.export_library(str(path), fcompile=linker),
        {"weight": WEIGHT},
        manifest(**changed),
        check,
        {"output:y": WEIGHT},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("artifact") / "adder").path


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def test_a_loaded_artifact_runs(whole):
    loaded = load_artifact(whole)
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(loaded.library)), tvm.cpu())
    x = np.full((2, 3), 10, "float32")
    arguments = [tvm.runtime.tensor(array) for array in [x, *loaded.weights()]]
    np.testing.assert_array_equal(machine["main"](*arguments).numpy(), x + WEIGHT)


def test_two_writes_give_the_same_bytes(whole, tmp_path):
    again = write(tmp_path / "again").path
    assert sorted(path.name for path in again.iterdir()) == FILES
    for name in FILES:
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_refused_by_the_name_of_its_file(copy, name):
    path = copy / name
    original = path.read_bytes()
    positions = range(len(original)) if name == "manifest.json" else range(0, len(original), len(original) // 40)
    for position in [*positions, len(original) - 1]:
        damaged = bytearray(original)
        damaged[position] ^= 0x20  # in JSON this turns a letter's case or a space, which a parser may forgive
        path.write_bytes(damaged)
        with pytest.raises(DanceError, match=name):
            load_artifact(copy)
    path.write_bytes(original)
    load_artifact(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_torn_file_is_refused_by_its_name(copy, name):
    raw = (copy / name).read_bytes()
    (copy / name).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DanceError, match=name):
        load_artifact(copy)
    (copy / name).unlink()
    with pytest.raises(DanceError, match=name):
        load_artifact(copy)


@pytest.mark.parametrize("change", ["written to", "replaced", "removed"])
def test_files_that_change_after_they_were_verified_are_refused(copy, change):
    artifact, path = load_artifact(copy), copy / "weights.safetensors"
    artifact.require_unchanged()
    if change == "written to":
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        os.utime(path, ns=(0, 0))  # whatever the clock's steps
    elif change == "replaced":
        shutil.copy2(path, copy / "new")
        (copy / "new").rename(path)
    else:
        path.unlink()
    with open_device("local") as device, pytest.raises(DanceError, match="safetensors was changed after"):
        device.load(artifact)


def test_a_folder_that_is_no_artifact_is_told(tmp_path):
    with pytest.raises(DanceError, match="not an artifact"):
        load_artifact(tmp_path)
    with pytest.raises(DanceError, match=r"there is no artifact .*none: `dance-tvm build` writes one"):
        load_artifact(tmp_path / "none")
    (tmp_path / "letter").write_text("Dear device,")
    with pytest.raises(DanceError, match="letter is a file: an artifact is the folder"):
        load_artifact(tmp_path / "letter")


def test_another_schema_is_told_as_such(copy):
    facts = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**facts, "schema_version": 99, "novelty": 1}))
    with pytest.raises(DanceError, match="schema version 99"):
        load_artifact(copy)


def test_a_file_outside_of_the_folder_is_refused(copy):
    facts = json.loads((copy / "manifest.json").read_text())
    facts["files"]["../../etc/hostname"] = facts["files"]["model.so"]
    artifacts._write_manifest(copy, Manifest.model_validate(facts))
    with pytest.raises(DanceError, match="which is not a file name"):
        load_artifact(copy)


def test_another_version_of_the_runtime_is_refused(tmp_path):
    versions = {**manifest().versions, "apache-tvm": "0.26.0"}
    with pytest.raises(DanceError, match=r"apache-tvm 0\.26\.0"):
        write(tmp_path / "old", versions=versions)


def test_a_library_of_another_architecture_is_refused_before_it_is_mapped(whole, copy):
    raw = bytearray((copy / "model.so").read_bytes())
    raw[18:20] = (243).to_bytes(2, "little")  # RISC-V
    (copy / "model.so").write_bytes(raw)
    facts = load_artifact(whole).manifest
    files = {**facts.files, "model.so": artifacts._describe(copy / "model.so")}
    artifacts._write_manifest(copy, facts.model_copy(update={"files": files}))
    with pytest.raises(DanceError, match="ELF machine 243"):
        load_artifact(copy)


def test_a_device_of_another_architecture_is_told(whole):
    with pytest.raises(DanceError, match="riscv64"):
        load_artifact(whole).require_machine("riscv64")


def test_missing_instructions_are_told_before_they_trap(tmp_path):
    target = manifest().target.model_copy(update={"cpu_features": ["avx10_9"]})
    loaded = write(tmp_path / "new", target=target)
    with pytest.raises(DanceError, match="avx10_9"):
        loaded.require_this_machine()


def test_the_result_of_the_check_is_written(tmp_path):
    passed = Check(status="passed", device="local", difference=0.0, allowed=1e-4)
    write(tmp_path / "checked", check=lambda artifact: passed)
    assert load_artifact(tmp_path / "checked").manifest.check == passed


@pytest.mark.parametrize("error", [DanceError("differs"), KeyboardInterrupt(), RuntimeError("broken")])
def test_a_failed_check_leaves_what_was_there(tmp_path, error):
    out = tmp_path / "out"
    before = write(out).manifest

    def fail(_artifact):
        raise error

    with pytest.raises(type(error)):
        write(out, check=fail, name="another")
    assert load_artifact(out).manifest == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_build_left_is_swept_by_the_next(tmp_path):
    dead = tmp_path / ".out.partial-999999999-x"
    ours = tmp_path / f".out.partial-{os.getpid()}-y"
    dead.mkdir()
    ours.mkdir()
    write(tmp_path / "out")
    assert not dead.exists()
    assert ours.exists()  # of a build that still runs


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DanceError, match="is not an artifact"):
        write(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_else_stands_in_an_artifact_is_not_taken_away(tmp_path):
    out = tmp_path / "out"
    write(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DanceError, match=r"has notes\.txt beside its artifact"):
        write(out, name="another")
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(DanceError, match="is a file, and an artifact is a folder"):
        write(out / "notes.txt")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DanceError, match="cannot be written"):
        write(tmp_path / "file" / "out")
    with pytest.raises(DanceError, match="cannot be written"):
        staging.require_writable("/proc/out")


def test_asking_for_a_place_leaves_nothing_there(tmp_path):
    staging.require_writable(tmp_path / "new" / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    def full(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DanceError, match="no space left"):
        write_artifact(tmp_path / "out", full, {}, manifest())
    assert not list(tmp_path.iterdir())
