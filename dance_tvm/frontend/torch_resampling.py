"""ATen operators that resample pictures and clips: interpolation to a size, and at points of a grid."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_values import Conversion, Importer, arguments, constant, dtype_of, shape_of

# More taps than these, as antialiasing has, are a product with a matrix.
_MOST_TAPS = 6

_AXES_OF = {"1d": 1, "2d": 2, "3d": 3}


def resample(node: fx.Node, importer: Importer) -> relax.Expr:
    """Interpolation in any mode, axis by axis: each output is a weighted sum of a few inputs, the weights constant."""
    x = importer.env[node.args[0]]
    rank = len(node.meta["val"].shape) - 2
    for axis in range(rank):
        matrix = _weights_along(node, axis, rank)
        if matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, np.eye(len(matrix))):
            x = _weighted(importer, x, axis + 2, matrix)
    return x


def _weights_along(node: fx.Node, axis: int, rank: int) -> np.ndarray:
    """How each output position of one axis is made of its input positions: the operator's answer to the unit matrix."""
    operator: Any = node.target
    given = {name: value for name, value in arguments(node).items() if name != "output_size"}
    source, output = given.pop("self", None) or given.pop("input"), node.meta["val"].shape[2:]
    extent = source.meta["val"].shape[axis + 2]
    scales = given.pop("scale_factors", None)
    names = {1: ("scales",), 2: ("scales_h", "scales_w"), 3: ("scales_d", "scales_h", "scales_w")}[rank]
    kept = {name: given.pop(name, None) for name in names}
    scale = scales[axis] if scales is not None else kept[names[axis]]
    plain = getattr(operator._overloadpacket, "default", operator)
    if rank == 1:
        unit = torch.eye(extent)[None]
        return plain(unit, [output[axis]], **given, **{names[axis]: scale})[0].numpy().T
    # The other axis of the unit matrix is resampled to its own size, which changes nothing.
    other = 1 if axis == 0 else 0
    shape, size = [1] * rank, [1] * rank
    shape[axis] = shape[other] = size[other] = extent
    size[axis] = output[axis]
    unit = torch.eye(extent).reshape([1, 1, *shape])
    matrix = plain(unit, size, **given, **{names[axis]: scale})
    matrix = matrix.reshape((size[axis], extent) if axis < other else (extent, size[axis]))
    return (matrix if axis < other else matrix.T).numpy()


def _weighted(importer: Importer, x: relax.Expr, axis: int, matrix: np.ndarray) -> relax.Expr:
    """``matrix`` (out, in) times the ``axis`` of ``x``."""
    emit, rank = importer.block_builder.emit, len(shape_of(x))
    taps = max(1, int((matrix != 0).sum(1).max()))
    if taps > _MOST_TAPS:
        order = [i for i in range(rank) if i != axis]
        moved = emit(relax.op.permute_dims(x, [*order, axis]))
        product_ = emit(relax.op.matmul(moved, constant(np.ascontiguousarray(matrix.T))))
        return emit(relax.op.permute_dims(product_, np.argsort([*order, axis]).tolist()))
    places = np.argsort(matrix == 0, axis=1, kind="stable")[:, :taps]
    weights = np.take_along_axis(matrix, places, 1)
    total = None
    for tap in range(taps):
        term = emit(relax.op.take(x, constant(np.ascontiguousarray(places[:, tap]).astype(np.int64)), axis))
        if not (weights[:, tap] == 1).all():
            line = weights[:, tap].reshape([-1 if i == axis else 1 for i in range(rank)])
            term = emit(relax.op.multiply(term, constant(np.ascontiguousarray(line))))
        total = term if total is None else emit(relax.op.add(total, term))
    assert total is not None
    return total


# --- at points of a grid ---

_BILINEAR, _NEAREST = 0, 1
_ZEROS, _BORDER, _REFLECTION = 0, 1, 2


def grid_sample(node: fx.Node, importer: Importer) -> relax.Expr:
    """``x`` (N, C, ...) at the points of ``grid`` (N, ..., axes), whose last axis is innermost first, from -1 to 1."""
    x, grid = importer.env[node.args[0]], importer.env[node.args[1]]
    mode, padding, corners = (node.args[i] for i in (2, 3, 4))
    if mode not in (_BILINEAR, _NEAREST):
        raise DanceError("cubic interpolation at the points of a grid is not supported: use bilinear or nearest")
    sampler = _Sampler(importer, x, grid, padding, bool(corners))
    return sampler.nearest() if mode == _NEAREST else sampler.linear()


