"""The gathered convolution on a GPU: a tiled implicit GEMM over the same index lists as the CPU's.

A block of threads computes ``mr`` rows × ``nr`` output channels. It walks the products of its rows' taps and live input
channels in steps of ``step``: fetches the rows' values and the weights of the next step into registers, multiplies the
present one out of shared memory, then puts the fetched ones into the other half of that memory. The grid is that of the
dense layer; blocks past the counts of the lists end at once, so that no count has to travel to the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from tvm import tirx

from ..convolution import Convolution
from ..emit import FLOAT, INT, Expr, flat, lanes, let, number, read, serial, short, store, when, write
from ..epilogue import activate
from ..preparation import Panels, Preparation
from ..space import Space
from ..workload import Workload
from .block_space import BlockSpace
from .channel_plan import ChannelPlan
from .emit import (
    QUAD,
    barrier,
    each_element,
    integer,
    launch,
    parts,
    pick,
    registers,
    shared,
    zeros,
)
from .row_plan import BlockPlan, has_border
from .tiles import BlockTile, Gpu


@dataclass(frozen=True)
class BlockConv(Convolution):
    """A convolution for blocks of threads. ``dtype`` is how activations and weights are stored; sums are float32."""

    tile: BlockTile
    plan: BlockPlan

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"conv3d_gather_gpu{self.marks}_{short(self.dtype)}_{self.tile.name}"

    def channel_planner(self, axis: str, channels: int) -> ChannelPlan:
        """One block of threads a sample."""
        return ChannelPlan(self.plan.samples, channels, axis)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: (panels, taps, depth, nr), or (taps, depth, channels_out) for gathered ones."""
        return (self.window.taps, self.depth, self.channels_out) if self.live_out else super().weight_shape

    @property
    def panelled(self) -> Preparation:
        """In panels, or with output channels innermost: one panel as wide as all of them."""
        if len(self.weight_shape) == 4:
            return super().panelled
        return Panels(1, self.channels_out, self.depth, self.window.taps, self.channels_out)

    def pack_weights(self, weight: np.ndarray) -> np.ndarray:
        """Pack float32 weights (C_out, C_in / groups, KT, KH, KW) the way the kernel reads them."""
        return super().pack_weights(weight).reshape(self.weight_shape)

    def unpacked(self, at: Expr) -> tuple[Expr, Expr, Expr, Expr] | None:
        """Where output channels are innermost, too."""
        if len(self.weight_shape) == 4:
            return super().unpacked(at)
        tap = let(tirx.floordiv(at, self.channels_out * self.depth))
        channel = let(tirx.floormod(tirx.floordiv(at, self.channels_out), self.depth))
        return let(tirx.floormod(at, self.channels_out)), tap, channel, tirx.const(True, "bool")

    def space(self, machine: Gpu, workload: Workload) -> Space | None:
        """Rows and channels of a block and of a thread, terms of a step."""
        return BlockSpace(machine, workload)

    def sized(self: B, decisions: Mapping[str, int]) -> B:
        """With this tile."""
        tile = BlockTile(**decisions)
        return replace(self, tile=tile, plan=replace(self.plan, mr=tile.mr))

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Blocks of rows by panels of output channels."""
        GatherEmitter(self, Arguments(self, args)).emit()


B = TypeVar("B", bound=BlockConv)


@dataclass
class Term:
    """One product of the sum: whether there is one, its tap's row in the tap list, its channel and weights."""

    inside: Expr
    taps: tuple[Expr, Expr, Expr]
    channel: Expr
    weights: Expr


