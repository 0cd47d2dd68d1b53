"""ATen operators that place elements, as Relax operators: scatter and slice assignment in their forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_indexing import BY_MASK, flat_positions, indexed, indexed_first
from dance_tvm.frontend.torch_values import (
    Conversion,
    Importer,
    arguments,
    cast,
    constant,
    constant_of,
    dtype_of,
    shape_of,
)


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
    x, axes, chosen = indexed(node, importer)
    shape = list(np.broadcast_shapes(*(tuple(shape_of(each)) for each in chosen)))
    together = axes == list(range(axes[0], axes[0] + len(axes)))
    return _put(importer, x, axes, chosen, shape, values, axes[0] if together else 0, accumulate)


def _put_by_mask(node: fx.Node, importer: Importer, values: relax.Expr, accumulate: bool) -> relax.Expr:
    emit, x, indices = importer.block_builder.emit, importer.env[node.args[0]], arguments(node)["indices"]
    places = [axis for axis, each in enumerate(indices) if each is not None]
    if len(places) != 1 or any(n != 1 for n in shape_of(values)):
        raise DanceError(f"{BY_MASK}, or assign a single value")
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
    x, rest = indexed_first(importer, x, axes)
    extents = shape_of(x)
    count, rows = int(np.prod(shape)), extents[len(axes) :]
    if 0 in (count, *rows):
        return before
    wanted = [*rows[:at], *shape, *rows[at:]]
    values = values if shape_of(values) == wanted else emit(relax.op.broadcast_to(values, wanted))
    order = [*range(at, at + len(shape)), *range(at), *range(at + len(shape), len(wanted))]
    values = values if order == sorted(order) else emit(relax.op.permute_dims(values, order))
    flat = flat_positions(importer, indices, extents[: len(axes)], shape)
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


SCATTERING: dict[str, Conversion] = {
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
