"""Max pooling of tensors with channels first (`docs/kernels.md`): lanes are positions of a line.

Frames and rows of a window are reduced first, a line at a time with what pads it, so that each column is read once for
all windows that it is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..emit import Expr, big, flat, lanes, let, number, parallel, scratch, serial, store
from ..geometry import WIDTH
from ..kernel import Operand, output
from ..pool import LOWEST, Pool
from ..taps import span


@dataclass(frozen=True)
class PlanarPool(Pool):
    """As :class:`..pool.Pool` of maxima without masks, of tensors (N, C, T, H, W)."""

    vector_floats: int = 1

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"pool3d_planar_{self.pooling}_f32"

    def operands(self) -> list[Operand]:
        """x (N, C, T, H, W), y (N, C, T', H', W')."""
        planes = (self.window.batch, self.channels)
        return [Operand("x", (*planes, *self.window.size)), output("y", (*planes, *self.window.out))]

    def describe(self) -> dict[str, Any]:
        """Also that channels come first."""
        return {**super().describe(), "planar": True}

    @property
    def lanes(self) -> tuple[int, int]:
        """Lanes of a vector of input and of output positions: no more than a line has."""
        return _lanes(self.window.size[WIDTH], self.vector_floats), _lanes(self.window.out[WIDTH], self.vector_floats)

    @property
    def line(self) -> int:
        """Floats of a line with what pads it, whole vectors to be read behind it among them."""
        window = self.window
        past = (window.out[WIDTH] - 1) * window.stride[WIDTH] + (window.kernel[WIDTH] - 1) * window.dilation[WIDTH] + 1
        return max(past, window.padding[WIDTH] + window.size[WIDTH]) + window.stride[WIDTH] * self.vector_floats

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Frame by frame of each channel."""
        x, y = flat(args["x"]), flat(args["y"])
        (size_t, size_h, size_w), (out_t, out_h, out_w) = self.window.size, self.window.out
        with parallel(self.window.batch * self.channels * out_t) as task:
            plane, frame = let(tirx.floordiv(task, out_t)), let(tirx.floormod(task, out_t))
            reduced = scratch((self.line,))
            with serial(self.line) as index:
                store(reduced, number(LOWEST), index)
            frames = span(self.window, 0, frame)
            with serial(out_h) as row:
                rows = span(self.window, 1, row)
                self._columns(x, let(big(plane) * (size_t * size_h * size_w)), (frames, rows), reduced)
                self._windows(reduced, y, let((big(task) * out_h + row) * out_w))

    def _columns(
        self,
        x: tirx.Buffer,
        source: Expr,
        area: tuple[tuple[Expr, Expr, Expr], tuple[Expr, Expr, Expr]],
        reduced: tirx.Buffer,
    ) -> None:
        """The largest value of each column of the area, behind what pads the line."""
        window, count = self.window, self.lanes[0]
        size_h, size_w = window.size[1:]
        (frame, first_frame, past_frame), (row, first_row, past_row) = area
        with serial(-(-size_w // count)) as vector:
            column = let(tirx.min(vector * count, size_w - count))
            best = scratch((count,))
            store(best, number(LOWEST, count), lanes(0, count))
            with serial(past_frame - first_frame) as f, serial(past_row - first_row) as r:
                at_frame = frame + (first_frame + f) * window.dilation[0]
                at_row = row + (first_row + r) * window.dilation[1]
                at = let(source + ((at_frame * size_h + at_row) * size_w + column))
                _take(best, x[lanes(at, count)], count)
            store(reduced, best[lanes(0, count)], lanes(window.padding[WIDTH] + column, count))

    def _windows(self, reduced: tirx.Buffer, y: tirx.Buffer, target: Expr) -> None:
        """The largest of the columns of each window."""
        window, count = self.window, self.lanes[1]
        stride, out_w = window.stride[WIDTH], window.out[WIDTH]
        with serial(-(-out_w // count)) as vector:
            column = let(tirx.min(vector * count, out_w - count))
            best = scratch((count,))
            store(best, number(LOWEST, count), lanes(0, count))
            for tap in range(window.kernel[WIDTH]):
                _take(best, _strided(reduced, column * stride + tap * window.dilation[WIDTH], stride, count), count)
            store(y, best[lanes(0, count)], lanes(target + column, count))


def _strided(buffer: tirx.Buffer, start: Expr, stride: int, count: int) -> Expr:
    """``count`` values from ``start`` on, ``stride`` apart: as vectors that lie side by side, put together."""
    vectors = [let(buffer[lanes(start + index * count, count)]) for index in range(stride)]
    if stride == 1 or count == 1:
        return vectors[0]
    return tirx.Shuffle(vectors, [index * stride for index in range(count)])


def _take(best: tirx.Buffer, value: Expr, count: int) -> None:
    """A value into the largest so far; NaN stays NaN, which ``max`` forgets."""
    value, now = let(value), let(best[lanes(0, count)])
    larger = tirx.Select(now > value, now, value)
    store(best, tirx.Select(tirx.isnan(now), now, larger), lanes(0, count))


def _lanes(extent: int, most: int) -> int:
    """The largest power of two that neither exceeds."""
    return min(most, 1 << (extent.bit_length() - 1))
