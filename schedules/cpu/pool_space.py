"""The decisions of pools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..workload import Decisions, Workload
from .pool3d import VectorPool, default_vectors
from .space import Loops, are_whole
from .tiles import Machine

#: Vectors of channels that a pool may reduce at once.
POOLED_VECTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class PoolSpace:
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

    def kernel(self, decisions: Mapping[str, int]) -> VectorPool:
        """The pool."""
        work, lists = self.workload, self.workload.lists
        return VectorPool(
            work.window,
            work.channels_in,
            work.pooling,  # type: ignore[arg-type]  # a pool's is "max" or "avg"
            in_frames="in_frames" in lists,
            out_frames="out_frames" in lists,
            zero_dead=False,
            vector_floats=self.machine.vector_floats,
            vectors=decisions["vectors"],
            in_positions=(work.window.batch, 1) if "in_positions" in lists else None,
            dtype=work.dtype,
        )