class Arguments:
    """The parameters that all kernels of convolutions share, and what all do with them."""

    def __init__(self, conv: BlockConv, args: Mapping[str, tirx.Buffer]) -> None:
        self.conv, self.lists, self.masks = conv, args, {key: args[key] for key in conv.masks_read}
        self.bias = args["bias"]
        self.in_channels: Any = args.get("in_channels")
        self.out_channels: Any = args.get("out_channels")
        self.x, self.weights = flat(args["x"]), flat(args["weights"])
        self.y, self.taps = flat(args["y"]), flat(args["tap_entries"])
        self.residual = flat(args["residual"]) if conv.residual else None

    def tap_range(self, sample: Expr, tile: Expr) -> tuple[Expr, Expr]:
        """First tap entry of a tile, and how many it has."""
        segment = let(self.lists["blocks"][sample, tile])
        some = let(self.lists["blocks"][sample, tile + 1] > segment)
        first = let(pick(some, self.lists["segments"][sample, segment, 0], integer(0)))
        last = pick(some, self.lists["segments"][sample, segment, 1], integer(0))
        return first, let(last - first)

    def beside(self, row: Expr, column: Expr) -> list[Expr]:
        """Conditions under which a position lies in the picture; none where every tap always does."""
        _, height, width = self.conv.window.size
        if not has_border(self.conv.window):
            return []
        return [row >= 0, row < height, column >= 0, column < width]

    def corner(self, row_out: Expr) -> tuple[Expr, Expr]:
        """Row and column in the picture of the first tap of an output position."""
        window = self.conv.window
        _, out_h, out_w = window.out
        row = tirx.truncmod(tirx.truncdiv(row_out, out_w), out_h) * window.stride[1] - window.padding[1]
        return row, tirx.truncmod(row_out, out_w) * window.stride[2] - window.padding[2]

    def finish(self, value: Expr, target: Expr, channel: Expr, count: int) -> None:
        """Bias, residual, activation, and the store."""
        value = value + self.bias[lanes(channel, count)]
        if self.residual is not None:
            value = value + read(self.residual, target, count)
        write(self.y, self.finished(activate(self.conv.activation, value, count), channel, count), target, count)

    def finished(self, value: Expr, channel: Expr, count: int) -> Expr:
        """What is stored for output channels ``channel …``."""
        return value

    def zero_dead(self) -> None:
        """A launch of its own: zeros where readers may look and nothing is computed."""
        conv, window = self.conv, self.conv.window
        everything = conv.zero_dead == "all"
        if not (self.masks or (everything and conv.live_out)):
            return
        with each_element(window.positions_out * conv.channels_out) as index:
            position = let(tirx.floordiv(index, conv.channels_out))
            _, out_h, out_w = window.out
            frame = let(tirx.floordiv(position, out_h * out_w))
            clip, out_frame = tirx.floordiv(frame, window.out[0]), tirx.floormod(frame, window.out[0])
            dead: list[Expr] = [tirx.const(everything and conv.live_out, "bool")]
            frame_alive: Expr = tirx.const(True, "bool")
            if "out_frames" in self.masks:
                frame_alive = let(self.masks["out_frames"][clip, out_frame] != number(0.0))
                if everything:
                    dead.append(tirx.Not(frame_alive))
            if "positions" in self.masks:
                clips, frames = conv.plan.positions or (1, 1)
                row, column = tirx.floormod(tirx.floordiv(position, out_w), out_h), tirx.floormod(position, out_w)
                at = (clip if clips > 1 else 0, out_frame if frames > 1 else 0, row, column)
                dead.append(tirx.all(frame_alive, self.masks["positions"][at] == number(0.0)))
            with when(tirx.any(*dead)):
                write(self.y, number(0.0), index)


