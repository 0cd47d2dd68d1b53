"""Operators of ONNX that read or write by indices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.frontend.onnx_conversions.operator import Conversion, Operator, dtype_of, shape_of, shaped_like_axis


def _wrapped(op: Operator, indices: Any, extent: Any) -> Any:
    """Indices of which negative ones count from the end."""
    known = op.importer.known(indices)
    if known is not None:  # TVM would compile a function to fold each of the operators below
        return op.constant(np.where(known < 0, known + extent, known), dtype_of(indices))
    below = op.emit(relax.op.less(indices, op.like(0, indices)))
    return op.emit(
        relax.op.where(below, op.emit(relax.op.add(indices, op.constant(extent, dtype_of(indices)))), indices)
    )


def _gather(op: Operator) -> Any:
    x, indices = op.inputs
    axis = op.flag("axis") % len(shape_of(x))
    if dtype_of(indices).startswith("int"):
        indices = _wrapped(op, indices, shape_of(x)[axis])
    return relax.op.take(x, indices, axis)


def _gather_elements(op: Operator) -> Any:
    x, indices = op.inputs
    axis = op.flag("axis") % len(shape_of(x))
    return relax.op.gather_elements(x, _wrapped(op, indices, shape_of(x)[axis]), axis)


def _rows_of(op: Operator, x: Any, indices: Any, batch: int) -> tuple[Any, list[int]]:
    """Tuples of indices along the last axis as places in the flattened indexed axes, and what follows those axes."""
    shape, depth = shape_of(x), shape_of(indices)[-1]
    extents = shape[batch : batch + depth]
    indices = _wrapped(op, indices, np.array(extents))
    steps = np.cumprod([1, *extents[:0:-1]])[::-1]
    known = op.importer.known(indices)
    if known is not None:
        return op.constant((known * steps).sum(-1), dtype_of(indices)), shape[batch + depth :]
    weighted = op.emit(relax.op.multiply(indices, op.constant(steps, dtype_of(indices))))
    return op.emit(relax.op.sum(weighted, [-1])), shape[batch + depth :]


def _gather_nd(op: Operator) -> Any:
    x, indices = op.inputs
    shape, batch = shape_of(x), op.flag("batch_dims")
    depth = shape_of(indices)[-1]
    rows, rest = _rows_of(op, x, indices, batch)
    count, places = math.prod(shape[:batch]), math.prod(shape[batch : batch + depth])
    if batch:  # places in all batches, one after another
        starts = np.arange(count).reshape([*shape[:batch], *[1] * (len(shape_of(rows)) - batch)]) * places
        rows = op.emit(relax.op.add(rows, op.constant(starts, dtype_of(rows))))
    flat = op.emit(relax.op.reshape(x, [count * places, *rest]))
    return relax.op.take(flat, rows, 0)


def _scatter_elements(op: Operator) -> Any:
    x, indices, updates = op.inputs
    if not math.prod(shape_of(indices)):
        return x
    axis = op.flag("axis") % len(shape_of(x))
    mode = {"none": "update"}.get(name := op.text("reduction", "none"), name)
    return relax.op.scatter_elements(x, _wrapped(op, indices, shape_of(x)[axis]), updates, axis, mode)


def _scatter_nd(op: Operator) -> Any:
    x, indices, updates = op.inputs
    if not math.prod(shape_of(indices)):
        return x
    mode = {"none": "update"}.get(name := op.text("reduction", "none"), name)
    extents = np.array(shape_of(x)[: shape_of(indices)[-1]])
    return relax.op.scatter_nd(x, _wrapped(op, indices, extents), updates, mode)


def _compress(op: Operator) -> Any:
    x, chosen = op.input(0), np.flatnonzero(op.required(1, "a condition"))
    if "axis" not in op.attributes:
        x, axis = op.emit(relax.op.reshape(x, [-1])), 0
    else:
        axis = op.flag("axis") % len(shape_of(x))
    return relax.op.take(x, op.constant(chosen), axis)


def _one_hot(op: Operator) -> Any:
    indices, depth, values = op.input(0), int(op.required(1, "a depth").item()), op.input(2)
    rank = len(shape_of(indices)) + 1
    axis = op.flag("axis", -1) % rank
    wrapped = op.emit(relax.op.expand_dims(_wrapped(op, indices, depth), axis))
    places = op.constant(np.arange(depth).reshape([-1 if at == axis else 1 for at in range(rank)]), dtype_of(indices))
    off, on = (op.emit(relax.op.take(values, op.constant(at, "int64"), 0)) for at in (0, 1))
    return relax.op.where(op.emit(relax.op.equal(wrapped, places)), on, off)


def _reverse_sequence(op: Operator) -> Any:
    x, lengths = op.inputs
    shape, batch, time = shape_of(x), op.flag("batch_axis", 1), op.flag("time_axis", 0)
    lengths = shaped_like_axis(op, lengths, len(shape), batch)
    steps = op.constant(np.arange(shape[time]).reshape([-1 if at == time else 1 for at in range(len(shape))]))
    last = op.emit(relax.op.subtract(lengths, op.constant(1, "int64")))
    mirrored = op.emit(relax.op.subtract(last, steps))
    places = op.emit(relax.op.where(op.emit(relax.op.less(steps, lengths)), mirrored, steps))
    return relax.op.gather_elements(x, op.emit(relax.op.broadcast_to(places, shape)), time)


def _top_k(op: Operator) -> Any:
    k = int(op.required(1, "k").item())
    x, axis = op.input(0), op.flag("axis", -1) % len(shape_of(op.input(0)))
    return relax.op.topk(x, k, axis, "both", bool(op.flag("largest", 1)), "int64")


def _tensor_scatter(op: Operator) -> Any:
    """A cache with new rows written at each batch's own place."""
    cache, update, places = op.input(0), op.input(1), op.input(2)
    shape, axis = shape_of(cache), op.flag("axis", -2) % len(shape_of(cache))
    steps = np.arange(shape_of(update)[axis]).reshape([-1 if at == axis else 1 for at in range(len(shape))])
    rows = op.constant(steps, "int64")
    if places is not None:
        rows = op.emit(relax.op.add(rows, shaped_like_axis(op, places, len(shape), 0)))
    if op.text("mode", "linear") == "circular":
        rows = op.emit(relax.op.floor_mod(rows, op.constant(shape[axis], "int64")))
    rows = op.emit(relax.op.broadcast_to(rows, shape_of(update)))
    return relax.op.scatter_elements(cache, rows, update, axis)


CONVERSIONS: dict[str, Conversion] = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
}
