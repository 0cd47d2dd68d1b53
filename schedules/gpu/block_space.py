"""The tuning space of convolutions on GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm import s_tir

from ..workload import KERNEL_GROUPS, Decisions, Workload
from .tiles import BlockTile, Gpu, candidates, default_tile, predicted_cost

#: Tiles that the model holds for this much slower than its best are not tried.
WORTH_TRYING = 2.0


@dataclass(frozen=True)
class BlockSpace:
    """The decisions of a convolution for one workload on one GPU: the gathered one, or that of kernel groups.

    ==============================  ===================================================================
    decision                        meaning
    ==============================  ===================================================================
    mr, nr                          rows and output channels of a block of threads
    step                            terms of the sum that go through shared memory at a time
    thread_rows, thread_channels    sums that one thread holds in registers
    ==============================  ===================================================================

    With kernel groups ``nr`` is given: a block computes one group's filters. Their columns are made up at random, as
    on a CPU.
    """

    machine: Gpu
    workload: Workload
    names = ("mr", "nr", "step", "thread_rows", "thread_channels")

    @property
    def filters(self) -> int | None:
        """Output channels of a block where they are given."""
        return self.workload.group[0] if self.workload.family == KERNEL_GROUPS else None

    def _fitting(self) -> list[BlockTile]:
        """Tiles that fit the GPU and the workload."""
        return [tile for tile in candidates(self.machine) if self.filters in (None, tile.nr)]

    @cached_property
    def tiles(self) -> list[BlockTile]:
        """Tiles worth trying, the best by the model first; each fits the GPU's registers, shared memory and threads."""
        window, group_out = self.workload.window, self.workload.group_out
        cost = {tile: predicted_cost(self.machine, window, group_out, tile) for tile in self._fitting()}
        limit = WORTH_TRYING * min(cost.values())
        return sorted((tile for tile in cost if cost[tile] <= limit), key=cost.__getitem__)

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return len(self.tiles)

    def default(self) -> Decisions:
        """What is chosen without a record."""
        return decisions_of(default_tile(self.machine, self.workload.window, self.workload.group_out, self.filters))

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fit this one as they are."""
        return dict(decisions)

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, and a tile that fits the GPU."""
        if set(decisions) != set(self.names):
            return False
        return BlockTile(**decisions) in self._fitting()

    def parts(self) -> list[dict[str, list[int]]]:
        """One part for each choice of all but the rows: which rows fit depends on it."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for tile in self.tiles:
            decisions = decisions_of(tile)
            rows.setdefault(tuple(decisions[name] for name in self.names[1:]), []).append(tile.mr)
        return [
            {"mr": sorted(fitting), **{name: [value] for name, value in zip(self.names[1:], rest, strict=True)}}
            for rest, fitting in rows.items()
        ]

    def tile_loops(self, sch: s_tir.Schedule, loops: Sequence[Any], chosen: Mapping[str, Any]) -> None:
        """Blocks of threads compute rows × output channels, each thread some of both."""
        row, out, tap, channel = loops
        tiles, in_tile = sch.split(row, [None, chosen["mr"]])
        panels, in_panel = sch.split(out, [None, chosen["nr"]])
        down, rows = sch.split(in_tile, [None, chosen["thread_rows"]])
        right, columns = sch.split(in_panel, [None, chosen["thread_channels"]])
        steps, in_step = sch.split(channel, [None, chosen["step"]])
        sch.reorder(tiles, panels, down, right, tap, steps, in_step, rows, columns)
        sch.bind(sch.fuse(tiles, panels), "blockIdx.x")
        sch.bind(sch.fuse(down, right), "threadIdx.x")
        for loop in (rows, columns):
            sch.unroll(loop)


def decisions_of(tile: BlockTile) -> Decisions:
    """The decisions that make up a tile."""
    return {name: int(getattr(tile, name)) for name in BlockSpace.names}
