"""Searches over one run of axes: for the largest or least, NaN where one element is NaN, as PyTorch has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx

from ..emit import Expr, flat, lanes, let, number, parallel, read, scratch, serial, store
from ..reduction import Reduction
from .moments import TASK_LANES, each_chunk, lanes_for

#: Vectors that are searched side by side, to hide the latency of comparisons.
SIDE_BY_SIDE = 4


class Found(Protocol):
    """What was found so far, in some lanes."""

    def take(self, value: Expr, row: Expr) -> None:
        """Look at one more vector, that of ``row``."""

    def result(self) -> Expr:
        """What is stored of it."""


@dataclass(frozen=True)
class Search(Reduction):
    """A :class:`..reduction.Reduction` of the statistics max and min, in vectors of ``vector_floats`` lanes."""

    vector_floats: int = 1

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Along lines, or lanes that stay apart."""
        (self.lines if self.inner == 1 else self.rows)(flat(args["x"]), flat(args["y"]))

    def begun(self, count: int) -> Found:
        """Nothing found so far, in ``count`` lanes."""
        raise NotImplementedError

    def lines(self, x: tirx.Buffer, y: tirx.Buffer) -> None:
        """Lanes are elements of a line."""
        raise NotImplementedError

    def rows(self, x: tirx.Buffer, y: tirx.Buffer) -> None:
        """Lanes are elements that stay apart."""
        reduced, inner = self.reduced, self.inner
        count, width = lanes_for(inner, self.vector_floats), min(inner, TASK_LANES)
        chunks = -(-inner // width)
        with parallel(self.outer * chunks) as task:
            outer = let(tirx.floordiv(task, chunks))
            # The last chunk overlaps the one before: both write the same.
            start = let(tirx.min(tirx.floormod(task, chunks) * width, inner - width))

            def visit(lane: Expr, offsets: list[int]) -> None:
                found = [self.begun(count) for _ in offsets]
                with serial(reduced) as row:
                    here = let((outer * reduced + row) * inner + start + lane)
                    for each, offset in zip(found, offsets, strict=True):
                        each.take(read(x, here + offset, count), row)
                for each, offset in zip(found, offsets, strict=True):
                    store(y, each.result(), lanes(outer * inner + start + lane + offset, count))

            each_chunk(width, count, SIDE_BY_SIDE, visit)


@dataclass(frozen=True)
class VectorExtreme(Search):
    """The largest or least itself."""

    def begun(self, count: int) -> _Extreme:
        """Nothing found so far."""
        found = _Extreme(self.statistic == "max", scratch((count,)), scratch((count,)), count)
        store(found.best, number(-math.inf if found.largest else math.inf, count), lanes(0, count))
        store(found.nan, number(0.0, count), lanes(0, count))
        return found

    def lines(self, x: tirx.Buffer, y: tirx.Buffer) -> None:
        """Each line by itself: some vectors side by side, then their lanes, then what fills no vector."""
        count, length = lanes_for(self.reduced, self.vector_floats), self.reduced
        vectors = length // count
        ways = min(SIDE_BY_SIDE, vectors)
        passes, behind = vectors // ways, vectors // ways * ways * count
        with parallel(self.outer) as line:
            top = let(line * length)
            found = [self.begun(count) for _ in range(ways)]
            with serial(passes) as index:
                for way, each in enumerate(found):
                    each.take(read(x, top + (index * ways + way) * count, count))
            for vector in range(vectors - passes * ways):
                found[vector].take(read(x, top + behind + vector * count, count))
            for other in found[1:]:
                found[0].join(other)
            one = self.begun(1)
            with serial(count) as lane:
                store(one.best, one.better(one.best[0], found[0].best[lane]), 0)
                store(one.nan, one.nan[0] + found[0].nan[lane], 0)
            if length % count:
                with serial(length % count) as index:
                    one.take(read(x, top + vectors * count + index))
            store(y, one.result(), line)


@dataclass(frozen=True)
class _Extreme:
    """The best so far in ``count`` lanes, and NaN where one was met: a comparison forgets it."""

    largest: bool
    best: tirx.Buffer
    nan: tirx.Buffer
    count: int

    def better(self, one: Expr, other: Expr) -> Expr:
        return tirx.max(one, other) if self.largest else tirx.min(one, other)

    def take(self, value: Expr, _row: Expr = 0) -> None:
        """Look at one more vector."""
        value, every = let(value), lanes(0, self.count)
        store(self.best, self.better(self.best[every], value), every)
        store(self.nan, tirx.Select(tirx.isnan(value), value, self.nan[every]), every)

    def join(self, other: _Extreme) -> None:
        every = lanes(0, self.count)
        store(self.best, self.better(self.best[every], other.best[every]), every)
        store(self.nan, self.nan[every] + other.nan[every], every)

    def result(self) -> Expr:
        every = lanes(0, self.count)
        return tirx.Select(tirx.isnan(self.nan[every]), self.nan[every], self.best[every])
