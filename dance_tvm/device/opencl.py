"""Run GPU kernels through OpenCL without TVM's OpenCL runtime, which its wheel leaves out.

The kernels are compiled by TVM's own passes up to OpenCL C and its list of launches; pyopencl compiles and launches
them. With PoCL installed (the ``gpu`` extra) the device is this machine's processor, so that GPU kernels and whole
lowered networks can be checked where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.target import Target
from tvm.tirx.build import codegen_build, split_host_device_mods

from dance_tvm.errors import DanceError

if TYPE_CHECKING:
    from dance_tvm.transform.pipeline import Lowered

#: Where a data pointer and the device lie in TVM's packed arguments (`tvm_struct_get`'s field numbers).
_ARGUMENT_HANDLE = 15

_HALF_PRAGMA = "#pragma OPENCL EXTENSION cl_khr_fp16 : enable"

Ref = int | str  # an argument by its place, or a workspace by its name


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what it is given, how many blocks on each axis, how many threads a block."""

    kernel: str
    arguments: tuple[Ref, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


@dataclass
class Plan:
    """How one function runs: its launches in order, and bytes of the workspaces that it takes."""

    launches: list[Launch] = field(default_factory=list)
    workspaces: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceCode:
    """The device side of a module: OpenCL C (or another device language) and a plan for each function."""

    source: str
    plans: dict[str, Plan]


def device_code(mod: tvm.IRModule, target: Target) -> DeviceCode:
    """Lower every PrimFunc of ``mod`` for a GPU target; raises DanceError for one that has no GPU schedule."""
    functions = {name.name_hint: func for name, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
    named = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    module = tirx.transform.BindTarget(target)(tvm.IRModule(named))
    pipeline, _, finalize_device = tirx.get_default_tir_pipeline(target)
    try:
        with target:
            lowered = pipeline(module)
    except Exception as error:  # TVM's verifier says which function touches device memory on the host
        raise DanceError(
            f"a function cannot be lowered for {target.kind.name}: {str(error).splitlines()[-1]}"
        ) from None
    host, devices = split_host_device_mods(lowered)
    sources = [codegen_build(finalize_device()(device), kind).inspect_source("") for kind, device in devices.items()]
    plans = {name.name_hint: _plan_of(func) for name, func in host.functions_items()}
    return DeviceCode("\n".join(sources), plans)


def _plan_of(func: tirx.PrimFunc) -> Plan:
    """Read the launches off a host function."""
    plan = Plan()
    known: dict[Any, Ref | None] = {}
    packed = func.params[1]

    def resolve(expression: Any) -> Ref | None:
        """The argument or workspace that an expression leads to."""
        if isinstance(expression, tvm.ir.Var):
            return known.get(expression)
        if not isinstance(expression, tvm.ir.Call):
            return None
        name = getattr(expression.op, "name", "")
        args = list(expression.args)
        if name == "tirx.tvm_struct_get" and args[0].same_as(packed) and int(args[2]) == _ARGUMENT_HANDLE:
            return int(args[1])
        return next((found for found in map(resolve, args) if found is not None), None)

    for statement in _statements(func.body):
        if isinstance(statement, tirx.Bind):
            known[statement.var] = resolve(statement.value)
        elif isinstance(statement, tirx.DeclBuffer):
            known[statement.buffer] = resolve(statement.data)
        elif isinstance(statement, tirx.AllocBuffer):
            buffer = statement.buffer
            name = f"workspace {len(plan.workspaces)}"
            elements = int(np.prod([int(extent) for extent in buffer.shape]))
            plan.workspaces[name] = elements * np.dtype(str(buffer.dtype)).itemsize
            known[buffer] = name
        elif isinstance(statement, tirx.Evaluate):
            call = statement.value
            if getattr(getattr(call, "op", None), "name", "") == "tirx.call_ffi_kernel":
                plan.launches.append(_launch_of(call, resolve))
    return plan


def _launch_of(call: Any, resolve: Any) -> Launch:
    tags = [str(tag) for tag in call.attrs.launch_params]
    values = list(call.args)[1:]
    data, extents = values[: len(values) - len(tags)], values[len(values) - len(tags) :]
    sizes = {tag: int(extent) for tag, extent in zip(tags, extents, strict=True)}
    arguments = tuple(resolve(value) for value in data)
    if None in arguments:
        raise DanceError(f"kernel {call.args[0].value} takes a value that is no buffer: it cannot be launched here")
    axes = ("x", "y", "z")
    return Launch(
        str(call.args[0].value),
        arguments,  # type: ignore[arg-type]
        tuple(sizes.get(f"blockIdx.{axis}", 1) for axis in axes),  # type: ignore[arg-type]
        tuple(sizes.get(f"threadIdx.{axis}", 1) for axis in axes),  # type: ignore[arg-type]
    )


def _statements(node: Any) -> Iterator[Any]:
    """The statements of a host function in order; bodies of conditions are TVM's checks of its arguments."""
    if isinstance(node, tirx.SeqStmt):
        for each in node.seq:
            yield from _statements(each)
        return
    yield node
    if isinstance(node, tirx.AttrStmt):
        yield from _statements(node.body)


class OpenCLSession:
    """One OpenCL device of this machine, the first unless ``name`` is part of another's name.

    ``emulate_half``: keep half precision in single where the device has none, rounding what every kernel stored.
    ``optimise``: let the device's compiler optimise; without, PoCL compiles several times as fast and runs slower.
    Raises DanceError where pyopencl is not installed or there is no (such) device.
    """

    def __init__(self, name: str = "", optimise: bool = True, emulate_half: bool = False) -> None:
        self._cl = _pyopencl()
        self._emulate_half = emulate_half
        self._options = [] if optimise else ["-cl-opt-disable"]
        devices = [device for platform in self._platforms() for device in platform.get_devices()]
        fitting = [device for device in devices if name.lower() in device.name.lower()]
        if not fitting:
            known = ", ".join(device.name for device in devices) or "none"
            raise DanceError(f"there is no OpenCL device {name!r} here (found: {known}): pip install 'dance-tvm[gpu]'")
        self.device = fitting[0]
        self.name = self.device.name
        self.context = self._cl.Context([self.device])
        self.queue = self._cl.CommandQueue(self.context)

    def _platforms(self) -> list[Any]:
        try:
            return self._cl.get_platforms()
        except self._cl.LogicError:  # how pyopencl says that there is none
            return []

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
        if most > self.device.max_work_group_size:
            raise DanceError(
                f"{self.name} runs at most {self.device.max_work_group_size} threads a block and a kernel needs {most}"
            )

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
            kernel(self.queue, total, launch.block, *given)

    def call(self, func: tirx.PrimFunc, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> list[np.ndarray]:
        """Run one PrimFunc: its arguments in order, outputs last; they start with what ``outputs`` hold."""
        code = device_code(tvm.IRModule({"main": func}), opencl_target())
        buffers = [self.upload(array) for array in [*inputs, *outputs]]
        self.run(self.compile(code), code.plans["main"], buffers)
        found = buffers[len(inputs) :]
        return [
            self.download(buffer, array.shape, str(array.dtype)) for buffer, array in zip(found, outputs, strict=True)
        ]


def opencl_target() -> Target:
    """TVM's target for OpenCL C that any device takes; the host side is never run."""
    return Target({"kind": "opencl", "host": {"kind": "llvm"}})


@lru_cache(maxsize=1)
def _pyopencl() -> Any:
    try:
        import pyopencl
    except ImportError:
        raise DanceError("there is no OpenCL here: pip install 'dance-tvm[gpu]'") from None
    return pyopencl


def _kernel(program: Any, name: str) -> Any:
    """The kernel object of that name, kept: pyopencl makes a new one at each attribute access."""
    kept = program.__dict__.setdefault("_kept_kernels", {})
    if name not in kept:
        kept[name] = getattr(program, name)
    return kept[name]


@dataclass
class _Value:
    """A tensor on the device."""

    buffer: Any
    shape: tuple[int, ...]
    dtype: str


class OpenCLNetwork:
    """A lowered network on an OpenCL device: its Relax function is walked here, its kernels run there.

    Raises DanceError for a function that holds anything but calls of kernels.
    """

    def __init__(self, session: OpenCLSession, lowered: Lowered, name: str = "main") -> None:
        self.session = session
        self.main = lowered.mod[name]
        code = device_code(lowered.mod, opencl_target())
        self._plans = code.plans
        self._program = session.compile(code)
        self._weights = [self._value(array) for array in lowered.weights.values()]
        self._constants: dict[int, _Value] = {}

    def run(self, inputs: list[np.ndarray] | Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in order, for inputs in the order of the network's parameters (or by their names)."""
        values: dict[Any, Any] = {}
        params = list(self.main.params)
        if isinstance(inputs, Mapping):
            inputs = list(inputs.values())
        given = [self._value(array) for array in inputs] + self._weights
        values.update(zip(params, given, strict=True))
        body = self.main.body
        for block in body.blocks:
            for binding in block.bindings:
                values[binding.var] = self._evaluate(binding.value, values)
        result = self._evaluate(body.body, values)
        flat = result if isinstance(result, list) else [result]
        return [self.session.download(each.buffer, each.shape, each.dtype) for each in flat]

    def _value(self, array: np.ndarray) -> _Value:
        held = array.astype("float32") if self.session.rounds and array.dtype == np.float16 else array
        return _Value(self.session.upload(held), array.shape, str(array.dtype))

    def _evaluate(self, value: Any, values: dict[Any, Any]) -> Any:
        if isinstance(value, relax.Var):
            return values[value]
        if isinstance(value, relax.Tuple):
            return [self._evaluate(field, values) for field in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._evaluate(value.tuple_value, values)[value.index]
        if isinstance(value, tvm.ir.GenericConst):
            key = hash(value)
            if key not in self._constants:
                self._constants[key] = self._value(value.value.numpy())
            return self._constants[key]
        name = getattr(getattr(value, "op", None), "name", "")
        if name == "relax.call_tir":
            return self._call(value, values)
        raise DanceError(f"the network holds {name or type(value).__name__}, which is no kernel: it cannot run here")

    def _call(self, call: Any, values: dict[Any, Any]) -> Any:
        given = self._evaluate(call.args[1], values)
        types = call.ty_args[0]
        several = isinstance(types, relax.TupleType)
        made = []
        for each in types.fields if several else [types]:
            shape = tuple(int(extent) for extent in each.shape)
            dtype = str(each.dtype)
            size = int(np.prod(shape)) * np.dtype(self._held_as(dtype)).itemsize
            made.append(_Value(self.session.empty(size), shape, dtype))
        self.session.run(self._program, self._plans[call.args[0].name_hint], [v.buffer for v in [*given, *made]])
        for each in made:
            self._round(each)
        return made if several else made[0]

    def _held_as(self, dtype: str) -> str:
        return "float32" if self.session.rounds and dtype == "float16" else dtype

    def _round(self, value: _Value) -> None:
        """Where half precision is emulated: what a store would have kept."""
        if self._held_as(value.dtype) != value.dtype:
            exact = self.session.download(value.buffer, value.shape, "float32")
            value.buffer = self.session.upload(exact.astype("float16").astype("float32"))
