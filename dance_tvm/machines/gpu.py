"""This machine's NVIDIA GPU, as its driver describes it, and the name of its OpenCL device."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from dance_tvm.core.errors import DanceError

#: fp32 multiply-adds a cycle of one multiprocessor, by compute capability (CUDA C++ programming guide).
_LANES = {
    50: 128, 52: 128, 53: 128, 60: 64, 61: 128, 62: 128, 70: 64, 72: 64, 75: 64,
    80: 64, 86: 128, 87: 128, 89: 128, 90: 128, 100: 128, 120: 128,
}  # fmt: skip

#: Numbers of CUdevice_attribute.
_ATTRIBUTES = {
    "block_threads": 1, "block_shared": 8, "warp": 10, "block_registers": 12, "khz": 13, "units": 16,
    "memory_khz": 36, "bus_bits": 37,
    "unit_threads": 39, "major": 75, "minor": 76, "shared": 81, "registers": 82,
}  # fmt: skip

#: The newest PTX version that a driver takes, by the CUDA version that it supports, newest first (PTX ISA).
PTX_OF_DRIVER = (
    ((11, 8), "7.8"), ((11, 7), "7.7"), ((11, 6), "7.6"), ((11, 5), "7.5"), ((11, 4), "7.4"), ((11, 3), "7.3"),
    ((11, 2), "7.2"), ((11, 1), "7.1"), ((11, 0), "7.0"), ((10, 2), "6.5"), ((10, 1), "6.4"), ((10, 0), "6.3"),
)  # fmt: skip


def driver_ptx(version: tuple[int, int]) -> str:
    """The newest PTX version, among those that the compiler here writes, that such a driver takes; empty if none."""
    return next((ptx for cuda, ptx in PTX_OF_DRIVER if version >= cuda), "")


def detect_cuda() -> dict[str, Any] | None:
    """Facts of the first GPU in the form of a target file (``tvm``, ``gpu``, memory); None where there is none."""
    library = _driver()
    if library is None:
        return None
    device, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    if library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), 0):
        return None
    library.cuDriverGetVersion(ctypes.byref(version))
    library.cuDeviceGetName(name, len(name), device)
    size = ctypes.c_size_t()
    library.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    facts = {}
    for key, number in _ATTRIBUTES.items():
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        facts[key] = value.value
    cuda = (version.value // 1000, version.value % 1000 // 10)
    return _described(facts, name.value.decode(), size.value, cuda)


def opencl_devices() -> list[Any]:
    """The OpenCL devices of this machine that can compile. Raises DanceError where pyopencl is not installed."""
    return [device for device in _all_opencl_devices() if not _is_unknown_to_pocl(device)]


def why_no_opencl() -> str:
    """What to do where ``opencl_devices`` finds none, as the end of a sentence."""
    if any(map(_is_unknown_to_pocl, _all_opencl_devices())):
        return "PoCL's wheel is older than this processor: sudo apt-get install pocl-opencl-icd"
    return "pip install 'dance-tvm[gpu]'"


def _all_opencl_devices() -> list[Any]:
    cl = pyopencl()
    try:
        return [device for platform in cl.get_platforms() for device in platform.get_devices()]
    except cl.LogicError:  # how pyopencl says that there is no platform
        return []


def is_pocl(device: Any) -> bool:
    """Whether this OpenCL device is a processor by PoCL."""
    return "PoCL" in device.version


def _is_unknown_to_pocl(device: Any) -> bool:
    """Whether this is an x86-64 processor newer than PoCL's LLVM, for which PoCL compiles nothing (its issue 1049)."""
    return is_pocl(device) and "x86_64" in device.version and device.version.endswith("-generic")


def opencl_library() -> str | None:
    """The OpenCL library that pyopencl brought along and opened; None where it is not installed: the system's own.

    It finds devices of the system, and PoCL's where that is installed (the ``gpu`` extra).
    """
    try:
        home = Path(pyopencl().__file__).parent
    except DanceError:
        return None
    return next(map(str, sorted(home.glob(".libs/libOpenCL*"))), None)


@lru_cache(maxsize=1)
def pyopencl() -> Any:
    """The module. Raises DanceError where it is not installed."""
    try:
        import pyopencl as module
    except ImportError:
        raise DanceError("there is no OpenCL here: pip install 'dance-tvm[gpu]'") from None
    return module


def detect_opencl() -> dict[str, Any] | None:
    """The first OpenCL device's name in the form of a target file; None where there is none.

    Its limits are left out: code for the target ``opencl`` keeps within those that all devices have.
    """
    try:
        devices = opencl_devices()
    except DanceError:
        return None
    return {"gpu": {"name": devices[0].name}} if devices else None


def _described(facts: dict[str, int], name: str, memory: int, cuda: tuple[int, int]) -> dict[str, Any]:
    capability = facts["major"] * 10 + facts["minor"]
    known = max((each for each in _LANES if each <= capability), default=50)
    of_unit = (
        "units",
        "warp",
        "unit_threads",
        "block_threads",
        "registers",
        "block_registers",
        "shared",
        "block_shared",
    )
    return {
        "tvm": {"kind": "cuda", "arch": f"sm_{capability}"},
        "gpu": {
            **{key: facts[key] for key in of_unit},
            "name": name,
            "lanes": _LANES[known],
            "max_ghz": round(facts["khz"] / 1e6, 4),
            "fp16": capability >= 53,
            "ptx": driver_ptx(cuda),
            "driver": f"CUDA {cuda[0]}.{cuda[1]}",
        },
        "memory_gib": round(memory / 2**30, 1),
        # Double data rate: two transfers a cycle of the memory's clock.
        "memory_gb_per_s": round(2 * facts["memory_khz"] * facts["bus_bits"] / 8e6, 1) or 1.0,
    }


def _driver() -> ctypes.CDLL | None:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