class _Sampler:
    """Reads of ``x`` at points, as reads of its flat positions."""

    def __init__(self, importer: Importer, x: relax.Expr, grid: relax.Expr, padding: Any, corners: bool) -> None:
        self._emit = importer.block_builder.emit
        self._batch, self._channels, *self._extents = shape_of(x)
        self._dtype, self._points = dtype_of(x), shape_of(grid)[1:-1]
        rank, emit = len(self._extents), self._emit
        order = [0, *range(2, rank + 2), 1]
        self._flat = emit(relax.op.reshape(emit(relax.op.permute_dims(x, order)), [-1, self._channels]))
        self._padding, self._corners = padding, corners
        self._places = [self._place(grid, axis) for axis in range(rank)]

    def nearest(self) -> relax.Expr:
        return self._arranged(self._read([self._emit(relax.op.round(place)) for place in self._places]))

    def linear(self) -> relax.Expr:
        emit, total = self._emit, None
        lows = [emit(relax.op.floor(place)) for place in self._places]
        shares = [emit(relax.op.subtract(place, low)) for place, low in zip(self._places, lows, strict=True)]
        one = self._number(1)
        for corner in product((0, 1), repeat=len(lows)):
            at = [emit(relax.op.add(low, one)) if up else low for low, up in zip(lows, corner, strict=True)]
            term = self._read(at)
            for share, up in zip(shares, corner, strict=True):
                weight = share if up else emit(relax.op.subtract(one, share))
                term = emit(relax.op.multiply(term, emit(relax.op.expand_dims(weight, len(shape_of(weight))))))
            total = term if total is None else emit(relax.op.add(total, term))
        assert total is not None
        return self._arranged(total)

    def _number(self, value: float) -> relax.Expr:
        return relax.const(value, self._dtype)

    def _place(self, grid: relax.Expr, axis: int) -> relax.Expr:
        """Where each point lies along ``axis``, in elements, inside of it where the padding says so."""
        emit, number, extent = self._emit, self._number, self._extents[axis]
        column = len(self._extents) - 1 - axis
        last = len(shape_of(grid)) - 1
        value = emit(relax.op.strided_slice(grid, [last], [column], [column + 1]))
        value = emit(relax.op.add(emit(relax.op.reshape(value, shape_of(grid)[:-1])), number(1)))
        factor = (extent - 1) / 2 if self._corners else extent / 2
        value = emit(relax.op.multiply(value, number(factor)))
        value = value if self._corners else emit(relax.op.subtract(value, number(0.5)))
        if self._padding == _REFLECTION:
            low = 0.0 if self._corners else -0.5
            value = self._reflected(value, low, extent - 1.0 if self._corners else float(extent))
        if self._padding in (_BORDER, _REFLECTION):
            value = emit(relax.op.minimum(emit(relax.op.maximum(value, number(0))), number(extent - 1)))
        return value

    def _reflected(self, value: relax.Expr, low: float, span: float) -> relax.Expr:
        """``value`` folded back and forth between ``low`` and ``low + span``."""
        emit, number = self._emit, self._number
        if span == 0:
            return emit(relax.op.multiply(value, number(0)))
        away = emit(relax.op.abs(emit(relax.op.subtract(value, number(low)))))
        turns = emit(relax.op.floor(emit(relax.op.divide(away, number(span)))))
        extra = emit(relax.op.subtract(away, emit(relax.op.multiply(turns, number(span)))))
        halves = emit(relax.op.floor(emit(relax.op.multiply(turns, number(0.5)))))
        odd = emit(relax.op.subtract(turns, emit(relax.op.multiply(halves, number(2)))))
        back = emit(relax.op.subtract(number(span), extra))
        folded = emit(relax.op.where(emit(relax.op.greater(odd, number(0.5))), back, extra))
        return emit(relax.op.add(folded, number(low)))

    def _read(self, at: list[relax.Expr]) -> relax.Expr:
        """``x`` (N, points, C) at whole positions, zero outside."""
        emit, number = self._emit, self._number
        flat, inside = None, None
        for place, extent in zip(at, self._extents, strict=True):
            kept = emit(relax.op.minimum(emit(relax.op.maximum(place, number(0))), number(extent - 1)))
            index = emit(relax.op.astype(kept, "int64"))
            if flat is not None:
                index = emit(relax.op.add(emit(relax.op.multiply(flat, relax.const(extent, "int64"))), index))
            flat = index
            if self._padding == _ZEROS:
                here = emit(relax.op.astype(emit(relax.op.equal(place, kept)), self._dtype))
                inside = here if inside is None else emit(relax.op.multiply(inside, here))
        assert flat is not None
        if self._batch > 1:
            size = int(np.prod(self._extents))
            first = np.arange(self._batch).reshape([-1, *[1] * len(self._points)]) * size
            flat = emit(relax.op.add(flat, constant(first.astype(np.int64))))
        taken = emit(relax.op.take(self._flat, flat, 0))
        if inside is None:
            return taken
        return emit(relax.op.multiply(taken, emit(relax.op.expand_dims(inside, len(shape_of(inside))))))

    def _arranged(self, value: relax.Expr) -> relax.Expr:
        rank = len(self._points)
        return self._emit(relax.op.permute_dims(value, [0, rank + 1, *range(1, rank + 1)]))


_RESAMPLED = (
    *(f"upsample_nearest{rank}" for rank in _AXES_OF),
    *(f"_upsample_nearest_exact{rank}" for rank in _AXES_OF),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)

RESAMPLING: dict[str, Conversion] = {
    **{f"{operator}.{form}": resample for operator in _RESAMPLED for form in ("default", "vec")},
    "grid_sampler_2d.default": grid_sample,
    "grid_sampler_3d.default": grid_sample,
}
