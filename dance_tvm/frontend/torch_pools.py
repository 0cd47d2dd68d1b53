"""ATen's pools, as Relax operators."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_convolutions import LAYOUTS, spread
from dance_tvm.frontend.torch_values import (
    Conversion,
    Importer,
    Operator,
    constant,
    dtype_of,
    shape_of,
)

# Each takes an operator or two of its own.
_MOST_CELLS = 512


_MAX_POOLS: dict[int, Operator] = {
    1: relax.op.nn.max_pool1d,
    2: relax.op.nn.max_pool2d,
    3: relax.op.nn.max_pool3d,
}


_AVG_POOLS: dict[int, Operator] = {
    1: relax.op.nn.avg_pool1d,
    2: relax.op.nn.avg_pool2d,
    3: relax.op.nn.avg_pool3d,
}


def _argument(node: fx.Node, importer: Importer, index: int, name: str, default: Any) -> Any:
    args = importer.retrieve_args(node)
    value = args[index] if len(args) > index else node.kwargs.get(name, default)
    return default if value is None or value == [] else value


def _overhang(x: relax.Expr, output: torch.Tensor, span: list[int], stride: list[int], padding: list[int]) -> list[int]:
    """How far the last window of each axis reaches past the padded input: what ceil_mode adds, often nothing."""
    rank = len(span)
    inputs, outputs = shape_of(x)[-rank:], output.shape[-rank:]
    return [max(0, (outputs[i] - 1) * stride[i] + span[i] - inputs[i] - 2 * padding[i]) for i in range(rank)]


def _max_pool(rank: int, *, with_indices: bool) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        x = importer.env[node.args[0]]
        size = spread(node.args[1], rank)
        stride = spread(_argument(node, importer, 2, "stride", size), rank)
        padding = spread(_argument(node, importer, 3, "padding", 0), rank)
        dilation = spread(_argument(node, importer, 4, "dilation", 1), rank)
        output = node.meta["val"][0] if with_indices else node.meta["val"]
        span = [dilation[i] * (size[i] - 1) + 1 for i in range(rank)]
        after = [a + b for a, b in zip(padding, _overhang(x, output, span, stride, padding), strict=True)]
        pooled = _MAX_POOLS[rank](x, size, stride, [*padding, *after], dilation, layout=LAYOUTS[rank][0])
        pooled = importer.block_builder.emit(pooled)
        if not with_indices:
            return pooled
        places = pooled  # never read
        if any(user.args[1] == 1 and user.users for user in node.users):
            places = _places_of_maxima(importer, x, rank, [padding, after, stride, dilation, size], output)
        return importer.block_builder.emit(relax.Tuple([pooled, places]))

    return convert


def _places_of_maxima(
    importer: Importer, x: relax.Expr, rank: int, window: list[list[int]], output: torch.Tensor
) -> relax.Expr:
    """The flat position of each window's largest value, the first of equal ones and the last NaN: tap by tap."""
    padding, after, stride, dilation, size = window
    emit, extents, dtype = importer.block_builder.emit, shape_of(x)[-rank:], dtype_of(x)
    lead = len(shape_of(x)) - rank
    width = [0, 0] * lead + [amount for pair in zip(padding, after, strict=True) for amount in pair]
    lowest = -math.inf if "float" in dtype else torch.iinfo(getattr(torch, dtype)).min
    x = emit(relax.op.nn.pad(x, width, pad_value=lowest)) if any(width) else x
    grid = np.arange(math.prod(extents)).reshape(extents)
    grid = np.pad(grid, [*zip(padding, after, strict=True)], constant_values=-1)
    best, places = None, None
    for tap in product(*map(range, size)):
        begin = [tap[i] * dilation[i] for i in range(rank)]
        end = [begin[i] + (output.shape[lead + i] - 1) * stride[i] + 1 for i in range(rank)]
        value = emit(relax.op.strided_slice(x, list(range(lead, lead + rank)), begin, end, stride))
        here = grid[tuple(slice(begin[i], end[i], stride[i]) for i in range(rank))]
        at = constant(np.ascontiguousarray(here, np.int64).reshape([1] * lead + list(here.shape)))
        if best is None:
            best, places = value, emit(relax.op.broadcast_to(at, list(output.shape)))
            continue
        larger = emit(relax.op.greater(value, best))
        if "float" in dtype:
            larger = emit(relax.op.logical_or(larger, emit(relax.op.not_equal(value, value))))
        if any(width):  # where all is the lowest, a place in the padding is none
            larger = emit(relax.op.logical_or(larger, emit(relax.op.less(places, relax.const(0, "int64")))))
        best, places = emit(relax.op.where(larger, value, best)), emit(relax.op.where(larger, at, places))
    assert places is not None
    return places


