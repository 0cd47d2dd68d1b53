"""Operators of ONNX that move elements or change shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.frontend.onnx_conversions.operator import (
    Conversion,
    Operator,
    UnsupportedError,
    dtype_of,
    equal_parts,
    shape_of,
)
from dance_tvm.ir.split import split


def _reshape(op: Operator) -> Any:
    x, target = op.input(0), [int(n) for n in op.required(1, "a shape")]
    shape = shape_of(x)
    if not op.flag("allowzero"):
        target = [shape[at] if extent == 0 else extent for at, extent in enumerate(target)]
    if -1 in target:
        rest = math.prod(extent for extent in target if extent != -1)
        target[target.index(-1)] = math.prod(shape) // max(1, rest)
    if 0 in target:
        return op.constant(np.empty(target, dtype_of(x)))
    return relax.op.reshape(x, target)


def _flatten(op: Operator) -> Any:
    shape = shape_of(op.input(0))
    axis = op.flag("axis", 1)
    axis += len(shape) if axis < 0 else 0
    return relax.op.reshape(op.input(0), [math.prod(shape[:axis]), math.prod(shape[axis:])])


def _expand(op: Operator) -> Any:
    x, target = op.input(0), op.required(1, "a shape")
    shape = np.broadcast_shapes(tuple(shape_of(x)), tuple(int(n) for n in target))
    return relax.op.broadcast_to(x, shape)


def _tile(op: Operator) -> Any:
    return relax.op.tile(op.input(0), [int(n) for n in op.required(1, "repeats")])


def _squeeze(op: Operator) -> Any:
    shape, axes = shape_of(op.input(0)), op.known(1, "axes")
    dropped = [at for at, n in enumerate(shape) if n == 1] if axes is None else [int(a) % len(shape) for a in axes.flat]
    return relax.op.reshape(op.input(0), [n for at, n in enumerate(shape) if at not in dropped])


def _unsqueeze(op: Operator) -> Any:
    shape, axes = shape_of(op.input(0)), op.required(1, "axes")
    rank = len(shape) + axes.size
    added, rest = {int(axis) % rank for axis in axes.flat}, iter(shape)
    return relax.op.reshape(op.input(0), [1 if at in added else next(rest) for at in range(rank)])


def _concat(op: Operator) -> Any:
    parts = [part for part in op.inputs if part is not None]
    axis = op.flag("axis", 1) % len(shape_of(parts[0]))
    filled = [part for part in parts if shape_of(part)[axis]] or parts[:1]
    return filled[0] if len(filled) == 1 else relax.op.concat(filled, axis)


def _split(op: Operator) -> list[Any]:
    x = op.input(0)
    axis = op.flag("axis") % len(shape_of(x))
    extent, sizes = shape_of(x)[axis], op.known(1, "sizes")
    count = op.flag("num_outputs", op.outputs)
    cut = equal_parts(extent, -(-extent // count)) if sizes is None else [int(size) for size in sizes]
    return split(op.emit, x, [*cut, *([0] * (count - len(cut)))], axis)


def _slice(op: Operator) -> Any:
    x = op.input(0)
    shape = shape_of(x)
    starts, ends = op.required(1, "starts"), op.required(2, "ends")
    axes, steps = op.known(3, "axes"), op.known(4, "steps")
    axes = np.arange(starts.size) if axes is None else axes
    steps = np.ones_like(starts) if steps is None else steps
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        positions = range(shape[axis])[slice(int(start), int(end), int(step))]
        at = int(axis) % len(shape)
        if len(positions) == shape[at] and step > 0:
            continue
        if step > 0 and len(positions):
            x = op.emit(relax.op.strided_slice(x, [at], [positions.start], [positions.stop], [positions.step]))
        else:
            x = op.emit(relax.op.take(x, op.constant(np.array(positions, np.int64)), at))
        if not len(positions):  # no kernel writes nothing
            shape[at] = 0
            return op.constant(np.empty(shape, dtype_of(x)))
    return x


def _pad(op: Operator) -> Any:
    """Padding as a graph operator; negative amounts cut."""
    x = op.input(0)
    shape = shape_of(x)
    amounts, axes = op.required(1, "amounts"), op.known(3, "axes")
    axes = np.arange(len(shape)) if axes is None else axes
    before, after = np.zeros(len(shape), int), np.zeros(len(shape), int)
    for axis, low, high in zip(axes, *np.split(amounts, 2), strict=True):
        before[axis], after[axis] = low, high
    mode = op.text("mode", "constant")
    if mode != "constant":
        return _mirrored(op, x, before, after, mode)
    begin, end = np.maximum(-before, 0), np.array(shape) - np.maximum(-after, 0)
    if begin.any() or (end != shape).any():
        x = op.emit(relax.op.strided_slice(x, list(range(len(shape))), begin.tolist(), end.tolist()))
    before, after = np.maximum(before, 0), np.maximum(after, 0)
    if not before.any() and not after.any():
        return x
    width = np.stack([before, after], 1).reshape(-1).tolist()
    fill = op.input(2)
    value = np.array(0.0) if fill is None else op.importer.known(fill)
    if value is not None:
        return relax.op.nn.pad(x, width, pad_value=float(value.item()))
    inside = op.constant(np.pad(np.ones(shape_of(x), bool), np.stack([before, after], 1)))
    return relax.op.where(inside, op.emit(relax.op.nn.pad(x, width)), op.emit(relax.op.reshape(fill, [])))


def _mirrored(op: Operator, x: Any, before: np.ndarray, after: np.ndarray, mode: str) -> Any:
    """Padding with the tensor's own values."""
    shape = np.array(shape_of(x))
    names = {"edge": "replicate", "wrap": "circular", "reflect": "reflect"}
    if mode not in names:
        raise UnsupportedError(f"is not supported with mode={mode!r}")
    padded = [int(axis) for axis in np.flatnonzero(before | after)]
    small = all(0 <= n < shape[axis] for axis in padded for n in (before[axis], after[axis]))
    if not padded:
        return x
    if small and len(shape) in (3, 4, 5) and padded[0] >= 2:
        width = np.stack([before, after], 1).reshape(-1).tolist()
        return relax.op.nn.pad(x, width, pad_mode=names[mode])
    for axis in padded:
        positions = np.arange(max(0, -before[axis]), shape[axis] - max(0, -after[axis]))
        amount = (max(0, before[axis]), max(0, after[axis]))
        x = op.emit(relax.op.take(x, op.constant(np.pad(positions, amount, mode)), axis))  # type: ignore[call-overload]  # mode is one of names
    return x


