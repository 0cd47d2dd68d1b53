"""Tuning spaces of GPU kernels: what may be chosen, and the one place where it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..geometry import Window
from ..spaces import Decisions, TuningLog, Workload
from .tiles import BlockTile, Gpu, candidates, default_tile, predicted_cost

#: Tiles that the model holds for this much slower than its best are not tried.
WORTH_TRYING = 2.0
DECISIONS = ("mr", "nr", "step", "thread_rows", "thread_channels")


@dataclass(frozen=True)
class BlockSpace:
    """The decisions of the gathered convolution for one workload on one GPU.

    ==============================  ===================================================================
    decision                        meaning
    ==============================  ===================================================================
    mr, nr                          rows and output channels of a block of threads
    step                            terms of the sum that go through shared memory at a time
    thread_rows, thread_channels    sums that one thread holds in registers
    ==============================  ===================================================================
    """

    machine: Gpu
    workload: Workload

    @cached_property
    def tiles(self) -> list[BlockTile]:
        """Tiles worth trying, the best by the model first."""
        window, group_out = self.workload.window, self.workload.group_out
        cost = {tile: predicted_cost(self.machine, window, group_out, tile) for tile in candidates(self.machine)}
        limit = WORTH_TRYING * min(cost.values())
        return sorted((tile for tile in cost if cost[tile] <= limit), key=cost.__getitem__)

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return len(self.tiles)

    def default(self) -> Decisions:
        """What is chosen without a record."""
        return decisions_of(default_tile(self.machine, self.workload.window, self.workload.group_out))

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fit this one as they are."""
        return dict(decisions)

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, and a tile that fits the GPU."""
        if set(decisions) != set(DECISIONS):
            return False
        return BlockTile(**decisions) in set(candidates(self.machine))


def decisions_of(tile: BlockTile) -> Decisions:
    """The decisions that make up a tile."""
    return {name: int(getattr(tile, name)) for name in DECISIONS}


def choose_tile(
    workload: Workload, gpu: Gpu, log: TuningLog | None = None, nr: int | None = None
) -> tuple[BlockTile, str]:
    """The tile for a workload and where it comes from: a record of the log, or the default (an empty origin)."""
    space = BlockSpace(gpu, workload)
    advice = log.advise(workload) if log is not None and nr is None else None
    if advice is not None and space.allows(advice.decisions):
        return BlockTile(**advice.decisions), advice.origin
    return default_tile(gpu, workload.window, workload.group_out, nr), ""


def groups_cost(gpu: Gpu, window: Window) -> Callable[[Any], float]:
    """What kernel groups cost on ``gpu``: lanes, each as dear as in the best tile of that many filters."""
    rates: dict[int | None, float] = {}

    def rate(nr: int | None) -> float:
        if nr not in rates:
            tile = default_tile(gpu, window, nr or 64, nr)
            rates[nr] = predicted_cost(gpu, window, tile.nr, tile) / tile.nr
        return rates[nr]

    return lambda groups: groups.lanes * rate(None if groups.scheme == "dense" else groups.gm)
