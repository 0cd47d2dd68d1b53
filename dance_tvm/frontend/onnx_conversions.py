"""Operators of ONNX over Relax: where TVM's importer lacks them, emits loops, or departs from the standard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.frontend.onnx_resize import interpolation_matrix, nearest_positions


class UnsupportedError(Exception):
    """What keeps an operator from being read, after its name, and what the user can do about it."""

    def __init__(self, reason: str, instead: str = "export the network to .pt2, or without it") -> None:
        super().__init__(f"{reason}: {instead}")


@dataclass
class Operator:
    """A node: its inputs as expressions (None where an optional one is left out) and its attributes."""

    importer: Any
    kind: str
    inputs: list[Any]
    attributes: dict[str, Any]
    outputs: int
    opset: int

    def input(self, index: int) -> Any:
        """An input; None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def known(self, index: int, what: str) -> np.ndarray | None:
        """The value of an input that must be known now; None where it is left out."""
        if (value := self.input(index)) is None:
            return None
        known = self.importer.known(value)
        if known is None:
            raise UnsupportedError(f"has {what} that depend on the input", "make them constants when exporting")
        return known

    def required(self, index: int, what: str) -> np.ndarray:
        """The value of an input that must be there and be known now."""
        if (known := self.known(index, what)) is None:
            raise UnsupportedError(f"lacks {what}", "export the network again")
        return known

    def value(self, index: int) -> np.ndarray | None:
        """The value of an input if it is known now."""
        value = self.input(index)
        return None if value is None else self.importer.known(value)

    def ints(self, name: str, otherwise: Sequence[int] = ()) -> list[int]:
        """A list attribute."""
        return [int(item) for item in self.attributes.get(name, otherwise)]

    def flag(self, name: str, otherwise: int = 0) -> int:
        """An integer attribute."""
        return int(self.attributes.get(name, otherwise))

    def number(self, name: str, otherwise: float) -> float:
        """A float attribute."""
        return float(self.attributes.get(name, otherwise))

    def text(self, name: str, otherwise: str) -> str:
        """A string attribute."""
        value = self.attributes.get(name, otherwise)
        return value.decode() if isinstance(value, bytes) else str(value)

    def emit(self, expr: Any) -> Any:
        """A variable that holds ``expr``."""
        return self.importer.bb.emit(expr)

    def constant(self, array: Any, dtype: str | None = None) -> Any:
        """``array`` as an expression."""
        return self.importer.constant(np.asarray(array, dtype))

    def like(self, number: float, x: Any) -> Any:
        """A number of the type of ``x``."""
        return self.constant(number, dtype_of(x))

    def described(self) -> str:
        """Attributes and the inputs' types in a few words."""
        plain = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in self.attributes.items()
            if isinstance(value, (bytes, int, float, tuple)) and name != "tvm_custom"
        }
        told = [f"{name}={value}" for name, value in plain.items()]
        kinds = [f"{dtype_of(x)} {tuple(shape_of(x))}" for x in self.inputs if isinstance(x, relax.Expr)]
        return ", ".join([*told, f"of {' and '.join(kinds)}"])


Conversion = Callable[[Operator], Any]


def shape_of(x: Any) -> list[int]:
    """The extents of an expression."""
    return [int(extent) for extent in x.ty.shape]


def dtype_of(x: Any) -> str:
    """The dtype of an expression."""
    return str(x.ty.dtype.dtype)


def equal_parts(extent: int, size: int) -> list[int]:
    """Parts of ``size``, the last one with what is left."""
    return [min(size, extent - start) for start in range(0, extent, size)]


def _is_float(x: Any) -> bool:
    return dtype_of(x).startswith("float")


def _shaped_like_axis(op: Operator, x: Any, rank: int, axis: int) -> Any:
    """A vector spread along ``axis`` of a tensor of ``rank`` axes; a scalar or a larger tensor as it is."""
    if len(shape_of(x)) != 1 or rank == 1:
        return x
    return op.emit(relax.op.reshape(x, [-1 if at == axis % rank else 1 for at in range(rank)]))


