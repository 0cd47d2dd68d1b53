"""The largest or least over one run of axes, NaN where one element is NaN, as PyTorch has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import Expr, flat, lanes, let, number, parallel, read, scratch, serial, store
from ..reduction import Reduction
from .moments import TASK_LANES, each_chunk, lanes_for

#: Vectors that are searched side by side, to hide the latency of comparisons.
SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class VectorExtreme(Reduction):
    """As :class:`..reduction.Reduction` of the statistics max and min, in vectors of ``vector_floats`` lanes."""

    vector_floats: int = 1

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Along lines, or lanes that stay apart."""
        (_lines if self.inner == 1 else _rows)(self, flat(args["x"]), flat(args["y"]))

    def begun(self, count: int) -> _Found:
        """Nothing found so far."""
        found = _Found(self.statistic == "max", scratch((count,)), scratch((count,)), count)
        store(found.best, number(-math.inf if found.largest else math.inf, count), lanes(0, count))
        store(found.nan, number(0.0, count), lanes(0, count))
        return found


@dataclass(frozen=True)
class _Found:
    """The best so far in ``count`` lanes, and NaN where one was met: a comparison forgets it."""

    largest: bool
    best: tirx.Buffer
    nan: tirx.Buffer
    count: int

    def better(self, one: Expr, other: Expr) -> Expr:
        return tirx.max(one, other) if self.largest else tirx.min(one, other)

    def take(self, value: Expr) -> None:
        """Look at one more vector."""
        value, every = let(value), lanes(0, self.count)
        store(self.best, self.better(self.best[every], value), every)
        store(self.nan, tirx.Select(tirx.isnan(value), value, self.nan[every]), every)

    def join(self, other: _Found) -> None:
        every = lanes(0, self.count)
        store(self.best, self.better(self.best[every], other.best[every]), every)
        store(self.nan, self.nan[every] + other.nan[every], every)

    def result(self) -> Expr:
        every = lanes(0, self.count)
        return tirx.Select(tirx.isnan(self.nan[every]), self.nan[every], self.best[every])


def _lines(spec: VectorExtreme, x: tirx.Buffer, y: tirx.Buffer) -> None:
    count, length = lanes_for(spec.reduced, spec.vector_floats), spec.reduced
    vectors = length // count
    ways = min(SIDE_BY_SIDE, vectors)
    passes, behind = vectors // ways, vectors // ways * ways * count
    with parallel(spec.outer) as line:
        top = let(line * length)
        found = [spec.begun(count) for _ in range(ways)]
        with serial(passes) as index:
            for way, each in enumerate(found):
                each.take(read(x, top + (index * ways + way) * count, count))
        for vector in range(vectors - passes * ways):
            found[vector].take(read(x, top + behind + vector * count, count))
        for other in found[1:]:
            found[0].join(other)
        one = spec.begun(1)
        with serial(count) as lane:
            store(one.best, one.better(one.best[0], found[0].best[lane]), 0)
            store(one.nan, one.nan[0] + found[0].nan[lane], 0)
        if length % count:
            with serial(length % count) as index:
                one.take(read(x, top + vectors * count + index))
        store(y, one.result(), line)


def _rows(spec: VectorExtreme, x: tirx.Buffer, y: tirx.Buffer) -> None:
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
                    each.take(read(x, here + offset, count))
            for each, offset in zip(found, offsets, strict=True):
                store(y, each.result(), lanes(outer * inner + start + lane + offset, count))

        each_chunk(width, count, SIDE_BY_SIDE, visit)
