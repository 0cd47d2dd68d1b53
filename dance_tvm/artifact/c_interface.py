"""The C interface of an artifact: ``main`` as a table, a small runtime, and the header, compiled into ``model.so``.

`dance_model.h` says how the library is used and docs/c-interface.md what is promised. The compiler is zig's (clang with
headers for every architecture), so that artifacts are built for phones and boards without an NDK or a cross compiler.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dance_tvm.artifact.c_program import Names, Program
from dance_tvm.artifact.linker import target_triple
from dance_tvm.artifact.weight_store import Store
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.host import needed_flags
from dance_tvm.machines.target import Target

INTERFACE = Path(__file__).with_name("interface")
HEADER = INTERFACE / "dance_model.h"
RUNTIME = tuple(INTERFACE / f"{name}.c" for name in ("threads", "digest", "prepare", "weights", "runtime", "tvm"))
COMPILE_TIMEOUT_S = 300

_STORE = """
    .section .rodata
    .balign 64
    .hidden dance_store
    .globl dance_store
dance_store:
    .incbin "store.bin"
    .section .note.GNU-stack, "", %progbits
"""
#: Extensions of instruction sets that the runtime's own loops gain from, as the target file and the compiler name them.
_FEATURES = ("avx2", "f16c")


def compile_interface(program: Program, store: Store, names: Names, target: Target, folder: Path) -> list[str]:
    """Object files in ``folder`` that give a library with the program's kernels the interface of `dance_model.h`.

    Raises DanceError where the compiler is missing or fails.
    """
    for part in RUNTIME:
        (folder / part.name).write_bytes(part.read_bytes())
    (folder / "program.c").write_text(program.source(names, store))
    inline = not store.names
    (folder / "store.bin").write_bytes(b"".join(store.data) if inline and store.size else b"\0")
    (folder / "store.S").write_text(_STORE)
    sources = [*(part.name for part in RUNTIME), "program.c", "store.S"]
    flags = _flags(target)
    for source in sources:
        _compile(source, flags, folder)
    return [str(folder / Path(source).with_suffix(".o")) for source in sources]


def _flags(target: Target) -> list[str]:
    machine = target_triple(target).partition("-")[0]
    flags = ["-O2", "-fPIC", "-std=c11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-fno-stack-protector", "-g0"]
    flags.append("-ffp-contract=off")  # prepared weights are equal to the bit with schedules/preparation.py
    needed = needed_flags(target.tvm_target(1))
    return ["-target", f"{machine}-linux-musl", *flags, *(f"-m{each}" for each in _FEATURES if each in needed)]


def _compile(source: str, flags: list[str], folder: Path) -> None:
    """The object file beside the source; paths are left out of it, so that equal sources give equal bytes."""
    command = [sys.executable, "-m", "ziglang", "cc", *flags]
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
