"""Compile a GPU's code when the artifact is built, not when it is loaded.

TVM makes CUDA source. Boards such as the Jetson Nano have
no compiler that could, so NVRTC (the ``gpu`` extra) compiles it here to PTX, as old a version as the board's driver
needs, and ptxas checks it for the board's architecture. OpenCL has no such form: its source travels, and the phone's
driver compiles it when the artifact is loaded.
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tvm

from dance_tvm.artifact.folder import DeviceCode
from dance_tvm.artifact.linker import target_triple
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.target import Target

PTXAS_TIMEOUT_S = 300
_WHEELS = "pip install 'dance-tvm[gpu]' (nvidia-cuda-nvrtc-cu11 and nvidia-cuda-nvcc-cu11)"

#: The headers that TVM's CUDA source asks NVRTC for, with what kernels here use of them.
_HEADERS = {
    "math_constants.h": """#pragma once
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000ULL)
#define CUDART_NAN __longlong_as_double(0xfff8000000000000ULL)
""",
    "cuda/std/cstdint": """#pragma once
namespace cuda { namespace std {
using int8_t = signed char; using int16_t = short; using int32_t = int; using int64_t = long long;
using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned int;
using uint64_t = unsigned long long;
} }
""",
    "cuda/std/type_traits": """#pragma once
namespace cuda { namespace std {
template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <class T> struct is_integral;
template <class T> struct is_signed;
template <class T> struct is_unsigned;
template <class T> struct is_floating_point;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
} }
""",
}


@dataclass(frozen=True)
class KernelFacts:
    """What ptxas says of one kernel: registers a thread, bytes of shared memory a block, bytes spilled."""

    name: str
    registers: int
    shared: int
    spills: int


def described(code: str, target: Target) -> DeviceCode:
    """What the manifest says of the ``code`` of a GPU."""
    assert target.gpu is not None
    if target.tvm["kind"] != "cuda":
        note = f"compiled by the device's driver when a model is created ({target.gpu.driver})"
        return DeviceCode(format="opencl", architecture="any", version="", note=note)
    note = "checked by ptxas" if _ptxas() else "not checked: the nvidia-cuda-nvcc-cu11 wheel is not installed"
    arch = str(target.tvm["arch"])
    return DeviceCode(format="ptx", architecture=arch, version=_version(code), note=f"{note}; the driver assembles it")


def ptx_for(source: str, target: Target) -> str:
    """PTX of CUDA source in a version that the target's driver takes, checked by ptxas where that is installed.

    Raises DanceError where there is no compiler, or where the code cannot be had in that version.
    """
    assert target.gpu is not None
    arch = str(target.tvm["arch"])
    ptx = compile_ptx(source, arch, target.gpu.ptx)
    if _ptxas() is not None:
        assemble(ptx, arch)
    return ptx


def embed_ptx(executable: Any, target: Target) -> dict[str, Any]:
    """Of a CUDA target: arguments for TVM's ``export_library`` that put PTX in the place of CUDA source."""
    if target.tvm["kind"] != "cuda":
        return {}
    return {"fpack_imports": _packer(ptx_for(cuda_source(executable.mod), target), target_triple(target))}


def cuda_source(module: Any) -> str:
    """The CUDA source of all device modules under ``module``."""
    return "\n".join(each.inspect_source("cuda") for each in _under(module) if each.kind == "cuda")


def _under(module: Any) -> Iterator[Any]:
    for each in module.imports:
        yield each
        yield from _under(each)


# -- compiling --------------------------------------------------------------------------------------------------------


