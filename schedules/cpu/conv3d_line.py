"""The convolution along lines, for layers of few input channels and strided pointwise ones (`docs/kernels.md`).

A tile is ``mr`` outputs of one line × some vectors of output channels. Of each line of taps the inputs of an output lie
side by side in memory, those of the next output at a constant distance: one loop over taps and channels multiplies them
all, without lists. Tiles at both ends of a line leave out the taps outside the clip when the kernel is emitted.

Where masks say which outputs are read, lines and tiles of which none is are left out; a tile that is read in part is
computed whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx

from ..emit import (
    FLOAT,
    HALF,
    INT,
    Expr,
    big,
    ceil_div,
    choose,
    let,
    number,
    parallel,
    scratch,
    serial,
    store,
    when,
    write,
)
from ..geometry import HEIGHT, TIME, WIDTH, Triple, Window
from ..kernel import Count, Operand, Planned
from ..space import Space
from ..taps import span
from ..workload import Workload
from .line_tiles import LineSpace, predicted_cycles
from .lines import each_piece
from .row_plan import RowPlan
from .row_tiles import RowConv, RowTile, RowTiles, TileSums, panel_widths
from .tiles import HALF_TERMS, Machine

#: Of the two outer axes, where a line begins to read and its taps inside the clip.
Spans = tuple[tuple[Expr, Expr, Expr], tuple[Expr, Expr, Expr]]
#: Of each output of a tile, the taps that read inside the clip.
Taps = list[list[int]]


@dataclass(frozen=True)
class LineConv(RowConv):
    """A convolution with what is fused behind it.

    ``out_frames``, ``positions`` and ``zero_dead`` are those of the row plan and of the gathered convolution.
    """

    window: Window
    channels_in: int
    channels_out: int
    tile: RowTile
    residual: bool = False
    activation: str = ""
    out_frames: bool = False
    positions: tuple[int, int] | None = None
    zero_dead: str = ""
    dtype: str = FLOAT
    groups: int = 1

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
        return self.seconds_by(partial(predicted_cycles, groups=self.groups), machine, threads)

    def work(self) -> tuple[Count, Count, Count]:
        """All taps inside the clip, of the outputs that are read."""
        pairs = Count(operand="counts", at=(3,)) if self.plan.masks else Count(self.window.tap_positions)
        return pairs, Count(self.depth), Count(self.channels_out)

    @property
    def plan(self) -> RowPlan:
        """Its rows, which are planned for their counts alone."""
        return RowPlan(self.window, 1, 1, self.window.taps, 1, False, self.out_frames, self.positions)

    def lists(self) -> list[Planned]:
        """What counts its rows, where masks leave some out."""
        return [Planned(self.plan, tuple(self.plan.shapes))] if self.plan.masks else []

    def describe(self) -> dict[str, Any]:
        """Also the taps that each output reads, from which, with its masks, follows what was executed."""
        if not self.plan.masks:
            return super().describe()
        window = self.window
        taps = [[len(window.live_taps(axis, index)) for index in range(window.out[axis])] for axis in range(3)]
        return {**super().describe(), "taps": taps}

    def operands(self) -> list[Operand]:
        """The masks before the output."""
        *given, y = super().operands()
        return [*given, *self.plan.masks.values(), y]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Lines by panels of output channels."""
        LineEmitter(self, args).emit()


def runs(window: Window, inside: list[list[int]], apart: bool = False) -> list[tuple[int, int, int, int]]:
    """Taps of a line that the same outputs of a tile read, side by side in memory: the first tap, how many, the first
    output, past the last. ``apart``: no two lie side by side."""
    found: list[tuple[int, int, int, int]] = []
    for tap in range(window.kernel[WIDTH]):
        rows = [row for row, taps in enumerate(inside) if tap in taps]
        if not rows:
            continue
        begin, end = rows[0], rows[-1] + 1
        if found and found[-1][2:] == (begin, end) and window.dilation[WIDTH] == 1 and not apart:
            found[-1] = (found[-1][0], found[-1][1] + 1, begin, end)
        else:
            found.append((tap, 1, begin, end))
    return found


def most_in_a_pass(window: Window, depth: int) -> tuple[int, int]:
    """Frames of taps, or of one frame the lines of taps, whose products half precision may add up; 0: less than one."""
    line = window.kernel[WIDTH] * depth
    frames = HALF_TERMS // (window.kernel[HEIGHT] * line)
    return frames, 0 if frames else HALF_TERMS // line


@dataclass(frozen=True)
class Line:
    """A line of outputs: which of all it is, and its clip, frame and row; of a pool's, which of the lines under it."""

    index: Expr
    clip: Expr
    frame: Expr
    row: Expr
    under: Expr = 0


