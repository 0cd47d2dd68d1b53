"""Resampling along frames, height and width at once: upsampling and downsampling by constant weights.

Each output is a weighted sum of a few inputs of each axis, of which places and weights are constants. Channels are
lanes; all axes are combined in registers, so that nothing between them is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from tvm import tirx

from ..emit import FLOAT, INT, Expr, big, flat, lanes, let, parallel, serial, splat, store
from ..geometry import Triple
from ..kernel import Kernel, Operand, constant, output
from .conv3d_gather import parts_of

#: Vectors of channels that are summed side by side.
SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class Resample(Kernel):
    """(N, T, H, W, C) of ``size`` to ``out``: along each axis ``taps`` inputs make an output; ``weighted`` says which
    axes have weights (those of the others are 1). ``planar``: tensors are (N, H, W, C), T being 1."""

    kind = "resample"
    batch: int
    size: Triple
    out: Triple
    channels: int
    taps: Triple
    weighted: tuple[bool, bool, bool]
    vector_floats: int
    planar: bool = False

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"resample_{'x'.join(str(taps) for taps in self.taps)}_f32"

    def operands(self) -> list[Operand]:
        """x, of each axis places (out · taps) and where given weights, y."""
        tables = []
        for axis, (extent, taps, weighted) in enumerate(zip(self.out, self.taps, self.weighted, strict=True)):
            tables.append(constant(f"places_{axis}", (extent * taps,), INT))
            tables += [constant(f"weights_{axis}", (extent * taps,))] if weighted else []
        x, y = ((self.batch, *extents[self.planar :], self.channels) for extents in (self.size, self.out))
        return [Operand("x", x), *tables, output("y", y)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Line by line of outputs."""
        _Emitter(self, args).emit()


class _Emitter:
    def __init__(self, spec: Resample, args: Mapping[str, tirx.Buffer]) -> None:
        self.spec, self.x, self.y, self.args = spec, flat(args["x"]), flat(args["y"]), args

    def emit(self) -> None:
        spec = self.spec
        frames, height, width = spec.out
        with parallel(spec.batch * frames * height) as line:
            clip = let(tirx.floordiv(line, frames * height))
            frame, row = let(tirx.floormod(tirx.floordiv(line, height), frames)), let(tirx.floormod(line, height))
            above = self._above(clip, frame, row)
            with serial(width) as column:
                corners = self._corners(above, column)
                target = let(big(line * width + column) * spec.channels)
                done = 0
                count, all_channels = spec.vector_floats, spec.channels
                for vectors in (SIDE_BY_SIDE, 1):
                    passes = (all_channels - done) // (vectors * count)
                    with serial(passes) as index:
                        first = let(done + index * (vectors * count))
                        for v in range(vectors):
                            self._sum(corners, target, first + v * count, count)
                    done += passes * vectors * count
                for begin, size in parts_of(all_channels - done):
                    self._sum(corners, target, done + begin, size)

    def _along(self, axis: int, output: Expr, tap: int) -> tuple[Expr, Expr | None]:
        """The place of a tap of an output along an axis, and its weight (None: 1)."""
        at = output * self.spec.taps[axis] + tap
        weight = let(self.args[f"weights_{axis}"][at]) if self.spec.weighted[axis] else None
        return self.args[f"places_{axis}"][at], weight

    def _above(self, clip: Expr, frame: Expr, row: Expr) -> list[tuple[Expr, Expr | None]]:
        """Where the lines of the input that a line of outputs is made of begin, and their weights."""
        frames, height, _ = self.spec.size
        found = []
        for tap_t, tap_h in product(range(self.spec.taps[0]), range(self.spec.taps[1])):
            (place_t, weight_t), (place_h, weight_h) = self._along(0, frame, tap_t), self._along(1, row, tap_h)
            line = let((clip * frames + place_t) * height + place_h)
            found.append((line, _times(weight_t, weight_h)))
        return found

    def _corners(self, above: list[tuple[Expr, Expr | None]], column: Expr) -> list[tuple[Expr, Expr | None]]:
        """Where the inputs of one output lie, and their weights."""
        found, width = [], self.spec.size[2]
        across = [self._along(2, column, tap) for tap in range(self.spec.taps[2])]
        across = [(let(place), weight) for place, weight in across]
        for line, weight in above:
            for place, other in across:
                found.append((let(big(line * width + place) * self.spec.channels), _times(weight, other)))
        return found

    def _sum(self, corners: list[tuple[Expr, Expr | None]], target: Expr, first: Expr, count: int) -> None:
        """So many channels of one output."""
        total: Expr | None = None
        for start, weight in corners:
            value = self.x[lanes(start + first, count)]
            value = value if weight is None else value * splat(weight, count)
            total = value if total is None else total + value
        assert total is not None
        store(self.y, total, lanes(target + first, count))


def _times(left: Expr | None, right: Expr | None) -> Expr | None:
    """The product of two weights, either of which may be 1."""
    if left is None or right is None:
        return right if left is None else left
    return let(left * right)


def tables(places: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places and weights (out, taps) of an axis as the kernel reads them."""
    return np.ascontiguousarray(places, INT).reshape(-1), np.ascontiguousarray(weights, FLOAT).reshape(-1)
