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
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.target import Target

INTERFACE = Path(__file__).with_name("interface")
HEADER = INTERFACE / "dance_model.h"
COMPILE_TIMEOUT_S = 300

_CONSTANTS = """
    .section .rodata
    .balign 64
    .hidden dance_constants
    .globl dance_constants
dance_constants:
    .incbin "constants.bin"
    .section .note.GNU-stack, "", %progbits
"""


def compile_interface(program: Program, names: Names, target: Target, folder: Path) -> list[str]:
    """Object files in ``folder`` that give a library with the program's kernels the interface of `dance_model.h`.

    Raises DanceError where the compiler is missing or fails.
    """
    (folder / "program.c").write_text(program.source(names))
    (folder / "constants.h").write_text(
        'extern const unsigned char dance_constants[] __attribute__((visibility("hidden")));\n'
    )
    (folder / "constants.bin").write_bytes(bytes(program.constants) or b"\0")
    (folder / "constants.S").write_text(_CONSTANTS)
    return [
        _compiled(folder / "program.c", target),
        _compiled(folder / "constants.S", target),
        _runtime(target, folder),
    ]


def _runtime(target: Target, folder: Path) -> str:
    return _compiled(INTERFACE / "runtime.c", target, folder / "runtime.o")


def _compiled(source: Path, target: Target, output: Path | None = None) -> str:
    """The object file of ``source``; paths are left out of it, so that equal sources give equal bytes."""
    output = output or source.with_suffix(".o")
    machine = target_triple(target).partition("-")[0]
    flags = ["-O2", "-fPIC", "-std=c11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-fno-stack-protector", "-g0"]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-musl", *flags]
    try:
        done = subprocess.run(
            [*command, f"-I{INTERFACE}", f"-I{source.parent}", "-c", source.name, "-o", str(output.resolve())],
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            cwd=source.parent,
        )
    except subprocess.TimeoutExpired:
        raise DanceError(f"compiling the C interface did not end within {COMPILE_TIMEOUT_S} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise DanceError(f"the C interface cannot be compiled ({said[0] if said else 'no reason given'})")
    return str(output)