class GatherEmitter:
    """The kernel's parts, from its launch down to the multiply-add."""

    def __init__(self, conv: BlockConv, args: Arguments) -> None:
        self.conv, self.tile, self.args = conv, conv.tile, args
        #: Whether a panel is any ``nr`` live output channels, or ``nr`` consecutive ones.
        self.gathers = conv.live_out

    def emit(self) -> None:
        conv, tile = self.conv, self.tile
        self.args.zero_dead()
        tiles = conv.plan.tiles_capacity
        with launch(conv.plan.samples * tiles * conv.panels, tile.threads) as (block, thread):
            self.thread = thread
            panel = let(tirx.floormod(block, conv.panels))
            current = let(tirx.floormod(tirx.floordiv(block, conv.panels), tiles))
            self.sample = let(tirx.floordiv(block, conv.panels * tiles)) if conv.plan.samples > 1 else integer(0)
            with when(tirx.all(current < self.args.lists["counts"][self.sample, 1], *self._panel_alive(panel))):
                self._block(current, panel)

    def _panel_alive(self, panel: Expr) -> list[Expr]:
        """Conditions under which the panel has anything to compute."""
        if not self.gathers:
            return []
        return [panel * self.tile.nr < self.args.out_channels[self.sample, 0]]

    # -- one block ---------------------------------------------------------------------------------------------------

    def _block(self, current: Expr, panel: Expr) -> None:
        tile = self.tile
        self.panel = panel
        self._declare_memory()
        self._list_rows(current, panel)
        self.first_tap, taps = self.args.tap_range(self.sample, current)
        total = self._prepare_terms(taps)
        for index in range(tile.thread_rows * tile.thread_channels):
            store(self.acc, number(0.0), index)
        barrier()
        steps = let(tirx.floordiv(total + (tile.step - 1), tile.step))
        self.total = total
        self._fetch(integer(0))
        with serial(steps) as step:
            half = let(tirx.floormod(step, 2))
            self._put(half)
            barrier()
            with when(step + 1 < steps):
                self._fetch(step + 1)
            self._multiply(half)
        self._store_tile()

    def _declare_memory(self) -> None:
        tile = self.tile
        # The offset keeps writes of different steps in different banks.
        self.pitch = tile.mr + QUAD
        self.row_in, self.row_out = shared((tile.mr,), INT), shared((tile.mr,), INT)
        self.row_corner = shared((2 * tile.mr,), INT)
        self.xs, self.ws = shared((2 * tile.step * self.pitch,)), shared((2 * tile.step * tile.nr,))
        self.acc = registers((tile.thread_rows * tile.thread_channels,))
        self.fetched_x = registers((tile.mr * tile.step // tile.threads,))
        self.fetched_w = registers((tile.step * tile.nr // tile.threads,))

    def _list_rows(self, current: Expr, panel: Expr) -> None:
        """Bring the block's rows, and the output channels that it gathers, into shared memory."""
        tile, args = self.tile, self.args
        with self._spread(tile.mr) as row:
            target = let(args.lists["rows_out"][self.sample, current, row])
            store(self.row_in, args.lists["rows_in"][self.sample, current, row], row)
            store(self.row_out, target, row)
            down, right = args.corner(target)
            store(self.row_corner, down, row)
            store(self.row_corner, right, tile.mr + row)
        if self.gathers:
            self.columns = shared((tile.nr,), INT)
            with self._spread(tile.nr) as index:
                last = args.out_channels[self.sample, 0] - 1
                listed = args.out_channels[self.sample, 1 + tirx.min(panel * tile.nr + index, last)]
                store(self.columns, listed, index)

    @contextmanager
    def _spread(self, count: int) -> Iterator[Expr]:
        """Share out ``count`` indices over the block's threads."""
        threads = self.tile.threads
        with serial(-(-count // threads)) as turn:
            index = let(turn * threads + self.thread)
            with when(index < count):
                yield index

    # -- the terms of the sum ----------------------------------------------------------------------------------------

    def _prepare_terms(self, taps: Expr) -> Expr:
        """How many terms the block's sums have: taps × live input channels."""
        if not self.conv.live_in:
            return let(taps * self.conv.depth)
        self.live = let(self.args.in_channels[self.sample, 0])
        # Terms are fewer than 2**20, so this quotient is exact (see _term).
        self.inverse = let(number(1.0) / tirx.Cast(FLOAT, tirx.max(self.live, 1)))
        return let(taps * self.live)

    def _term(self, index: Expr) -> Term:
        """Term ``index`` of the sum: its tap and channel, and where its weights begin."""
        conv, tile, taps = self.conv, self.tile, self.args.taps
        inside = let(index < self.total)
        safe = let(tirx.min(index, tirx.max(self.total - 1, 0)))
        if conv.live_in:
            turn = let(tirx.Cast(INT, (tirx.Cast(FLOAT, safe) + number(0.5)) * self.inverse))
            at = let(safe - turn * self.live)
            channel = let(self.args.in_channels[self.sample, 1 + at])
        else:
            turn = let(tirx.floordiv(safe, conv.depth))
            channel = let(safe - turn * conv.depth)
        entry = let((self.first_tap + turn) * 4)
        row = let(taps[entry] * conv.depth + channel)
        if self.gathers:
            weights = row * conv.channels_out
        else:
            weights = (self.panel * (conv.window.taps * conv.depth) + row) * tile.nr
        return Term(inside, (taps[entry + 1], taps[entry + 2], taps[entry + 3]), channel, let(weights))

    @property
    def vector(self) -> int:
        """Channels that one load of a row brings."""
        conv = self.conv
        return QUAD if not conv.live_in and conv.depth % QUAD == 0 and conv.channels_in % QUAD == 0 else 1

    # -- from memory to registers to shared memory -------------------------------------------------------------------

    def _fetch(self, step: Expr) -> None:
        base = let(step * self.tile.step)
        self._fetch_rows(base)
        self._fetch_weights(base)

    def _fetch_rows(self, base: Expr) -> None:
        """Each thread fetches the same ``vector`` terms of several rows."""
        conv, count = self.conv, self.vector
        across, rows = self._row_place()
        term = self._term(let(base + across * count))
        offset, down, right = (let(value) for value in term.taps)
        start = 0
        if conv.groups > 1:
            start = tirx.floordiv(self.panel, conv.panels // conv.groups) * conv.depth
        # Counted in vectors, so that TVM sees that a load is aligned.
        channel = let(tirx.truncdiv(term.channel + start, count))
        for turn, row in enumerate(rows):
            corner = (let(self.row_corner[row] + down), let(self.row_corner[self.tile.mr + row] + right))
            inside = let(tirx.all(term.inside, *self.args.beside(*corner)))
            source = let((self.row_in[row] + offset) * (conv.channels_in // count) + channel)
            value = let(pick(inside, read(self.args.x, source * count, count), zeros(count)))
            for index, part in enumerate(parts(value, count)):
                store(self.fetched_x, part, turn * count + index)

    def _row_place(self) -> tuple[Expr, list[Expr]]:
        """Which terms of a step this thread fetches, and for which rows."""
        tile = self.tile
        across = tile.step // self.vector
        rows_a_turn = tile.threads // across
        first = tirx.floordiv(self.thread, across)
        return tirx.floormod(self.thread, across), [
            first + turn * rows_a_turn for turn in range(tile.mr // rows_a_turn)
        ]

    def _weight_place(self) -> Iterator[tuple[Expr, Expr, int]]:
        """Term within a step and output channel within the panel of each fetch, and how many channels it brings."""
        tile = self.tile
        count = 1 if self.gathers else QUAD
        while tile.step * tile.nr < count * tile.threads:
            count //= 2
        across = tile.nr // count
        for turn in range(tile.step * tile.nr // (count * tile.threads)):
            slot = self.thread + turn * tile.threads
            yield tirx.floordiv(slot, across), tirx.floormod(slot, across) * count, count

    def _fetch_weights(self, base: Expr) -> None:
        for turn, (of_step, column, count) in enumerate(self._weight_place()):
            term = self._term(let(base + of_step))
            at = self.columns[column] if self.gathers else column
            value = let(pick(term.inside, read(self.args.weights, term.weights + at, count), zeros(count)))
            for index, part in enumerate(parts(value, count)):
                store(self.fetched_w, part, turn * count + index)

    def _put(self, half: Expr) -> None:
        """What was fetched goes into one half of shared memory."""
        tile, count = self.tile, self.vector
        across, rows = self._row_place()
        start = let(half * (tile.step * self.pitch))
        for turn, row in enumerate(rows):
            for index in range(count):
                at = start + (across * count + index) * self.pitch + row
                store(self.xs, self.fetched_x[turn * count + index], at)
        start = let(half * (tile.step * tile.nr))
        for turn, (of_step, column, width) in enumerate(self._weight_place()):
            at = start + of_step * tile.nr + column
            store(self.ws, self.fetched_w[lanes(integer(turn * width), width)], lanes(at, width))

    # -- from shared memory to sums ----------------------------------------------------------------------------------

    def _rows_of_thread(self) -> list[Expr]:
        """Rows that this thread sums: quads of consecutive ones, the quads spread over the tile."""
        tile = self.tile
        down = tirx.floordiv(self.thread, tile.nr // tile.thread_channels)
        apart = tile.mr // (tile.thread_rows // QUAD)
        return [down * QUAD + quad * apart for quad in range(tile.thread_rows // QUAD)]

    def _columns_of_thread(self) -> list[Expr]:
        tile = self.tile
        right = tirx.floormod(self.thread, tile.nr // tile.thread_channels)
        apart = tile.nr // (tile.thread_channels // QUAD)
        return [right * QUAD + quad * apart for quad in range(tile.thread_channels // QUAD)]

    def _multiply(self, half: Expr) -> None:
        tile = self.tile
        rows = [let(half * (tile.step * self.pitch) + row) for row in self._rows_of_thread()]
        columns = [let(half * (tile.step * tile.nr) + column) for column in self._columns_of_thread()]
        with serial(tile.step) as k:
            a = [let(self.xs[lanes(k * self.pitch + row, QUAD)]) for row in rows]
            b = [let(self.ws[lanes(k * tile.nr + column, QUAD)]) for column in columns]
            left = [part for vector in a for part in parts(vector, QUAD)]
            right = [part for vector in b for part in parts(vector, QUAD)]
            for i, value in enumerate(left):
                for j, weight in enumerate(right):
                    index = i * tile.thread_channels + j
                    store(self.acc, self.acc[index] + value * weight, index)

    # -- from sums to memory -----------------------------------------------------------------------------------------

    def _store_tile(self) -> None:
        conv, tile = self.conv, self.tile
        per_group = conv.panels // conv.groups
        group = 0 if conv.groups == 1 else tirx.floordiv(self.panel, per_group)
        within = self.panel if conv.groups == 1 else tirx.floormod(self.panel, per_group)
        whole = not self.gathers and conv.group_out % tile.nr == 0 and conv.channels_out % QUAD == 0
        for quad, row in enumerate(self._rows_of_thread()):
            for index in range(QUAD):
                target = let(self.row_out[row + index] * conv.channels_out)
                for block, column in enumerate(self._columns_of_thread()):
                    first = (quad * QUAD + index) * tile.thread_channels + block * QUAD
                    place = let(within * tile.nr + column)
                    if whole:
                        channel = let(group * conv.group_out + place)
                        value = self.acc[lanes(integer(first), QUAD)]
                        self.args.finish(value, target + channel, channel, QUAD)
                    else:
                        self._store_one_by_one(target, column, place, group, first)

    def _store_one_by_one(self, target: Expr, column: Expr, place: Expr, group: Expr, first: int) -> None:
        conv = self.conv
        for part in range(QUAD):
            if self.gathers:
                inside = place + part < self.args.out_channels[self.sample, 0]
                channel = self.columns[column + part]
            else:
                inside = place + part < conv.group_out
                channel = group * conv.group_out + place + part
            with when(inside):
                at = let(channel)
                self.args.finish(self.acc[first + part], target + at, at, 1)