class LineEmitter(RowTiles):
    """The kernel's loops, down to the tile."""

    def __init__(self, conv: LineConv, args: Mapping[str, tirx.Buffer]) -> None:
        super().__init__(conv, args)
        self.positions, self.zero_dead = conv.positions, conv.zero_dead
        #: Outputs under one of the kernel's, along each axis.
        self.step: Triple = (1, 1, 1)
        #: The window whose outputs the kernel leaves, how many of them are in a line, and where.
        self.outer, self.width, self.result = conv.window, conv.window.out[WIDTH], self.y
        self.frame_mask, self.position_mask = args.get("out_frames"), args.get("positions")

    def emit(self) -> None:
        frames, height, _ = self.outer.out
        with parallel(self.outer.batch * frames * height) as index:
            clip = let(tirx.floordiv(index, frames * height))
            frame, row = let(tirx.floormod(tirx.floordiv(index, height), frames)), let(tirx.floormod(index, height))
            line = Line(index, clip, frame, row)
            if self.frame_mask is None:
                self._line(line)
            else:
                read = self.frame_mask[clip, frame * self.step[TIME]] != number(0.0)
                choose(read, partial(self._line, line), partial(self._dead_line, line))

    def _line(self, line: Line) -> None:
        """One line of a frame that somebody reads."""
        window = self.conv.window
        read = None if self.position_mask is None else self._count_read(line, 0, self.width)
        spans = span(window, TIME, line.frame), span(window, HEIGHT, line.row)
        self.remember()
        first, blocks = 0, self.conv.blocks
        per_block = self.conv.vectors // blocks
        for panels, vectors in panel_widths(per_block, self.tile.vectors):
            with serial(blocks * panels) as index:
                within, skipped = (index, 0) if blocks == 1 else (index % panels, index // panels * per_block)
                panel = (let(first + within * vectors + skipped), vectors)
                each_piece(window, WIDTH, self.tile.mr, partial(self._piece, line, read, spans, panel))
            first += panels * vectors
        if read is not None and self.zero_dead:
            self._clear_unread(line, read)

    # -- what is read ------------------------------------------------------------------------------------------------

    def _is_read(self, line: Line, column: Expr) -> Expr:
        """1 where somebody reads an output of a line, else 0."""
        assert self.position_mask is not None
        assert self.positions is not None
        clips, frames = self.positions
        frame, row, column = (each * step for each, step in zip((line.frame, line.row, column), self.step, strict=True))
        at = (line.clip if clips > 1 else 0, frame if frames > 1 else 0, row, column)
        return tirx.Cast(INT, self.position_mask[at] != number(0.0))

    def _count_read(self, line: Line, begin: Expr, count: Expr) -> Expr:
        """How many of ``count`` outputs of a line from ``begin`` on somebody reads."""
        found = scratch((1,), INT)
        store(found, tirx.IntImm(INT, 0), 0)
        with serial(count) as index:
            store(found, found[0] + self._is_read(line, begin + index), 0)
        return let(found[0])

    def _clear_unread(self, line: Line, read: Expr) -> None:
        """Zeros in the outputs of a line that nobody reads, where not all are."""
        with when(read < self.width), serial(self.width) as column, when(self._is_read(line, column) == 0):
            self._zeros(line, column)

    def _dead_line(self, line: Line) -> None:
        if self.zero_dead == "all":
            with serial(self.width) as column:
                self._zeros(line, column)

    def _zeros(self, line: Line, column: Expr) -> None:
        channels = self.conv.channels_out
        with serial(channels) as channel:
            write(self.result, number(0.0), big(line.index * self.width + column) * channels + channel)

    def _piece(
        self, line: Line, read: Expr | None, spans: Spans, panel: tuple[Expr, int], begin: Expr, inside: Taps
    ) -> None:
        """A tile, unless nobody reads any of it; ``read``: how many outputs of the line somebody does."""
        if read is None:
            self._tile(line, spans, panel, begin, inside)
            return
        some = scratch((1,), INT)
        store(some, read, 0)
        with when(tirx.all(read > 0, read < self.width)):
            store(some, self._read_in(line, begin, len(inside)), 0)
        with when(some[0] > 0):
            self._tile(line, spans, panel, begin, inside)

    def _read_in(self, line: Line, begin: Expr, count: int) -> Expr:
        """How many results of a tile somebody reads."""
        return self._count_read(line, begin, count)

    # -- the tile ----------------------------------------------------------------------------------------------------

    def _tile(self, line: Line, spans: Spans, panel: tuple[Expr, int], begin: Expr, inside: Taps) -> None:
        """The outputs from ``begin`` on of one line, all their taps."""
        conv, window, depth = self.conv, self.conv.window, self.conv.block_in
        vector, width = panel
        channel = tirx.floordiv(vector, conv.vectors // conv.blocks) * depth if conv.blocks > 1 else 0
        (source0, first0, past0), (source1, first1, past1) = spans
        sums = self.start(vector, len(inside), width)
        left = let(begin * window.stride[WIDTH] - window.padding[WIDTH])
        frames, rows = most_in_a_pass(window, depth) if conv.dtype == HALF else (0, 0)
        multiply = self.add if frames or rows else self.multiply
        with self._taps(TIME, past0 - first0, frames, sums) as index0:
            tap0 = let(first0 + index0)
            frame = let(line.clip * window.size[TIME] + source0 + tap0 * window.dilation[TIME])
            with self._taps(HEIGHT, past1 - first1, rows, sums) as index1:
                tap1 = let(first1 + index1)
                row = let(frame * window.size[HEIGHT] + source1 + tap1 * window.dilation[HEIGHT])
                source = let(big(row * window.size[WIDTH] + left) * conv.channels_in + channel)
                tap = (tap0 * window.kernel[HEIGHT] + tap1) * window.kernel[WIDTH]
                weights = let(big(vector) * self.vector_floats + big(tap) * (depth * self.count))
                for first, count, begin_row, end_row in runs(window, inside, apart=conv.blocks > 1):
                    moved = first * window.dilation[WIDTH] * conv.channels_in + begin_row * conv.row_floats
                    some = sums.rows(begin_row, end_row)
                    multiply(source + moved, weights + first * depth * self.count, count * depth, some)
        self.finish(let(self._target(line, begin, vector)), sums)

    def _target(self, line: Line, begin: Expr, vector: Expr) -> Expr:
        """Where a tile is stored."""
        return big(line.index * self.width + begin) * self.conv.channels_out + vector * self.count

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
