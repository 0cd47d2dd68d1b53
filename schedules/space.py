"""What a tuning space is: the sizes that may be decided for one workload on one machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tvm import s_tir

from .workload import Decisions, Workload


class Space(Protocol):
    """What may be decided for one workload on one machine."""

    @property
    def workload(self) -> Workload:
        """For which workload."""

    @property
    def names(self) -> tuple[str, ...]:
        """The decisions, in order."""

    @property
    def size(self) -> int:
        """How many candidates there are."""

    def default(self) -> Decisions:
        """What is chosen without a record."""

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them."""

    def parts(self) -> list[dict[str, list[int]]]:
        """The values of each decision, in parts within which each goes with each."""

    def tile_loops(self, sch: s_tir.Schedule, loops: Sequence[Any], chosen: Mapping[str, Any]) -> None:
        """Tile the loops of an implicit GEMM over rows, output channels, taps and input channels by decisions."""
