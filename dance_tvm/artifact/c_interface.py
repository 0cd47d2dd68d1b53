"""The C interface of an artifact: ``main`` as a table, a small runtime, and the header, compiled into ``model.so``.

`dance_model.h` says how the library is used and docs/c-interface.md what is promised. The compiler is zig's (clang with
headers for every architecture), so that artifacts are built for phones and boards without an NDK or a cross compiler.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dance_tvm.artifact.linker import run_compiler, target_triple
from dance_tvm.artifact.weight_store import Store
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.host import needed_flags
from dance_tvm.machines.target import Target

if TYPE_CHECKING:  # packing needs only the sources' place, not TVM
    from dance_tvm.artifact.c_program import Names, Program

INTERFACE = Path(__file__).with_name("interface")
HEADER = INTERFACE / "dance_model.h"
_RUNTIME = ("processor", "threads", "digest", "prepare", "weights", "work", "runtime", "tvm")
#: What runs the steps, by the target's kind.
_STEPS = {"llvm": ("processor_steps",), "opencl": ("gpu_steps", "opencl"), "cuda": ("gpu_steps", "cuda")}
COMPILE_TIMEOUT_S = 300

_PROGRAM, _STORE, _GPU_CODE = "program.c", "store.bin", "gpu_code.txt"
#: Extensions of instruction sets that the runtime's own loops gain from, as the target file and the compiler name them.
_FEATURES = ("avx2", "f16c")


class Cache(Protocol):
    """Object files of earlier builds, by a hash of all that they follow from."""

    def read(self, key: str) -> bytes | None:
        """The object file, if it is there."""

    def write(self, key: str, code: bytes) -> None:
        """Keep it."""


def compile_interface(
    program: Program, store: Store, names: Names, target: Target, folder: Path, cache: Cache | None = None
) -> list[str]:
    """Object files in ``folder`` that give a library with the program's kernels the interface of `dance_model.h`.

    What ``cache`` holds is taken from there. Raises DanceError where the compiler is missing or fails.
    """
    parts = [f"{name}.c" for name in (*_RUNTIME, *_STEPS[target.tvm["kind"]])]
    for part in parts:
        (folder / part).write_bytes((INTERFACE / part).read_bytes())
    included = {"dance_store": _STORE, **({"dance_gpu_code": _GPU_CODE} if program.gpu else {})}
    data = "".join(_included(*each) for each in included.items())
    (folder / _PROGRAM).write_text(program.source(names, store) + data)
    (folder / _STORE).write_bytes(b"".join(store.data) if not store.names and store.size else b"\0")
    (folder / _GPU_CODE).write_bytes(program.gpu.source.encode() + b"\0" if program.gpu else b"")
    flags = _flags(target)
    sources = [*parts, _PROGRAM]
    _compile(sources, flags, folder, cache)
    return [str(folder / Path(source).with_suffix(".o")) for source in sources]


def _included(symbol: str, file: str) -> str:
    """C that gives the bytes of a file a name."""
    return f"""
__asm__(
    "    .section .rodata\\n    .balign 64\\n    .hidden {symbol}\\n    .globl {symbol}\\n"
    "{symbol}:\\n    .incbin \\"{file}\\"\\n    .previous\\n");
"""


def _flags(target: Target) -> list[str]:
    machine = target_triple(target).partition("-")[0]
    flags = ["-O2", "-fPIC", "-std=c11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-fno-stack-protector", "-g0"]
    flags.append("-ffp-contract=off")  # prepared weights are equal to the bit with schedules/preparation.py
    needed = needed_flags(target.tvm_target(1))
    return ["-target", f"{machine}-linux-musl", *flags, *(f"-m{each}" for each in _FEATURES if each in needed)]


def _compile(sources: Sequence[str], flags: list[str], folder: Path, cache: Cache | None) -> None:
    """Object files beside the sources."""
    for source in sources:
        key, made = _key(folder / source, flags), (folder / source).with_suffix(".o")
        code = cache.read(key) if cache is not None else None
        if code is not None:
            made.write_bytes(code)
            continue
        _run_compiler(source, flags, folder)
        if cache is not None:
            cache.write(key, made.read_bytes())


def _key(source: Path, flags: list[str]) -> str:
    """A hash of all that the object file follows from."""
    included = (_STORE, _GPU_CODE) if source.name == _PROGRAM else ()
    parts = [source.read_bytes(), *((source.parent / name).read_bytes() for name in included)]
    hashed = hashlib.sha256("\0".join([_rules_sha256(), source.name, *flags]).encode())
    for part in parts:
        hashed.update(hashlib.sha256(part).digest())
    return hashed.hexdigest()


@lru_cache(maxsize=1)
def _rules_sha256() -> str:
    """Of the headers, this file and the compiler's version."""
    hashed = hashlib.sha256(version("ziglang").encode())
    for header in [*sorted(INTERFACE.glob("*.h")), Path(__file__)]:
        hashed.update(hashlib.sha256(header.read_bytes()).digest())
    return hashed.hexdigest()


def _run_compiler(source: str, flags: list[str], folder: Path) -> None:
    """Paths are left out of what it writes, so that equal sources give equal bytes."""
    try:
        done = run_compiler([*flags, f"-I{INTERFACE}", "-I.", "-c", source], COMPILE_TIMEOUT_S, folder)
    except subprocess.TimeoutExpired:
        raise DanceError(f"compiling the C interface did not end within {COMPILE_TIMEOUT_S} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise DanceError(f"the C interface cannot be compiled ({said[0] if said else 'no reason given'})")
