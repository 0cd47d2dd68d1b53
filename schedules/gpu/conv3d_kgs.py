"""Convolution with kernel-group structured sparsity on a GPU: the gathered one, its terms being listed columns.

A block computes one kernel group of ``nr`` filters. The columns of a group are listed tap by tap, so those of a tile's
taps are one stretch of the list, from its first tap to its last; columns of a dead frame in between count as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from .. import kernel_group_conv
from ..emit import INT, Expr, ceil_div, lanes, let, number, serial, short, store, when
from ..kernel import Operand, Weights, output
from ..kernel_group_conv import KernelGroupLists
from .conv3d_gather import Arguments, BlockConv, GatherEmitter, Term
from .emit import BLOCK, compact, each_element, integer, launch, pick, registers


@dataclass(frozen=True)
class GroupConv(KernelGroupLists, BlockConv):
    """As :class:`BlockConv`, with ``tile.nr`` filters in a group and ``columns`` columns over all groups."""

    columns: int = 0

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"conv3d_kgs_gpu{self.marks}_{short(self.dtype)}_{self.tile.name}"

    @property
    def entry_fields(self) -> int:
        """Channel, tap and weights of each column."""
        return 3

    def column_planner(self) -> ColumnPlan:
        """A launch that lists them, and one that finds where groups begin."""
        return ColumnPlan(self)

    def static_columns(self, weights: Weights) -> np.ndarray:
        """The ``columns`` list of the weights."""
        assert weights.columns is not None
        listed = np.zeros((1, self.entry_fields, self.entries), INT)
        listed[0, 0, : self.columns] = weights.columns.channel
        listed[0, 1, : self.columns] = self.column_taps(weights.columns.ptr)
        listed[0, 2, : self.columns] = np.arange(self.columns) * self.tile.nr
        return listed

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Blocks of rows by kernel groups."""
        GroupEmitter(self, _GroupArguments(self, args)).emit()


