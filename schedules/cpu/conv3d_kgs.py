"""Convolution with kernel-group structured (KGS) sparsity, RT3D section 3, along the lists of the row plan.

A kernel group is ``gm`` filters; its weights are stored column by column, and a column is one (tap, input channel)
that any of its filters uses. Each column is listed by how far its input lies from the window's first tap, so the
columns of consecutive taps are one list that one loop walks: the loops over taps and over input channels of the
gathered convolution become a single one. Vanilla and filter sparsity are the cases where those lists are long or empty.
A mask of live input channels thins the lists once per clip (:func:`plan_columns`); the kernel does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tvm import tirx

from .. import kernel_group_conv
from ..emit import FLOAT, INT, Expr, big, ceil_div, lane, lanes, let, number, scratch, serial, short, splat, store, when
from ..kernel import Operand, Weights, constant
from ..kernel_columns import Nonzero
from ..kernel_group_conv import KernelGroupLists
from ..space import Space
from ..workload import Workload
from .conv3d_gather import GatherConv, GatherEmitter
from .cost import KERNEL_GROUP_EFFICIENCY
from .direct_spaces import KernelGroupSpace
from .panel_weights import WeightPanel
from .tiles import HALF_TERMS, Machine


@dataclass(frozen=True)
class KernelGroupConv(KernelGroupLists, GatherConv):
    """As :class:`GatherConv`, with ``tile.nr`` = gm filters in a group and ``columns`` columns over all groups.

    ``run`` is 1 where ``live_in`` thins the columns one by one. ``threads`` share the groups out evenly. ``nonzero``
    is for the choice of kernels: which weights are not zero, where that is known.
    """

    columns: int = 0
    run: int = 1
    threads: int = 1
    nonzero: Nonzero | None = field(default=None, compare=False, repr=False)

    @property
    def compact(self) -> bool:
        """Dead channels are left out of the column lists; the input stays as it is."""
        return False

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        step = f"_k{self.tile.step}" if self.tile.step > 1 else ""
        return f"conv3d_kgs{self.marks}_{short(self.dtype)}_mr{self.tile.mr}_gm{self.tile.nr}{step}"

    @property
    def entry_fields(self) -> int:
        """How far an entry's input lies from the first channel of the window's first tap; of thinned ones also where
        their weights are."""
        return 2 if self.live_in else 1

    @property
    def bias_size(self) -> int:
        """Length of the packed bias."""
        return self.panels * self.tile.nr

    def pack_bias(self, bias: np.ndarray) -> np.ndarray:
        """Pad the bias to whole groups."""
        return np.concatenate([bias, np.zeros(self.bias_size - len(bias))]).astype("float32")

    def channel_operands(self) -> list[Operand]:
        """Also the order of groups (groups,), and the runs of consecutive taps."""
        lists = super().channel_operands()
        lists[2:2] = [constant("group_order", (self.panels,), INT), constant("tap_runs", self.tap_runs.shape, INT)]
        return lists

    def column_planner(self) -> ColumnPlan:
        """One sweep over the columns."""
        return ColumnPlan(self)

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Also the order of groups that shares them out evenly, and the runs of taps."""
        constants = super().prepare(weights)
        assert weights is not None
        assert weights.columns is not None
        order = balanced_order(np.diff(weights.columns.ptr[:, [0, -1]])[:, 0], self.threads)
        return {**constants, "group_order": order, "tap_runs": self.tap_runs}

    def static_columns(self, weights: Weights) -> np.ndarray:
        """The ``columns`` list of the weights."""
        assert weights.columns is not None
        taps = self.column_taps(weights.columns.ptr)
        offsets = np.array([self.window.offset(tap) for tap in range(self.window.taps)], "int64")
        listed = np.zeros((1, self.entry_fields, self.entries), INT)
        places = (offsets[taps] * self.channels_in + weights.columns.channel)[:: self.run]
        listed[0, 0, : self.columns // self.run] = places
        if self.live_in:
            listed[0, 1, : self.columns] = np.arange(self.columns) * self.tile.nr
        return listed

    @cached_property
    def tap_runs(self) -> np.ndarray:
        """int32 (2, entries + 1): for each tap entry its run of consecutive taps, and where each run begins."""
        taps = self.plan.tap_entries[:, 0]
        begins = np.flatnonzero(np.concatenate([[True], np.diff(taps) != 1]))
        table = np.full((2, len(taps) + 1), len(taps), INT)
        table[0, :-1] = np.repeat(np.arange(len(begins)), np.diff([*begins, len(taps)]))
        table[1, : len(begins)] = begins
        return table

    def space(self, machine: Machine, workload: Workload) -> Space:
        """Rows of the register tile, blocks of rows, passes over taps, order of loops."""
        return KernelGroupSpace(machine.storing(self.dtype), workload)

    @property
    def columns_share(self) -> float:
        """Of the columns that are left, each slower than a dense one."""
        return self.columns / (self.panels * self.window.taps * self.depth) / KERNEL_GROUP_EFFICIENCY

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Blocks of rows by kernel groups."""
        KernelGroupEmitter(self, args).emit()


def balanced_order(columns_per_group: np.ndarray, threads: int) -> np.ndarray:
    """Groups in an order that gives ``threads`` equal consecutive shares of about equal numbers of columns.

    Threads take equal counts of consecutive tasks. The longest groups are dealt out first, back and forth.
    """
    longest_first = np.argsort(-columns_per_group, kind="stable")
    shares: list[list[int]] = [[] for _ in range(threads)]
    for turn, group in enumerate(longest_first):
        lap, place = divmod(turn, threads)
        shares[place if lap % 2 == 0 else threads - 1 - place].append(int(group))
    return np.array([group for share in shares for group in share], INT)


@dataclass(frozen=True)
class ColumnPlan(kernel_group_conv.ColumnPlan):
    """Thin the column lists; a place modulo C_in is its channel."""

    name = "plan_columns"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """One sweep over the columns of all groups and taps."""
        conv = self.conv
        samples, panels, entries = conv.plan.samples, conv.panels, conv.window.taps + 1
        mask, starts, static, out_starts, out_columns = args.values()
        used = scratch((1,), INT)
        with serial(samples) as sample:
            with serial(out_columns.shape[2]) as index:
                store(out_columns, tirx.IntImm(INT, 0), sample, 0, index)
                store(out_columns, tirx.IntImm(INT, 0), sample, 1, index)
            store(used, tirx.IntImm(INT, 0), 0)
            with serial(panels) as panel:
                store(out_starts, used[0], sample, panel, 0)
                with serial(entries - 1) as tap:
                    begin = let(starts[0, panel, tap])
                    with serial(starts[0, panel, tap + 1] - begin) as offset:
                        column = let(begin + offset)
                        place = let(static[0, 0, column])
                        with when(mask[sample, tirx.floormod(place, conv.channels_in)] != number(0.0)):
                            slot = let(used[0])
                            store(out_columns, place, sample, 0, slot)
                            store(out_columns, static[0, 1, column], sample, 1, slot)
                            store(used, slot + 1, 0)
                    store(out_starts, used[0], sample, panel, tap + 1)


class KernelGroupEmitter(GatherEmitter):
    """The gathered kernel with columns in the place of channels."""

    conv: KernelGroupConv

    def __init__(self, conv: KernelGroupConv, args: Mapping[str, tirx.Buffer]) -> None:
        super().__init__(conv, args)
        self.listed_panels = False
        self.column_starts, self.columns = args["column_starts"], args["columns"]
        self.order, self.tap_runs = args["group_order"], args["tap_runs"]
        self.out_mask: Any = args.get("out_mask")

    def _block(self, sample: Expr, block: Expr, panel: Expr) -> None:
        group = let(self.order[panel])
        if not self.conv.live_out:
            super()._block(sample, block, group)
            return
        alive = scratch((1,))
        store(alive, number(0.0), 0)
        with serial(tirx.min(self.tile.nr, self.conv.channels_out - group * self.tile.nr)) as index:
            store(alive, tirx.max(alive[0], self.out_mask[sample, group * self.tile.nr + index]), 0)
        with when(alive[0] != number(0.0)):
            self.sample = sample
            super()._block(sample, block, group)

    def _tile(
        self,
        sample: Expr,
        panel: Expr,
        current: Expr,
        place: Expr,
        partial: tirx.Buffer,
        taps: tuple[Expr, Expr],
        channels: tuple[Expr, Expr],
        weights: WeightPanel,
    ) -> None:
        """Accumulate the segment's taps over one tile, one loop for each run of consecutive taps."""
        rows = [let(big(self.rows_in[sample, current, r]) * self.conv.channels_in) for r in range(self.tile.mr)]
        acc, added = self._started(partial, place), scratch((1,), INT)
        store(added, tirx.IntImm(INT, 0), 0)
        first, end = taps
        first_run = let(self.tap_runs[0, first])
        with serial(self.tap_runs[0, end - 1] + 1 - first_run) as index:
            run = let(first_run + index)
            begin = let(tirx.max(self.tap_runs[1, run], first))
            last = let(tirx.min(self.tap_runs[1, run + 1], end) - 1)
            listed = self._listed(sample, panel, self.taps[begin, 0], self.taps[last, 0])
            if self.conv.dtype == FLOAT:
                self._run(sample, listed, rows, acc)
            else:
                self._run_in_parts(sample, listed, rows, acc, (added, partial, place))
        self._put_back(acc, partial, place)

    def _run_in_parts(
        self,
        sample: Expr,
        listed: tuple[Expr, Expr],
        rows: list[Expr],
        acc: list[list[tirx.Buffer]],
        sums: tuple[tirx.Buffer, tirx.Buffer, Expr],
    ) -> None:
        """Accumulate the ``listed`` columns in half precision, which must not add up too many: before it would,
        ``acc`` goes to the partial sums. ``sums``: entries added up since it last did, partial sums, their place."""
        most = max(1, HALF_TERMS // self.conv.run)
        added, partial, place = sums
        zeros = number(0.0, self.tile.vector_floats, self.conv.dtype)
        with serial(ceil_div(listed[1], most)) as part:
            some = let(tirx.min(most, listed[1] - part * most))
            with when(added[0] + some > most):
                self._put_back(acc, partial, place)
                self._each_vector(lambda r, v, _at: store(acc[r][v], zeros, lanes(0, self.tile.vector_floats)))
                store(added, tirx.IntImm(INT, 0), 0)
            self._run(sample, (let(listed[0] + part * most), some), rows, acc)
            store(added, added[0] + some, 0)

    def _listed(self, sample: Expr, panel: Expr, first: Expr, last: Expr) -> tuple[Expr, Expr]:
        """The first entry of the columns of the taps ``first`` to ``last``, and how many there are."""
        of_sample = sample if self.conv.column_samples > 1 else 0
        begin = let(self.column_starts[of_sample, panel, first])
        return begin, let(self.column_starts[of_sample, panel, last + 1] - begin)

    def _run(self, sample: Expr, listed: tuple[Expr, Expr], rows: list[Expr], acc: list[list[tirx.Buffer]]) -> None:
        """Accumulate the ``listed`` columns (first entry, how many)."""
        conv = self.conv
        of_sample = sample if conv.column_samples > 1 else 0
        with serial(listed[1]) as step:
            entry = let(listed[0] + step)
            source = let(big(self.columns[of_sample, 0, entry]))
            at = self.columns[of_sample, 1, entry] if conv.live_in else entry * (conv.run * conv.tile.nr)
            weights = let(big(at))
            for chunk in range(0, conv.run, self.tile.step):
                self._multiply_columns(rows, source + chunk, weights + chunk * self.tile.nr, acc)

    def _multiply_columns(self, rows: list[Expr], source: Expr, weights: Expr, acc: list[list[tirx.Buffer]]) -> None:
        """``tile.step`` columns of consecutive channels: one load a row, then a multiply by each of its lanes."""
        tile, count = self.tile, self.tile.vector_floats
        xs = [let(self.x[lanes(row + source, tile.step)]) for row in rows] if tile.step > 1 else []
        for k in range(tile.step):
            at = weights + k * tile.nr
            w = [let(self.weights[lanes(at + v * count, count)]) for v in range(tile.vectors)]
            for r, row in enumerate(rows):
                x = lane(xs[r], k) if xs else self.x[row + source]
                spread = let(splat(x, count))
                for v in range(tile.vectors):
                    store(acc[r][v], acc[r][v][lanes(0, count)] + spread * w[v], lanes(0, count))

    def _finished(self, value: Expr, channel: Expr, count: int) -> Expr:
        if not self.conv.live_out:
            return value
        return value * self.out_mask[self.sample, lanes(channel, count)]
