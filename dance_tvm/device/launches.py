"""The device side of a module: its source, and how each of its functions launches its kernels.

The kernels are lowered by TVM's own passes up to OpenCL C (or CUDA C++) and its list of launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.target import Target
from tvm.tirx.build import codegen_build, split_host_device_mods

from dance_tvm.artifact.gpu_launches import DeviceCode, Launch, Plan, Ref
from dance_tvm.core.errors import DanceError
from dance_tvm.schedules.geometry import triple

#: Where a data pointer and the device lie in TVM's packed arguments (`tvm_struct_get`'s field numbers).
_ARGUMENT_HANDLE = 15


def device_code(mod: tvm.IRModule, target: Target) -> DeviceCode:
    """Lower every PrimFunc of ``mod`` for a GPU target; raises DanceError for one that has no GPU schedule."""
    functions = {name.name_hint: func for name, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
    named = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    module = tirx.transform.BindTarget(target)(tvm.IRModule(named))
    pipeline, _, finalize_device = tirx.get_default_tir_pipeline(target)
    with target:
        host, devices = split_host_device_mods(pipeline(module))
    sources = [codegen_build(finalize_device()(device), kind).inspect_source("") for kind, device in devices.items()]
    plans = {name.name_hint: _plan_of(func) for name, func in host.functions_items()}
    for name, plan in plans.items():
        if not plan.launches:
            raise DanceError(f"{name} has no GPU schedule: it launches no kernel on {target.kind.name}")
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
        raise DanceError(f"kernel {call.args[0].value} takes a value that is not a buffer: it cannot be launched here")
    grid, block = (triple(sizes.get(f"{index}.{axis}", 1) for axis in "xyz") for index in ("blockIdx", "threadIdx"))
    return Launch(str(call.args[0].value), arguments, grid, block)


def _statements(node: Any) -> Iterator[Any]:
    """The statements of a host function in order; bodies of conditions are TVM's checks of its arguments."""
    if isinstance(node, tirx.SeqStmt):
        for each in node.seq:
            yield from _statements(each)
        return
    yield node
    if isinstance(node, tirx.AttrStmt):
        yield from _statements(node.body)


def opencl_target() -> Target:
    """TVM's target for OpenCL C that any device takes; the host side is never run."""
    return Target({"kind": "opencl", "host": {"kind": "llvm"}})
