"""Max pooling of tensors with channels first (`docs/kernels.md`): lanes are positions of a line.

Frames and rows of a window are reduced first, into lines with what pads them, so that each column is read once for
all windows that it is in; where windows share rows, frames before rows.
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

#: Taps of frames and rows that are read without a loop.
MOST_UNROLLED = 16


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

    @property
    def unrolled(self) -> bool:
        """Whether the taps of frames and rows are read without a loop: few, and some inside the clip everywhere."""
        few = self.window.kernel[0] * self.window.kernel[1] <= MOST_UNROLLED
        return few and all(map(all, self.window.classes[:2]))

    @property
    def by_frames(self) -> bool:
        """Whether the frames of a window are reduced before its rows: once for all rows of windows that they are in."""
        return self.unrolled and self.window.kernel[0] > 1 and self.window.stride[1] < self.window.kernel[1]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Frame by frame of each channel."""
        x, y = flat(args["x"]), flat(args["y"])
        (size_t, size_h, size_w), (out_t, out_h, out_w) = self.window.size, self.window.out
        with parallel(self.window.batch * self.channels * out_t) as task:
            plane, frame = let(tirx.floordiv(task, out_t)), let(tirx.floormod(task, out_t))
            source = let(big(plane) * (size_t * size_h * size_w))
            places = self._places(0, frame) if self.unrolled else []
            if self.by_frames:
                x, source, places = self._frames(x, source, places), big(0), [0]
            # All lines before their windows: a load waits for the stores of two vectors that it takes its lanes from.
            reduced = scratch((out_h * self.line,))
            with serial(out_h) as row:
                line = let(row * self.line)
                with serial(self.line) as index:
                    store(reduced, number(LOWEST), line + index)
                if self.unrolled:
                    rows = [let((f * size_h + r) * size_w) for f in places for r in self._places(1, row)]
                    self._columns(x, [source + each for each in rows], reduced, line)
                else:
                    spans = span(self.window, 0, frame), span(self.window, 1, row)
                    self._looped_columns(x, source, spans, reduced, line)
            with serial(out_h) as row:
                self._windows(reduced, let(row * self.line), y, let((big(task) * out_h + row) * out_w))

    def _places(self, axis: int, index: Expr) -> list[Expr]:
        """Where output ``index`` reads on an axis; the last tap inside the clip stands for those behind it."""
        start, first, past = span(self.window, axis, index)
        step = self.window.dilation[axis]
        return [let(start + tirx.min(first + tap, past - 1) * step) for tap in range(self.window.kernel[axis])]

    def _frames(self, x: tirx.Buffer, source: Expr, places: list[Expr]) -> tirx.Buffer:
        """The largest value of each position over the frames of a window."""
        size = self.window.size[1] * self.window.size[2]
        count = _lanes(size, self.vector_floats)
        frames = scratch((size,))
        starts = [let(source + place * size) for place in places]
        with serial(-(-size // count)) as vector:
            at = let(tirx.min(vector * count, size - count))
            store(frames, _largest([x[lanes(start + at, count)] for start in starts], count), lanes(at, count))
        return frames

    def _columns(self, x: tirx.Buffer, starts: list[Expr], reduced: tirx.Buffer, line: Expr) -> None:
        """The largest value of each column of some lines of the input, behind what pads the line."""
        window, count = self.window, self.lanes[0]
        size_w = window.size[WIDTH]
        with serial(-(-size_w // count)) as vector:
            column = let(tirx.min(vector * count, size_w - count))
            best = _largest([x[lanes(start + column, count)] for start in starts], count)
            store(reduced, best, lanes(line + (window.padding[WIDTH] + column), count))

    def _looped_columns(
        self,
        x: tirx.Buffer,
        source: Expr,
        area: tuple[tuple[Expr, Expr, Expr], tuple[Expr, Expr, Expr]],
        reduced: tirx.Buffer,
        line: Expr,
    ) -> None:
        """The same of any area."""
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
                store(best, _largest([best[lanes(0, count)], x[lanes(at, count)]], count), lanes(0, count))
            store(reduced, best[lanes(0, count)], lanes(line + (window.padding[WIDTH] + column), count))

    def _windows(self, reduced: tirx.Buffer, line: Expr, y: tirx.Buffer, target: Expr) -> None:
        """The largest of the columns of each window."""
        window, count = self.window, self.lanes[1]
        stride, out_w = window.stride[WIDTH], window.out[WIDTH]
        with serial(-(-out_w // count)) as vector:
            column = let(tirx.min(vector * count, out_w - count))
            taps = [tap * window.dilation[WIDTH] for tap in range(window.kernel[WIDTH])]
            columns = [_strided(reduced, line + (column * stride + tap), stride, count) for tap in taps]
            store(y, _largest(columns, count), lanes(target + column, count))


def _strided(buffer: tirx.Buffer, start: Expr, stride: int, count: int) -> Expr:
    """``count`` values from ``start`` on, ``stride`` apart: as vectors that lie side by side, put together."""
    vectors = [let(buffer[lanes(start + index * count, count)]) for index in range(stride)]
    if stride == 1 or count == 1:
        return vectors[0]
    return tirx.Shuffle(vectors, [index * stride for index in range(count)])


def _largest(values: list[Expr], count: int) -> Expr:
    """The largest of some vectors; NaN stays NaN, which ``max`` forgets. It is kept in a buffer: of variables that each
    hold a choice between those before them, TVM's simplifier makes expressions that double with every vector."""
    best = scratch((count,))
    store(best, values[0], lanes(0, count))
    for each in values[1:]:
        value, now = let(each), let(best[lanes(0, count)])
        larger = tirx.Select(now > value, now, value)
        store(best, tirx.Select(tirx.isnan(now), now, larger), lanes(0, count))
    return best[lanes(0, count)]


def _lanes(extent: int, most: int) -> int:
    """The largest power of two that neither exceeds."""
    return min(most, 1 << (extent.bit_length() - 1))
