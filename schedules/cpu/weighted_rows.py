"""Sums of a few weighted rows of a matrix, whose places and weights are computed: what is read at points of a grid.

Places and weights of a result are read once; its channels are lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import INT, Expr, big, flat, lanes, let, parallel, serial, splat, store
from ..kernel import Kernel, Operand, output
from .conv3d_gather import parts_of


@dataclass(frozen=True)
class WeightedRows(Kernel):
    """y[p] = the sum of ``taps`` rows x[places_t[p]] · weights_t[p]: x is (rows, channels), y (points, channels).
    Negative places count from the end; those outside are those at the ends."""

    kind = "weighted_rows"
    rows: int
    points: int
    channels: int
    taps: int
    vector_floats: int

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"weighted_rows_{self.taps}_f32"

    def operands(self) -> list[Operand]:
        """x, of each tap its places and weights, y."""
        tables = []
        for tap in range(self.taps):
            tables += [Operand(f"places_{tap}", (self.points,), INT), Operand(f"weights_{tap}", (self.points,))]
        return [Operand("x", (self.rows, self.channels)), *tables, output("y", (self.points, self.channels))]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Point by point."""
        x, y, count = flat(args["x"]), flat(args["y"]), self.vector_floats
        with parallel(self.points) as point:
            starts, weights = list[Expr](), list[Expr]()
            for tap in range(self.taps):
                given = let(args[f"places_{tap}"][point])
                place = tirx.max(tirx.min(given + tirx.Select(given < 0, self.rows, 0), self.rows - 1), 0)
                starts.append(let(big(place) * self.channels))
                weights.append(let(args[f"weights_{tap}"][point]))

            def sum_(first: Expr, size: int) -> None:
                total: Expr | None = None
                for start, weight in zip(starts, weights, strict=True):
                    value = x[lanes(start + first, size)] * splat(weight, size)
                    total = value if total is None else total + value
                assert total is not None
                store(y, total, lanes(big(point) * self.channels + first, size))

            whole = self.channels // count
            with serial(whole) as index:
                sum_(index * count, count)
            for begin, size in parts_of(self.channels - whole * count):
                sum_(whole * count + begin, size)
