"""Link TVM's object files into a shared library, for any ELF target and without a system compiler or an NDK.

The linker is LLVM's lld out of the `ziglang` wheel. The same objects give the same bytes: no build id, no symbol
table with paths, no time stamps. With `TVM_NDK_CC` set, Android targets are linked by that compiler instead.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dance_tvm.errors import DanceError

LINK_TIMEOUT_S = 300

# Android 15 devices may use 16 KiB pages; a library aligned to them loads on 4 KiB systems too.
PAGE_SIZE = 16384

_EMULATION = {"x86_64": "elf_x86_64", "aarch64": "aarch64linux", "arm64": "aarch64linux"}

# A library must name whom it needs where the loader does not search already loaded libraries (Android does not).
# The compiled kernels call TVM's error function and libm; both names are those that the running system has loaded.
_NEEDED_ANDROID = ("libtvm_ffi.so", "libm.so", "libc.so")
_NEEDED_LINUX = ("libtvm_ffi.so", "libm.so.6", "libc.so.6")


def target_triple(target: Any) -> str:
    """The LLVM triple of the code that runs on the target's CPU: its `mtriple`, else this machine's.

    `target` is a `dance_tvm.target.Target`; for a GPU target the triple is that of its `host` part.
    """
    for part in (target.tvm, target.tvm.get("host"), getattr(target, "host", None)):
        if isinstance(part, dict) and part.get("mtriple"):
            return str(part["mtriple"])
    return host_triple()


def host_triple() -> str:
    """The triple of this machine."""
    return f"{platform.machine()}-linux-gnu"


def lld_command() -> list[str]:
    """The command that starts lld. Raises DanceError where the ziglang wheel is not installed."""
    if importlib.util.find_spec("ziglang") is None:
        raise DanceError("There is no linker: install the ziglang package with `pip install ziglang`.")
    return [sys.executable, "-m", "ziglang", "ld.lld"]


def link_shared(output: str | Path, objects: Sequence[str | Path], triple: str) -> None:
    """Link object files into the shared library `output` for `triple`, e.g. `aarch64-linux-android`.

    Raises DanceError where the architecture is unknown, no linker is there, or linking fails.
    """
    ndk = os.environ.get("TVM_NDK_CC")
    objects = [str(path) for path in objects]
    if ndk and "android" in triple:
        flags = ["-shared", "-fPIC", "-lm", "-s", "-Wl,--build-id=none", f"-Wl,-z,max-page-size={PAGE_SIZE}"]
        _run([*shlex.split(ndk), "-o", str(output), *objects, *flags], tool="TVM_NDK_CC")
        return
    with tempfile.TemporaryDirectory(prefix="dance_tvm_link_") as stubs:
        linker = [*lld_command(), "-m", _emulation(triple)]
        needed = _stub_libraries(linker, Path(stubs), _NEEDED_ANDROID if "android" in triple else _NEEDED_LINUX)
        flags = ["-shared", "--strip-all", "--build-id=none", "--hash-style=both", "-z", f"max-page-size={PAGE_SIZE}"]
        _run([*linker, *flags, "-o", str(output), *objects, *needed], tool="lld")


def shared_library_linker(target: Any):
    """An `fcompile` for TVM's `export_library` that links for `target` (a `dance_tvm.target.Target`)."""
    triple = target_triple(target)

    def link(output: str, objects: list[str] | str, options: Any = None, **_unused: Any) -> None:
        del options  # compiler flags of TVM's default fcompile: there is no compiler here
        link_shared(output, [objects] if isinstance(objects, str) else objects, triple)

    link.output_format = "so"  # type: ignore[attr-defined]
    link.object_format = "o"  # type: ignore[attr-defined]
    link.get_target_triple = lambda: triple  # type: ignore[attr-defined]
    return link


def _emulation(triple: str) -> str:
    machine = triple.split("-")[0]
    if machine not in _EMULATION:
        raise DanceError(f"Cannot link for {triple}: known architectures are {', '.join(sorted(_EMULATION))}.")
    return _EMULATION[machine]


def _stub_libraries(linker: list[str], folder: Path, names: Sequence[str]) -> list[str]:
    """Empty libraries that carry only a name, so that the linked library names them as needed."""
    nothing = folder / "nothing.ld"
    nothing.write_text("")
    paths = [str(folder / name) for name in names]
    for name, path in zip(names, paths, strict=True):
        _run([*linker, "-shared", "-soname", name, "-o", path, str(nothing)], tool="lld")
    return paths


def _run(command: list[str], tool: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LINK_TIMEOUT_S)
    except FileNotFoundError:
        raise DanceError(f"{tool} names a program that does not exist: {command[0]}.") from None
    except subprocess.TimeoutExpired:
        raise DanceError(f"Linking with {tool} did not end within {LINK_TIMEOUT_S} s.") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise DanceError(f"Linking with {tool} failed: {said[0] if said else f'exit code {done.returncode}'}.")