def compile_ptx(source: str, arch: str, newest: str = "") -> str:
    """PTX of CUDA source for ``sm_53`` and the like, its version lowered to ``newest`` where it is newer.

    Raises DanceError where NVRTC is not installed or refuses the source.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(_HEADERS))(*(name.encode() for name in _HEADERS))
    texts = (ctypes.c_char_p * len(_HEADERS))(*(text.encode() for text in _HEADERS.values()))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", len(_HEADERS), texts, names)
    try:
        options = [b"-std=c++17", b"-default-device", f"--gpu-architecture={arch.replace('sm_', 'compute_')}".encode()]
        if "cuda_fp16.h" in source:
            options.append(f"-I{_half_header().parent}".encode())
        if nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            said = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).strip().splitlines()
            raise DanceError(f"NVRTC cannot compile for {arch}: {said[0] if said else 'it does not say why'}")
        ptx = _read(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if newest and _number(_version(ptx)) > _number(newest):
        # Nothing newer is used by these kernels; ptxas refuses what is.
        ptx = re.sub(r"^\.version .*$", f".version {newest}", ptx, count=1, flags=re.MULTILINE)
    return ptx


def assemble(ptx: str, arch: str) -> list[KernelFacts]:
    """Let ptxas assemble ``ptx`` for ``arch`` and say what each kernel takes.

    Raises DanceError where the nvcc wheel is not installed or ptxas refuses the code.
    """
    tool = _ptxas()
    if tool is None:
        raise DanceError(f"there is no ptxas: {_WHEELS}")
    with tempfile.TemporaryDirectory(prefix="dance_tvm_ptx_") as folder:
        path = Path(folder) / "kernels.ptx"
        path.write_text(ptx)
        command = [str(tool), f"-arch={arch}", "-v", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PTXAS_TIMEOUT_S, check=False)
    if done.returncode:
        raise DanceError(f"ptxas refuses the code for {arch}: {(done.stderr or done.stdout).strip().splitlines()[0]}")
    return list(_facts(done.stderr + done.stdout))


def _facts(said: str) -> Iterator[KernelFacts]:
    blocks = re.split(r"Compiling entry function '", said)[1:]
    for block in blocks:
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", block))
        name = block.partition("'")[0]
        yield KernelFacts(name, int(registers[1]) if registers else 0, int(shared[1]) if shared else 0, spills)


def _version(ptx: str) -> str:
    found = re.search(r"^\.version (\S+)", ptx, re.MULTILINE)
    return found[1] if found else ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _read(size_of: Any, copy: Any, program: Any) -> str:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    copy(program, text)
    return text.value.decode()


def _wheel_file(package: str, pattern: str) -> Path | None:
    """A file of one of NVIDIA's wheels, which share the namespace package ``nvidia``."""
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or []:
        found = sorted((Path(folder) / package).glob(pattern))
        if found:
            return found[0]
    return None


def _nvrtc() -> ctypes.CDLL:
    path = _wheel_file("cuda_nvrtc", "lib/libnvrtc.so.*")
    if path is None:
        raise DanceError(f"there is no CUDA compiler: {_WHEELS}")
    return ctypes.CDLL(str(path))


def _half_header() -> Path:
    path = _wheel_file("cuda_runtime", "include/cuda_fp16.h")
    if path is None:
        raise DanceError("half precision needs CUDA's header cuda_fp16.h: pip install nvidia-cuda-runtime-cu11")
    return path


def _ptxas() -> Path | None:
    return _wheel_file("cuda_nvcc", "bin/ptxas")


# -- packing ----------------------------------------------------------------------------------------------------------


def _packer(ptx: str, triple: str) -> Callable[[Any, bool, str, str], str]:
    """TVM's ``fpack_imports``: the imported modules in one object file, CUDA source replaced by ``ptx``."""

    def pack(module: Any, system_lib: bool, prefix: str, workspace: str) -> str:
        packed = bytes(tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy())
        target = json.dumps({"kind": "llvm", "mtriple": triple})
        blob = tvm.get_global_func("codegen.codegen_blob")
        path = Path(workspace) / f"{prefix}devc.o"
        blob(replace_cuda(packed, ptx), system_lib, target, prefix).write_to_file(str(path))
        return str(path)

    return pack


def replace_cuda(packed: bytes, ptx: str) -> bytes:
    """The packed imports of a library with PTX in the place of CUDA source.

    The form is TVM's: a length, the tree of imports as two lists, then name and bytes of each module; those of a CUDA
    module are a format, a table of kernels, and the code.
    """
    body = packed[8:]
    at = 0
    for _ in range(2):
        (count,) = struct.unpack_from("<Q", body, at)
        at += 8 + 8 * count
    parts = [body[:at]]
    while at < len(body):
        name, at = _text(body, at)
        parts.append(_written(name))
        if name == b"_lib":
            continue
        content, at = _text(body, at)
        parts.append(_written(_with_ptx(content, ptx) if name == b"cuda" else content))
    new = b"".join(parts)
    return struct.pack("<Q", len(new)) + new


def _with_ptx(content: bytes, ptx: str) -> bytes:
    form, start = _text(content, 0)
    if form != b"cuda":
        raise DanceError(
            f"the device code is {form.decode(errors='replace')} and not CUDA source: it cannot be replaced"
        )
    code = next(end for end in _code_starts(content, start))
    return _written(b"ptx") + content[start:code] + _written(ptx.encode())


def _code_starts(content: bytes, start: int) -> Iterator[int]:
    """Where a length stands that reaches exactly to the end: the code is what comes last."""
    for at in range(start, len(content) - 8):
        if struct.unpack_from("<Q", content, at)[0] == len(content) - at - 8:
            yield at


def _text(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + size], at + 8 + size


def _written(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
