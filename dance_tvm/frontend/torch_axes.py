"""ATen operators that walk along one axis or cut it: running sums and extremes, splits, flat ``take``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_values import (
    Conversion,
    Importer,
    arguments,
    cast,
    constant,
    dtype_of,
    name_of,
    shape_of,
)
from dance_tvm.ir.split import split

# A running extreme compares every element with all before it.
_MOST_PAIRS = 1 << 24


def _running(extreme: Callable[..., relax.Expr], lowest: float) -> Conversion:
    """``cummax`` and ``cummin``: the extreme so far and the last place where it stands, NaN above all others."""

    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        given, emit = arguments(node), importer.block_builder.emit
        x = importer.env[given["self"]]
        shape = shape_of(x)
        if not shape:
            return emit(relax.Tuple([x, relax.const(0, "int64")]))
        axis = given["dim"] % len(shape)
        extent = shape[axis]
        if math.prod(shape) * extent > _MOST_PAIRS:
            raise DanceError(f"a running extreme over {extent} elements of shape {tuple(shape)} takes too long")
        if not dtype_of(x).startswith("float"):
            raise DanceError("a running extreme is supported for floats only: convert its input to float first")
        last = [place for place in range(len(shape)) if place != axis]
        moved = emit(relax.op.permute_dims(x, [*last, axis]))
        pairs = [shape[place] for place in last] + [extent, extent]
        spread = emit(relax.op.broadcast_to(emit(relax.op.expand_dims(moved, len(shape) - 1)), pairs))
        seen = constant(np.tri(extent, dtype=bool))
        values = emit(extreme(emit(relax.op.where(seen, spread, relax.const(lowest, dtype_of(x)))), [-1]))
        known = emit(relax.op.expand_dims(values, len(shape)))
        same = emit(relax.op.equal(spread, known))
        unknown = emit(relax.op.logical_and(emit(relax.op.isnan(spread)), emit(relax.op.isnan(known))))
        here = emit(relax.op.logical_and(emit(relax.op.logical_or(same, unknown)), seen))
        numbers = constant(np.arange(extent, dtype="int64"))
        places = emit(relax.op.max(emit(relax.op.where(here, numbers, relax.const(-1, "int64"))), [-1]))
        order = [*range(axis), len(shape) - 1, *range(axis, len(shape) - 1)]
        return emit(relax.Tuple([emit(relax.op.permute_dims(each, order)) for each in (values, places)]))

    return convert


def _scan(operator: Callable[..., relax.Expr]) -> Conversion:
    """``cumsum`` and ``cumprod`` in the type that PyTorch gives; of a scalar it is the scalar."""

    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        given = arguments(node)
        x = cast(importer, importer.env[given["self"]], name_of(node.meta["val"].dtype))
        return importer.block_builder.emit(operator(x, given["dim"])) if shape_of(x) else x

    return convert


def _split_with_sizes(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x`` cut into parts of given sizes."""
    given, emit = arguments(node), importer.block_builder.emit
    x, sizes = importer.env[given["self"]], [int(size) for size in given["split_sizes"]]
    axis = given.get("dim", 0)
    if len(sizes) > 1 and all(sizes):  # later passes know the parts by the operator that they come from
        return emit(relax.op.split(x, np.cumsum(sizes)[:-1].tolist(), axis))
    return emit(relax.Tuple(split(emit, x, sizes, axis)))


def _take(node: fx.Node, importer: Importer) -> relax.Expr:
    """Elements by their place in the flattened tensor, places below zero counted from its end."""
    given, emit = arguments(node), importer.block_builder.emit
    x, places = importer.env[given["self"]], cast(importer, importer.env[given["index"]], "int64")
    count = math.prod(shape_of(x))
    below = emit(relax.op.less(places, relax.const(0, "int64")))
    places = emit(relax.op.where(below, emit(relax.op.add(places, relax.const(count, "int64"))), places))
    return emit(relax.op.take(emit(relax.op.reshape(x, [count])), places, 0))


AXES: dict[str, Callable[[fx.Node, Importer], Any]] = {
    "cummax.default": _running(relax.op.max, -math.inf),
    "cummin.default": _running(relax.op.min, math.inf),
    "cumsum.default": _scan(relax.op.cumsum),
    "cumprod.default": _scan(relax.op.cumprod),
    "split_with_sizes.default": _split_with_sizes,
    "take.default": _take,
}
