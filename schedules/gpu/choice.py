"""Which kernel of a GPU a layer gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..convolution import LayerKernel
from ..cpu.choice import TuningLog, settled
from ..geometry import Window
from ..layer import Choice, Layer
from ..pool import Pool
from ..workload import Workload
from .conv3d_direct import DirectConv, LinearConv, is_few_rows
from .conv3d_gather import BlockConv
from .conv3d_kgs import GroupConv
from .pool3d import BlockPool
from .row_plan import block_plan
from .tiles import BlockTile, Gpu, default_tile, predicted_cost

#: Output channels of a convolution group under which a tile would stay nearly empty.
FEW_CHANNELS = 8


def blocked(layer: Layer, tile: BlockTile, kind: type[BlockConv] = BlockConv) -> BlockConv:
    """The kernel of a layer: over its live columns where it is pruned, else of this kind."""
    fields = {**layer.fields, "tile": tile}
    plan = block_plan(layer.window, tile.mr, layer.samples, *layer.masks)
    if layer.columns is None:
        return kind(**fields, plan=plan)
    return GroupConv(**fields, plan=plan, columns=layer.columns)


def _smallest(workload: Workload) -> BlockTile:
    """A tile of which sizes are still to be decided; of kernel groups the channels are given."""
    return BlockTile(1, workload.group[0], 1, 1, 1)


def kernel_of(workload: Workload, gpu: Gpu) -> BlockConv:
    """The kernel of a workload's family, its sizes still to be decided."""
    return blocked(Layer.of(workload), _smallest(workload))


def offer_few_rows(layer: Layer, _gpu: Gpu, _algorithm: str, _log: TuningLog | None) -> Choice[LayerKernel] | None:
    """A linear layer that is bound by reading its weights."""
    if layer.columns is not None or not is_few_rows(layer.window, layer.groups, layer.samples):
        return None
    return Choice(blocked(layer, BlockTile(layer.window.positions_out // layer.samples, 0, 0, 0, 0), LinearConv))


def offer_few_channels(layer: Layer, _gpu: Gpu, _algorithm: str, _log: TuningLog | None) -> Choice[LayerKernel] | None:
    """Convolution groups that would leave a tile nearly empty."""
    if layer.groups == 1 or layer.group_out >= FEW_CHANNELS:
        return None
    return Choice(blocked(layer, BlockTile(32, 0, 0, 0, 0), DirectConv))


def offer(layer: Layer, gpu: Gpu, _algorithm: str, log: TuningLog | None) -> Choice[LayerKernel]:
    """Any layer, in tiles."""
    return settled(blocked(layer, _smallest(layer.workload)), gpu, layer.workload, log)


def offer_pool(workload: Workload, fields: Mapping[str, Any], _gpu: Gpu, _log: TuningLog | None) -> Choice[Pool]:
    """The pool of a workload."""
    return Choice(BlockPool(**fields))


def groups_cost(gpu: Gpu, window: Window) -> Callable[[Any], float]:
    """What kernel groups cost on ``gpu``: lanes, each as dear as in the best tile of that many filters."""
    rates: dict[int | None, float] = {}

    def rate(nr: int | None) -> float:
        if nr not in rates:
            tile = default_tile(gpu, window, nr or 64, nr)
            rates[nr] = predicted_cost(gpu, window, tile.nr, tile) / tile.nr
        return rates[nr]

    return lambda groups: groups.lanes * rate(None if groups.scheme == "dense" else groups.gm)