# Shapes


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
    parts = equal_parts(extent, -(-extent // count)) if sizes is None else [int(size) for size in sizes]
    parts += [0] * (count - len(parts))
    if len(parts) == 1:
        return [x]
    return list(op.emit(relax.op.split(x, np.cumsum(parts)[:-1].tolist(), axis)))


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


# Reading and writing by index


def _wrapped(op: Operator, indices: Any, extent: Any) -> Any:
    """Indices of which negative ones count from the end."""
    below = op.emit(relax.op.less(indices, op.like(0, indices)))
    return op.emit(
        relax.op.where(below, op.emit(relax.op.add(indices, op.constant(extent, dtype_of(indices)))), indices)
    )


def _gather(op: Operator) -> Any:
    x, indices = op.inputs
    axis = op.flag("axis") % len(shape_of(x))
    known = op.importer.known(indices)
    if known is not None:
        indices = op.constant(np.where(known < 0, known + shape_of(x)[axis], known))
    elif dtype_of(indices).startswith("int"):
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
    lengths = _shaped_like_axis(op, lengths, len(shape), batch)
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
        rows = op.emit(relax.op.add(rows, _shaped_like_axis(op, places, len(shape), 0)))
    if op.text("mode", "linear") == "circular":
        rows = op.emit(relax.op.floor_mod(rows, op.constant(shape[axis], "int64")))
    rows = op.emit(relax.op.broadcast_to(rows, shape_of(update)))
    return relax.op.scatter_elements(cache, rows, update, axis)


# Numbers


def _cast(op: Operator) -> Any:
    """Another type; other floats are computed in float32."""
    from onnx.helper import tensor_dtype_to_np_dtype

    dtype = str(tensor_dtype_to_np_dtype(op.flag("to")))
    return _as_type(op, "float32" if dtype in ("float16", "bfloat16", "float64") else dtype)


def _cast_like(op: Operator) -> Any:
    return _as_type(op, dtype_of(op.input(1)))


def _as_type(op: Operator, dtype: str) -> Any:
    x = op.input(0)
    if dtype == dtype_of(x):
        return x
    if (dtype not in ("float32", "bool") and not dtype.startswith(("int", "uint"))) or dtype.endswith(("int4", "int2")):
        raise UnsupportedError(f"makes {dtype} of its input, in which nothing is computed")
    if dtype == "bool":
        return relax.op.not_equal(x, op.like(0, x))
    return relax.op.astype(x, dtype)


def _clip(op: Operator) -> Any:
    x, bounds = op.input(0), (op.input(1), op.input(2))
    known = [op.value(1), op.value(2)]
    if known[0] is not None and known[1] is not None and _is_float(x):
        return relax.op.clip(x, float(known[0].item()), float(known[1].item()))
    for bound, function in zip(bounds, (relax.op.maximum, relax.op.minimum), strict=True):
        x = x if bound is None else op.emit(function(x, bound))
    return x


def _einsum(op: Operator) -> Any:
    equation = op.text("equation", "").replace(" ", "")
    return relax.op.einsum(tuple(op.inputs), equation)


def _celu(op: Operator) -> Any:
    x, emit = op.input(0), op.emit
    alpha, one = op.like(op.number("alpha", 1.0), x), op.like(1.0, x)
    below = emit(relax.op.divide(emit(relax.op.minimum(x, op.like(0.0, x))), alpha))
    below = emit(relax.op.multiply(alpha, emit(relax.op.subtract(emit(relax.op.exp(below)), one))))
    return relax.op.add(emit(relax.op.nn.relu(x)), below)


def _elu(op: Operator) -> Any:
    x, emit = op.input(0), op.emit
    below = emit(relax.op.subtract(emit(relax.op.exp(emit(relax.op.minimum(x, op.like(0.0, x))))), op.like(1.0, x)))
    return relax.op.add(emit(relax.op.nn.relu(x)), emit(relax.op.multiply(op.like(op.number("alpha", 1.0), x), below)))


def _is_inf(op: Operator) -> Any:
    x = op.input(0)
    infinite = op.emit(relax.op.isinf(x))
    if op.flag("detect_negative", 1) and op.flag("detect_positive", 1):
        return infinite
    if not op.flag("detect_negative", 1) and not op.flag("detect_positive", 1):
        return op.constant(np.zeros(shape_of(x), bool))
    side = relax.op.greater if op.flag("detect_positive", 1) else relax.op.less
    return relax.op.logical_and(infinite, op.emit(side(x, op.like(0.0, x))))


def _scan_along(function: Callable[..., Any]) -> Conversion:
    def convert(op: Operator) -> Any:
        x, axis = op.input(0), int(op.required(1, "an axis").item())
        axis %= len(shape_of(x))
        back = bool(op.flag("reverse"))
        x = op.emit(relax.op.flip(x, axis)) if back else x
        if op.flag("exclusive"):  # the first element's sum is of nothing
            first = 0.0 if function is relax.op.cumsum else 1.0
            x = op.emit(relax.op.strided_slice(x, [axis], [0], [shape_of(x)[axis] - 1]))
            width = [0] * (2 * len(shape_of(x)))
            width[2 * axis] = 1
            x = op.emit(relax.op.nn.pad(x, width, pad_value=first))
        found = op.emit(function(x, axis, dtype_of(x)))
        return relax.op.flip(found, axis) if back else found

    return convert


def _variadic(function: Callable[..., Any]) -> Conversion:
    def convert(op: Operator) -> Any:
        found = op.inputs[0]
        for x in op.inputs[1:]:
            found = op.emit(function(found, x))
        return found

    return convert


def _mean(op: Operator) -> Any:
    total = _variadic(relax.op.add)(op)
    return relax.op.divide(total, op.like(len(op.inputs), total))


def _lp_normalization(op: Operator) -> Any:
    x, axis, emit = op.input(0), op.flag("axis", -1), op.emit
    if op.flag("p", 2) == 1:
        norm = emit(relax.op.sum(emit(relax.op.abs(x)), [axis], True))
    else:
        norm = emit(relax.op.sqrt(emit(relax.op.sum(emit(relax.op.multiply(x, x)), [axis], True))))
    safe = emit(relax.op.where(emit(relax.op.equal(norm, op.like(0, x))), op.like(1, x), norm))
    return relax.op.divide(x, safe)


def _shrink(op: Operator) -> Any:
    x, emit = op.input(0), op.emit
    bias, limit = op.like(op.number("bias", 0.0), x), op.number("lambd", 0.5)
    above, below = emit(relax.op.greater(x, op.like(limit, x))), emit(relax.op.less(x, op.like(-limit, x)))
    inner = emit(relax.op.where(below, emit(relax.op.add(x, bias)), op.like(0, x)))
    return relax.op.where(above, emit(relax.op.subtract(x, bias)), inner)


def _thresholded_relu(op: Operator) -> Any:
    x = op.input(0)
    above = op.emit(relax.op.greater(x, op.like(op.number("alpha", 1.0), x)))
    return relax.op.where(above, x, op.like(0, x))


def _leaky_relu(op: Operator) -> Any:
    return relax.op.nn.leakyrelu(op.input(0), op.number("alpha", 0.01))


def _prelu(op: Operator) -> Any:
    x, slope = op.inputs
    if op.opset < 7:  # a slope for each channel, which later versions would have along the last axis
        slope = _shaped_like_axis(op, slope, len(shape_of(x)), 1)
    below = op.emit(relax.op.less(x, op.like(0, x)))
    return relax.op.where(below, op.emit(relax.op.multiply(x, slope)), x)


def _dropout(op: Operator) -> Any:
    training = op.value(2)
    if op.input(2) is not None and (training is None or bool(training.item())):
        raise UnsupportedError("is in training mode", "export the network for inference")
    return [op.input(0), op.constant(np.ones(shape_of(op.input(0)), bool))]


def _mod(op: Operator) -> Any:
    """With the sign of the divisor, as Python has it; with that of the dividend where ``fmod``."""
    a, b = op.inputs
    if op.flag("fmod"):
        return relax.op.mod(a, b)
    if not _is_float(a):
        return relax.op.floor_mod(a, b)
    rest, zero, emit = op.emit(relax.op.mod(a, b)), op.like(0, a), op.emit
    opposite = emit(relax.op.not_equal(emit(relax.op.less(rest, zero)), emit(relax.op.less(b, zero))))
    moved = emit(relax.op.logical_and(opposite, emit(relax.op.not_equal(rest, zero))))
    return relax.op.where(moved, emit(relax.op.add(rest, b)), rest)


def _pow(op: Operator) -> Any:
    x, exponent = op.inputs
    if _is_float(x) and not _is_float(exponent):
        exponent = op.emit(relax.op.astype(exponent, dtype_of(x)))
    if not _is_float(x):
        found = op.emit(relax.op.power(*(op.emit(relax.op.astype(v, "float64")) for v in (x, exponent))))
        return relax.op.astype(found, dtype_of(x))
    return relax.op.power(x, exponent)


def _gemm(op: Operator) -> Any:
    a, b, c = op.input(0), op.input(1), op.input(2)
    a = op.emit(relax.op.permute_dims(a)) if op.flag("transA") else a
    b = op.emit(relax.op.permute_dims(b)) if op.flag("transB") else b
    y = op.emit(relax.op.matmul(a, b))
    if (alpha := op.number("alpha", 1.0)) != 1.0:
        y = op.emit(relax.op.multiply(y, op.like(alpha, y)))
    if c is None:
        return y
    if (beta := op.number("beta", 1.0)) != 1.0:
        c = op.emit(relax.op.multiply(c, op.like(beta, c)))
    return relax.op.add(y, c)


def _mat_mul_integer(op: Operator) -> Any:
    """Products of integers, summed in int32."""
    a, b = (_centred(op, op.input(at), op.input(at + 2), axis) for at, axis in ((0, -2), (1, -1)))
    return relax.op.matmul(a, b, "int32")


def _centred(op: Operator, x: Any, zero: Any, axis: int) -> Any:
    """Integers less their zero point, as int32."""
    x = op.emit(relax.op.astype(x, "int32"))
    if zero is None:
        return x
    zero = op.emit(relax.op.astype(zero, "int32"))
    return op.emit(relax.op.subtract(x, _shaped_like_axis(op, zero, len(shape_of(x)), axis)))


# Reductions


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


def _most(dtype: type[np.floating[Any]] = np.float32) -> float:
    return float(np.finfo(dtype).max)


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


# Windows


def _window(op: Operator, extents: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations, and padding (before every axis, then after every axis) as the attributes give them."""
    rank = len(extents)
    strides, dilations = op.ints("strides", [1] * rank), op.ints("dilations", [1] * rank)
    automatic = op.text("auto_pad", "NOTSET")
    if automatic in ("NOTSET", ""):
        return strides, dilations, op.ints("pads", [0] * (2 * rank))
    if automatic == "VALID":
        return strides, dilations, [0] * (2 * rank)
    spans = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, kernel, strict=True)]
    total = [
        max(0, (-(-extent // stride) - 1) * stride + span - extent)
        for extent, stride, span in zip(extents, strides, spans, strict=True)
    ]
    return strides, dilations, _shared_out(total, automatic)


def _shared_out(total: Sequence[int], automatic: str) -> list[int]:
    """Padding as SAME_UPPER and SAME_LOWER share it: the odd one goes after, or before."""
    less, more = [n // 2 for n in total], [n - n // 2 for n in total]
    return less + more if automatic == "SAME_UPPER" else more + less


def _conv(op: Operator) -> Any:
    x, weight, bias = op.input(0), op.input(1), op.input(2)
    rank = len(shape_of(x)) - 2
    if rank not in (1, 2, 3):
        raise UnsupportedError(f"is not supported over {rank} axes")
    strides, dilations, pads = _window(op, shape_of(x)[2:], shape_of(weight)[2:])
    function = (relax.op.nn.conv1d, relax.op.nn.conv2d, relax.op.nn.conv3d)[rank - 1]
    out_dtype = "int32" if dtype_of(x).startswith("int") else None
    y = op.emit(function(x, weight, strides, pads, dilations, op.flag("group", 1), out_dtype=out_dtype))
    return y if bias is None else relax.op.add(y, _shaped_like_axis(op, bias, rank + 2, 1))


def _conv_transpose(op: Operator) -> Any:
    x, weight, bias = op.input(0), op.input(1), op.input(2)
    extents, rank = shape_of(x)[2:], len(shape_of(x)) - 2
    if rank not in (1, 2, 3):
        raise UnsupportedError(f"is not supported over {rank} axes")
    strides, dilations = op.ints("strides", [1] * rank), op.ints("dilations", [1] * rank)
    extra = op.ints("output_padding", [0] * rank)
    weight = _dilated(op, weight, dilations)
    spans = shape_of(weight)[2:]
    full = [stride * (n - 1) + span for stride, n, span in zip(strides, extents, spans, strict=True)]
    begin, sizes = _kept(op, full, extra, extents, strides)
    fewer = [min(size, whole - first) for size, whole, first in zip(sizes, full, begin, strict=True)]
    after = [whole - first - size for whole, first, size in zip(full, begin, fewer, strict=True)]
    function = (relax.op.nn.conv1d_transpose, relax.op.nn.conv2d_transpose, relax.op.nn.conv3d_transpose)[rank - 1]
    simple = fewer == sizes and all(n >= 0 for n in [*begin, *after])
    y = op.emit(function(x, weight, strides, begin + after if simple else 0, groups=op.flag("group", 1)))
    if not simple:  # rows past the end of what the kernel reaches hold the bias alone
        cut = [max(0, n) for n in begin]
        axes = list(range(2, rank + 2))
        y = op.emit(relax.op.strided_slice(y, axes, cut, [c + n for c, n in zip(cut, fewer, strict=True)]))
        missing = [(0, size - n) for size, n in zip(sizes, fewer, strict=True)]
        y = op.emit(relax.op.nn.pad(y, [0, 0, 0, 0, *(n for pair in missing for n in pair)]))
    return y if bias is None else relax.op.add(y, _shaped_like_axis(op, bias, rank + 2, 1))


def _kept(
    op: Operator, full: list[int], extra: list[int], extents: list[int], strides: list[int]
) -> tuple[list[int], list[int]]:
    """Of all that a transposed convolution reaches, where what it keeps begins, and its size."""
    rank, automatic = len(full), op.text("auto_pad", "NOTSET")
    pads = op.ints("pads", [0] * (2 * rank))
    wanted = op.ints("output_shape")[-rank:]
    if not wanted and automatic in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * stride for n, stride in zip(extents, strides, strict=True)]
    if wanted:
        total = [whole + more - size for whole, more, size in zip(full, extra, wanted, strict=True)]
        pads = _shared_out(total, automatic)  # the odd one before, unless SAME_UPPER
        return [max(0, n) for n in pads[:rank]], wanted
    sizes = [
        whole + more - before - after
        for whole, more, before, after in zip(full, extra, pads[:rank], pads[rank:], strict=True)
    ]
    return pads[:rank], sizes


def _dilated(op: Operator, weight: Any, dilations: Sequence[int]) -> Any:
    """A kernel with zeros between its taps."""
    for at, dilation in enumerate(dilations):
        axis, shape = at + 2, shape_of(weight)
        if dilation == 1 or shape[axis] == 1:
            continue
        spread = op.emit(relax.op.reshape(weight, [*shape[: axis + 1], 1, *shape[axis + 1 :]]))
        width = [0] * (2 * (len(shape) + 1))
        width[2 * (axis + 1) + 1] = dilation - 1
        spread = op.emit(relax.op.nn.pad(spread, width))
        shape[axis] *= dilation
        spread = op.emit(relax.op.reshape(spread, shape))
        weight = op.emit(relax.op.strided_slice(spread, [axis], [0], [shape[axis] - dilation + 1]))
    return weight


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
    strides, dilations, pads = _window(op, extents, size)
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
    if _is_float(x):
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
    least = np.finfo(np.float32).min if _is_float(x) else np.iinfo(dtype_of(x)).min
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
    strides, dilations, pads = _window(op, image, block)
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


# Norms


def _batch_norm(op: Operator) -> Any:
    x, scale, bias, mean, var = op.inputs[:5]
    epsilon, rank = op.number("epsilon", 1e-5), len(shape_of(x))
    if not op.flag("training_mode"):
        if rank > 1:
            return relax.op.nn.batch_norm(x, scale, bias, mean, var, 1, epsilon, training=False)
        raise UnsupportedError("is not supported on vectors")
    axes = [axis for axis in range(rank) if axis != 1]
    own_mean, own_var = op.emit(relax.op.mean(x, axes)), op.emit(relax.op.variance(x, axes))
    y = op.emit(relax.op.nn.batch_norm(x, scale, bias, own_mean, own_var, 1, epsilon, training=False))
    momentum = op.number("momentum", 0.9)
    y = op.emit(relax.TupleGetItem(y, 0))
    kept = [
        op.emit(
            relax.op.add(
                op.emit(relax.op.multiply(old, op.like(momentum, old))),
                op.emit(relax.op.multiply(new, op.like(1 - momentum, new))),
            )
        )
        for old, new in ((mean, own_mean), (var, own_var))
    ]
    return [y, *kept]


def _layer_norm(op: Operator) -> Any:
    x, scale, bias = op.input(0), op.input(1), op.input(2)
    rank = len(shape_of(x))
    axes = list(range(op.flag("axis", -1) % rank, rank))
    shape, epsilon, emit = [shape_of(x)[axis] for axis in axes], op.number("epsilon", 1e-5), op.emit
    if shape_of(scale) == shape and op.outputs == 1:
        zeros = op.constant(np.zeros(shape, np.float32)) if bias is None else bias
        return relax.op.nn.layer_norm(x, scale, zeros, axes, epsilon)
    mean = emit(relax.op.mean(x, axes, True))
    apart = emit(relax.op.subtract(x, mean))
    var = emit(relax.op.mean(emit(relax.op.multiply(apart, apart)), axes, True))
    inverse = emit(relax.op.divide(op.like(1, x), emit(relax.op.sqrt(emit(relax.op.add(var, op.like(epsilon, x)))))))
    y = emit(relax.op.multiply(emit(relax.op.multiply(apart, inverse)), scale))
    return [y if bias is None else emit(relax.op.add(y, bias)), mean, inverse][: op.outputs]


def _rms_norm(op: Operator) -> Any:
    x, scale, emit = op.input(0), op.input(1), op.emit
    rank = len(shape_of(x))
    axes = list(range(op.flag("axis", -1) % rank, rank))
    square = emit(relax.op.mean(emit(relax.op.multiply(x, x)), axes, True))
    norm = emit(relax.op.sqrt(emit(relax.op.add(square, op.like(op.number("epsilon", 1e-5), x)))))
    return relax.op.multiply(emit(relax.op.divide(x, norm)), scale)


# Quantisation: computed in float32 with the rounding kept


def _along(op: Operator, scale: Any, x: Any, axis: int) -> Any:
    """Scales or zero points spread over the axis, or the blocks of the axis, that they are of."""
    shape, block = shape_of(x), op.flag("block_size")
    if block and len(shape_of(scale)) == len(shape):
        repeated = op.emit(relax.op.repeat(scale, block, axis % len(shape)))
        return op.emit(relax.op.strided_slice(repeated, [axis % len(shape)], [0], [shape[axis]]))
    return _shaped_like_axis(op, scale, len(shape), axis)


def _range_of(dtype: str) -> tuple[int, int]:
    if not dtype.startswith(("int", "uint")):
        raise UnsupportedError(f"is not supported with {dtype}", "quantize to int8, uint8, int16 or uint16")
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _quantized(op: Operator, x: Any, scale: Any, zero: Any, dtype: str) -> Any:
    """``x`` in steps of ``scale``, rounded half to even, from ``zero`` on, within the range of ``dtype``."""
    low, high = _range_of(dtype)
    steps = op.emit(relax.op.round(op.emit(relax.op.divide(x, scale))))
    if zero is not None:
        steps = op.emit(relax.op.add(steps, op.emit(relax.op.astype(zero, "float32"))))
    return op.emit(relax.op.astype(op.emit(relax.op.clip(steps, float(low), float(high))), dtype))


def _quantize_linear(op: Operator) -> Any:
    from onnx.helper import tensor_dtype_to_np_dtype

    x, scale, zero = op.input(0), op.input(1), op.input(2)
    axis, kind = op.flag("axis", 1), op.flag("output_dtype")
    wanted = str(tensor_dtype_to_np_dtype(kind)) if kind else "uint8"
    dtype = wanted if zero is None else dtype_of(zero)
    x = x if _is_float(x) else op.emit(relax.op.astype(x, "float32"))
    point = None if zero is None else _along(op, zero, x, axis)
    return _quantized(op, x, _along(op, scale, x, axis), point, dtype)


def _dequantized(op: Operator, x: Any, scale: Any, zero: Any, axis: int) -> Any:
    steps = op.emit(relax.op.astype(x, "float32"))
    if zero is not None:
        zero = op.emit(relax.op.astype(_along(op, zero, x, axis), "float32"))
        steps = op.emit(relax.op.subtract(steps, zero))
    return op.emit(relax.op.multiply(steps, _along(op, scale, x, axis)))


def _dequantize_linear(op: Operator) -> Any:
    return _dequantized(op, op.input(0), op.input(1), op.input(2), op.flag("axis", 1))


def _dynamic_quantize_linear(op: Operator) -> Any:
    x, emit = op.input(0), op.emit
    zero = op.like(0, x)
    least = emit(relax.op.minimum(emit(relax.op.min(x)), zero))
    most = emit(relax.op.maximum(emit(relax.op.max(x)), zero))
    scale = emit(relax.op.divide(emit(relax.op.subtract(most, least)), op.like(255, x)))
    point = emit(relax.op.divide(emit(relax.op.negative(least)), scale))
    point = emit(relax.op.clip(emit(relax.op.round(point)), 0.0, 255.0))
    return [_quantized(op, x, scale, point, "uint8"), scale, relax.op.astype(point, "uint8")]


def _qlinear_mat_mul(op: Operator) -> Any:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = op.inputs
    left, right = _dequantized(op, a, a_scale, a_zero, -2), _dequantized(op, b, b_scale, b_zero, -1)
    return _quantized(op, op.emit(relax.op.matmul(left, right)), y_scale, y_zero, dtype_of(y_zero))


def _qlinear_conv(op: Operator) -> Any:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = op.inputs[:8]
    bias = op.input(8)
    if bias is not None:
        step = op.emit(relax.op.multiply(x_scale, w_scale))
        bias = op.emit(relax.op.multiply(op.emit(relax.op.astype(bias, "float32")), step))
    inputs = [_dequantized(op, x, x_scale, x_zero, 1), _dequantized(op, w, w_scale, w_zero, 0), bias]
    y = op.emit(_conv(Operator(op.importer, "Conv", inputs, op.attributes, 1, op.opset)))
    return _quantized(op, y, y_scale, y_zero, dtype_of(y_zero))


def _conv_integer(op: Operator) -> Any:
    """Through float32, which holds each product of bytes and sums of a thousand of them exactly."""
    x, w = (
        op.emit(relax.op.astype(_centred(op, op.input(at), op.input(at + 2), axis), "float32"))
        for at, axis in ((0, 1), (1, 0))
    )
    y = op.emit(_conv(Operator(op.importer, "Conv", [x, w], op.attributes, 1, op.opset)))
    return relax.op.astype(op.emit(relax.op.round(y)), "int32")


# Sampling


def _resize(op: Operator) -> Any:
    """Each axis by itself: picked by index where the mode is nearest, a product with a matrix where it is not."""
    x = op.input(0)
    shape = shape_of(x)
    axes = [axis % len(shape) for axis in op.ints("axes", range(len(shape)))]
    first = 1 if op.kind == "Upsample" or op.opset < 11 else 2
    given, wanted = op.known(first, "scales"), op.known(3, "sizes") if first == 2 else None
    mode = op.text("mode", "nearest")
    transform = op.text("coordinate_transformation_mode", "half_pixel" if first == 2 else "asymmetric")
    roi = op.known(1, "a region") if first == 2 and transform == "tf_crop_and_resize" else None
    if op.flag("antialias") and mode != "nearest":
        transform = f"{transform}+antialias"
    scales, sizes = _scales_and_sizes(op, [shape[axis] for axis in axes], given, wanted)
    if (known := _as_an_operator(op, x, axes, sizes, scales, mode, transform)) is not None:
        return known
    for at, axis in enumerate(axes):
        window = None if roi is None else (float(roi[at]), float(roi[at + len(axes)]))
        x = _resized(op, x, axis, sizes[at], scales[at], mode, transform, window)
    return x


def _scales_and_sizes(
    op: Operator, extents: list[int], scales: np.ndarray | None, sizes: np.ndarray | None
) -> tuple[list[float], list[int]]:
    if scales is not None and scales.size:
        return [float(scale) for scale in scales], [
            math.floor(extent * float(scale) + 1e-6) for extent, scale in zip(extents, scales, strict=True)
        ]
    if sizes is None:
        raise UnsupportedError("has neither scales nor sizes", "export the network again")
    ratios = [int(size) / extent for size, extent in zip(sizes, extents, strict=True)]
    policy = op.text("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return ratios, [int(size) for size in sizes]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [ratio] * len(extents), [math.floor(extent * ratio + 0.5) for extent in extents]


def _as_an_operator(
    op: Operator, x: Any, axes: list[int], sizes: list[int], scales: list[float], mode: str, transform: str
) -> Any:
    """Linear upsampling of pictures and clips as PyTorch has it, which has an operator of its own; else None."""
    shape, rank = shape_of(x), len(shape_of(x)) - 2
    target = list(shape)
    for axis, size in zip(axes, sizes, strict=True):
        target[axis] = size
    exact = all(abs(size - scale * shape[axis]) < 1e-6 for axis, size, scale in zip(axes, sizes, scales, strict=True))
    usual = mode == "linear" and transform in ("half_pixel", "align_corners") and _is_float(x)
    if rank not in (2, 3) or target[:2] != shape[:2] or not usual or not exact or min(target) == 0:
        return None
    if transform == "align_corners" and min(target[2:]) == 1:
        return None
    function = (relax.op.image.resize2d, relax.op.image.resize3d)[rank - 2]
    return function(x, tuple(target[2:]), method="linear", coordinate_transformation_mode=transform)


def _resized(
    op: Operator,
    x: Any,
    axis: int,
    size: int,
    scale: float,
    mode: str,
    transform: str,
    window: tuple[float, float] | None,
) -> Any:
    extent, rank = shape_of(x)[axis], len(shape_of(x))
    if size == extent and scale == 1.0 and window is None:
        return x
    if mode == "nearest":
        usual = "floor" if op.kind == "Upsample" or op.opset < 11 else "round_prefer_floor"
        positions, outside = nearest_positions(extent, size, scale, transform, op.text("nearest_mode", usual), window)
        picked = op.emit(relax.op.take(x, op.constant(positions), axis))
        if not outside.any():
            return picked
        mask = op.constant(outside.reshape([-1 if at == axis else 1 for at in range(rank)]))
        return op.emit(relax.op.where(mask, op.like(op.number("extrapolation_value", 0.0), x), picked))
    matrix, outside = interpolation_matrix(
        extent,
        size,
        scale,
        mode,
        transform,
        window,
        op.number("cubic_coeff_a", -0.75),
        bool(op.flag("exclude_outside")),
    )
    dtype = dtype_of(x)
    x = x if _is_float(x) else op.emit(relax.op.astype(x, "float32"))
    last = [*(at for at in range(rank) if at != axis), axis]
    y = op.emit(relax.op.permute_dims(x, last)) if last != list(range(rank)) else x
    y = op.emit(relax.op.matmul(y, op.constant(matrix.T.astype(np.float32))))
    if outside.any():
        y = op.emit(relax.op.where(op.constant(outside), op.like(op.number("extrapolation_value", 0.0), y), y))
    back = np.argsort(last).tolist()
    y = op.emit(relax.op.permute_dims(y, back)) if last != list(range(rank)) else y
    return y if dtype_of(y) == dtype else op.emit(relax.op.astype(op.emit(relax.op.round(y)), dtype))


def _grid_sample(op: Operator) -> Any:
    x, grid = op.inputs
    rank = len(shape_of(x)) - 2
    method = {"linear": "bilinear", "cubic": "bicubic"}.get(name := op.text("mode", "linear"), name)
    if rank not in (2, 3) or (rank == 3 and method == "bicubic"):
        raise UnsupportedError(f"is not supported with mode={name!r} over {rank} axes")
    grid = op.emit(relax.op.permute_dims(grid, [0, rank + 1, *range(1, rank + 1)]))
    return relax.op.image.grid_sample(
        x,
        grid,
        method=method,
        layout="NCHW" if rank == 2 else "NCDHW",
        padding_mode=op.text("padding_mode", "zeros"),
        align_corners=bool(op.flag("align_corners")),
    )


def _roi_align(op: Operator) -> Any:
    x, boxes, batches = op.inputs
    mode = op.text("mode", "avg")
    if mode != "avg":
        raise UnsupportedError(f"is not supported with mode={mode!r}", "use the mean")
    batches = op.emit(relax.op.reshape(op.emit(relax.op.astype(batches, dtype_of(x))), [-1, 1]))
    return relax.op.vision.roi_align(
        x,
        op.emit(relax.op.concat([batches, boxes], 1)),
        (op.flag("output_height", 1), op.flag("output_width", 1)),
        op.number("spatial_scale", 1.0),
        op.flag("sampling_ratio"),
        aligned=op.opset >= 16 and op.text("coordinate_transformation_mode", "half_pixel") == "half_pixel",
    )


#: Operators that are taken apart as the standard defines them, though TVM's importer has something by that name.
BY_DEFINITION = frozenset({"Attention", "AffineGrid", "MeanVarianceNormalization", "GroupNormalization"})

CONVERSIONS: dict[str, Conversion] = {
    "ArgMax": _argument(relax.op.argmax),
    "ArgMin": _argument(relax.op.argmin),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Celu": _celu,
    "CenterCropPad": _center_crop_pad,
    "Clip": _clip,
    "Col2Im": _col2im,
    "Compress": _compress,
    "Concat": _concat,
    "Conv": _conv,
    "ConvInteger": _conv_integer,
    "ConvTranspose": _conv_transpose,
    "CumProd": _scan_along(relax.op.cumprod),
    "CumSum": _scan_along(relax.op.cumsum),
    "DequantizeLinear": _dequantize_linear,
    "Dropout": _dropout,
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
    "Einsum": _einsum,
    "Elu": _elu,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "GridSample": _grid_sample,
    "Hardmax": _hardmax,
    "IsInf": _is_inf,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu,
    "LpNormalization": _lp_normalization,
    "LpPool": _lp_pool,
    "MatMulInteger": _mat_mul_integer,
    "Max": _variadic(relax.op.maximum),
    "MaxPool": _max_pool,
    "MaxUnpool": _max_unpool,
    "Mean": _mean,
    "Min": _variadic(relax.op.minimum),
    "Mod": _mod,
    "OneHot": _one_hot,
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _pow,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_mat_mul,
    "QuantizeLinear": _quantize_linear,
    "RMSNormalization": _rms_norm,
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
    "Reshape": _reshape,
    "Resize": _resize,
    "ReverseSequence": _reverse_sequence,
    "RoiAlign": _roi_align,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shrink": _shrink,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _variadic(relax.op.add),
    "TensorScatter": _tensor_scatter,
    "ThresholdedRelu": _thresholded_relu,
    "Tile": _tile,
    "TopK": _top_k,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
}
