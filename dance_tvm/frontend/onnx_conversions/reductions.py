"""Operators of ONNX that reduce axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.frontend.onnx_conversions.operator import Conversion, Operator, dtype_of, shape_of


def _axes(op: Operator) -> list[int] | None:
    """The axes that a reduction is over; None where it leaves its input as it is."""
    rank, axes = len(shape_of(op.input(0))), op.known(1, "axes")
    if axes is not None and axes.size:
        return [int(axis) % rank for axis in axes.flat]
    return None if op.flag("noop_with_empty_axes") else list(range(rank))


def _reduction(
    reduce: Callable[..., Any],
    of_nothing: float,
    before: Callable[[Operator, Any], Any] = lambda op, x: x,
    after: Callable[[Operator, Any], Any] = lambda op, x: x,
) -> Conversion:
    """A reduction of ``before(x)``, then ``after``; ``of_nothing`` is what it makes of no elements."""

    def convert(op: Operator) -> Any:
        x, axes = op.input(0), _axes(op)
        dtype, shape = dtype_of(x), shape_of(x)
        if axes is None:
            return after(op, before(op, x))
        if 0 in (shape[axis] for axis in axes):
            left = [1 if at in axes else n for at, n in enumerate(shape) if op.flag("keepdims", 1) or at not in axes]
            return op.constant(np.full(left, of_nothing, dtype))
        if dtype == "bool":
            x = op.emit(relax.op.astype(x, "int8"))
        found = before(op, x)
        found = after(op, op.emit(reduce(found, axes, bool(op.flag("keepdims", 1))))) if axes else after(op, found)
        return relax.op.astype(op.emit(found), dtype) if dtype == "bool" else found

    return convert


def _log_sum_exp(op: Operator) -> Any:
    x, axes, emit = op.input(0), _axes(op), op.emit
    if axes is None:
        return x
    if 0 in (shape_of(x)[axis] for axis in axes):
        return _reduction(relax.op.sum, -np.inf)(op)
    top = emit(relax.op.max(x, axes, True))
    top = emit(relax.op.where(emit(relax.op.isinf(top)), op.like(0.0, x), top))  # infinity less infinity is no number
    summed = emit(relax.op.sum(emit(relax.op.exp(emit(relax.op.subtract(x, top)))), axes, True))
    found = emit(relax.op.add(emit(relax.op.log(summed)), top))
    return found if op.flag("keepdims", 1) else relax.op.squeeze(found, axes)


def _squared(op: Operator, x: Any) -> Any:
    return op.emit(relax.op.multiply(x, x))


def _argument(function: Callable[..., Any]) -> Conversion:
    def convert(op: Operator) -> Any:
        x = op.input(0)
        axis, keep = op.flag("axis") % len(shape_of(x)), bool(op.flag("keepdims", 1))
        if not op.flag("select_last_index"):
            return relax.op.astype(op.emit(function(x, axis, keep)), "int64")
        backwards = op.emit(relax.op.astype(op.emit(function(op.emit(relax.op.flip(x, axis)), axis, keep)), "int64"))
        return relax.op.subtract(op.constant(shape_of(x)[axis] - 1, "int64"), backwards)

    return convert


def _hardmax(op: Operator) -> Any:
    x = op.input(0)
    shape = shape_of(x)
    axis = op.flag("axis", -1 if op.opset >= 13 else 1) % len(shape)
    if op.opset < 13:
        x = op.emit(relax.op.reshape(x, [math.prod(shape[:axis]), math.prod(shape[axis:])]))
        axis = 1
    first = op.emit(relax.op.argmax(x, axis, True))
    places = np.arange(shape_of(x)[axis]).reshape([-1 if at == axis else 1 for at in range(len(shape_of(x)))])
    hot = op.emit(relax.op.equal(first, op.constant(places, dtype_of(first))))
    return relax.op.reshape(op.emit(relax.op.astype(hot, dtype_of(x))), shape)


CONVERSIONS: dict[str, Conversion] = {
    "ArgMax": _argument(relax.op.argmax),
    "ArgMin": _argument(relax.op.argmin),
    "Hardmax": _hardmax,
    "ReduceL1": _reduction(relax.op.sum, 0.0, before=lambda op, x: op.emit(relax.op.abs(x))),
    "ReduceL2": _reduction(relax.op.sum, 0.0, _squared, lambda op, x: op.emit(relax.op.sqrt(x))),
    "ReduceLogSum": _reduction(relax.op.sum, -np.inf, after=lambda op, x: op.emit(relax.op.log(x))),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _reduction(relax.op.max, -np.inf),
    "ReduceMean": _reduction(relax.op.mean, np.nan),
    "ReduceMin": _reduction(relax.op.min, np.inf),
    "ReduceProd": _reduction(relax.op.prod, 1.0),
    "ReduceSum": _reduction(relax.op.sum, 0.0),
    "ReduceSumSquare": _reduction(relax.op.sum, 0.0, before=_squared),
}
