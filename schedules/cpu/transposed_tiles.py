"""Tile sizes of transposed convolutions, and their tuning space: those of an ordinary convolution like one phase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import s_tir

from ..geometry import WIDTH, Triple, Window
from ..spread import Spread
from ..workload import LINE, POINTWISE, TRANSPOSED, Decisions, Workload
from .line_tiles import LineSpace
from .pointwise_tiles import PointwiseSpace, PointwiseTile
from .row_space import RowSpace
from .row_tiles import RowTile
from .space import are_whole
from .tiles import Machine

#: What a phase over all positions never shares out.
_WHOLE = {"splits": 1}


@dataclass(frozen=True)
class TransposedSpace:
    """The decisions of a transposed convolution for one workload on one machine: those of :class:`PointwiseSpace` but
    ``splits`` where windows lie side by side, else those of :class:`LineSpace`."""

    machine: Machine
    workload: Workload

    @property
    def phase(self) -> RowSpace:
        """The space of an ordinary convolution like one phase."""
        work = self.workload
        assert work.spread is not None
        geometry = Spread(work.window, work.spread)
        window, size = geometry.window, geometry.size
        like = replace(work, spread=None)
        if geometry.tiles_output:
            pointwise = Window(window.batch, size, size, (1, 1, 1))
            return PointwiseSpace(self.machine, replace(like, window=pointwise, family=POINTWISE))
        phase = max(geometry.phases(WIDTH), key=lambda each: (each.taps, each.outputs))
        taps = tuple(-(-k // s) for k, s in zip(window.kernel, geometry.spread, strict=True))
        out = (window.out[0], window.out[1], max(1, phase.outputs))
        line = Window(window.batch, size, out, (taps[0], taps[1], max(1, phase.taps)))
        return LineSpace(self.machine, replace(like, window=line, family=LINE))

    @property
    def names(self) -> tuple[str, ...]:
        """The decisions, in order."""
        return tuple(name for name in self.phase.names if name not in _WHOLE)

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(math.prod(map(len, part.values())) for part in self.parts())

    def default(self) -> Decisions:
        """What is chosen without a record."""
        return self._of_phase(self.phase.default())

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""
        return self._of_phase(self.phase.normal(self._for_phase(decisions)))

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them."""
        return are_whole(decisions, self.names) and self.phase.allows(self._for_phase(decisions))

    def parts(self) -> list[dict[str, list[int]]]:
        """Those of the phase."""
        return [{name: part[name] for name in self.names} for part in self.phase.parts()]

    def tile_loops(self, sch: s_tir.Schedule, loops: Sequence[Any], chosen: Mapping[str, Any]) -> None:
        """As the phase does."""
        self.phase.tile_loops(sch, loops, chosen)

    def _of_phase(self, decisions: Decisions) -> Decisions:
        return {name: value for name, value in decisions.items() if name not in _WHOLE}

    def _for_phase(self, decisions: Mapping[str, int]) -> Decisions:
        return {**decisions, **{name: value for name, value in _WHOLE.items() if name in self.phase.names}}


def first_tile(machine: Machine, workload: Workload) -> RowTile:
    """A tile of the kind that the layer has, of the smallest sizes."""
    if "block_tiles" in TransposedSpace(machine, workload).names:
        return PointwiseTile(1, 1, machine.vector_floats, 1, 1)
    return RowTile(1, 1, machine.vector_floats, 1)


def transposed(workload: Workload, spread: Triple) -> Workload:
    """The same layer over its input spread out by zeros."""
    return replace(workload, family=TRANSPOSED, spread=spread)
