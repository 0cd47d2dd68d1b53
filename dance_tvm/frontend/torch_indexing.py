"""ATen operators that pick elements, as Relax operators: index and gather in their forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_values import (
    Importer,
    arguments,
    cast,
    constant,
    constant_of,
    dtype_of,
    name_of,
    shape_of,
)

BY_MASK = "indexing by a mask gives a shape that depends on values: multiply by the mask instead"


def index(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x[:, i, :, j]`` by tensors of positions: axis by axis where they do not interact, else by flat position."""
    x, axes, chosen = indexed(node, importer)
    together = axes == list(range(axes[0], axes[0] + len(axes)))
    shape = list(np.broadcast_shapes(*(tuple(shape_of(each)) for each in chosen)))
    if 0 in shape_of(x):
        return relax.op.zeros(list(node.meta["val"].shape), dtype_of(x))
    if together and _is_grid(chosen, shape):
        return _take_grid(importer, x, axes, chosen)
    return _take_flat(importer, x, axes, chosen, shape, axes[0] if together else 0)


def indexed(node: fx.Node, importer: Importer) -> tuple[relax.Expr, list[int], list[relax.Expr]]:
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
        raise DanceError(BY_MASK)
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
    x, rest = indexed_first(importer, x, axes)
    flat = flat_positions(importer, indices, shape_of(x)[: len(axes)], shape)
    x = emit(relax.op.reshape(x, [-1, *shape_of(x)[len(axes) :]]))
    taken = emit(relax.op.take(x, flat, 0))
    before = rest[:at]
    order = [len(shape) + i for i in range(len(before))] + list(range(len(shape)))
    order += [len(shape) + i for i in range(len(before), len(rest))]
    return taken if order == sorted(order) else emit(relax.op.permute_dims(taken, order))


def indexed_first(importer: Importer, x: relax.Expr, axes: list[int]) -> tuple[relax.Expr, list[int]]:
    """``x`` with ``axes`` in front, and the axes that follow them."""
    rest = [axis for axis in range(len(shape_of(x))) if axis not in axes]
    if axes + rest != list(range(len(shape_of(x)))):
        x = importer.block_builder.emit(relax.op.permute_dims(x, axes + rest))
    return x, rest


def flat_positions(importer: Importer, indices: list[relax.Expr], extents: list[int], shape: list[int]) -> relax.Expr:
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
    """A view by strides, as elements taken from the flat tensor whose memory it is a view of, maybe through others."""
    base: fx.Node = node.args[0]  # type: ignore[assignment]  # a tensor
    views = [node]
    while getattr(base.target, "is_view", False):
        views.append(base)
        base = base.args[0]  # type: ignore[assignment]  # what a view is of
    held = base.meta["val"]
    if not held.is_contiguous() or held.storage_offset():
        raise DanceError("the tensor that it is a view of does not lie in order: use slices")
    places = torch.arange(held.numel()).reshape(held.shape)
    try:
        for view in reversed(views):
            places = view.target(places, *view.args[1:], **view.kwargs)  # type: ignore[operator]  # a function
    except RuntimeError as problem:
        raise DanceError("its strides reach outside the tensor: use slices") from problem
    emit = importer.block_builder.emit
    flat = emit(relax.op.reshape(importer.env[base], [-1]))
    return emit(relax.op.take(flat, constant(places.contiguous().numpy()), 0))


def copy(node: fx.Node, importer: Importer) -> relax.Expr:
    """The second tensor in the first one's shape and type, as assignment to a view writes it."""
    expected = node.meta["val"]
    value = cast(importer, importer.env[node.args[1]], name_of(expected.dtype))
    shape = list(expected.shape)
    return value if shape_of(value) == shape else importer.block_builder.emit(relax.op.broadcast_to(value, shape))


INDEXING: dict[str, Callable[[fx.Node, Importer], Any]] = {
    "index.Tensor": index,
    "_unsafe_index.Tensor": index,
    "index_select.default": index_select,
    "gather.default": gather,
    "as_strided.default": as_strided,
    "copy.default": copy,
}
