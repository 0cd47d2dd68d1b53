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

from dance_tvm.artifact.linker import target_triple, zig_command
from dance_tvm.artifact.weight_store import Store
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.host import needed_flags
from dance_tvm.machines.target import Target

if TYPE_CHECKING:  # packing needs the sources' place alone, and no TVM
    from dance_tvm.artifact.c_program import Names, Program

INTERFACE = Path(__file__).with_name("interface")
HEADER = INTERFACE / "dance_model.h"
RUNTIME = tuple(
    INTERFACE / f"{name}.c" for name in ("processor", "threads", "digest", "prepare", "weights", "runtime", "tvm")
)
COMPILE_TIMEOUT_S = 300

_PROGRAM, _STORE = "program.c", "store.bin"
_INLINE_STORE = f"""
__asm__(
    "    .section .rodata\\n    .balign 64\\n    .hidden dance_store\\n    .globl dance_store\\n"
    "dance_store:\\n    .incbin \\"{_STORE}\\"\\n    .previous\\n");
"""
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
    for part in RUNTIME:
        (folder / part.name).write_bytes(part.read_bytes())
    (folder / _PROGRAM).write_text(program.source(names, store) + _INLINE_STORE)
    (folder / _STORE).write_bytes(b"".join(store.data) if not store.names and store.size else b"\0")
    flags = _flags(target)
    sources = [*(part.name for part in RUNTIME), _PROGRAM]
    _compile(sources, flags, folder, cache)
    return [str(folder / Path(source).with_suffix(".o")) for source in sources]


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
    parts = [source.read_bytes(), (source.parent / _STORE).read_bytes() if source.name == _PROGRAM else b""]
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
    command = [*zig_command(), "cc", *flags]
    try:
        done = subprocess.run(
            [*command, f"-I{INTERFACE}", "-I.", "-c", source],
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            cwd=folder,
        )
    except subprocess.TimeoutExpired:
        raise DanceError(f"compiling the C interface did not end within {COMPILE_TIMEOUT_S} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise DanceError(f"the C interface cannot be compiled ({said[0] if said else 'no reason given'})")
