"""The first place of the largest or least over one axis; of NaN where one element is NaN, as PyTorch has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import FLOAT, INT, Expr, cast, flat, lanes, let, number, parallel, scratch, serial, splat, store
from ..kernel import Kernel, Operand, output
from .extremes import SIDE_BY_SIDE
from .moments import TASK_LANES, each_chunk, lanes_for

PLACE = "int64"


@dataclass(frozen=True)
class PlaceOfExtreme(Kernel):
    """Over the middle of ``(outer, reduced, inner)``, as which ``shape`` is seen; the places have ``out_shape``."""

    kind = "reduction"
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    outer: int
    reduced: int
    inner: int
    largest: bool
    vector_floats: int

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"arg{'max' if self.largest else 'min'}_f32"

    def operands(self) -> list[Operand]:
        """x, y."""
        return [Operand("x", self.shape, FLOAT), output("y", self.out_shape, PLACE)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Along lines, or lanes that stay apart."""
        (_lines if self.inner == 1 else _rows)(self, flat(args["x"]), flat(args["y"]))

    def begun(self, count: int) -> _Best:
        """Nothing found so far."""
        best = _Best(self.largest, scratch((count,)), scratch((count,), INT), count)
        store(best.value, number(-math.inf if self.largest else math.inf, count), lanes(0, count))
        store(best.place, splat(tirx.IntImm(INT, 0), count), lanes(0, count))
        return best


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


def _lines(spec: PlaceOfExtreme, x: tirx.Buffer, y: tirx.Buffer) -> None:
    """Each lane has the vectors in its place; then the lanes are compared."""
    count, length = lanes_for(spec.reduced, spec.vector_floats), spec.reduced
    vectors = length // count
    with parallel(spec.outer) as line:
        top = let(line * length)
        best = spec.begun(count)
        with serial(vectors) as index:
            best.take(x[lanes(top + index * count, count)], index)
        one = spec.begun(1)
        store(one.value, best.value[0], 0)
        store(one.place, best.place[0] * count, 0)
        with serial(count) as lane:
            one.take_lane(best.value[lane], best.place[lane] * count + lane)
        if length % count:
            with serial(length % count) as index:
                one.take_lane(x[top + vectors * count + index], vectors * count + index)
        store(y, cast(one.place[0], PLACE), line)


def _rows(spec: PlaceOfExtreme, x: tirx.Buffer, y: tirx.Buffer) -> None:
    reduced, inner = spec.reduced, spec.inner
    count, width = lanes_for(inner, spec.vector_floats), min(inner, TASK_LANES)
    chunks = -(-inner // width)
    with parallel(spec.outer * chunks) as task:
        outer = let(tirx.floordiv(task, chunks))
        # The last chunk overlaps the one before: both write the same.
        start = let(tirx.min(tirx.floormod(task, chunks) * width, inner - width))

        def visit(lane: Expr, offsets: list[int]) -> None:
            found = [spec.begun(count) for _ in offsets]
            with serial(reduced) as row:
                here = let((outer * reduced + row) * inner + start + lane)
                for each, offset in zip(found, offsets, strict=True):
                    each.take(x[lanes(here + offset, count)], row)
            for each, offset in zip(found, offsets, strict=True):
                at = lanes(outer * inner + start + lane + offset, count)
                store(y, cast(each.place[lanes(0, count)], PLACE, count), at)

        each_chunk(width, count, SIDE_BY_SIDE, visit)
