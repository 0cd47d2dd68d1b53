"""The linker: names it needs, same bytes twice, honest failures, and libraries that load."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from dance_tvm import linker
from dance_tvm.errors import DanceError


@I.ir_module
class Exponential:
    @R.function
    def main(x: R.Tensor((2, 3), "float32")) -> R.Tensor((2, 3), "float32"):
        with R.dataflow():
            y = R.exp(x)
            R.output(y)
        return y


def target_for(triple: str) -> SimpleNamespace:
    return SimpleNamespace(tvm={"kind": "llvm", "mtriple": triple}, host=None)


def export(path: Path, triple: str) -> Path:
    executable = tvm.compile(Exponential, tvm.target.Target({"kind": "llvm", "mtriple": triple}))
    executable.export_library(str(path), fcompile=linker.shared_library_linker(target_for(triple)))
    return path


@pytest.mark.parametrize(
    "triple, machine, needed",
    [
        ("x86_64-linux-gnu", 62, [b"libtvm_ffi.so\0", b"libm.so.6\0"]),
        ("aarch64-linux-gnu", 183, [b"libtvm_ffi.so\0", b"libm.so.6\0"]),
        ("aarch64-linux-android", 183, [b"libtvm_ffi.so\0", b"libm.so\0", b"libc.so\0"]),
    ],
)
def test_links_for_each_architecture_and_names_its_needs(tmp_path, triple, machine, needed):
    data = export(tmp_path / "model.so", triple).read_bytes()
    assert data[:4] == b"\x7fELF"
    assert int.from_bytes(data[18:20], "little") == machine
    for name in needed:
        assert name in data
    assert b"GLIBC_" not in data


def test_two_links_give_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    first = export(tmp_path / "a" / "model.so", "aarch64-linux-gnu")
    second = export(tmp_path / "elsewhere" / "other.so", "aarch64-linux-gnu")
    assert first.read_bytes() == second.read_bytes()


def test_host_library_loads_and_computes_without_any_compiler(tmp_path):
    """Linked in a process whose PATH is empty, so no cc, ld or objdump can help."""
    library = tmp_path / "model.so"
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_linker as t, pathlib; t.export(pathlib.Path({str(library)!r}), t.linker.host_triple())"
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
    export(tmp_path / "b.so", "aarch64-linux-gnu")
    assert not log.exists()


def test_failures_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(DanceError, match="Cannot link for riscv64-linux-gnu"):
        linker.link_shared(tmp_path / "a.so", [], "riscv64-linux-gnu")
    with pytest.raises(DanceError, match="lld failed: .*missing.o"):
        linker.link_shared(tmp_path / "a.so", [tmp_path / "missing.o"], "x86_64-linux-gnu")
    monkeypatch.setenv("TVM_NDK_CC", str(tmp_path / "no-clang"))
    with pytest.raises(DanceError, match="TVM_NDK_CC names a program that does not exist"):
        linker.link_shared(tmp_path / "a.so", [], "aarch64-linux-android")
    monkeypatch.delenv("TVM_NDK_CC")
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DanceError, match="pip install ziglang"):
        linker.link_shared(tmp_path / "a.so", [], "x86_64-linux-gnu")
