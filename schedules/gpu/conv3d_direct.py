"""Convolutions that no tile fits, on a GPU: groups of few channels (depthwise), and linear layers of few rows.

Depthwise: one thread per output value, output channels next to each other. Few rows: the weights are read once and
nothing else counts, so a block takes 32 output channels and shares the input channels out over its threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import Expr, ceil_div, let, number, read, serial, short, store, when
from ..geometry import Window
from ..workload import Workload
from .conv3d_gather import Arguments, BlockConv
from .emit import BLOCK, barrier, integer, launch, pick, registers, shared
from .tiles import Gpu

#: Output channels of a block of :class:`LinearConv`, and how many ways its sums are split.
COLUMNS, SLICES = 32, 8
#: Rows up to which a linear layer is bound by reading its weights.
FEW_ROWS = 8


@dataclass(frozen=True)
class DirectConv(BlockConv):
    """A convolution with one thread per output value; of the tile only ``mr`` counts."""

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"conv3d_direct_gpu{self.marks}_{short(self.dtype)}_b{self.tile.mr}"

    @property
    def panels(self) -> int:
        """Weights are not packed in panels."""
        return 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(taps, depth, channels_out)."""
        return (self.window.taps, self.depth, self.channels_out)

    def space(self, machine: Gpu, workload: Workload) -> None:
        """Nothing."""

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """One thread per output value."""
        tiles, rows = self.plan.tiles_capacity, self.tile.mr
        blocks = -(-rows * self.channels_out // BLOCK)
        given = Arguments(self, args)
        given.zero_dead()
        with launch(self.plan.samples * tiles * blocks, BLOCK) as (block, thread):
            current = let(tirx.floormod(tirx.floordiv(block, blocks), tiles))
            sample = let(tirx.floordiv(block, blocks * tiles)) if self.plan.samples > 1 else integer(0)
            index = let(tirx.floormod(block, blocks) * BLOCK + thread)
            row = let(tirx.floordiv(index, self.channels_out))
            slot = let(tirx.floormod(index, self.channels_out))
            with when(tirx.all(current < given.lists["counts"][sample, 1], row < rows)):
                channel, there = _place(self, given, sample, slot)
                with when(let(there)):
                    _sum_of_one(self, given, sample, current, row, let(channel))


@dataclass(frozen=True)
class LinearConv(DirectConv):
    """A linear layer of at most :data:`FEW_ROWS` rows, all in one tile."""

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"linear_gpu{self.marks}_{short(self.dtype)}_r{self.tile.mr}"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """A block takes :data:`COLUMNS` output channels."""
        rows, blocks = self.tile.mr, -(-self.channels_out // COLUMNS)
        given = Arguments(self, args)
        given.zero_dead()
        with launch(self.plan.samples * blocks, COLUMNS * SLICES) as (block, thread):
            sample = let(tirx.floordiv(block, blocks)) if self.plan.samples > 1 else integer(0)
            column, part = let(tirx.floormod(thread, COLUMNS)), let(tirx.floordiv(thread, COLUMNS))
            channel, there = _place(self, given, sample, let(tirx.floormod(block, blocks) * COLUMNS + column))
            channel, there = let(tirx.min(channel, self.channels_out - 1)), let(there)
            sums, acc = shared((SLICES * rows * COLUMNS,)), registers((rows,))
            some = let(given.lists["counts"][sample, 1] > 0)
            for row in range(rows):
                store(acc, number(0.0), row)
            with when(some):
                _slice_of_sums(self, given, sample, part, channel, acc)
            for row in range(rows):
                store(sums, acc[row], (part * rows + row) * COLUMNS + column)
            barrier()
            with serial(ceil_div(integer(rows), SLICES)) as turn:
                row = let(turn * SLICES + part)
                with when(tirx.all(some, there, row < rows)):
                    _finish_row(self, given, sample, row, column, channel, sums)


def _place(conv: BlockConv, args: Arguments, sample: Expr, slot: Expr) -> tuple[Expr, Expr]:
    """Output channel of ``slot`` among those computed, and whether there is one."""
    if not conv.live_out:
        return slot, slot < conv.channels_out
    live = args.out_channels[sample, 0]
    listed = args.out_channels[sample, 1 + tirx.max(tirx.min(slot, live - 1), 0)]
    return pick(live > 0, listed, integer(0)), slot < live


def _sum_of_one(conv: BlockConv, args: Arguments, sample: Expr, current: Expr, row: Expr, channel: Expr) -> None:
    """One output value."""
    source = let(args.lists["rows_in"][sample, current, row])
    target = let(args.lists["rows_out"][sample, current, row])
    down, right = (let(value) for value in args.corner(target))
    first, taps = args.tap_range(sample, current)
    start = let(tirx.floordiv(channel, conv.group_out) * conv.depth)
    live = let(args.in_channels[sample, 0]) if conv.live_in else conv.depth
    acc = registers((1,))
    store(acc, number(0.0), 0)
    with serial(taps) as turn:
        entry = let((first + turn) * 4)
        tap, offset = let(args.taps[entry]), let(args.taps[entry + 1])
        inside = args.beside(let(down + args.taps[entry + 2]), let(right + args.taps[entry + 3]))

        def add() -> None:
            with serial(live) as at:
                k = let(args.in_channels[sample, 1 + at]) if conv.live_in else at
                value = read(args.x, (source + offset) * conv.channels_in + start + k)
                weight = read(args.weights, (tap * conv.depth + k) * conv.channels_out + channel)
                store(acc, acc[0] + value * weight, 0)

        if inside:
            with when(tirx.all(*inside)):
                add()
        else:
            add()
    args.finish(acc[0], target * conv.channels_out + channel, channel, 1)


def _slice_of_sums(conv: BlockConv, args: Arguments, sample: Expr, part: Expr, channel: Expr, acc: tirx.Buffer) -> None:
    """Add up every ``SLICES``-th input channel."""
    rows = conv.tile.mr
    sources = [let(args.lists["rows_in"][sample, 0, row] * conv.channels_in) for row in range(rows)]
    live = let(args.in_channels[sample, 0]) if conv.live_in else integer(conv.depth)
    with serial(ceil_div(tirx.max(live - part, 0), SLICES)) as turn:
        at = let(turn * SLICES + part)
        k = let(args.in_channels[sample, 1 + at]) if conv.live_in else at
        weight = let(read(args.weights, k * conv.channels_out + channel))
        for row, source in enumerate(sources):
            store(acc, acc[row] + read(args.x, source + k) * weight, row)


def _finish_row(
    conv: BlockConv, args: Arguments, sample: Expr, row: Expr, column: Expr, channel: Expr, sums: tirx.Buffer
) -> None:
    total = registers((1,))
    store(total, number(0.0), 0)
    for part in range(SLICES):
        store(total, total[0] + sums[(part * conv.tile.mr + row) * COLUMNS + column], 0)
    target = let(args.lists["rows_out"][sample, 0, row])
    args.finish(total[0], target * conv.channels_out + channel, channel, 1)


def is_few_rows(window: Window, groups: int, samples: int) -> bool:
    """Whether :class:`LinearConv` can compute it: one tap, one convolution group, few rows of each sample."""
    few = window.positions_out // samples <= FEW_ROWS
    return few and window.taps == 1 and groups == 1 and window.size == window.out
