"""What the tuning spaces of convolutions by rows at a constant distance share: their register tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..layer import Layer
from ..workload import Decisions, Workload
from .space import WORTH_TRYING, VectorSpace, are_whole
from .tiles import Machine, candidates

#: Cycles of a tile beside its sums: addresses and loops, and for each vector its bias and its store.
TILE_CYCLES, VECTOR_CYCLES = 10.0, 1.5
#: Registers that a tile leaves free, and more in half precision, where inputs have to be in sixteen of them: else LLVM
#: turns the sums in a ring from register to register, one move for five multiply-adds.
FLOAT_SPARE, HALF_SPARE = 1, 4
#: Cycles in which a vector of sums in half precision is put into float32 ones.
PUT_CYCLES = 3.0
#: Bytes a cycle that come from the second-level cache.
L2_BYTES = 24.0


def is_dense(layer: Layer, *masks: str) -> bool:
    """Whether the layer leaves nothing out but by ``masks`` of these axes: what these convolutions take."""
    lists = set(layer.workload.lists).difference(masks)
    whole = layer.columns is None and layer.spread is None and not layer.planar
    return whole and not lists


def put_cycles(machine: Machine, terms: int, vectors: int) -> float:
    """Cycles in which sums in half precision are put into float32 ones, of a tile of so many vectors."""
    return 0.0 if machine.element_bytes == 4 else PUT_CYCLES * vectors * -(-terms // machine.most_terms)


@dataclass(frozen=True)
class RowSpace(VectorSpace):
    """The register tile, ``mr`` × ``vectors``, and ``step``, as in :class:`~.direct_spaces.GatherSpace`."""

    machine: Machine
    workload: Workload
    names: ClassVar[tuple[str, ...]] = ("mr", "vectors", "step")

    @property
    def rows(self) -> int:
        """Rows that lie at a constant distance."""
        raise NotImplementedError

    @property
    def terms(self) -> int:
        """Terms of a sum that lie side by side."""
        raise NotImplementedError

    def predicted(self, tile: tuple[int, int, int]) -> float:
        """Cycles of one thread for the layer with register tiles of (rows, vectors, step)."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(math.prod(map(len, part.values())) for part in self.parts())

    @property
    def vectors(self) -> int:
        """Vectors that hold the output channels."""
        return -(-self.workload.channels_out // self.machine.vector_floats)

    @property
    def tiles(self) -> dict[tuple[int, int, int], float]:
        """Register tiles (rows, vectors, step) that the layer can fill, and their predicted cycles: with registers to
        spare where each row's terms are loaded as a vector, since LLVM spills those that fill the last."""
        found: dict[tuple[int, int, int], float] = {}
        spare = HALF_SPARE if self.machine.element_bytes == 2 else FLOAT_SPARE
        for mr, width, step in candidates(self.machine):
            used = mr * width + width + (mr + spare if step > 1 else 1)
            if mr <= self.rows and width <= self.vectors and used <= self.machine.registers:
                tile = (mr, width, self._step(step))
                found[tile] = self.predicted(tile)
        return found

    def _step(self, step: int) -> int:
        return step if self.terms >= step else 1

    def default(self) -> Decisions:
        """What is chosen without a record."""
        tiles = self.tiles
        mr, vectors, step = min(tiles, key=lambda tile: tiles[tile])
        return {"mr": mr, "vectors": vectors, "step": step}

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""
        fitted = {"mr": min(decisions["mr"], self.rows), "vectors": min(decisions["vectors"], self.vectors)}
        return {**decisions, **fitted, "step": self._step(decisions["step"])}

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, positive, and no more registers than there are."""
        if not are_whole(decisions, self.names) or min(decisions.values()) < 1:
            return False
        return (decisions["mr"], decisions["vectors"], decisions["step"]) in self.tiles

    def parts(self) -> list[dict[str, list[int]]]:
        """One part for each number of vectors: which rows are worth trying depends on it."""
        tiles = self.tiles
        limit = WORTH_TRYING * min(tiles.values())
        found: dict[tuple[int, int], list[int]] = {}
        for (mr, vectors, step), cycles in tiles.items():
            if cycles <= limit:
                found.setdefault((vectors, step), []).append(mr)
        return [{"mr": rows, "vectors": [vectors], "step": [step]} for (vectors, step), rows in found.items()]
