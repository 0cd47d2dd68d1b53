"""Tile sizes of the pointwise convolution of tensors with channels first, and its tuning space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..geometry import Window
from ..workload import PLANAR, Decisions, Workload
from .pointwise_tiles import predicted_cycles
from .row_products import rows_beside
from .row_tiles import RowTile
from .space import WORTH_TRYING, Loops, VectorSpace, are_whole
from .tiles import CHAINS_TO_HIDE_LATENCY, Machine, evenly

#: Share of the first-level cache that a block's positions take where all weights stay there, to be read anew for every
#: panel of positions, and of the second-level cache otherwise; the most where larger blocks compute fewer vectors in
#: all, since the last block overlaps the one before.
NEAR_SHARE_OF_L1, FAR_SHARE_OF_L2, MOST_SHARE_OF_L2 = 0.6, 0.5, 0.85
#: Vectors of positions beside which a tile has its output channels.
VECTORS = 2
#: Vectors of positions that are tried, and multiples of the default's block.
WIDTHS, BLOCK_FACTORS = (1, 2, 3, 4, 6), (0.25, 0.5, 1, 2, 4)


@dataclass(frozen=True)
class PlanarTile(RowTile):
    """``mr`` output channels × at most ``vectors`` vectors of positions; ``block`` vectors are copied at a time."""

    block: int


@dataclass(frozen=True)
class PlanarSpace(VectorSpace):
    """The decisions of the pointwise convolution with channels first for one workload on one machine.

    ===============  ===============================================================================================
    decision         meaning
    ===============  ===============================================================================================
    mr, vectors      the register tile: output channels, vectors of positions
    step             input channels loaded as one vector per row
    block            vectors of positions that are copied side by side at a time
    ===============  ===============================================================================================
    """

    machine: Machine
    workload: Workload
    names: ClassVar[tuple[str, ...]] = ("mr", "vectors", "step", "block")

    @property
    def blocks(self) -> int:
        """The most vectors of a block: those of a clip."""
        return -(-math.prod(self.workload.window.out) // self.machine.vector_floats)

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(math.prod(map(len, part.values())) for part in self.parts())

    def default(self) -> Decisions:
        """What is chosen without a record: two vectors of positions, more beside few output channels, and as many of
        these as registers hold."""
        machine, work = self.machine, self.workload
        depth, channels_out = work.channels_in, work.channels_out
        vectors = max(VECTORS, -(-CHAINS_TO_HIDE_LATENCY // channels_out))
        most, step = rows_beside(machine, vectors)
        mr = evenly(channels_out, most)
        near = 4 * depth * channels_out <= machine.l1d
        rooms = (
            [NEAR_SHARE_OF_L1 * machine.l1d] if near else [s * machine.l2 for s in (FAR_SHARE_OF_L2, MOST_SHARE_OF_L2)]
        )
        positions, floats = math.prod(work.window.out), machine.vector_floats
        of_thread = -(-positions // (floats * work.threads))
        blocks = [max(1, min(max(vectors, int(room) // (4 * depth * floats)), of_thread)) for room in rooms]

        def computed(block: int) -> int:
            cut = -(-positions // (floats * block))
            return cut * -(-positions // (floats * cut))

        block = min(blocks, key=computed)
        return {"mr": mr, "vectors": min(vectors, block), "step": step if depth >= step else 1, "block": block}

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one."""
        block = min(decisions["block"], self.blocks)
        fitted = {"mr": min(decisions["mr"], self.workload.channels_out), "vectors": min(decisions["vectors"], block)}
        step = decisions["step"] if self.workload.channels_in >= decisions["step"] else 1
        return {**decisions, **fitted, "step": step, "block": block}

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, and no more registers than there are."""
        if not are_whole(decisions, self.names) or min(decisions.values()) < 1:
            return False
        mr, vectors, step, block = (decisions[name] for name in self.names)
        most, given = rows_beside(self.machine, vectors)
        fits = mr <= min(most, self.workload.channels_out) and step in (1, given)
        return fits and step <= self.workload.channels_in and vectors <= block <= self.blocks

    def parts(self) -> list[dict[str, list[int]]]:
        """One part for each number of vectors: how many output channels fit depends on it."""
        default, work = self.default(), self.workload
        like = mirrored(work.window, work.channels_out)
        sides = (work.channels_in, math.prod(work.window.out))
        cycles: dict[tuple[int, int], float] = {}
        for vectors in sorted({*(width for width in WIDTHS if width <= self.blocks), default["vectors"]}):
            for mr in range(1, min(rows_beside(self.machine, vectors)[0], work.channels_out) + 1):
                cycles[mr, vectors] = predicted_cycles(self.machine, like, sides, (mr, vectors, default["step"]))
        limit = max(WORTH_TRYING * min(cycles.values()), cycles[default["mr"], default["vectors"]])
        found: dict[int, list[int]] = {}
        for (mr, vectors), predicted in cycles.items():
            if predicted <= limit:
                found.setdefault(vectors, []).append(mr)
        scaled = (int(factor * default["block"]) for factor in BLOCK_FACTORS)
        blocks = sorted({min(max(1, block), self.blocks) for block in scaled})
        return [
            {"mr": rows, "vectors": [vectors], "step": [default["step"]], "block": fitting}
            for vectors, rows in found.items()
            if (fitting := [block for block in blocks if block >= vectors])
        ]

    def loops(self) -> Loops:
        """Blocks of vectors of positions; output channels of a tile."""
        return {"rows": ("block", "vectors", self.machine.vector_floats), "channels_out": ("mr",)}


def mirrored(window: Window, rows: int) -> Window:
    """``rows`` rows in the place of a window's positions."""
    return replace(window, batch=rows, size=(1, 1, 1), out=(1, 1, 1))


def planar(workload: Workload) -> Workload:
    """The same layer with channels first."""
    return replace(workload, family=PLANAR)
