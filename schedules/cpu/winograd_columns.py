"""Winograd convolution over the weight columns that pruning left (`docs/rt3d.md`).

A column is one input channel at one tap of those that are not transformed, for a panel of output channels: a whole
frame of the kernel's height and width, or all of the kernel where frames are transformed too. Each panel has a list of
its columns by how far their transformed inputs lie from those of the first tap; the products walk it, and columns of
zeros are neither stored nor read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from tvm import tirx

from ..emit import INT, Expr, big, ceil_div, flat, let, serial, when
from ..kernel import Count, Operand, Weights, constant
from ..kernel_columns import Columns, Nonzero
from .cost import KERNEL_GROUP_EFFICIENCY
from .direct_spaces import X86_ROW_POINTERS
from .tiles import Machine
from .winograd import WinogradConv
from .winograd_multiply import Channels, Panel, Products
from .winograd_plan import WinogradPlan
from .winograd_transforms import WinogradPanels


@dataclass(frozen=True)
class WinogradColumns(WinogradConv):
    """As :class:`WinogradConv`, of a layer whose weights other than zero are ``nonzero``; no channels are listed.

    ``run``: input channels whose columns come together, which divides them.
    """

    nonzero: Nonzero = field(kw_only=True)
    run: int = 1
    skips = ("weight columns",)

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return super().name.replace("winograd", "winograd_columns", 1)

    def kept(self, nr: int, plan: WinogradPlan) -> Columns:
        """The columns of panels of ``nr`` output channels."""
        return _kept(self.nonzero, nr, self.run, plan.transformed[0])

    @property
    def own(self) -> Columns:
        """Those of its panels."""
        return self.kept(self.tile.nr, self.plan)

    def most_rows(self, machine: Machine) -> int:
        """As many as have a pointer of their own: the loop over a run of columns is short."""
        return X86_ROW_POINTERS if machine.broadcast_loads else machine.most_rows

    def columns_share(self, nr: int, plan: WinogradPlan) -> float:
        """As the lists have it."""
        return float(self.kept(nr, plan).live.mean()) / KERNEL_GROUP_EFFICIENCY

    @property
    def weights(self) -> float:
        """Transformed weights of one pair of channels, on average."""
        return super().weights * float(self.own.live.mean())

    @property
    def stored(self) -> int:
        """Columns that are stored; a layer without any keeps one run that no list names."""
        return max(self.run, self.own.count)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the transformed weights: (ξ, columns, nr)."""
        return (self.plan.xi, self.stored, self.tile.nr)

    @property
    def panelled(self) -> WinogradPanels:
        """Columns take the place of input channels."""
        plan, (taps, height, width) = self.plan, self.window.kernel
        kernel = (taps if plan.transformed[0] else 1, height, width)
        return WinogradPanels(self.tile.nr, self.stored, kernel, plan.m, plan.transformed, self.tile.nr)

    def unprepared(self, weight: np.ndarray) -> np.ndarray:
        """The columns' weights, (nr, columns, KT or 1, KH, KW)."""
        nr, transformed, kept = self.tile.nr, self.plan.transformed[0], self.own
        group, tap, channel = kept.index
        filters = np.pad(weight, [(0, -len(weight) % nr), *[(0, 0)] * 4])
        frames = slice(None) if transformed else tap
        picked = np.zeros((self.stored, nr, *self.panelled.kernel), weight.dtype)
        for lane in range(nr):
            found = filters[group * nr + lane, channel, frames]
            picked[: kept.count, lane] = found.reshape(kept.count, *self.panelled.kernel)
        return np.ascontiguousarray(picked.swapaxes(0, 1))

    def pack_weights(self, weight: np.ndarray) -> np.ndarray:
        """Those of columns alone."""
        return super().pack_weights(self.unprepared(weight)).reshape(self.weight_shape)

    def channel_operands(self) -> list[Operand]:
        """Where the columns of each panel and tap begin, and where the inputs of each run of columns are."""
        return [
            constant("column_starts", (1, self.panels, self.plan.taps + 1), INT),
            constant("column_places", (self.stored // self.run,), INT),
        ]

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Also the lists."""
        kept, plan = self.own, self.plan
        _, tap, channel = kept.index
        step = plan.columns * plan.window.dilation[0]
        places = np.zeros(self.stored // self.run, INT)
        places[: kept.count // self.run] = (tap * (step * self.channels_in) + channel)[:: self.run]
        starts = (kept.ptr[None] // self.run).astype(INT)
        return {**super().prepare(weights), "column_starts": starts, "column_places": places}

    def work(self) -> tuple[Count, Count, Count]:
        """Multiply-adds of a pair are the mean over the taps, output channels are 1."""
        lanes = np.full(self.panels, self.tile.nr)
        lanes[-1] -= self.panels * self.tile.nr - self.channels_out
        columns = int(np.diff(self.own.ptr[:, [0, -1]])[:, 0] @ lanes)
        return super().work()[0], Count(columns // self.plan.taps), Count(1)

    def multiplied(self, args: Mapping[str, tirx.Buffer], sources: tirx.Buffer, products: tirx.Buffer) -> Products:
        """By columns."""
        return _ColumnProducts(self, args, flat(args["weights"]), sources, products)


@lru_cache(maxsize=64)
def _kept(nonzero: Nonzero, nr: int, run: int, whole: bool) -> Columns:
    return nonzero.columns(nr, run, whole)


class _ColumnProducts(Products):
    """``M[ξ][row][oc] = Σ V · U`` over the columns of a panel."""

    conv: WinogradColumns

    def __init__(
        self, conv: WinogradColumns, args: Mapping[str, tirx.Buffer], weights: tirx.Buffer,
        sources: tirx.Buffer, products: tirx.Buffer,
    ) -> None:  # fmt: skip
        super().__init__(conv, args, weights, sources, products)
        self.starts, self.places = args["column_starts"], args["column_places"]

    def multiply_panel(self, chunk: Expr, xi: Expr, panel: Expr) -> None:
        """One ξ, one panel of output channels, all rows of the chunk."""
        conv, tile = self.conv, self.tile
        plane = let(big(xi) * (conv.stored * tile.nr))
        weights = Panel(self.weights, [plane + v * tile.vector_floats for v in range(tile.vectors)], 0, tile.nr)
        source = let(big(xi) * conv.source_plane)
        target = let(big(xi) * conv.product_plane + panel * tile.nr)
        most = max(1, tile.depth_block * tile.segment_taps // conv.run)
        with serial(self.counts[chunk, 2]) as run:
            tap, last_tap, low, high = (let(self.runs[chunk, run, field]) for field in range(4))
            begin = let(self.starts[0, panel, self.taps[tap, 0]])
            end = let(self.starts[0, panel, self.taps[tirx.max(last_tap - 1, tap), 0] + 1])
            listed = let(tirx.Select(last_tap > tap, end - begin, 0))
            with when(listed == 0):
                self._zero_products(target, low, high, tile.vectors)
            with serial(ceil_div(listed, most)) as block, serial(high - low) as offset:
                current = let(low + offset)
                rows = [let(self.rows_in[chunk, current, r]) for r in range(tile.mr)]
                place = let(target + big(current) * (tile.mr * conv.panels * tile.nr))
                acc = self._started(place, tile.vectors, block == 0)
                first = let(begin + block * most)
                self._walk(rows, source, weights, (first, let(tirx.min(most, end - first))), acc)
                self._put_back(acc, place)

    def _walk(
        self, rows: list[Expr], source: Expr, weights: Panel, listed: tuple[Expr, Expr], acc: list[list[tirx.Buffer]]
    ) -> None:
        """Accumulate the ``listed`` entries (the first, how many) of one tile of rows."""
        conv = self.conv
        sources = [let(source + big(row) * conv.channels_in) for row in rows]
        ahead = self.tile.depth_block * self.tile.segment_taps
        with serial(listed[1]) as index:
            entry = let(listed[0] + index)
            column = let(entry * conv.run)
            # No weights are asked for beyond the last ones.
            later = let(tirx.min(column + ahead, conv.stored - conv.run))
            self._multiply(
                sources, weights, Channels(self.places[entry], column, conv.run, [later] * len(weights.starts)), acc
            )
