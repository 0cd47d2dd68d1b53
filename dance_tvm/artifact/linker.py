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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dance_tvm.artifact.interface.dance_model import seal_of
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.target import Target

LINK_TIMEOUT_S = 300

# Android 15 devices may use 16 KiB pages; a library aligned to them loads on 4 KiB systems too.
PAGE_SIZE = 16384

_EMULATION = {"x86_64": "elf_x86_64", "aarch64": "aarch64linux", "arm64": "aarch64linux"}


def target_triple(target: Target) -> str:
    """The LLVM triple of the code that runs on the target's CPU: its `mtriple`, else this machine's.

    For a GPU target the triple is that of its `host` part.
    """
    for part in (target.tvm, target.tvm.get("host"), target.host):
        if isinstance(part, dict) and part.get("mtriple"):
            return str(part["mtriple"])
    return host_triple()


def host_triple() -> str:
    """The triple of this machine."""
    return f"{platform.machine()}-linux-gnu"


def zig_command() -> list[str]:
    """The command that starts zig. Raises DanceError where the ziglang wheel is not installed."""
    if importlib.util.find_spec("ziglang") is None:
        raise DanceError("there is no linker: install the ziglang package with `pip install ziglang`")
    return [sys.executable, "-m", "ziglang"]


def run_compiler(words: Sequence[str], timeout: float, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What zig's C compiler says to ``words`` in ``folder``; raises as ``zig_command`` does.

    What it keeps lies in a folder of its own, since a home may be missing or read-only; our cache has the objects.
    """
    with tempfile.TemporaryDirectory(prefix="dance_tvm_zig_") as kept:
        return subprocess.run(
            [*zig_command(), "cc", *words],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=folder,
            env={"ZIG_GLOBAL_CACHE_DIR": kept, **os.environ},
        )


def lld_command() -> list[str]:
    """The command that starts lld; raises as ``zig_command`` does."""
    return [*zig_command(), "ld.lld"]


def link_shared(
    output: str | Path,
    objects: Sequence[str | Path],
    triple: str,
    needed: Sequence[str] = (),
    page_size: int = PAGE_SIZE,
    entry: str = "",
) -> None:
    """Link object files into the shared library `output` for `triple`, e.g. `aarch64-linux-android`.

    `needed` are the sonames that the device's loader must bring in (DT_NEEDED); `page_size` is in bytes; `entry` is the
    symbol that a program begins at.
    Raises DanceError where the architecture is unknown, no linker is there, or linking fails.
    """
    ndk = os.environ.get("TVM_NDK_CC")
    inputs = [str(path) for path in objects]
    if ndk and "android" in triple:
        flags = ["-shared", "-fPIC", "-lm", "-s", "-Wl,--build-id=none", f"-Wl,-z,max-page-size={page_size}"]
        flags += ["-nostartfiles", f"-Wl,-e,{entry}"] if entry else []
        _run([*shlex.split(ndk), "-o", str(output), *inputs, *flags], tool="TVM_NDK_CC")
        return
    with tempfile.TemporaryDirectory(prefix="dance_tvm_link_") as folder:
        linker = [*lld_command(), "-m", _emulation(triple)]
        stubs = _stub_libraries(linker, Path(folder), needed)
        flags = ["-shared", "--strip-all", "--build-id=none", "--hash-style=both", "-z", f"max-page-size={page_size}"]
        flags += ["-e", entry] if entry else []
        _run([*linker, *flags, "-o", str(output), *inputs, *stubs], tool="lld")


@dataclass(frozen=True)
class SharedLibraryLinker:
    """An `fcompile` for TVM's `export_library` that links for `target` by its `link` facts, `kernels` with the rest."""

    target: Target
    kernels: tuple[str, ...] = ()
    output_format: ClassVar = "so"
    object_format: ClassVar = "o"

    def get_target_triple(self) -> str:
        """The LLVM triple that TVM compiles what it adds itself for."""
        return target_triple(self.target)

    def __call__(self, output: str, objects: list[str] | str, options: Any = None, **_unused: Any) -> None:
        del options  # compiler flags of TVM's default fcompile: there is no compiler here
        inputs = [objects] if isinstance(objects, str) else objects
        link = self.target.link
        link_shared(output, [*inputs, *self.kernels], self.get_target_triple(), link.needed, link.page_size)


def shared_library_linker(target: Target, kernels: Sequence[str] = ()) -> SharedLibraryLinker:
    """What links for `target`, to be given to `export_library`; `kernels` are object files beside TVM's."""
    return SharedLibraryLinker(target, tuple(kernels))


def link_program(output: str | Path, objects: Sequence[str | Path], target: Target) -> None:
    """Link a program that needs no TVM into the shared library `output`, and seal it.

    Android wants its libc by name, and a GPU's driver is opened by a library that is part of libc in newer systems.
    """
    triple = target_triple(target)
    is_android = "android" in triple
    others = [name for name in target.link.needed if name != "libtvm_ffi.so"]
    loader = ["libdl.so" if is_android else "libdl.so.2"] if target.gpu else []
    needed = [*(["libc.so"] if is_android else []), *loader, *others]
    link_shared(output, objects, triple, needed, target.link.page_size)
    seal(output)


def seal(library: str | Path) -> None:
    """End a library with a checksum of what it holds, by which `dance_model.h` and `dance_model.py` verify it before
    they load it. The system's loader passes over what no header of the library names."""
    with Path(library).open("r+b") as stream:
        stream.write(seal_of(stream.read()))


def join_objects(output: str | Path, objects: Sequence[str | Path], names: Mapping[str, str], triple: str) -> None:
    """Join object files for `triple` into the object file `output`; `names` are further ones for symbols, name: symbol.

    Raises as linking does.
    """
    script = Path(output).with_suffix(".ld")
    script.write_text("".join(f'"{name}" = "{symbol}";\n' for name, symbol in names.items()), encoding="utf-8")
    flags = ["-m", _emulation(triple), "-r", "-o", str(output)]
    _run([*lld_command(), *flags, *map(str, objects), str(script)], tool="lld")


def archive(output: str | Path, objects: Sequence[str | Path]) -> None:
    """Pack object files into the static library `output`, without times and owners; raises as linking does."""
    _run([*zig_command(), "ar", "rcsD", str(output), *map(str, objects)], tool="zig ar")


def _emulation(triple: str) -> str:
    machine = triple.split("-")[0]
    if machine not in _EMULATION:
        raise DanceError(f"cannot link for {triple}: known architectures are {', '.join(sorted(_EMULATION))}")
    return _EMULATION[machine]


def _stub_libraries(linker: list[str], folder: Path, names: Sequence[str]) -> list[str]:
    """Empty libraries that carry only a name: linked against, they become DT_NEEDED entries.

    Android's loader looks for symbols only in the named libraries, never in those already loaded.
    """
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
        raise DanceError(f"{tool} names a program that does not exist: {command[0]}") from None
    except subprocess.TimeoutExpired:
        raise DanceError(f"linking with {tool} did not end within {LINK_TIMEOUT_S} s") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise DanceError(f"linking with {tool} failed: {said[0] if said else f'exit code {done.returncode}'}")
