"""`dance_server`, the device server that needs no TVM: compiled for a target, here, with zig only.

One set of objects for plain headers, linked as a shared library with an entry of its own (`server/start.c`): neither an
NDK nor a system's libraries are at hand. It needs Android, or glibc of 2.17 or newer. Its protocol is described in
`server/server.h`.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

from dance_tvm.artifact.c_interface import INTERFACE
from dance_tvm.artifact.linker import link_shared, run_compiler, target_triple
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.target import Target

NAME = "dance_server"
SOURCES = Path(__file__).with_name("server")
COMPILE_TIMEOUT_S = 300
_FLAGS = ("-O2", "-fPIC", "-std=c11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-fno-stack-protector", "-g0")
_LOADERS = {"aarch64": "/lib/ld-linux-aarch64.so.1", "x86_64": "/lib64/ld-linux-x86-64.so.2"}
_ANDROID_LOADER = "/system/bin/linker64"
#: Artifacts for Linux find libm and pthread in the program that loads them.
_LIBRARIES = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0")
_ANDROID_LIBRARIES = ("libc.so", "libm.so", "libdl.so")


def build_server(target: Target, folder: Path) -> Path:
    """Write `dance_server` for the target's processor into `folder`, and give its path.

    Raises DanceError where the compiler is missing or fails, or the folder cannot be written.
    """
    out, triple = folder / NAME, target_triple(target)
    machine, is_android = triple.partition("-")[0], "android" in triple
    if machine not in _LOADERS:
        raise DanceError(f"{NAME} is made for {' and '.join(_LOADERS)}, not for {machine}")
    loader = _ANDROID_LOADER if is_android else _LOADERS[machine]
    flags = ["-target", f"{machine}-linux-musl", *_FLAGS, f"-I{INTERFACE}", f'-DLOADER="{loader}"']
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="dance_tvm_server_") as name:
            objects = [_compiled(source, flags, Path(name)) for source in sorted(SOURCES.glob("*.c"))]
            link_shared(out, objects, triple, _ANDROID_LIBRARIES if is_android else _LIBRARIES, entry="_start")
        out.chmod(0o755)
    except OSError as error:
        raise DanceError(f"{out} cannot be written: {error.strerror or error}") from None
    return out


def kept_server(target: Target, folder: Path) -> Path:
    """`dance_server` as `build_server` makes it, in ``folder`` under a name that follows from its sources: it is made
    once."""
    sources = [*sorted(SOURCES.iterdir()), *sorted(INTERFACE.glob("*.h")), Path(__file__)]
    hashed = hashlib.sha256(f"{target_triple(target)} {version('ziglang')}".encode())
    for source in filter(Path.is_file, sources):
        hashed.update(hashlib.sha256(source.read_bytes()).digest())
    kept = folder / f"{NAME}-{hashed.hexdigest()[:12]}"
    if not kept.exists():
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder) as made:
            build_server(target, Path(made)).replace(kept)
    return kept


def _compiled(source: Path, flags: list[str], folder: Path) -> Path:
    out = folder / f"{source.stem}.o"
    try:
        done = run_compiler([*flags, "-c", str(source), "-o", str(out)], COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DanceError(f"compiling {NAME} did not end within {COMPILE_TIMEOUT_S} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise DanceError(f"{NAME} cannot be compiled ({said[0] if said else 'no reason given'})")
    return out
