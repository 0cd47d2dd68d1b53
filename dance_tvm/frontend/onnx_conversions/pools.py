"""Pools of ONNX, and what puts windows back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.frontend.onnx_conversions.convolutions import padded_window
from dance_tvm.frontend.onnx_conversions.operator import (
    Conversion,
    Operator,
    UnsupportedError,
    dtype_of,
    is_float,
    shape_of,
)


@dataclass(frozen=True)
class _Pool:
    """A pooling window: padding that makes every window whole, and of it what ceil_mode added."""

    size: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int]
    added: list[int]
    counts: list[int]  # of windows along each axis


def _pool(op: Operator) -> _Pool:
    extents = shape_of(op.input(0))[2:]
    size, rank = op.ints("kernel_shape"), len(extents)
    strides, dilations, pads = padded_window(op, extents, size)
    added, counts = [], []
    for axis in range(rank):
        span = dilations[axis] * (size[axis] - 1) + 1
        room = extents[axis] + pads[axis] + pads[rank + axis] - span
        count = room // strides[axis] + 1
        if op.flag("ceil_mode"):
            count = -(-room // strides[axis]) + 1
            # The last window begins inside of the tensor or of the padding before it.
            count -= (count - 1) * strides[axis] >= extents[axis] + pads[axis]
        counts.append(count)
        added.append(max(0, (count - 1) * strides[axis] + span - extents[axis] - pads[axis] - pads[rank + axis]))
    whole = pads[:rank] + [pad + more for pad, more in zip(pads[rank:], added, strict=True)]
    return _Pool(size, strides, dilations, whole, added, counts)


def _pooled(kind: str, rank: int) -> Callable[..., Any]:
    if rank not in (1, 2, 3):
        raise UnsupportedError(f"is not supported over {rank} axes")
    return getattr(relax.op.nn, f"{kind}_pool{rank}d")


def _max_pool(op: Operator) -> Any:
    x, pool = op.input(0), _pool(op)
    if op.outputs > 1:
        return _max_pool_with_places(op, x, pool)
    function = _pooled("max", len(pool.size))
    if is_float(x):
        return function(x, pool.size, pool.strides, pool.pads, pool.dilations)
    floats = op.emit(relax.op.astype(x, "float32"))  # which hold bytes exactly
    return relax.op.astype(op.emit(function(floats, pool.size, pool.strides, pool.pads, pool.dilations)), dtype_of(x))


def _max_pool_with_places(op: Operator, x: Any, pool: _Pool) -> Any:
    """The largest values and where they were in the flattened tensor."""
    n, c, *extents = shape_of(x)
    places, inside = _window_places(extents, pool)
    flat = op.emit(relax.op.reshape(x, [n, c, math.prod(extents)]))
    read = op.emit(relax.op.take(flat, op.constant(places.reshape(-1)), 2))
    read = op.emit(relax.op.reshape(read, [n, c, *places.shape]))
    least = np.finfo(np.float32).min if is_float(x) else np.iinfo(dtype_of(x)).min
    read = op.emit(relax.op.where(op.constant(inside), read, op.like(least, x)))
    values, first = op.emit(relax.op.max(read, [3])), op.emit(relax.op.argmax(read, 3, True))
    first = op.emit(relax.op.astype(first, "int64"))
    all_places = op.emit(relax.op.broadcast_to(op.constant(places), [n, c, *places.shape]))
    chosen = op.emit(relax.op.squeeze(op.emit(relax.op.gather_elements(all_places, first, 3)), [3]))
    if op.flag("storage_order"):
        chosen = _column_major(op, chosen, extents)
    channels = np.arange(n * c).reshape(n, c, 1) * math.prod(extents)
    chosen = op.emit(relax.op.add(chosen, op.constant(channels)))
    shape = [n, c, *pool.counts]
    return [relax.op.reshape(values, shape), relax.op.reshape(chosen, shape)]


def _column_major(op: Operator, places: Any, extents: Sequence[int]) -> Any:
    """Places in a tensor of ``extents`` whose first axis lies closest."""
    order = np.arange(math.prod(extents)).reshape(tuple(extents)[::-1]).transpose().reshape(-1)
    return op.emit(relax.op.take(op.constant(order), places, 0))


def _window_places(extents: Sequence[int], pool: _Pool) -> tuple[np.ndarray, np.ndarray]:
    """For each window (rows) the place of each of its taps in the flattened tensor, and whether that is inside."""
    rank = len(extents)
    axes = []
    for axis in range(rank):
        starts = np.arange(pool.counts[axis]) * pool.strides[axis] - pool.pads[axis]
        axes.append(starts[:, None] + np.arange(pool.size[axis]) * pool.dilations[axis])
    windows, taps = (np.meshgrid(*(np.arange(a.shape[i]) for a in axes), indexing="ij") for i in (0, 1))
    places = np.zeros((windows[0].size, taps[0].size), np.int64)
    inside = np.ones_like(places, bool)
    for axis in range(rank):
        along = axes[axis][windows[axis].reshape(-1)][:, taps[axis].reshape(-1)]
        inside &= (along >= 0) & (along < extents[axis])
        places = places * extents[axis] + along.clip(0, extents[axis] - 1)
    return places, inside


def _average_pool(op: Operator) -> Any:
    x, pool = op.input(0), _pool(op)
    include = bool(op.flag("count_include_pad"))
    function = _pooled("avg", len(pool.size))
    y = op.emit(function(x, pool.size, pool.strides, pool.pads, pool.dilations, count_include_pad=include))
    if not include or not any(pool.added):
        return y
    rank = len(pool.size)
    padded = [n + pool.pads[at] + pool.pads[rank + at] - pool.added[at] for at, n in enumerate(shape_of(x)[2:])]
    counted = _Pool(pool.size, pool.strides, pool.dilations, [0] * (2 * rank), [0] * rank, pool.counts)
    _, inside = _window_places(padded, counted)
    share = math.prod(pool.size) / np.maximum(1, inside.sum(1)).reshape(pool.counts)
    return relax.op.multiply(y, op.constant(share, "float32"))


def _lp_pool(op: Operator) -> Any:
    x, pool, p = op.input(0), _pool(op), float(op.flag("p", 2))
    powered = op.emit(relax.op.power(op.emit(relax.op.abs(x)), op.like(p, x)))
    function = _pooled("avg", len(pool.size))
    mean = op.emit(function(powered, pool.size, pool.strides, pool.pads, pool.dilations, count_include_pad=True))
    total = op.emit(relax.op.multiply(mean, op.like(math.prod(pool.size), x)))
    return relax.op.power(total, op.like(1 / p, x))


def _max_unpool(op: Operator) -> Any:
    x, places, wanted = op.input(0), op.input(1), op.known(2, "a shape")
    n, c, *extents = shape_of(x)
    kernel, rank = op.ints("kernel_shape"), len(extents)
    strides, pads = op.ints("strides", [1] * rank), op.ints("pads", [0] * (2 * rank))
    natural = [(extents[at] - 1) * strides[at] + kernel[at] - pads[at] - pads[rank + at] for at in range(rank)]
    zeros = op.constant(np.zeros(n * c * math.prod(natural), dtype_of(x)))
    flat = [op.emit(relax.op.reshape(part, [-1])) for part in (places, x)]
    y = op.emit(relax.op.reshape(op.emit(relax.op.scatter_elements(zeros, *flat, 0)), [n, c, *natural]))
    if wanted is None or [int(size) for size in wanted[2:]] == natural:
        return y
    width = [0, 0, 0, 0, *(m for size, had in zip(wanted[2:], natural, strict=True) for m in (0, int(size) - had))]
    return relax.op.nn.pad(y, width)


def _col2im(op: Operator) -> Any:
    """Blocks laid out as columns, put back and summed where they overlap."""
    x = op.input(0)
    image = [int(n) for n in op.required(1, "a shape")]
    block = [int(n) for n in op.required(2, "a shape")]
    rank = len(image)
    strides, dilations, pads = padded_window(op, image, block)
    counts = [
        (image[at] + pads[at] + pads[rank + at] - dilations[at] * (block[at] - 1) - 1) // strides[at] + 1
        for at in range(rank)
    ]
    places, inside = _window_places(image, _Pool(block, strides, dilations, pads, [0] * rank, counts))
    n, columns, count = shape_of(x)
    taps = math.prod(block)
    c, size = columns // taps, math.prod(image)
    x = op.emit(relax.op.reshape(x, [n, c, taps * count]))
    if not inside.all():
        x = op.emit(relax.op.multiply(x, op.constant(inside.T.reshape(-1), dtype_of(x))))
    where = op.constant(np.broadcast_to(places.T.reshape(-1), (n, c, taps * count)).copy())
    zeros = op.constant(np.zeros((n, c, size), dtype_of(x)))
    y = op.emit(relax.op.scatter_elements(zeros, where, x, 2, "add"))
    return relax.op.reshape(y, [n, c, *image])


CONVERSIONS: dict[str, Conversion] = {
    "AveragePool": _average_pool,
    "Col2Im": _col2im,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
    "MaxUnpool": _max_unpool,
}
