"""Tile sizes of the pointwise convolution: which layers it takes, a model of its time, its tuning space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..layer import Layer
from ..workload import POINTWISE, Decisions, Workload
from .pointwise import PointwiseConv, PointwiseTile
from .row_tiles import panel_widths, register_tiles
from .tiles import CHAINS_TO_HIDE_LATENCY, Machine

#: Cycles of a tile beside its sums: addresses and loops, and for each vector its bias and its store.
TILE_CYCLES, VECTOR_CYCLES = 10.0, 1.5
#: Share of the second-level cache that a block's rows may take; with a gate, what they become takes as much again.
ROWS_SHARE_OF_L2 = 0.15
#: Bytes a cycle that come from the second-level cache.
L2_BYTES = 24.0
#: Register tiles that the model holds for this much slower than its best are not tried.
WORTH_TRYING = 1.5
#: Tiles of a block that are tried.
BLOCK_TILES = (8, 32, 128, 512)


def is_pointwise(layer: Layer) -> bool:
    """Whether the layer is one matrix product over all positions, with nothing left out."""
    window = layer.window
    every = window.taps == 1 and window.size == window.out and not any(window.padding)
    whole = not layer.workload.lists and layer.columns is None
    return every and whole and layer.groups == 1 and layer.dtype == "float32"


def predicted_cycles(machine: Machine, workload: Workload, tile: tuple[int, int, int]) -> float:
    """Cycles of one thread for the layer with register tiles of (rows, vectors, step)."""
    rows, depth = workload.window.positions_out, workload.channels_in
    mr, most, step = tile
    total = 0.0
    for panels, vectors in panel_widths(-(-workload.channels_out // machine.vector_floats), most):
        multiply, loads = mr * vectors / 2, (mr / step + vectors) / 2
        far = 4 * vectors * machine.vector_floats / L2_BYTES
        bound = max(multiply, loads, far, CHAINS_TO_HIDE_LATENCY / 2)
        channel = bound + 0.1 * mr / step + 0.35 * vectors
        cycles = depth * channel + VECTOR_CYCLES * mr * vectors + TILE_CYCLES
        total += panels * (-(-rows // mr) * cycles + 4 * rows * depth / L2_BYTES)
    return total


@dataclass(frozen=True)
class PointwiseSpace:
    """The decisions of the pointwise convolution for one workload on one machine.

    ===============  ===============================================================================================
    decision         meaning
    ===============  ===============================================================================================
    vectors, mr      the register tile, as in :class:`~.spaces.GatherSpace`
    step             input channels loaded as one vector per row
    block_tiles      row tiles that are computed for one panel after the other (cache blocking)
    splits           parts in which threads share out the panels of a block
    ===============  ===============================================================================================
    """

    machine: Machine
    workload: Workload
    names = ("mr", "vectors", "step", "block_tiles", "splits")

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(math.prod(map(len, part.values())) for part in self.parts())

    @property
    def tiles(self) -> dict[tuple[int, int, int], float]:
        """Register tiles (rows, vectors, step) that the layer can fill, and their predicted cycles."""
        work = self.workload
        vectors = -(-work.channels_out // self.machine.vector_floats)
        found = register_tiles(self.machine, work.window.positions_out, vectors, work.channels_in)
        return {tile: predicted_cycles(self.machine, work, tile) for tile in found}

    def _step(self, step: int) -> int:
        return step if self.workload.channels_in >= step else 1

    def default(self) -> Decisions:
        """What is chosen without a record."""
        work, threads = self.workload, self.workload.threads
        tiles = self.tiles
        mr, vectors, step = min(tiles, key=lambda tile: tiles[tile])
        fitting = max(1, int(ROWS_SHARE_OF_L2 * self.machine.l2) // (4 * work.channels_in * mr))
        tiles_of_all = -(-work.window.positions_out // mr)
        block_tiles = max(1, min(fitting, tiles_of_all // threads))
        splits = 1 if -(-tiles_of_all // block_tiles) >= threads else threads
        return self.normal({"mr": mr, "vectors": vectors, "step": step, "block_tiles": block_tiles, "splits": splits})

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""
        rows, vectors = self.workload.window.positions_out, -(-self.workload.channels_out // self.machine.vector_floats)
        fitted = dict(decisions)
        fitted["mr"], fitted["vectors"] = min(fitted["mr"], rows), min(fitted["vectors"], vectors)
        fitted["step"] = self._step(fitted["step"])
        fitted["block_tiles"] = min(fitted["block_tiles"], -(-rows // fitted["mr"]))
        fitted["splits"] = min(fitted["splits"], -(-vectors // fitted["vectors"]))
        return fitted

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, positive, and no more registers than there are."""
        if set(decisions) != set(self.names) or not all(isinstance(value, int) for value in decisions.values()):
            return False
        tile = (decisions["mr"], decisions["vectors"], decisions["step"])
        return tile in self.tiles and min(decisions.values()) >= 1

    def parts(self) -> list[dict[str, list[int]]]:
        """One part for each number of vectors: which rows are worth trying depends on it."""
        default, tiles = self.default(), self.tiles
        limit = WORTH_TRYING * min(tiles.values())
        found: dict[tuple[int, int], list[int]] = {}
        for (mr, vectors, step), cycles in tiles.items():
            if cycles <= limit:
                found.setdefault((vectors, step), []).append(mr)
        blocks, splits = {*BLOCK_TILES, default["block_tiles"]}, {1, default["splits"]}
        return [
            {
                "mr": rows,
                "vectors": [vectors],
                "step": [step],
                "block_tiles": sorted(blocks),
                "splits": sorted(splits),
            }
            for (vectors, step), rows in found.items()
        ]

    def loops(self) -> dict[str, tuple[str | int, ...]]:
        """Blocks of tiles of rows; vectors of a panel."""
        return {"rows": ("block_tiles", "mr"), "channels_out": ("vectors", self.machine.vector_floats)}

    def kernel(self, decisions: Mapping[str, int]) -> PointwiseConv:
        """The kernel that the decisions describe."""
        return self.fitted(Layer.of(self.workload), decisions)

    def fitted(self, layer: Layer, decisions: Mapping[str, int]) -> PointwiseConv:
        """The same for a layer of this workload."""
        tile = PointwiseTile(vector_floats=self.machine.vector_floats, **decisions)
        behind, before = (layer.residual, layer.activation), (layer.gate, layer.before)
        return PointwiseConv(layer.window, layer.channels_in, layer.channels_out, tile, *behind, *before)


def pointwise(workload: Workload) -> Workload:
    """The same layer by the pointwise convolution."""
    return replace(workload, family=POINTWISE)
