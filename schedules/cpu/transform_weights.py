"""Weights transformed for Winograd's algorithm in every call, into memory that the arena has anyway.

Where keeping them would take more memory than is allowed, this often costs less than a smaller tile of outputs does:
of a layer with many positions, the products take longer than the transform.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm import tirx

from ..emit import FLOAT, Expr, big, cast, flat, lanes, let, number, parallel, read, scratch, serial, store
from ..kernel import PLANNER, Kernel, Operand, Weights, constant, output
from ..preparation import Panels, Preparation
from .winograd_transforms import WinogradPanels, matrices

#: As `prepare.c` has it: what is rounded to float32 once is no less exact than weights that are kept.
WIDE = "float64"
#: Input channels of a task, written plane by plane: one vector after the other would go to another page each.
TASK_CHANNELS = 16


@dataclass(frozen=True)
class TransformWeights(Kernel):
    """Panels of filters (vectors, taps, C_in, lanes) become what ``panelled`` gives (ξ, vectors, taps, C_in, lanes)."""

    kind = PLANNER
    foldable = False
    panelled: WinogradPanels

    @property
    def name(self) -> str:
        """With the tile of outputs."""
        size = "x".join(str(m) for m in self.panelled.m)
        return f"transform_weights_{size}_v{self.panelled.lanes}"

    @property
    def vectors(self) -> int:
        """Of output channels."""
        return -(-self.panelled.channels_out // self.panelled.lanes)

    @property
    def points(self) -> int:
        """Vectors that one of input channels becomes."""
        return math.prod(self.panelled.points)

    @property
    def preparations(self) -> dict[str, Preparation]:
        """Filters side by side."""
        own = self.panelled
        return {"filters": Panels(1, own.channels_out, own.channels_in, math.prod(own.kernel), own.lanes)}

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """The filters."""
        if weights is None or weights.weight is None:
            return {}
        return {"filters": self.preparations["filters"].apply(weights.weight)}

    def operands(self) -> list[Operand]:
        """The filters, the transformed ones."""
        own = self.panelled
        behind = (own.channels_in, own.lanes)
        return [
            constant("filters", (self.vectors, math.prod(own.kernel), *behind)),
            output("weights", (self.points // own.taps, self.vectors, own.taps, *behind)),
        ]

    @cached_property
    def axes(self) -> list[int]:
        """Those that are transformed."""
        return [axis for axis in range(3) if self.panelled.transformed[axis]]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """A few input channels of one vector of filters after the other."""
        own = self.panelled
        together = math.gcd(own.channels_in, TASK_CHANNELS)
        blocks = own.channels_in // together
        filters, weights = flat(args["filters"]), flat(args["weights"])
        with parallel(self.vectors * blocks) as task:
            vector, first = let(tirx.floordiv(task, blocks)), let(tirx.floormod(task, blocks) * together)
            waiting = scratch((self.points * own.lanes,), WIDE)
            ready = scratch((self.points * together * own.lanes,))
            with serial(together) as index:
                at, into = (vector, let(first + index)), (ready, let(index * own.lanes), together * own.lanes)
                for position in range(len(self.axes)):
                    self._along(position, filters, at, waiting, into)
            with serial(self.points) as point:
                begin = let(self._row(point, (vector, first)))
                with serial(together) as index:
                    value = ready[lanes((point * together + index) * own.lanes, own.lanes)]
                    store(weights, value, lanes(begin + index * own.lanes, own.lanes))

    def _along(
        self,
        position: int,
        filters: tirx.Buffer,
        at: tuple[Expr, Expr],
        waiting: tirx.Buffer,
        into: tuple[tirx.Buffer, Expr, int],
    ) -> None:
        """All lines along an axis of the vector and channel ``at``. The first axis reads filters, the last one writes
        ``into`` (a buffer, where the first point is there, and how far the next one), what is between lies in
        ``waiting``."""
        own, count = self.panelled, self.panelled.lanes
        axis, last = self.axes[position], position == len(self.axes) - 1
        matrix = matrices(own.m[axis], own.kernel[axis])[1]
        others = [other for other in range(3) if other != axis]
        done = self.axes[:position]
        extents = [own.points[other] if other in done else own.kernel[other] for other in others]
        with serial(extents[0]) as i, serial(extents[1]) as j:
            place: list[Expr] = [0, 0, 0]
            for other, extent, index in zip(others, extents, (i, j), strict=True):
                place[other] = 0 if extent == 1 else index

            def along(offset: int, size: tuple[int, ...]) -> Expr:
                where = [offset if each == axis else place[each] for each in range(3)]
                return (where[0] * size[1] + where[1]) * size[2] + where[2]

            line = []
            for tap in range(own.kernel[axis]):
                if position == 0:
                    row = (at[0] * math.prod(own.kernel) + along(tap, own.kernel)) * own.channels_in + at[1]
                    line.append(let(cast(read(filters, let(big(row) * count), count), WIDE, count)))
                else:
                    line.append(let(waiting[lanes(let(along(tap, own.points) * count), count)]))
            for point, coefficients in enumerate(matrix):
                value = _sum(coefficients, line, count)
                if last:
                    ready, begin, step = into
                    store(ready, cast(value, FLOAT, count), lanes(let(begin + along(point, own.points) * step), count))
                else:
                    store(waiting, value, lanes(let(along(point, own.points) * count), count))

    def _row(self, point: Expr, at: tuple[Expr, Expr]) -> Expr:
        """Where the vector of a point begins; points are counted over the taps that are left, too."""
        own = self.panelled
        xi = self.points // own.taps
        plane, tap = (point, 0) if own.taps == 1 else (tirx.floormod(point, xi), tirx.floordiv(point, xi))
        return big(((plane * self.vectors + at[0]) * own.taps + tap) * own.channels_in + at[1]) * own.lanes


def _sum(coefficients: np.ndarray, line: list[Expr], count: int) -> Expr:
    """In the order of the taps, those left out that count for nothing."""
    used = [(float(factor), tap) for factor, tap in zip(coefficients, line, strict=True) if factor]
    terms = [tap if factor == 1 else tap * number(factor, count, WIDE) for factor, tap in used]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
