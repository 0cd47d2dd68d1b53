"""The linker: names it needs, same bytes twice, honest failures, and libraries that load."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from dance_tvm.artifact import linker
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.target import load_target


def exponential() -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.exp(x)))
    return builder.get()


def export(path: Path, target_name: str) -> Path:
    target = load_target(target_name)
    executable = tvm.compile(exponential(), target.tvm_target())
    executable.export_library(str(path), fcompile=linker.shared_library_linker(target))
    return path


@pytest.mark.parametrize("target_name", ["aarch64-linux", "snapdragon"])
def test_links_for_the_target_and_names_its_needs(tmp_path, target_name):
    data = export(tmp_path / "model.so", target_name).read_bytes()
    assert data[:4] == b"\x7fELF"
    assert int.from_bytes(data[18:20], "little") == 183  # EM_AARCH64
    needed = load_target(target_name).link.needed
    assert needed
    for name in needed:
        assert name.encode() + b"\0" in data
    assert b"GLIBC_" not in data


def test_two_links_give_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    first = export(tmp_path / "a" / "model.so", "aarch64-linux")
    second = export(tmp_path / "elsewhere" / "other.so", "aarch64-linux")
    assert first.read_bytes() == second.read_bytes()


def test_host_library_loads_and_computes_without_any_compiler(tmp_path):
    """Linked in a process whose PATH is empty, so no cc, ld or objdump can help."""
    library = tmp_path / "model.so"
    script = (
        f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_linker as t; "
        f"t.export(pathlib.Path({str(library)!r}), 'host')"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    x = np.array([[0, 1, 2], [3, 4, 5]], "float32")
    np.testing.assert_allclose(machine["main"](tvm.runtime.tensor(x)).numpy(), np.exp(x), rtol=1e-6)


def test_ndk_compiler_is_honoured_for_android_only(tmp_path, monkeypatch):
    log = tmp_path / "called"
    compiler = tmp_path / "clang"
    compiler.write_text(f'#!/bin/sh\necho "$@" > {log}\nwhile [ "$1" != -o ]; do shift; done\necho made > "$2"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("TVM_NDK_CC", str(compiler))
    linker.link_shared(tmp_path / "a.so", [tmp_path / "x.o"], "aarch64-linux-android")
    assert (tmp_path / "a.so").read_text() == "made\n"
    assert "-shared" in log.read_text()
    log.unlink()
    export(tmp_path / "b.so", "aarch64-linux")
    assert not log.exists()


def test_failures_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(DanceError, match="cannot link for riscv64-linux-gnu"):
        linker.link_shared(tmp_path / "a.so", [], "riscv64-linux-gnu")
    with pytest.raises(DanceError, match=r"lld failed: .*missing\.o"):
        linker.link_shared(tmp_path / "a.so", [tmp_path / "missing.o"], "x86_64-linux-gnu")
    monkeypatch.setenv("TVM_NDK_CC", str(tmp_path / "no-clang"))
    with pytest.raises(DanceError, match="TVM_NDK_CC names a program that does not exist"):
        linker.link_shared(tmp_path / "a.so", [], "aarch64-linux-android")
    monkeypatch.delenv("TVM_NDK_CC")
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DanceError, match="pip install ziglang"):
        linker.link_shared(tmp_path / "a.so", [], "x86_64-linux-gnu")


def test_the_c_compiler_needs_no_home(tmp_path, monkeypatch):
    (tmp_path / "home").touch()
    (tmp_path / "one.c").write_text("int one(void) { return 1; }\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", "ZIG_GLOBAL_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    done = linker.run_compiler(["-target", "aarch64-linux-musl", "-c", "one.c"], 60, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["home", "one.c", "one.o"]
