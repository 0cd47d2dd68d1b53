"""ATen operators that pick or place elements, as Relax operators: index, slice and scatter in their forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_values import (
    Conversion,
    Importer,
    arguments,
    cast,
    constant,
    constant_of,
    dtype_of,
    name_of,
    shape_of,
)

_BY_MASK = "indexing by a mask gives a shape that depends on values: multiply by the mask instead"


# --- pick ---


def index(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x[:, i, :, j]`` by tensors of positions: axis by axis where they do not interact, else by flat position."""
    x, axes, chosen = _indexed(node, importer)
    together = axes == list(range(axes[0], axes[0] + len(axes)))
    shape = list(np.broadcast_shapes(*(tuple(shape_of(each)) for each in chosen)))
    if 0 in shape_of(x):
        return relax.op.zeros(list(node.meta["val"].shape), dtype_of(x))
    if together and _is_grid(chosen, shape):
        return _take_grid(importer, x, axes, chosen)
    return _take_flat(importer, x, axes, chosen, shape, axes[0] if together else 0)


def _indexed(node: fx.Node, importer: Importer) -> tuple[relax.Expr, list[int], list[relax.Expr]]:
    """The tensor that is indexed, the axes that are, and their positions: integers, none negative."""
    x = importer.env[node.args[0]]
    axes: list[int] = []
    chosen: list[relax.Expr] = []
    axis = 0
    for each in arguments(node)["indices"]:
        if each is None:
            axis += 1
            continue
        for value in _positions(importer, each):
            axes.append(axis)
            chosen.append(_not_negative(importer, value, shape_of(x)[axis]))
            axis += 1
    return x, axes, chosen


def _positions(importer: Importer, node: fx.Node) -> list[relax.Expr]:
    """The positions that an index names: its own, or those where a constant mask is true, one tensor for each axis."""
    value = importer.env[node]
    if dtype_of(value) not in ("bool", "uint8"):
        return [value]
    mask = importer.parameter(node)
    if mask is None:
        raise DanceError(_BY_MASK)
    return [constant(places.numpy()) for places in mask.bool().nonzero(as_tuple=True)]


def _not_negative(importer: Importer, value: relax.Expr, extent: int) -> relax.Expr:
    places = constant_of(value)
    if places is not None:
        return constant(np.where(places < 0, places + extent, places).astype(places.dtype))
    emit, dtype = importer.block_builder.emit, dtype_of(value)
    negative = emit(relax.op.less(value, relax.const(0, dtype)))
    wrapped = emit(relax.op.add(value, relax.const(extent, dtype)))
    return emit(relax.op.where(negative, wrapped, value))


def _is_grid(indices: Sequence[relax.Expr], shape: list[int]) -> bool:
    """Whether the n-th index varies along the n-th axis of the result alone."""
    if len(indices) != len(shape):
        return False
    for position, each in enumerate(indices):
        aligned = [1] * (len(shape) - len(shape_of(each))) + shape_of(each)
        if any(extent != 1 for axis, extent in enumerate(aligned) if axis != position):
            return False
    return True


def _take_grid(importer: Importer, x: relax.Expr, axes: list[int], indices: list[relax.Expr]) -> relax.Expr:
    emit = importer.block_builder.emit
    for axis, each in zip(axes, indices, strict=True):
        line = each if len(shape_of(each)) == 1 else emit(relax.op.reshape(each, [-1]))
        x = emit(relax.op.take(x, line, axis))
    return x


def _take_flat(
    importer: Importer, x: relax.Expr, axes: list[int], indices: list[relax.Expr], shape: list[int], at: int
) -> relax.Expr:
    """Bring the indexed axes to the front, take by their flat position, and put the result's axes at ``at``."""
    emit = importer.block_builder.emit
    x, rest = _indexed_first(importer, x, axes)
    flat = _flat_positions(importer, indices, shape_of(x)[: len(axes)], shape)
    x = emit(relax.op.reshape(x, [-1, *shape_of(x)[len(axes) :]]))
    taken = emit(relax.op.take(x, flat, 0))
    before = rest[:at]
    order = [len(shape) + i for i in range(len(before))] + list(range(len(shape)))
    order += [len(shape) + i for i in range(len(before), len(rest))]
    return taken if order == sorted(order) else emit(relax.op.permute_dims(taken, order))


