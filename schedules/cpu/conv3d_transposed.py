"""Transposed convolutions that multiply no zeros (`docs/kernels.md`).

Along a line of outputs those of one phase (:mod:`..spread`) read neighbouring inputs through the same taps: they are
lines of a convolution of stride 1 whose results are stored at a distance. Where windows lie side by side every phase is
a pointwise layer over all positions, whatever lines they stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from tvm import tirx

from ..emit import FLOAT, Expr, big, choose, let, parallel, serial
from ..geometry import HEIGHT, TIME, WIDTH, Triple, Window
from ..kernel import Count
from ..space import Space
from ..spread import Spread
from ..workload import Workload
from .conv3d_line import runs
from .lines import each_piece
from .pointwise_tiles import PointwiseTile
from .row_tiles import RowConv, RowTile, RowTiles, TileSums, panel_widths
from .tiles import Machine
from .transposed_tiles import TransposedSpace

#: Of the taps that an output reads on an axis: the first, the input position there, and how many.
Span = tuple[Expr, Expr, Expr]


@dataclass(frozen=True)
class TransposedConv(RowConv):
    """A transposed convolution with what is fused behind it: ``window`` slides over the input spread out by zeros.

    Weights are those of the spread form, turned, the taps of a phase side by side along the width.
    """

    window: Window
    spread: Triple
    channels_in: int
    channels_out: int
    tile: RowTile
    residual: bool = False
    activation: str = ""
    dtype: str = FLOAT

    @property
    def geometry(self) -> Spread:
        """Its phases."""
        return Spread(self.window, self.spread)

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"conv3d_transposed_{self.size_name}"

    @property
    def x_shape(self) -> tuple[int, ...]:
        """(N, T, H, W, C_in), without zeros."""
        return (self.window.batch, *self.geometry.size, self.channels_in)

    @property
    def stored_floats(self) -> int:
        """Floats from one output of a tile to the next: those of a phase."""
        return self.spread[WIDTH] * self.channels_out

    def space(self, machine: Machine, workload: Workload) -> Space:
        """The tile of a phase."""
        return TransposedSpace(machine.storing(self.dtype), workload)

    def work(self) -> tuple[Count, Count, Count]:
        """All taps that are not on zeros."""
        return Count(self.geometry.tap_positions), Count(self.channels_in), Count(self.channels_out)

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Lines of outputs, or all positions of the input."""
        if isinstance(self.tile, PointwiseTile):
            _Positions(self, self.tile, args).emit()
        else:
            _Lines(self, args).emit()