def _center_crop_pad(op: Operator) -> Any:
    x = op.input(0)
    shape, wanted = shape_of(x), op.required(1, "a shape")
    axes = [axis % len(shape) for axis in op.ints("axes", range(len(shape)))]
    for axis, extent in zip(axes, wanted, strict=True):
        spare = shape[axis] - int(extent)
        if spare > 0:
            x = op.emit(relax.op.strided_slice(x, [axis], [spare // 2], [spare // 2 + int(extent)]))
        elif spare < 0:
            width = [0] * (2 * len(shape))
            width[2 * axis], width[2 * axis + 1] = -spare // 2, -spare - -spare // 2
            x = op.emit(relax.op.nn.pad(x, width))
    return x


def _eye_like(op: Operator) -> Any:
    from onnx.helper import tensor_dtype_to_np_dtype

    rows, columns = shape_of(op.input(0))
    kind = op.flag("dtype", -1)
    dtype = np.dtype(dtype_of(op.input(0))) if kind < 0 else tensor_dtype_to_np_dtype(kind)
    return op.constant(np.eye(rows, columns, op.flag("k"), dtype))


def _trilu(op: Operator) -> Any:
    k = op.known(1, "the diagonal")
    function = relax.op.triu if op.flag("upper", 1) else relax.op.tril
    return function(op.input(0), 0 if k is None else int(k.item()))


def _space_to_depth(op: Operator) -> Any:
    x, size = op.input(0), op.flag("blocksize")
    n, c, h, w = shape_of(x)
    x = op.emit(relax.op.reshape(x, [n, c, h // size, size, w // size, size]))
    x = op.emit(relax.op.permute_dims(x, [0, 1, 3, 5, 2, 4] if op.text("mode", "DCR") == "CRD" else [0, 3, 5, 1, 2, 4]))
    return relax.op.reshape(x, [n, c * size * size, h // size, w // size])


CONVERSIONS: dict[str, Conversion] = {
    "CenterCropPad": _center_crop_pad,
    "Concat": _concat,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
