"""The decisions of pools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..workload import Decisions, Workload
from .space import Loops, VectorSpace, are_whole
from .tiles import Machine

#: Vectors of channels that a pool may reduce at once.
POOLED_VECTORS = (1, 2, 4, 8)


#: Vectors of channels that hide the latency of their loads from one another: ``benchmarks.pools`` has four at 0.28 to
#: 1.05 of the time of one, and eight ahead of them over whole clips alone.
HIDING_VECTORS = 4


def default_vectors(channels: int, vector_floats: int) -> int:
    """Vectors of channels that a pool reduces at once without a record."""
    return max(1, min(HIDING_VECTORS, channels // vector_floats))


@dataclass(frozen=True)
class PoolSpace(VectorSpace):
    """The decisions of a pool for one workload on one machine.

    There is one: ``vectors``, how many vectors of channels are reduced at once. The rest of its time a pool waits for
    memory.
    """

    machine: Machine
    workload: Workload
    names = ("vectors",)

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return len(self.parts()[0]["vectors"])

    def default(self) -> Decisions:
        """What is chosen without a record."""
        return {"vectors": default_vectors(self.workload.channels_in, self.machine.vector_floats)}

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one: vectors beyond the channels are never used."""
        return {"vectors": min(decisions["vectors"], max(1, self.workload.channels_in // self.machine.vector_floats))}

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: sums, one value and an address fit in the registers."""
        return are_whole(decisions, self.names) and 1 <= decisions["vectors"] <= self.machine.registers - 2

    def parts(self) -> list[dict[str, list[int]]]:
        """One part."""
        return [{"vectors": sorted({self.normal({"vectors": count})["vectors"] for count in POOLED_VECTORS})}]

    def loops(self) -> Loops:
        """Vectors of channels."""
        return {"channels_out": ("vectors", self.machine.vector_floats)}