def _indexed_first(importer: Importer, x: relax.Expr, axes: list[int]) -> tuple[relax.Expr, list[int]]:
    """``x`` with ``axes`` in front, and the axes that follow them."""
    rest = [axis for axis in range(len(shape_of(x))) if axis not in axes]
    if axes + rest != list(range(len(shape_of(x)))):
        x = importer.block_builder.emit(relax.op.permute_dims(x, axes + rest))
    return x, rest


def _flat_positions(importer: Importer, indices: list[relax.Expr], extents: list[int], shape: list[int]) -> relax.Expr:
    """Positions along several axes as positions along these axes flattened, of the shape ``shape``."""
    known = [constant_of(each) for each in indices]
    places = [each for each in known if each is not None]
    if len(places) == len(indices):
        return constant(np.ravel_multi_index(tuple(np.broadcast_arrays(*places)), extents).astype(np.int64))
    emit = importer.block_builder.emit
    flat = cast(importer, indices[0], "int64")
    for extent, each in zip(extents[1:], indices[1:], strict=True):
        flat = emit(relax.op.multiply(flat, relax.const(extent, "int64")))
        flat = emit(relax.op.add(flat, cast(importer, each, "int64")))
    return flat if shape_of(flat) == shape else emit(relax.op.broadcast_to(flat, shape))