class _Lines(RowTiles):
    """Line by line, the phases along it one after the other."""

    def __init__(self, conv: TransposedConv, args: Mapping[str, tirx.Buffer]) -> None:
        super().__init__(conv, args)
        self.geometry = conv.geometry

    def emit(self) -> None:
        window = self.conv.window
        frames, height, _ = window.out
        with parallel(window.batch * frames * height) as line:
            clip = let(tirx.floordiv(line, frames * height))
            at = let(tirx.floormod(tirx.floordiv(line, height), frames)), let(tirx.floormod(line, height))
            spans = self._span(TIME, at[0]), self._span(HEIGHT, at[1])
            self.remember(passes=True)
            taps = 0
            for remainder, phase in enumerate(self.geometry.phases(WIDTH)):
                if phase.outputs:
                    self._phase((clip, line), spans, remainder, taps)
                taps += phase.taps

    def _span(self, axis: int, output: Expr) -> Span:
        """Of the taps that an output reads on an axis: the first, the input position there, and how many: those inside
        the clip."""
        window, step = self.geometry.window, self.geometry.spread[axis]
        kernel, padding, size = window.kernel[axis], window.padding[axis], self.geometry.size[axis]
        ahead = -(-window.out[axis] // step) * step  # so that what is divided is no less than zero
        tap = let(tirx.truncmod(padding + ahead - output, step))
        source = let(tirx.truncdiv(output - padding + tap, step))  # without a rest
        before = let(tirx.max(0, -source))
        past = let(tirx.min(tirx.truncdiv(kernel - tap + (step - 1), step), size - source))
        return let(tap + before * step), let(source + before), let(tirx.max(0, past - before))

    def _phase(self, at: tuple[Expr, Expr], spans: tuple[Span, Span], remainder: int, taps: int) -> None:
        """The outputs of one phase along a line; its taps of a line of taps begin at ``taps``."""
        window, first = self.geometry.within(WIDTH, remainder), 0
        for panels, width in panel_widths(self.conv.vectors, self.tile.vectors):
            with serial(panels) as index:
                vector = let(first + index * width)
                tile = partial(self._tile, at, spans, (window, remainder, taps), (vector, width))
                each_piece(window, WIDTH, self.tile.mr, tile)
            first += panels * width

    def _tile(
        self,
        at: tuple[Expr, Expr],
        spans: tuple[Span, Span],
        phase: tuple[Window, int, int],
        panel: tuple[Expr, int],
        begin: Expr,
        inside: list[list[int]],
    ) -> None:
        """The outputs of a phase from ``begin`` on, all their taps."""
        conv, geometry, depth = self.conv, self.geometry, self.conv.channels_in
        (clip, line), (window, remainder, taps), (vector, width) = at, phase, panel
        (first0, source0, count0), (first1, source1, count1) = spans
        sums = self.start(vector, len(inside), width)
        left = let(begin - window.padding[WIDTH])
        with serial(count0) as index0, serial(count1) as index1:
            frame = let(clip * geometry.size[TIME] + source0 + index0)
            row = let(frame * geometry.size[HEIGHT] + source1 + index1)
            source = let(big(row * geometry.size[WIDTH] + left) * depth)
            tap0, tap1 = first0 + index0 * geometry.spread[TIME], first1 + index1 * geometry.spread[HEIGHT]
            tap = let((tap0 * conv.window.kernel[HEIGHT] + tap1) * conv.window.kernel[WIDTH] + taps)
            weights = let(big(vector) * self.vector_floats + big(tap) * (depth * self.count))
            for first, count, begin_row, end_row in runs(window, inside):
                some = sums.rows(begin_row, end_row)
                moved = source + (first + begin_row) * depth
                self.multiply(moved, weights + first * depth * self.count, count * depth, some)
        place = big(line * conv.window.out[WIDTH] + begin * geometry.spread[WIDTH] + remainder)
        self.finish(let(place * conv.channels_out + vector * self.count), sums)


class _Positions(RowTiles):
    """All positions of the input for one tap after the other, windows being side by side."""

    def __init__(self, conv: TransposedConv, tile: PointwiseTile, args: Mapping[str, tirx.Buffer]) -> None:
        super().__init__(conv, args)
        self.blocks_of, self.geometry = tile, conv.geometry

    def emit(self) -> None:
        geometry, tile, taps = self.geometry, self.blocks_of, self.conv.window.taps
        total = self.conv.window.positions_out // taps
        blocks = -(-total // (tile.mr * tile.block_tiles))
        rows = -(-total // blocks)
        mr = min(tile.mr, rows)
        _, height, width = geometry.spread
        with parallel(blocks * taps) as task:
            start = let(tirx.min(tirx.floordiv(task, taps) * rows, total - rows))  # the last block overlaps
            phase = let(tirx.floormod(task, taps))
            frame, row = (
                let(tirx.floordiv(phase, height * width)),
                let(tirx.floormod(tirx.floordiv(phase, width), height)),
            )
            column = let(tirx.floormod(phase, width))
            turned = (geometry.spread[TIME] - 1 - frame) * height + (height - 1 - row)
            weights = let(big(turned * width + column) * (self.conv.channels_in * self.count))
            self.remember()
            first = 0
            for panels, vectors in panel_widths(self.conv.vectors, tile.vectors):
                with serial(panels) as index, serial(-(-rows // mr)) as piece:
                    vector, at = let(first + index * vectors), let(start + tirx.min(piece * mr, rows - mr))
                    self._tile(
                        at, (frame, row, column), let(weights + big(vector) * self.vector_floats), (vector, vectors, mr)
                    )
                first += panels * vectors

    def _tile(self, at: Expr, phase: tuple[Expr, Expr, Expr], weights: Expr, shape: tuple[Expr, int, int]) -> None:
        """The outputs of one phase that ``mr`` positions from ``at`` on make."""
        (vector, width, mr), extent = shape, self.geometry.size[WIDTH]
        sums = self.start(vector, mr, width)
        self.multiply(let(big(at) * self.conv.channels_in), weights, self.conv.channels_in, sums)
        if mr > extent:
            self._apart(at, phase, sums)
            return
        together = tirx.floormod(at, extent) + mr <= extent
        choose(
            together,
            lambda: self.finish(self._place(at, phase, vector), sums),
            lambda: self._apart(at, phase, sums),
        )

    def _apart(self, at: Expr, phase: tuple[Expr, Expr, Expr], sums: TileSums) -> None:
        """Results of positions that stand in several lines."""
        for row in range(len(sums.put)):
            self.finish(self._place(at + row, phase, sums.vector), sums.rows(row, row + 1))

    def _place(self, position: Expr, phase: tuple[Expr, Expr, Expr], vector: Expr) -> Expr:
        """Where the output of a phase that a position makes lies."""
        (_, rows, columns), (frames, height, width) = self.geometry.size, self.geometry.spread
        line, column = let(tirx.floordiv(position, columns)), tirx.floormod(position, columns)
        frame, row = let(tirx.floordiv(line, rows)), tirx.floormod(line, rows)
        above = let((frame * frames + phase[0]) * (rows * height) + row * height + phase[1])
        place = let(above * (columns * width) + column * width + phase[2])
        return let(big(place) * self.conv.channels_out + vector * self.count)
