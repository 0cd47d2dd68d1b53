"""The first place of the largest or least over one axis; of NaN where one element is NaN, as PyTorch has it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx

from ..emit import INT, Expr, cast, lanes, let, number, parallel, scratch, serial, short, splat, store
from ..kernel import Operand, output
from .extremes import Search
from .moments import lanes_for

PLACE = "int64"


@dataclass(frozen=True)
class PlaceOfExtreme(Search):
    """The place of the largest or least along the axis that is reduced."""

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"arg{self.statistic}_{short(self.dtype)}"

    def operands(self) -> list[Operand]:
        """x, y."""
        return [Operand("x", self.shape, self.dtype), output("y", self.out_shape, PLACE)]

    def begun(self, count: int) -> _Best:
        """Nothing found so far."""
        best = _Best(self.statistic == "max", scratch((count,)), scratch((count,), INT), count)
        store(best.value, number(-math.inf if best.largest else math.inf, count), lanes(0, count))
        store(best.place, splat(tirx.IntImm(INT, 0), count), lanes(0, count))
        return best

    def lines(self, x: tirx.Buffer, y: tirx.Buffer) -> None:
        """Each lane has the vectors in its place; then the lanes are compared."""
        count, length = lanes_for(self.reduced, self.vector_floats), self.reduced
        vectors = length // count
        with parallel(self.outer) as line:
            top = let(line * length)
            best = self.begun(count)
            with serial(vectors) as index:
                best.take(x[lanes(top + index * count, count)], index)
            one = self.begun(1)
            store(one.value, best.value[0], 0)
            store(one.place, best.place[0] * count, 0)
            with serial(count) as lane:
                one.take_lane(best.value[lane], best.place[lane] * count + lane)
            if length % count:
                with serial(length % count) as index:
                    one.take_lane(x[top + vectors * count + index], vectors * count + index)
            store(y, one.result(), line)


@dataclass(frozen=True)
class _Best:
    """The best so far and its place, in ``count`` lanes."""

    largest: bool
    value: tirx.Buffer
    place: tirx.Buffer
    count: int

    def take(self, value: Expr, place: Expr) -> None:
        """Look at a vector of values behind those so far."""
        every, value = lanes(0, self.count), let(value)
        best, at = let(self.value[every]), let(self.place[every])
        better = value > best if self.largest else value < best

        def chosen(new: Expr, old: Expr) -> Expr:
            of_nan = tirx.Select(tirx.isnan(best), old, new)
            return tirx.Select(tirx.isnan(value), of_nan, tirx.Select(better, new, old))

        store(self.value, chosen(value, best), every)
        store(self.place, chosen(splat(place, self.count), at), every)

    def take_lane(self, value: Expr, place: Expr) -> None:
        """Look at one value, which may stand before the best so far."""
        value, place, best, at = let(value), let(place), let(self.value[0]), let(self.place[0])
        before = place < at
        better = tirx.any(value > best if self.largest else value < best, tirx.all(value == best, before))
        of_nan = tirx.any(tirx.Not(tirx.isnan(best)), before)
        taken = let(tirx.any(tirx.all(tirx.isnan(value), of_nan), tirx.all(better, tirx.Not(tirx.isnan(best)))))
        store(self.value, tirx.Select(taken, value, best), 0)
        store(self.place, tirx.Select(taken, place, at), 0)

    def result(self) -> Expr:
        """The places, as they are stored."""
        return cast(self.place[lanes(0, self.count)], PLACE, self.count)