@dataclass(frozen=True)
class ColumnPlan(kernel_group_conv.ColumnPlan):
    """Thin the column lists; how many are left of each sample is a list of its own."""

    name = "plan_columns_gpu"

    def operands(self) -> list[Operand]:
        """Also what the first launch leaves for the second."""
        return [*super().operands(), output("used", (self.conv.plan.samples, 1), INT)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """List the columns, then find where each group and tap begins."""
        conv = self.conv
        samples, panels, entries = conv.plan.samples, conv.panels, conv.window.taps + 1
        mask, starts, static, out_starts, out_columns, used = args.values()
        with launch(samples, BLOCK) as (sample, thread):

            def list_it(slot: Expr, column: Expr) -> None:
                for field in range(3):
                    store(out_columns, static[0, field, column], sample, field, slot)

            def alive(column: Expr) -> Expr:
                return mask[sample, let(static[0, 0, column])] != number(0.0)

            total = compact(thread, conv.columns, alive, list_it)
            with when(thread == 0):
                store(used, total, sample, 0)
        with each_element(samples * panels * entries) as index:
            sample, entry = let(tirx.floordiv(index, panels * entries)), let(tirx.floormod(index, panels * entries))
            panel, tap = tirx.floordiv(entry, entries), tirx.floormod(entry, entries)
            begin = let(starts[0, panel, tap] * conv.tile.nr)
            store(out_starts, _first_from(out_columns, sample, used[sample, 0], begin), sample, panel, tap)


def _first_from(columns: tirx.Buffer, sample: Expr, used: Expr, begin: Expr) -> Expr:
    """The first of ``used`` listed columns whose weights lie at ``begin`` or behind; the list is sorted by them."""
    bounds = registers((2,), INT)
    store(bounds, integer(0), 0)
    store(bounds, used, 1)
    with serial(int(columns.shape[2]).bit_length()), when(bounds[0] < bounds[1]):
        middle = let(tirx.floordiv(bounds[0] + bounds[1], 2))
        before = let(columns[sample, 2, middle] < begin)
        store(bounds, pick(before, middle + 1, bounds[0]), 0)
        store(bounds, pick(before, bounds[1], middle), 1)
    return bounds[0]


class _GroupArguments(Arguments):
    conv: GroupConv
    sample: Expr

    def __init__(self, conv: GroupConv, args: Mapping[str, tirx.Buffer]) -> None:
        super().__init__(conv, args)
        self.column_starts, self.columns = args["column_starts"], args["columns"]
        self.out_mask: Any = args.get("out_mask")

    def finished(self, value: Expr, channel: Expr, count: int) -> Expr:
        return value * self.out_mask[self.sample, lanes(channel, count)] if self.out_mask is not None else value


class GroupEmitter(GatherEmitter):
    """The gathered kernel with columns in the place of taps and channels."""

    conv: GroupConv
    args: _GroupArguments

    def __init__(self, conv: GroupConv, args: _GroupArguments) -> None:
        super().__init__(conv, args)
        self.gathers = False

    @property
    def vector(self) -> int:
        """Columns that lie next to each other need not be of channels that do."""
        return 1

    def _panel_alive(self, panel: Expr) -> list[Expr]:
        self.args.sample = self.sample
        if not self.conv.live_out:
            return []
        alive = registers((1,))
        store(alive, number(0.0), 0)
        with serial(tirx.min(self.tile.nr, self.conv.channels_out - panel * self.tile.nr)) as index:
            store(alive, tirx.max(alive[0], self.args.out_mask[self.sample, panel * self.tile.nr + index]), 0)
        return [alive[0] != number(0.0)]

    def _prepare_terms(self, taps: Expr) -> Expr:
        """The stretch of the group's columns between its first and its last live tap, and which frames live."""
        args, conv = self.args, self.conv
        of_sample = self.of_sample = self.sample if conv.column_samples > 1 else integer(0)
        picture = conv.window.kernel[1] * conv.window.kernel[2]
        first = let(args.taps[self.first_tap * 4])
        last = let(args.taps[(self.first_tap + tirx.max(taps - 1, 0)) * 4])
        self.frames = registers((1,), INT)
        store(self.frames, integer(0), 0)
        with serial(ceil_div(taps, picture)) as turn:
            frame = tirx.floordiv(args.taps[(self.first_tap + turn * picture) * 4], picture)
            store(self.frames, tirx.bitwise_or(self.frames[0], tirx.shift_left(integer(1), frame)), 0)
        self.first_column = let(args.column_starts[of_sample, self.panel, first])
        end = args.column_starts[of_sample, self.panel, last + 1]
        return let(pick(taps > 0, end - self.first_column, integer(0)))

    def _term(self, index: Expr) -> Term:
        args, window = self.args, self.conv.window
        inside = let(index < self.total)
        column = let(self.first_column + tirx.min(index, tirx.max(self.total - 1, 0)))
        safe = let(tirx.min(column, max(0, self.conv.columns - 1)))
        channel, tap, weights = (let(args.columns[self.of_sample, field, safe]) for field in range(3))
        if self.conv.plan.dynamic_taps:
            frame = tirx.floordiv(tap, window.kernel[1] * window.kernel[2])
            alive = tirx.bitwise_and(tirx.shift_right(self.frames[0], frame), 1) > 0
            inside = let(tirx.all(inside, alive))
        _, height, width = window.size
        _, kernel_h, kernel_w = window.kernel
        frame, row, right = (
            tirx.truncdiv(tap, kernel_h * kernel_w),
            tirx.truncmod(tirx.truncdiv(tap, kernel_w), kernel_h),
            tirx.truncmod(tap, kernel_w),
        )
        down, right = let(row * window.dilation[1]), let(right * window.dilation[2])
        offset = let((frame * (window.dilation[0] * height) + down) * width + right)
        return Term(inside, (offset, down, right), channel, weights)
