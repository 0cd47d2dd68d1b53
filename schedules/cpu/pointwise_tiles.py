"""Tile sizes of the pointwise convolution: which layers it takes, a model of its time, its tuning space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..emit import FLOAT
from ..geometry import Window
from ..layer import Layer
from ..workload import POINTWISE, Decisions, Workload
from .row_space import L2_BYTES, TILE_CYCLES, VECTOR_CYCLES, RowSpace, is_dense, put_cycles
from .row_tiles import RowTile, panel_widths
from .space import Loops
from .tiles import CHAINS_TO_HIDE_LATENCY, Machine

#: Share of the second-level cache that a block's rows may take; with a gate, what they become takes as much again.
ROWS_SHARE_OF_L2 = 0.15
#: Share of it beyond which weights do not stay there, and that a block's rows may then take.
WEIGHTS_SHARE_OF_L2, MOST_ROWS_SHARE_OF_L2 = 0.5, 0.5
#: Tiles of a block that are tried.
BLOCK_TILES = (8, 32, 128, 512)


#: Share of the third-level cache that an input, or a residual and results, may take to be found there when read.
STAYS_IN_L3 = 0.25


@dataclass(frozen=True)
class PointwiseTile(RowTile):
    """At most ``block_tiles`` tiles of rows form a block, computed for one panel of output channels after the other;
    panels are shared out in ``splits`` parts, for threads beyond the blocks."""

    block_tiles: int
    splits: int = 1


def is_pointwise(layer: Layer) -> bool:
    """Whether the layer is one matrix product over all positions, with nothing left out."""
    window = layer.window
    one = layer.groups == 1 and window.taps == 1
    return is_dense(layer) and one and window.size == window.out and not any(window.padding)


def leaves_caches(layer: Layer, machine: Machine) -> bool:
    """Whether results had better be stored past the caches: with a residual, on x86, where both come from memory."""
    bytes_out = 2 * machine.element_bytes * layer.window.positions_out * layer.channels_out
    large = 0 < STAYS_IN_L3 * machine.l3 < bytes_out
    return layer.residual and layer.dtype == FLOAT and machine.broadcast_loads and large


def reads_far(layer: Layer, machine: Machine) -> bool:
    """Whether the input had better be prefetched by the tile: on x86, where it comes from memory and no residual does.
    From nearer it takes 1.02 to 1.04 of the time (3,072 → 768 channels over 197 rows, 4,864 → 1,024 over 100)."""
    bytes_in = machine.element_bytes * layer.window.positions_out * layer.channels_in
    large = 0 < STAYS_IN_L3 * machine.l3 < bytes_in
    return not layer.residual and layer.dtype == FLOAT and machine.broadcast_loads and large


def predicted_cycles(machine: Machine, window: Window, channels: tuple[int, int], tile: tuple[int, int, int]) -> float:
    """Cycles of one thread for the layer with register tiles of (rows, vectors, step)."""
    rows, (depth, channels_out) = window.positions_out, channels
    mr, most, step = tile
    total = 0.0
    for panels, vectors in panel_widths(-(-channels_out // machine.vector_floats), most):
        multiply, loads = mr * vectors / 2, (mr / step + vectors) / 2
        far = machine.element_bytes * vectors * machine.vector_floats / L2_BYTES
        bound = max(multiply, loads, far, CHAINS_TO_HIDE_LATENCY / 2)
        channel = bound + 0.1 * mr / step + 0.35 * vectors
        cycles = depth * channel + put_cycles(machine, depth, mr * vectors) + VECTOR_CYCLES * mr * vectors + TILE_CYCLES
        total += panels * (-(-rows // mr) * cycles + machine.element_bytes * rows * depth / L2_BYTES)
    return total


@dataclass(frozen=True)
class PointwiseSpace(RowSpace):
    """The decisions of the pointwise convolution for one workload on one machine.

    ===============  ===============================================================================================
    decision         meaning
    ===============  ===============================================================================================
    vectors, mr      the register tile, as in :class:`~.direct_spaces.GatherSpace`
    step             input channels loaded as one vector per row
    block_tiles      row tiles that are computed for one panel after the other (cache blocking)
    splits           parts in which threads share out the panels of a block
    ===============  ===============================================================================================
    """

    names: ClassVar[tuple[str, ...]] = ("mr", "vectors", "step", "block_tiles", "splits")

    @property
    def rows(self) -> int:
        """All positions."""
        return self.workload.window.positions_out

    @property
    def terms(self) -> int:
        """All input channels."""
        return self.workload.channels_in

    def predicted(self, tile: tuple[int, int, int]) -> float:
        """As the model has it."""
        work = self.workload
        return predicted_cycles(self.machine, work.window, (work.channels_in, work.channels_out), tile)

    def default(self) -> Decisions:
        """What is chosen without a record."""
        tile, threads = super().default(), self.workload.threads
        tiles_of_all = -(-self.rows // tile["mr"])
        block_tiles = max(1, min(self._fitting(tile), tiles_of_all // threads))
        splits = 1 if -(-tiles_of_all // block_tiles) >= threads else threads
        return self.normal({**tile, "block_tiles": block_tiles, "splits": splits})

    def _fitting(self, tile: Decisions) -> int:
        """Tiles of a block: those whose rows stay in the cache beside the weights; where weights do not, as many as
        make the fewest bytes come from beyond it: weights once for each block, rows that do not fit once for each
        panel."""
        machine, size = self.machine, self.machine.element_bytes
        tile_bytes, row_bytes = size * self.terms * tile["mr"], size * self.terms * self.rows
        near = max(1, int(ROWS_SHARE_OF_L2 * machine.l2) // tile_bytes)
        weight_bytes = size * self.terms * self.vectors * machine.vector_floats
        if weight_bytes <= WEIGHTS_SHARE_OF_L2 * machine.l2:
            return near
        panels, tiles = -(-self.vectors // tile["vectors"]), -(-self.rows // tile["mr"])

        def far_bytes(block_tiles: int) -> int:
            stays = block_tiles * tile_bytes <= MOST_ROWS_SHARE_OF_L2 * machine.l2
            return -(-tiles // block_tiles) * weight_bytes + (row_bytes if stays else panels * row_bytes)

        most = max(1, int(MOST_ROWS_SHARE_OF_L2 * machine.l2) // tile_bytes)
        return min(near, most, tiles, key=far_bytes)

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""
        fitted = super().normal(decisions)
        fitted["block_tiles"] = min(fitted["block_tiles"], -(-self.rows // max(1, fitted["mr"])))
        fitted["splits"] = min(fitted["splits"], -(-self.vectors // max(1, fitted["vectors"])))
        return fitted

    def parts(self) -> list[dict[str, list[int]]]:
        """Each part of the register tiles with every cache blocking."""
        default = self.default()
        blocking = {
            "block_tiles": sorted({*BLOCK_TILES, default["block_tiles"]}),
            "splits": sorted({1, default["splits"]}),
        }
        return [{**part, **blocking} for part in super().parts()]

    def loops(self) -> Loops:
        """Blocks of tiles of rows; vectors of a panel."""
        return {"rows": ("block_tiles", "mr"), "channels_out": ("vectors", self.machine.vector_floats)}


def pointwise(workload: Workload) -> Workload:
    """The same layer by the pointwise convolution."""
    return replace(workload, family=POINTWISE)
