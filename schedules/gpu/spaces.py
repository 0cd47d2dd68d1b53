"""Tuning spaces of GPU kernels: what may be chosen, and the one place where it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..convolution import LayerKernel
from ..cpu.space import Space
from ..cpu.spaces import SPACES, TuningLog, decide
from ..cpu.tiles import Machine
from ..geometry import Window
from ..layer import Choice, Layer
from ..pool import Pool
from ..workload import KERNEL_GROUPS, Decisions, Workload
from .conv3d_direct import DirectConv, LinearConv, is_few_rows
from .conv3d_gather import BlockConv
from .conv3d_kgs import GroupConv
from .pool3d import BlockPool
from .row_plan import block_plan
from .tiles import BlockTile, Gpu, candidates, default_tile, predicted_cost

#: Output channels of a convolution group under which a tile would stay nearly empty.
FEW_CHANNELS = 8
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

    def kernel(self, decisions: Mapping[str, int]) -> BlockConv:
        """The kernel."""
        return blocked(Layer.of(self.workload), BlockTile(**decisions))


def blocked(layer: Layer, tile: BlockTile, kind: type[BlockConv] = BlockConv) -> BlockConv:
    """The kernel of a layer: over its live columns where it is pruned, else of this kind."""
    fields = {**layer.fields, "tile": tile}
    plan = block_plan(layer.window, tile.mr, layer.samples, *layer.masks)
    if layer.columns is None:
        return kind(**fields, plan=plan)
    return GroupConv(**fields, plan=plan, columns=layer.columns)


def decisions_of(tile: BlockTile) -> Decisions:
    """The decisions that make up a tile."""
    return {name: int(getattr(tile, name)) for name in BlockSpace.names}


def choose_block_tile(workload: Workload, gpu: Gpu, log: TuningLog | None = None) -> tuple[BlockTile, str]:
    """The tile for a workload and where it comes from: a record of the log, or the default (an empty origin)."""
    decisions, origin = decide(BlockSpace(gpu, workload), log)
    return BlockTile(**decisions), origin


def offer_few_rows(layer: Layer, _gpu: Gpu, _wanted: str, _log: TuningLog | None) -> Choice[LayerKernel] | None:
    """A linear layer that is bound by reading its weights."""
    if layer.columns is not None or not is_few_rows(layer.window, layer.groups, layer.samples):
        return None
    return Choice(blocked(layer, BlockTile(layer.window.positions_out // layer.samples, 0, 0, 0, 0), LinearConv))


def offer_few_channels(layer: Layer, _gpu: Gpu, _wanted: str, _log: TuningLog | None) -> Choice[LayerKernel] | None:
    """Convolution groups that would leave a tile nearly empty."""
    if layer.groups == 1 or layer.group_out >= FEW_CHANNELS:
        return None
    return Choice(blocked(layer, BlockTile(32, 0, 0, 0, 0), DirectConv))


def offer(layer: Layer, gpu: Gpu, _wanted: str, log: TuningLog | None) -> Choice[LayerKernel]:
    """Any layer, in tiles."""
    tile, origin = choose_block_tile(layer.workload, gpu, log)
    return Choice(blocked(layer, tile), "", origin, layer.workload)


def offer_pool(workload: Workload, fields: Mapping[str, Any], _gpu: Gpu, _log: TuningLog | None) -> Choice[Pool]:
    """The pool of a workload."""
    return Choice(BlockPool(**fields))


def space_of(machine: Machine | Gpu, workload: Workload) -> Space:
    """What may be decided for a workload on a machine of either kind."""
    return BlockSpace(machine, workload) if isinstance(machine, Gpu) else SPACES[workload.family](machine, workload)


def groups_cost(gpu: Gpu, window: Window) -> Callable[[Any], float]:
    """What kernel groups cost on ``gpu``: lanes, each as dear as in the best tile of that many filters."""
    rates: dict[int | None, float] = {}

    def rate(nr: int | None) -> float:
        if nr not in rates:
            tile = default_tile(gpu, window, nr or 64, nr)
            rates[nr] = predicted_cost(gpu, window, tile.nr, tile) / tile.nr
        return rates[nr]

    return lambda groups: groups.lanes * rate(None if groups.scheme == "dense" else groups.gm)