def index_select(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x`` at some positions of one axis; a scalar has an axis of one."""
    x, axis, positions = importer.retrieve_args(node)
    emit = importer.block_builder.emit
    if not shape_of(x):
        return x
    if not shape_of(positions):
        positions = emit(relax.op.reshape(positions, [1]))
    return emit(relax.op.take(x, positions, axis))


def gather(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x[i][index[i][j]]`` along one axis; ``index`` may be shorter than ``x`` along the others."""
    x, axis, positions, *_ = importer.retrieve_args(node)
    emit = importer.block_builder.emit
    shape = shape_of(positions)
    if not shape_of(x):
        return x if not shape else emit(relax.op.broadcast_to(emit(relax.op.reshape(x, [1])), shape))
    if not shape:
        positions = emit(relax.op.reshape(positions, [1]))
        return emit(relax.op.reshape(gather_along(importer, x, axis, positions), []))
    return gather_along(importer, x, axis, positions)


def gather_along(importer: Importer, x: relax.Expr, axis: int, positions: relax.Expr) -> relax.Expr:
    """The elements of ``x`` at ``positions`` along ``axis``, as ``torch.gather`` takes them."""
    emit, shape = importer.block_builder.emit, shape_of(positions)
    axis %= len(shape)
    others = [i for i in range(len(shape)) if i != axis and shape[i] < shape_of(x)[i]]
    if others:
        x = emit(relax.op.strided_slice(x, others, [0] * len(others), [shape[i] for i in others]))
    return emit(relax.op.gather_elements(x, cast(importer, positions, "int64"), axis))


def as_strided(node: fx.Node, importer: Importer) -> relax.Expr:
    """A view by strides, as elements taken from the flat tensor."""
    given = arguments(node)
    source = given["self"].meta["val"]
    offset = given.get("storage_offset")
    offset = source.storage_offset() if offset is None else offset
    places = np.full((1,) * len(given["size"]), offset, np.int64)
    for axis, (extent, stride) in enumerate(zip(given["size"], given["stride"], strict=True)):
        places = places + (np.arange(extent) * stride).reshape([-1 if i == axis else 1 for i in range(places.ndim)])
    if not source.is_contiguous() or (places.size and places.max() >= source.numel()):
        raise DanceError("its strides reach outside of the tensor, or the tensor is itself a view: use slices")
    emit = importer.block_builder.emit
    flat = emit(relax.op.reshape(importer.env[node.args[0]], [-1]))
    return emit(relax.op.take(flat, constant(places), 0))


# --- place ---


def copy(node: fx.Node, importer: Importer) -> relax.Expr:
    """The second tensor in the first one's shape and type, as assignment to a view writes it."""
    expected = node.meta["val"]
    value = cast(importer, importer.env[node.args[1]], name_of(expected.dtype))
    shape = list(expected.shape)
    return value if shape_of(value) == shape else importer.block_builder.emit(relax.op.broadcast_to(value, shape))


def slice_scatter(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x`` with ``x[:, start:end:step]`` replaced: the pieces put together, or taken one by one."""
    given = arguments(node)
    x, source = importer.env[node.args[0]], importer.env[node.args[1]]
    axis = (given.get("dim") or 0) % len(shape_of(x))
    extent = shape_of(x)[axis]
    places = range(extent)[slice(given.get("start"), given.get("end"), given.get("step") or 1)]
    return _placed(importer, x, cast(importer, source, dtype_of(x)), axis, places)


def select_scatter(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x`` with ``x[:, index]`` replaced."""
    given = arguments(node)
    x, source = importer.env[node.args[0]], importer.env[node.args[1]]
    axis = given["dim"] % len(shape_of(x))
    place = given["index"] % shape_of(x)[axis]
    source = importer.block_builder.emit(relax.op.expand_dims(cast(importer, source, dtype_of(x)), axis))
    return _placed(importer, x, source, axis, range(place, place + 1))


def _placed(importer: Importer, x: relax.Expr, source: relax.Expr, axis: int, places: Sequence[int]) -> relax.Expr:
    """``x`` with what ``source`` holds at ``places`` of ``axis``."""
    emit, extent = importer.block_builder.emit, shape_of(x)[axis]
    if len(places) == extent:
        return source
    if not places or 0 in shape_of(source):
        return x
    if list(places) == list(range(places[0], places[0] + len(places))):
        first, last = places[0], places[-1] + 1
        parts = [emit(relax.op.strided_slice(x, [axis], [0], [first]))] if first else []
        parts += [source]
        parts += [emit(relax.op.strided_slice(x, [axis], [last], [extent]))] if last < extent else []
        return emit(relax.op.concat(parts, axis))
    order = np.arange(extent)
    order[list(places)] = extent + np.arange(len(places))
    return emit(relax.op.take(emit(relax.op.concat([x, source], axis)), constant(order), axis))


def diagonal_scatter(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x`` with a diagonal replaced."""
    given = arguments(node)
    expected = node.meta["val"]
    places = torch.arange(expected.numel()).reshape(expected.shape)
    diagonal = places.diagonal(given.get("offset") or 0, *(given.get(f"dim{i}", i - 1) for i in (1, 2)))
    x, source = importer.env[node.args[0]], importer.env[node.args[1]]
    return _placed_flat(importer, x, source, diagonal.numpy())


def as_strided_scatter(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x`` with the elements that a view by strides shows replaced."""
    given = arguments(node)
    expected = node.meta["val"]
    places = torch.arange(expected.numel()).as_strided(given["size"], given["stride"], given.get("storage_offset") or 0)
    return _placed_flat(importer, importer.env[node.args[0]], importer.env[node.args[1]], places.numpy())


def _placed_flat(importer: Importer, x: relax.Expr, source: relax.Expr, places: np.ndarray) -> relax.Expr:
    """``x`` with ``source`` at the flat positions ``places``; of equal positions the last one counts."""
    emit, shape = importer.block_builder.emit, shape_of(x)
    order = np.arange(int(np.prod(shape)))
    order[places.reshape(-1)] = order.size + np.arange(places.size)
    lines = [emit(relax.op.reshape(each, [-1])) for each in (x, cast(importer, source, dtype_of(x)))]
    taken = emit(relax.op.take(emit(relax.op.concat(lines, 0)), constant(order), 0))
    return emit(relax.op.reshape(taken, shape))


def index_put(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x[:, i, :, j] = values`` or ``+= values``; ``x[mask] = value`` where the mask decides at run time."""
    given = arguments(node)
    accumulate = bool(given.get("accumulate"))
    values = cast(importer, importer.env[node.args[2]], dtype_of(importer.env[node.args[0]]))
    masks = [
        each for each in given["indices"] if each is not None and dtype_of(importer.env[each]) in ("bool", "uint8")
    ]
    if any(importer.parameter(mask) is None for mask in masks):
        return _put_by_mask(node, importer, values, accumulate)
    x, axes, chosen = _indexed(node, importer)
    shape = list(np.broadcast_shapes(*(tuple(shape_of(each)) for each in chosen)))
    together = axes == list(range(axes[0], axes[0] + len(axes)))
    return _put(importer, x, axes, chosen, shape, values, axes[0] if together else 0, accumulate)


def _put_by_mask(node: fx.Node, importer: Importer, values: relax.Expr, accumulate: bool) -> relax.Expr:
    emit, x, indices = importer.block_builder.emit, importer.env[node.args[0]], arguments(node)["indices"]
    places = [axis for axis, each in enumerate(indices) if each is not None]
    if len(places) != 1 or any(n != 1 for n in shape_of(values)):
        raise DanceError(f"{_BY_MASK}, or assign a single value")
    before = places[0]
    mask = cast(importer, importer.env[indices[before]], "bool")
    after = len(shape_of(x)) - before - len(shape_of(mask))
    mask = emit(relax.op.reshape(mask, [1] * before + shape_of(mask) + [1] * after))
    value = emit(relax.op.reshape(values, []))
    value = emit(relax.op.add(x, value)) if accumulate else value
    return emit(relax.op.where(mask, value, x))


def _put(
    importer: Importer,
    x: relax.Expr,
    axes: list[int],
    indices: list[relax.Expr],
    shape: list[int],
    values: relax.Expr,
    at: int,
    accumulate: bool,
) -> relax.Expr:
    """``values`` (its indexed axes at ``at``) placed into ``x`` row by row, the indexed axes flattened in front."""
    emit, before = importer.block_builder.emit, x
    x, rest = _indexed_first(importer, x, axes)
    extents = shape_of(x)
    count, rows = int(np.prod(shape)), extents[len(axes) :]
    if 0 in (count, *rows):
        return before
    wanted = [*rows[:at], *shape, *rows[at:]]
    values = values if shape_of(values) == wanted else emit(relax.op.broadcast_to(values, wanted))
    order = [*range(at, at + len(shape)), *range(at), *range(at + len(shape), len(wanted))]
    values = values if order == sorted(order) else emit(relax.op.permute_dims(values, order))
    flat = _flat_positions(importer, indices, extents[: len(axes)], shape)
    lines = emit(relax.op.reshape(x, [-1, *rows]))
    placed = emit(relax.op.reshape(values, [count, *rows]))
    result = emit(relax.op.reshape(_put_rows(importer, lines, flat, placed, count, accumulate), extents))
    back = np.argsort([*axes, *rest]).tolist()
    return result if back == sorted(back) else emit(relax.op.permute_dims(result, back))


def _put_rows(
    importer: Importer, lines: relax.Expr, flat: relax.Expr, placed: relax.Expr, count: int, accumulate: bool
) -> relax.Expr:
    emit = importer.block_builder.emit
    places = constant_of(flat)
    if places is not None and not accumulate:
        order = np.arange(shape_of(lines)[0])
        order[places.reshape(-1)] = order.size + np.arange(count)
        return emit(relax.op.take(emit(relax.op.concat([lines, placed], 0)), constant(order), 0))
    positions = emit(relax.op.reshape(flat, [count, 1]))
    return emit(relax.op.scatter_nd(lines, positions, placed, "add" if accumulate else "update"))


_REDUCTIONS = {
    None: "update",
    "add": "add",
    "multiply": "mul",
    "sum": "add",
    "prod": "mul",
    "amax": "max",
    "amin": "min",
}


def scatter(reduction: str | None = None) -> Conversion:
    """``x`` with ``source`` placed along one axis where ``index`` says; the index may be shorter than both."""

    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        given = arguments(node)
        x, positions = importer.env[node.args[0]], importer.env[node.args[2]]
        source = given.get("src", given.get("value"))
        source = importer.env[source] if isinstance(source, fx.Node) else source
        how = reduction or given.get("reduce")
        if how not in _REDUCTIONS or given.get("include_self") is False:
            return _scatter_apart(importer, x, given["dim"], positions, source, how, given.get("include_self", True))
        return _scattered(importer, x, given["dim"], positions, source, _REDUCTIONS[how])

    return convert


def _scattered(
    importer: Importer, x: relax.Expr, axis: int, positions: relax.Expr, source: Any, how: str
) -> relax.Expr:
    emit, shape = importer.block_builder.emit, shape_of(x)
    if 0 in shape_of(positions):
        return x
    source = cast(importer, source, dtype_of(x))
    line, at, of = (each if shape_of(each) else emit(relax.op.reshape(each, [1])) for each in (x, positions, source))
    extents = shape_of(at)
    axis %= len(extents)
    if shape_of(of) == [1] * len(shape_of(of)) and len(shape_of(of)) != len(extents):
        of = emit(relax.op.broadcast_to(of, extents))
    longer = [i for i, extent in enumerate(extents) if extent < shape_of(of)[i]]
    if longer:
        of = emit(relax.op.strided_slice(of, longer, [0] * len(longer), [extents[i] for i in longer]))
    others = [i for i, extent in enumerate(extents) if i != axis and extent < shape_of(line)[i]]
    at = cast(importer, at, "int64")
    if others:
        # TVM walks every line of x: scatter into the lines that the index has, and put these back.
        part = emit(relax.op.strided_slice(line, others, [0] * len(others), [extents[i] for i in others]))
        placed = emit(relax.op.scatter_elements(part, at, of, axis, how))
        return _replaced_corner(importer, line, placed, others)
    placed = emit(relax.op.scatter_elements(line, at, of, axis, how))
    return placed if shape else emit(relax.op.reshape(placed, []))


def _replaced_corner(importer: Importer, x: relax.Expr, corner: relax.Expr, axes: list[int]) -> relax.Expr:
    """``x`` whose first positions along ``axes`` are ``corner``'s."""
    axis, *rest = axes
    extent = shape_of(corner)[axis]
    if rest:
        first = importer.block_builder.emit(relax.op.strided_slice(x, [axis], [0], [extent]))
        corner = _replaced_corner(importer, first, corner, rest)
    return _placed(importer, x, corner, axis, range(extent))


def _scatter_apart(
    importer: Importer,
    x: relax.Expr,
    axis: int,
    positions: relax.Expr,
    source: relax.Expr,
    how: str | None,
    include_self: bool,
) -> relax.Expr:
    """Means, and reductions that leave out what stood there: by counting what arrives at each position."""
    emit, dtype = importer.block_builder.emit, dtype_of(x)
    if how not in ("mean", "sum", "prod", "amax", "amin"):
        raise DanceError(f"the reduction {how!r} is not supported")
    zeros = emit(relax.op.zeros_like(x))
    ones = constant(np.ones(shape_of(source), dtype))
    count = _scattered(importer, zeros, axis, positions, ones, "add")
    touched = emit(relax.op.greater(count, relax.const(0, dtype)))
    start = x
    if not include_self:
        limits = torch.finfo(getattr(torch, dtype)) if "float" in dtype else torch.iinfo(getattr(torch, dtype))
        low = -np.inf if "float" in dtype else limits.min
        high = np.inf if "float" in dtype else limits.max
        neutral = {"prod": 1, "amax": low, "amin": high}.get(how, 0)
        start = emit(relax.op.where(touched, relax.const(neutral, dtype), x))
    result = _scattered(importer, start, axis, positions, source, _REDUCTIONS.get(how, "add"))
    if how != "mean":
        return result
    count = emit(relax.op.add(count, relax.const(1, dtype))) if include_self else count
    divide = relax.op.divide if "float" in dtype else relax.op.floor_divide
    mean = emit(divide(result, emit(relax.op.maximum(count, relax.const(1, dtype)))))
    return emit(relax.op.where(touched, mean, x))


def scatter_add(node: fx.Node, importer: Importer) -> relax.Expr:
    """As ``torch.scatter_add``."""
    return scatter("add")(node, importer)


INDEXING: dict[str, Callable[[fx.Node, Importer], Any]] = {
    "index.Tensor": index,
    "_unsafe_index.Tensor": index,
    "index_select.default": index_select,
    "gather.default": gather,
    "as_strided.default": as_strided,
    "copy.default": copy,
    "slice_scatter.default": slice_scatter,
    "select_scatter.default": select_scatter,
    "diagonal_scatter.default": diagonal_scatter,
    "as_strided_scatter.default": as_strided_scatter,
    "index_put.default": index_put,
    "_unsafe_index_put.default": index_put,
    "scatter.src": scatter(),
    "scatter.value": scatter(),
    "scatter.reduce": scatter(),
    "scatter.value_reduce": scatter(),
    "scatter_add.default": scatter_add,
    "scatter_reduce.two": scatter(),
}