def _avg_pool(rank: int) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        emit, x = importer.block_builder.emit, importer.env[node.args[0]]
        size = spread(node.args[1], rank)
        stride = spread(_argument(node, importer, 2, "stride", size), rank)
        padding = spread(_argument(node, importer, 3, "padding", 0), rank)
        include = bool(_argument(node, importer, 5, "count_include_pad", True))
        divisor = _argument(node, importer, 6, "divisor_override", None)
        overhang = _overhang(x, node.meta["val"], size, stride, padding)
        after = [a + b for a, b in zip(padding, overhang, strict=True)]
        if divisor is None and include and any(overhang):
            # PyTorch counts padding but not what lies beyond it: pad first, then count what is there.
            x = emit(relax.op.nn.pad(x, [0, 0, 0, 0, *(p for pad in padding for p in (pad, pad))]))
            padding, after, include = [0] * rank, overhang, False
        pooled = emit(
            _AVG_POOLS[rank](
                x,
                size,
                stride,
                [*padding, *after],
                count_include_pad=include or divisor is not None,
                layout=LAYOUTS[rank][0],
            )
        )
        if divisor is None:
            return pooled
        return emit(relax.op.multiply(pooled, relax.const(math.prod(size) / divisor, dtype_of(pooled))))

    return convert


def _adaptive_max_pool(rank: int) -> Conversion:
    """Axis by axis: the largest of each stretch, the stretches as PyTorch cuts them."""

    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        emit, x = importer.block_builder.emit, importer.env[node.args[0]]
        if any(user.args[1] == 1 and user.users for user in node.users):
            return _adaptive_max_with_places(importer, x, node.meta["val"][0].shape[-rank:])
        lead = len(shape_of(x)) - rank
        for axis, parts in enumerate(node.meta["val"][0].shape[-rank:], start=lead):
            extent = shape_of(x)[axis]
            cuts = [(i * extent // parts, -((i + 1) * extent // -parts)) for i in range(parts)]
            slices = [emit(relax.op.strided_slice(x, [axis], [low], [high])) for low, high in cuts]
            largest = [emit(relax.op.max(piece, [axis], True)) for piece in slices]
            x = largest[0] if parts == 1 else emit(relax.op.concat(largest, axis))
        return emit(relax.Tuple([x, x]))

    return convert


def _adaptive_max_with_places(importer: Importer, x: relax.Expr, cells: tuple[int, ...]) -> relax.Expr:
    """Each cell's largest value and its flat position, cell by cell."""
    emit, shape, rank = importer.block_builder.emit, shape_of(x), len(cells)
    if math.prod(cells) > _MOST_CELLS:
        raise DanceError(f"the indices of adaptive max pooling to more than {_MOST_CELLS} cells are not supported")
    lead, extents = shape[:-rank], shape[-rank:]
    grid = np.arange(math.prod(extents)).reshape(extents)
    values, places = [], []
    for cell in product(*map(range, cells)):
        low = [i * extent // parts for i, extent, parts in zip(cell, extents, cells, strict=True)]
        high = [-((i + 1) * extent // -parts) for i, extent, parts in zip(cell, extents, cells, strict=True)]
        piece = emit(relax.op.strided_slice(x, list(range(len(lead), len(shape))), low, high))
        line = emit(relax.op.reshape(piece, [*lead, -1]))
        best = emit(relax.op.argmax(line, len(lead), True))
        most = emit(relax.op.max(line, [len(lead)], True))
        if dtype_of(x).startswith("float"):
            best = _last_nan_or(importer, line, most, best)
        here = grid[tuple(map(slice, low, high))].reshape(-1).astype(np.int64)
        values.append(most)
        places.append(emit(relax.op.take(constant(here), best, 0)))
    joined = [emit(relax.op.concat(parts, len(lead))) if len(parts) > 1 else parts[0] for parts in (values, places)]
    return emit(relax.Tuple([emit(relax.op.reshape(each, [*lead, *cells])) for each in joined]))


def _last_nan_or(importer: Importer, line: relax.Expr, most: relax.Expr, best: relax.Expr) -> relax.Expr:
    """The place of the last NaN along the last axis where ``most`` is NaN; else ``best``."""
    emit, axis = importer.block_builder.emit, len(shape_of(line)) - 1
    backwards = emit(relax.op.argmax(emit(relax.op.flip(line, axis)), axis, True))
    last = emit(relax.op.subtract(relax.const(shape_of(line)[axis] - 1, "int64"), backwards))
    return emit(relax.op.where(emit(relax.op.not_equal(most, most)), last, best))


POOLS: dict[str, Conversion] = {
    **{f"max_pool{rank}d.default": _max_pool(rank, with_indices=False) for rank in (1, 2, 3)},
    **{f"max_pool{rank}d_with_indices.default": _max_pool(rank, with_indices=True) for rank in (2, 3)},
    **{f"avg_pool{rank}d.default": _avg_pool(rank) for rank in (1, 2, 3)},
    **{f"adaptive_max_pool{rank}d.default": _adaptive_max_pool(rank) for rank in (2, 3)},
}
