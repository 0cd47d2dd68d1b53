"""Functions and whole lowered networks on an OpenCL device: the graph is walked here, the kernels run there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax, tirx

from dance_tvm.core.errors import DanceError
from dance_tvm.device.launches import device_code, opencl_target
from dance_tvm.device.opencl import OpenCLSession

if TYPE_CHECKING:
    from dance_tvm.lowering.lowered import Lowered


def run_function(
    session: OpenCLSession, func: tirx.PrimFunc, inputs: list[np.ndarray], outputs: list[np.ndarray]
) -> list[np.ndarray]:
    """Run one PrimFunc: its arguments in order, outputs last; they start with what ``outputs`` hold."""
    code = device_code(tvm.IRModule({"main": func}), opencl_target())
    buffers = [session.upload(array) for array in [*inputs, *outputs]]
    session.run(session.compile(code), code.plans["main"], buffers)
    found = buffers[len(inputs) :]
    return [
        session.download(buffer, array.shape, str(array.dtype)) for buffer, array in zip(found, outputs, strict=True)
    ]


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

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs in order, for inputs in the order of the network's parameters."""
        given = [self._value(array) for array in inputs] + self._weights
        values: dict[Any, Any] = dict(zip(self.main.params, given, strict=True))
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
        raise DanceError(f"the network holds {name or type(value).__name__}, which is not a kernel: it cannot run here")

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
