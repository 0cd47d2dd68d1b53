"""Winograd convolution from the side of its input: tiles of living inputs, whose outputs are added where they overlap.

The transpose of minimal filtering: a tile of ``m`` inputs is evaluated (``A``, α × m), multiplied by transformed
weights of turned filters, and interpolated (``B``, α × α) to the α = m + 2 outputs that it reaches, with as many
products as ``m`` outputs of :mod:`.winograd` take. A tile is left out where all *its own* inputs are dead, while a tile
of outputs reads α inputs along each axis, of which some are alive nearly always.

The outputs of a row of tiles are added up in a *strip* of α lines. Tiles come in order, so that the first ``m`` lines
of a strip are complete once the next row of tiles begins; then they are stored, and its last two lines carried on.
Threads share the output channels: each has a strip of its own for a cache line of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from tvm import tirx

from ..emit import INT, Expr, big, lanes, let, number, parallel, read, scratch, serial, store, when, write
from ..epilogue import activate_for
from ..geometry import Triple, triple
from .conv3d_gather import GatherConv
from .cost import axis_densities
from .winograd import WinogradConv, WinogradEmitter
from .winograd_multiply import LINE_FLOATS
from .winograd_plan import Planner, WinogradPlan
from .winograd_transforms import WinogradPanels

#: Lines of a strip that the next row of tiles adds to as well.
OVERLAP = 2


def why_no_input_tiles(conv: GatherConv) -> str:
    """Why the layer of ``conv``, which a mask of its input's positions thins, cannot be computed from that side."""
    window, plan = conv.window, conv.plan
    if (window.size[0], window.kernel, window.stride) != (1, (1, 3, 3), (1, 1, 1)) or window.padding != (0, 1, 1):
        return "it leaves out the taps that read dead positions, and is no 3×3 convolution of single frames"
    if plan.out_frames or plan.positions is not None or conv.live_out:
        return "it leaves out the taps that read dead positions, and outputs too"
    if conv.channels_out % conv.tile.vector_floats:
        return "it leaves out the taps that read dead positions, and its output channels fill no whole vectors"
    return ""


