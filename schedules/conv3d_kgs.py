"""Convolution with kernel-group structured (KGS) sparsity, RT3D section 3, along the lists of the row plan.

A kernel group is ``gm`` filters; its weights are stored column by column, and a column is one (tap, input channel)
that any of its filters uses. The gathered convolution's loop over input channels becomes a loop over the columns that
group and tap have left, so vanilla and filter sparsity are the cases where those lists are long or empty. A mask of
live input channels thins the lists once per clip (:func:`plan_columns`); the kernel does not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from .conv3d_gather import GatherConv, GatherEmitter
from .emit import INT, Expr, argument, big, kernel, lanes, let, number, scratch, serial, store, when


@dataclass(frozen=True)
class KernelGroupConv(GatherConv):
    """As :class:`GatherConv`, with ``tile.nr`` = gm filters in a group and ``columns`` columns over all groups.

    ``live_out``: a mask (samples, C_out) of live output channels is given; groups without any are skipped, and dead
    channels of other groups are stored as zeros.
    """

    columns: int = 0

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        lists = "".join(mark for mark, on in (("i", self.live_in), ("o", self.live_out)) if on)
        return f"conv3d_kgs{lists and '_' + lists}_f32_mr{self.tile.mr}_gm{self.tile.nr}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(columns, gm); a layer without any column keeps one that no list names."""
        return (max(1, self.columns), self.tile.nr)

    @property
    def column_samples(self) -> int:
        """Column lists given: one for each sample where input channels die at run time, else one."""
        return self.plan.samples if self.live_in else 1

    @property
    def column_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the int32 lists: where each group and tap begins, and (channel, weight offset) of each column."""
        return {
            "column_starts": (self.column_samples, self.panels, self.window.taps + 1),
            "columns": (self.column_samples, 2, max(1, self.columns)),
        }

    @property
    def bias_size(self) -> int:
        """Length of the packed bias."""
        return self.panels * self.tile.nr

    def pack_bias(self, bias: np.ndarray) -> np.ndarray:
        """Pad the bias to whole groups."""
        return np.concatenate([bias, np.zeros(self.bias_size - len(bias))]).astype("float32")

    def static_columns(self, columns: np.ndarray) -> np.ndarray:
        """The ``columns`` list when no channel dies at run time, from the input channel of each column."""
        listed = np.zeros((1, 2, max(1, self.columns)), INT)
        listed[0, 0, : self.columns] = columns
        listed[0, 1, : self.columns] = np.arange(self.columns) * self.tile.nr
        return listed


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


def plan_columns(conv: KernelGroupConv, name: str = "plan_columns") -> tirx.PrimFunc:
    """Thin the column lists by a mask of live input channels.

    Parameters: mask (samples, C_in) float32, column_starts (1, groups, taps + 1) and columns (1, 2, columns) of the
    weights, then the two lists of each sample, filled.
    """
    samples, panels, entries = conv.plan.samples, conv.panels, conv.window.taps + 1
    with kernel(name) as built:
        mask = argument("mask", (samples, conv.channels_in))
        starts = argument("starts", (1, panels, entries), INT)
        static = argument("static", (1, 2, max(1, conv.columns)), INT)
        out_starts, out_columns = (argument(key, shape, INT) for key, shape in conv.column_shapes.items())
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
                        channel = let(static[0, 0, column])
                        with when(mask[sample, channel] != number(0.0)):
                            slot = let(used[0])
                            store(out_columns, channel, sample, 0, slot)
                            store(out_columns, static[0, 1, column], sample, 1, slot)
                            store(used, slot + 1, 0)
                    store(out_starts, used[0], sample, panel, tap + 1)
    return built.func


def conv3d_kgs(conv: KernelGroupConv) -> tirx.PrimFunc:
    """Emit the kernel.

    Parameters in order: x (N, T, H, W, C_in), weights (columns, gm), bias, tap entries, the five lists of the row
    plan, column_starts, columns, group order (groups,), then where asked for: out_mask (samples, C_out), out_frames,
    positions (masks, for ``zero_dead``), residual, and y (N, T, H, W, C_out).
    """
    with kernel(conv.name) as built:
        KernelGroupEmitter(conv).emit()
    return built.func


class KernelGroupEmitter(GatherEmitter):
    """The gathered kernel with columns in the place of channels."""

    conv: KernelGroupConv

    def __init__(self, conv: KernelGroupConv) -> None:
        super().__init__(conv)
        self.gathers = False

    def _live_panels(self, sample: Expr) -> Expr:
        return self.conv.panels

    def _live_count(self, sample: Expr) -> Expr:
        return self.conv.depth  # live channels are in the column lists

    def _declare_lists(self) -> None:
        conv = self.conv
        shapes = conv.column_shapes
        self.column_starts = argument("column_starts", shapes["column_starts"], INT)
        self.columns = argument("columns", shapes["columns"], INT)
        self.order = argument("group_order", (conv.panels,), INT)
        if conv.live_out:
            self.out_mask = argument("out_mask", (conv.plan.samples, conv.channels_out))

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

    def _tap(
        self,
        sample: Expr,
        panel: Expr,
        tap: Expr,
        offset: Expr,
        sources: list[Expr],
        channels: tuple[Expr, Expr],
        gathered: tirx.Buffer | None,
        acc: list[list[tirx.Buffer]],
    ) -> None:
        of_sample = sample if self.conv.column_samples > 1 else 0
        begin = let(self.column_starts[of_sample, panel, tap])
        with serial(self.column_starts[of_sample, panel, tap + 1] - begin) as step:
            column = let(begin + step)
            channel = let(big(self.columns[of_sample, 0, column]))
            at = let(big(self.columns[of_sample, 1, column]))
            self._multiply_one(sources, self.weights, 0, channel, at, acc)

    def _finished(self, value: Expr, channel: Expr, count: int) -> Expr:
        if not self.conv.live_out:
            return value
        return value * self.out_mask[self.sample, lanes(channel, count)]
