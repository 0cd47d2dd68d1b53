"""Run GPU kernels through OpenCL without TVM's OpenCL runtime, which its wheel leaves out.

TVM's passes make the source and the list of launches (:mod:`.launches`); pyopencl compiles and launches them. With PoCL
installed (the ``gpu`` extra) the device is this machine's processor, so that GPU kernels and whole lowered networks can
be checked, and tuned, where there is no GPU. Nothing here needs TVM.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from dance_tvm.artifact.gpu_launches import DeviceCode, Plan
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.gpu import is_pocl, opencl_devices, pyopencl, why_no_opencl

_HALF_PRAGMA = "#pragma OPENCL EXTENSION cl_khr_fp16 : enable"


class OpenCLSession:
    """One OpenCL device of this machine, the first unless ``name`` is part of another's name.

    ``emulate_half``: keep half precision in single where the device has none, rounding what every kernel stored.
    ``optimise``: let the device's compiler optimise. PoCL never does: it compiles several times as fast without, and
    with LLVM 15 its optimiser drops what follows a barrier under a condition, as plans of index lists have.
    Raises DanceError where pyopencl is not installed or there is no (such) device.
    """

    def __init__(self, name: str = "", optimise: bool = True, emulate_half: bool = False) -> None:
        self._cl = pyopencl()
        self._emulate_half = emulate_half
        devices = opencl_devices()
        fitting = [device for device in devices if name.lower() in device.name.lower()]
        if not fitting:
            known = ", ".join(device.name for device in devices)
            if known:
                raise DanceError(f"there is no OpenCL device {name!r} here; there is {known}")
            raise DanceError(f"there is no OpenCL device here: {why_no_opencl()}")
        self.device = fitting[0]
        self._options = [] if optimise and not is_pocl(self.device) else ["-cl-opt-disable"]
        self.name = self.device.name
        self.context = self._cl.Context([self.device])
        self.queue = self._cl.CommandQueue(self.context)

    @property
    def has_fp16(self) -> bool:
        """Whether kernels may compute with half precision."""
        return "cl_khr_fp16" in self.device.extensions

    @property
    def rounds(self) -> bool:
        """Whether half precision is emulated."""
        return self._emulate_half and not self.has_fp16

    def require(self, code: DeviceCode) -> None:
        """Raise DanceError where the device cannot run the code: half precision, threads of a block."""
        if "cl_khr_fp16" in code.source and not self.has_fp16 and not self._emulate_half:
            raise DanceError(f"{self.name} has no fp16 (cl_khr_fp16): build with --dtype float32")
        most = max((int(np.prod(each.block)) for plan in code.plans.values() for each in plan.launches), default=1)
        allowed = self.device.max_work_group_size
        if most > allowed:
            raise DanceError(f"{self.name} runs at most {allowed} threads per block, and a kernel needs {most}")

    def compile(self, code: DeviceCode) -> Any:
        """The device's program."""
        self.require(code)
        source, options = code.source, list(self._options)
        if self.rounds:
            source = source.replace("#ifdef cl_khr_fp16", "#if 1").replace(_HALF_PRAGMA, "")
            for lanes in ("", "2", "4", "8", "16"):
                options += [f"-Dhalf{lanes}=float{lanes}", f"-Dconvert_half{lanes}=convert_float{lanes}"]
        try:
            return self._cl.Program(self.context, source).build(options)
        except self._cl.RuntimeError as error:
            raise DanceError(f"{self.name} refuses the kernels: {str(error).splitlines()[0]}") from None

    def upload(self, array: np.ndarray) -> Any:
        """A buffer that holds ``array``."""
        flags = self._cl.mem_flags
        array = np.ascontiguousarray(array)
        return self._allocating(
            array.nbytes,
            lambda: (
                self._cl.Buffer(self.context, flags.READ_WRITE | flags.COPY_HOST_PTR, hostbuf=array)
                if array.nbytes
                else self._cl.Buffer(self.context, flags.READ_WRITE, 4)
            ),
        )

    def empty(self, size: int) -> Any:
        """A buffer of ``size`` bytes that were never written."""
        return self._allocating(
            size, lambda: self._cl.Buffer(self.context, self._cl.mem_flags.READ_WRITE, max(4, size))
        )

    def _allocating(self, size: int, make: Any) -> Any:
        try:
            return make()
        except (self._cl.MemoryError, self._cl.LogicError):
            raise DanceError(
                f"{self.name} is out of memory: {size / 2**20:.0f} MiB more than it gives one buffer or has left"
            ) from None

    def download(self, buffer: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """What a buffer holds."""
        array = np.empty(shape, dtype)
        if array.nbytes:
            self._cl.enqueue_copy(self.queue, array, buffer)
        return array

    def run(self, program: Any, plan: Plan, buffers: list[Any]) -> None:
        """Launch a function's kernels, one after the other."""
        workspaces = {name: self.empty(size) for name, size in plan.workspaces.items()}
        for launch in plan.launches:
            kernel = _kernel(program, launch.kernel)
            given = [workspaces[ref] if isinstance(ref, str) else buffers[ref] for ref in launch.arguments]
            total = tuple(blocks * threads for blocks, threads in zip(launch.grid, launch.block, strict=True))
            try:
                kernel(self.queue, total, launch.block, *given)
            except self._cl.MemoryError:
                raise DanceError(f"{self.name} is out of memory: the tensors of {launch.kernel} do not fit") from None

    def times(self, program: Any, plan: Plan, buffers: list[Any], repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` runs of a function, after one that warms up."""
        seconds = []
        for _ in range(1 + repeats):
            self.queue.finish()
            start = time.perf_counter()
            self.run(program, plan, buffers)
            self.queue.finish()
            seconds.append(time.perf_counter() - start)
        return seconds[1:]


def _kernel(program: Any, name: str) -> Any:
    """The kernel object of that name, kept: pyopencl makes a new one at each attribute access."""
    kept = program.__dict__.setdefault("_kept_kernels", {})
    if name not in kept:
        kept[name] = getattr(program, name)
    return kept[name]