@dataclass(frozen=True)
class InputTiles(WinogradPlan):
    """Tiles of the input: those are listed of which some position is alive. ``in_positions``: how many clips and frames
    the mask tells apart."""

    name = "plan_winograd_inputs"
    in_positions: tuple[int, int] | None = None

    @cached_property
    def tiles(self) -> Triple:
        """Input tiles on each axis."""
        return triple(-(-extent // m) for extent, m in zip(self.window.size, self.m, strict=True))

    @property
    def dynamic_taps(self) -> bool:
        """Tiles of dead frames are not listed at all."""
        return False

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Masks and the table in, the lists out."""
        _InputPlanner(self, args).emit()


class _InputPlanner(Planner):
    """Tiles are living where positions of the input are."""

    positions = "in_positions"

    def _frame_is_read(self, clip: Expr, frame: Expr) -> Expr:
        """Whether the frame is alive."""
        if not self.plan.in_frames:
            return tirx.IntImm("bool", 1)
        return self.masks["in_frames"][clip, frame] != number(0.0)


@dataclass(frozen=True)
class WinogradInputs(WinogradConv):
    """The kernel; its ``plan`` is :class:`InputTiles`."""

    spatial_tiles = (2, 4)  # masks come in tiles of powers of two, which others would cut

    @property
    def name(self) -> str:
        """As of other Winograd kernels, and from which side."""
        return super().name.replace("winograd", "winograd_inputs")

    @property
    def panelled(self) -> WinogradPanels:
        """Weights of turned filters."""
        return replace(super().panelled, turned=True)

    @property
    def masks_read(self) -> list[str]:
        """Which positions of a living tile are dead, and may hold anything."""
        return ["in_positions"]

    @property
    def group(self) -> int:
        """Output channels of a strip: a cache line, or a vector where that is longer."""
        return max(LINE_FLOATS, self.tile.vector_floats)

    @property
    def strip(self) -> Triple:
        """Lines, columns and channels of a strip."""
        return self.plan.alpha[1], self.plan.tiles[2] * self.plan.m[2] + OVERLAP, self.group

    @property
    def memory_bytes(self) -> int:
        """Also the strips."""
        return super().memory_bytes + 4 * -(-self.channels_out // self.group) * math.prod(self.strip)

    @property
    def expected(self) -> list[float]:
        """Shares of each thinned axis that may be alive."""
        return axis_densities((self.live_in, self.plan.in_frames, self.plan.in_positions))

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Chunk by chunk, as every Winograd kernel."""
        _InputEmitter(self, args).emit()


class _InputEmitter(WinogradEmitter):
    """Strips (groups, lines, columns, channels); ``reached``: which row of tiles each strip is at, of all clips, after
    whose last one stands a row without tiles."""

    conv: WinogradInputs

    def emit(self) -> None:
        conv, plan = self.conv, self.plan
        groups = -(-conv.channels_out // conv.group)
        self.strips = scratch((groups * math.prod(conv.strip),))
        self.reached = scratch((groups,), INT)
        with parallel(groups) as group:
            store(self.reached, tirx.IntImm(INT, 0), group)
            self._clear_lines(group, 0)
        self._each_chunk(groups, self._add_rows)
        with parallel(groups) as group:
            self._reach(group, tirx.IntImm(INT, plan.window.batch * self._rows_of_clip))

    @property
    def _rows_of_clip(self) -> int:
        return self.plan.tiles[1] + 1

    def _matrix(self, which: int, axis: int) -> np.ndarray:
        """``A`` for inputs, ``B`` for outputs."""
        return super()._matrix(2 - which, axis).T

    def _first_input(self, axis: int, index: Expr) -> Expr:
        return let(index * self.plan.input_step(axis))

    def _readable(self, clip: Expr, starts: Sequence[Expr]) -> tirx.Buffer:
        """For each position of a tile of inputs: 1 if it is inside the frame and alive."""
        plan, size = self.plan, self.window.size
        assert plan.in_positions is not None
        readable, mask = scratch((plan.m[1] * plan.m[2],), INT), self.args["in_positions"]
        of_clip, _ = plan.in_positions
        with serial(plan.m[1]) as line, serial(plan.m[2]) as column:
            at = (let(starts[1] + line), let(starts[2] + column))
            safe = (tirx.min(at[0], size[1] - 1), tirx.min(at[1], size[2] - 1))
            alive = mask[clip if of_clip > 1 else 0, 0, safe[0], safe[1]] != number(0.0)
            inside = tirx.all(at[0] < size[1], at[1] < size[2], alive)
            store(readable, tirx.Cast(INT, inside), line * plan.m[2] + column)
        return readable

    def _is_read(self, readable: tirx.Buffer | None, at: Sequence[Expr], place: Sequence[Expr]) -> list[Expr]:
        assert readable is not None
        return [readable[place[1] * self.plan.m[2] + place[2]] != 0]

    # -- strips ------------------------------------------------------------------------------------------------------

    def _at(self, group: Expr, line: Expr, column: Expr) -> Expr:
        """Where a position of a strip begins."""
        lines, columns, channels = self.conv.strip
        return big(((group * lines + line) * columns + column) * channels)

    def _vectors(self, group: Expr) -> Expr:
        """How many vectors of output channels a group has."""
        of_group, all_ = self.conv.group // self.tile.vector_floats, self.conv.channels_out // self.tile.vector_floats
        return tirx.min(of_group, all_ - group * of_group) if all_ % of_group else of_group

    def _clear_lines(self, group: Expr, first: int) -> None:
        lines, columns, channels = self.conv.strip
        floats = self.tile.vector_floats
        start = let(self._at(group, first, 0))
        with serial((lines - first) * columns * channels // floats) as vector:
            store(self.strips, number(0.0, floats), lanes(start + vector * floats, floats))

    def _add_rows(self, chunk: Expr, group: Expr) -> None:
        """All tiles of a chunk, in order, for the output channels of a group."""
        plan, mr = self.plan, self.tile.mr
        with serial(self.counts[chunk, 1] * mr) as slot:
            row = let(self.rows_out[chunk, tirx.floordiv(slot, mr), tirx.floormod(slot, mr)])
            with when(row >= 0):
                column = let(self.columns[chunk, row])
                clip, place = let(tirx.floordiv(column, plan.places)), let(tirx.floormod(column, plan.places))
                tile_row = let(tirx.floordiv(place, plan.tiles[2]))
                self._reach(group, let(clip * self._rows_of_clip + tile_row))
                self._add_tile(slot, group, let(tirx.floormod(place, plan.tiles[2]) * plan.m[2]))

    def _add_tile(self, slot: Expr, group: Expr, first_column: Expr) -> None:
        conv, floats, alpha = self.conv, self.tile.vector_floats, self.plan.alpha
        waiting = scratch((self.plan.xi * floats,))
        source = let(big(slot) * (conv.panels * self.tile.nr) + group * conv.group)
        with serial(self._vectors(group)) as vector:
            lane = let(vector * floats)

            def product_at(at: list[Expr]) -> Expr:
                xi = at[1] * alpha[2] + at[2]
                return self.products[lanes(big(xi) * conv.product_plane + source + lane, floats)]

            def add(at: Expr, value: Expr) -> None:
                line, column = tirx.floordiv(at, alpha[2]), tirx.floormod(at, alpha[2])
                there = lanes(self._at(group, line, first_column + column) + lane, floats)
                store(self.strips, self.strips[there] + value, there)

            self._along_axes([1, 2], 0, product_at, add, waiting, floats)

    def _reach(self, group: Expr, row: Expr) -> None:
        """Store what is complete before row ``row`` of all clips' tiles."""
        first = let(self.reached[group])
        with serial(row - first) as passed:
            self._store_lines(group, let(first + passed))
        store(self.reached, row, group)

    def _store_lines(self, group: Expr, row: Expr) -> None:
        """The first lines of a strip, which is at row ``row``, and carry its last ones on."""
        plan, window, (_, columns, channels) = self.plan, self.window, self.conv.strip
        clip, tile_row = let(tirx.floordiv(row, self._rows_of_clip)), let(tirx.floormod(row, self._rows_of_clip))
        shift = window.padding[1] - OVERLAP, window.padding[2] - OVERLAP
        with serial(plan.m[1]) as line:
            height = let(tile_row * plan.m[1] + line + shift[0])
            with when(tirx.all(height >= 0, height < window.out[1])):
                target = let(big((clip * window.out[1] + height) * window.out[2]) * self.conv.channels_out)
                self._store_line(group, line, -shift[1], target)
        floats, start = self.tile.vector_floats, let(self._at(group, 0, 0))
        with serial(OVERLAP * columns * channels // floats) as vector:
            at = let(start + vector * floats)
            carried = self.strips[lanes(at + plan.m[1] * columns * channels, floats)]
            store(self.strips, carried, lanes(at, floats))
        self._clear_lines(group, OVERLAP)

    def _store_line(self, group: Expr, line: Expr, first: int, target: Expr) -> None:
        """Bias, residual and activation of a line of outputs from ``target`` on; ``first``: its first column."""
        conv, floats = self.conv, self.tile.vector_floats
        with serial(self.window.out[2]) as column, serial(self._vectors(group)) as vector:
            lane = let(vector * floats)
            channel = let(group * conv.group + lane)
            value = self.strips[lanes(self._at(group, line, column + first) + lane, floats)]
            value = value + self.bias[lanes(channel, floats)]
            there = let(target + column * conv.channels_out + channel)
            value = let(value)
            if self.residual is not None:
                value = value + read(self.residual, there, floats)
            value = activate_for(str(self.y.dtype), conv.activation, value, floats)
            write(self.y, value, there, floats)
