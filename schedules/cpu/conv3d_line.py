"""The dense convolution along lines, for layers of few input channels and strided pointwise ones (`docs/kernels.md`).

A tile is ``mr`` outputs of one line × some vectors of output channels. Of each line of taps the inputs of an output lie
side by side in memory, those of the next output at a constant distance: one loop over taps and channels multiplies them
all, without lists. Tiles at both ends of a line leave out the taps outside the clip when the kernel is emitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tvm import tirx

from ..emit import FLOAT, HALF, Expr, big, ceil_div, let, parallel, serial
from ..geometry import HEIGHT, TIME, WIDTH, Window
from ..kernel import Count
from ..space import Space
from ..taps import span
from ..workload import Workload
from .cost import seconds_per_cycle
from .line_tiles import LineSpace, predicted_cycles
from .lines import each_piece
from .row_tiles import RowConv, RowTile, RowTiles, TileSums, panel_widths
from .tiles import HALF_TERMS, Machine


@dataclass(frozen=True)
class LineConv(RowConv):
    """A dense convolution with what is fused behind it."""

    window: Window
    channels_in: int
    channels_out: int
    tile: RowTile
    residual: bool = False
    activation: str = ""
    dtype: str = FLOAT

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"conv3d_line_{self.size_name}"

    @property
    def row_floats(self) -> int:
        """Floats from what one output of a line reads to what the next one does."""
        return self.window.stride[WIDTH] * self.channels_in

    def space(self, machine: Machine, workload: Workload) -> Space:
        """The register tile."""
        return LineSpace(machine.storing(self.dtype), workload)

    def predict(
        self, machine: Machine, threads: int, shares: Sequence[float] | None = None, whole_units: bool = False
    ) -> float:
        """As :mod:`~.line_tiles` has it: nothing is listed."""
        tile = (self.tile.mr, self.tile.vectors, self.tile.step)
        stored = machine.storing(self.dtype)
        cycles = predicted_cycles(stored, self.window, (self.channels_in, self.channels_out), tile)
        return cycles * seconds_per_cycle(stored) / threads

    def work(self) -> tuple[Count, Count, Count]:
        """All taps inside the clip."""
        return Count(self.window.tap_positions), Count(self.channels_in), Count(self.channels_out)

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Lines by panels of output channels."""
        _Emitter(self, args).emit()


def runs(window: Window, inside: list[list[int]]) -> list[tuple[int, int, int, int]]:
    """Taps of a line that the same outputs of a tile read, side by side in memory: the first tap, how many, the first
    output, past the last."""
    found: list[tuple[int, int, int, int]] = []
    for tap in range(window.kernel[WIDTH]):
        rows = [row for row, taps in enumerate(inside) if tap in taps]
        if not rows:
            continue
        begin, end = rows[0], rows[-1] + 1
        if found and found[-1][2:] == (begin, end) and window.dilation[WIDTH] == 1:
            found[-1] = (found[-1][0], found[-1][1] + 1, begin, end)
        else:
            found.append((tap, 1, begin, end))
    return found


def most_in_a_pass(window: Window, depth: int) -> tuple[int, int]:
    """Frames of taps, or of one frame the lines of taps, whose products half precision may add up; 0: less than one."""
    line = window.kernel[WIDTH] * depth
    frames = HALF_TERMS // (window.kernel[HEIGHT] * line)
    return frames, 0 if frames else HALF_TERMS // line


class _Emitter(RowTiles):
    """The kernel's loops, down to the tile."""

    def emit(self) -> None:
        window = self.conv.window
        frames, height, _ = window.out
        with parallel(window.batch * frames * height) as line:
            clip = let(tirx.floordiv(line, frames * height))
            at = let(tirx.floormod(tirx.floordiv(line, height), frames)), let(tirx.floormod(line, height))
            spans = span(window, TIME, at[0]), span(window, HEIGHT, at[1])
            self.remember()
            first = 0
            for panels, width in panel_widths(self.conv.vectors, self.tile.vectors):
                with serial(panels) as index:
                    vector = let(first + index * width)
                    each_piece(window, WIDTH, self.tile.mr, partial(self._tile, (clip, line), spans, (vector, width)))
                first += panels * width

    def _tile(
        self,
        at: tuple[Expr, Expr],
        spans: tuple[tuple[Expr, Expr, Expr], tuple[Expr, Expr, Expr]],
        panel: tuple[Expr, int],
        begin: Expr,
        inside: list[list[int]],
    ) -> None:
        """The outputs from ``begin`` on of one line, all their taps."""
        conv, window, depth = self.conv, self.conv.window, self.conv.channels_in
        (clip, line), (vector, width) = at, panel
        (source0, first0, past0), (source1, first1, past1) = spans
        sums = self.start(vector, len(inside), width)
        left = let(begin * window.stride[WIDTH] - window.padding[WIDTH])
        frames, rows = most_in_a_pass(window, depth) if conv.dtype == HALF else (0, 0)
        multiply = self.add if frames or rows else self.multiply
        with self._taps(TIME, past0 - first0, frames, sums) as index0:
            tap0 = let(first0 + index0)
            frame = let(clip * window.size[TIME] + source0 + tap0 * window.dilation[TIME])
            with self._taps(HEIGHT, past1 - first1, rows, sums) as index1:
                tap1 = let(first1 + index1)
                row = let(frame * window.size[HEIGHT] + source1 + tap1 * window.dilation[HEIGHT])
                source = let(big(row * window.size[WIDTH] + left) * depth)
                tap = (tap0 * window.kernel[HEIGHT] + tap1) * window.kernel[WIDTH]
                weights = let(big(vector) * self.vector_floats + big(tap) * (depth * self.count))
                for first, count, begin_row, end_row in runs(window, inside):
                    moved = first * window.dilation[WIDTH] * depth + begin_row * conv.row_floats
                    some = sums.rows(begin_row, end_row)
                    multiply(source + moved, weights + first * depth * self.count, count * depth, some)
        target = let(big(line * window.out[WIDTH] + begin) * conv.channels_out + vector * self.count)
        self.finish(target, sums)

    @contextmanager
    def _taps(self, axis: int, count: Expr, most: int, sums: TileSums) -> Iterator[Expr]:
        """Loop over ``count`` taps along an axis, at most ``most`` of them in a pass; 0: passes are made elsewhere."""
        if not most:
            with serial(count) as index:
                yield index
        elif most >= self.conv.window.kernel[axis]:
            with self.one_pass(sums), serial(count) as index:
                yield index
        else:
            groups = serial(ceil_div(count, most))
            with groups as group, self.one_pass(sums), serial(tirx.min(most, count - group * most)) as index:
                yield let(group * most + index)
