"""Products of rows that lie at a constant distance in memory with packed vectors, summed in registers.

One address and constant distances reach all rows of a tile, and each value of a row is multiplied into some vectors
side by side: the innermost loop of pointwise layers, of convolutions along lines and of attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from ..emit import Expr, big, lanes, let, number, prefetch, scratch, serial, splat, splat_lane, store
from ..past_caches import LINE_FLOATS
from .tiles import Machine

#: The sums of a tile: a buffer of one vector for each row and vector.
Sums = list[list[tirx.Buffer]]


@dataclass(frozen=True)
class Rows:
    """Where a tile's rows lie: the buffer, floats from one row to the next, and from one term of a row to the next."""

    buffer: tirx.Buffer
    distance: int
    spacing: int = 1


@dataclass(frozen=True)
class Vectors:
    """Packed vectors of ``count`` lanes: terms lie one behind the other, ``distance`` floats from vector to vector."""

    buffer: tirx.Buffer
    distance: int
    count: int


def cleared(mr: int, width: int, count: int) -> Sums:
    """Sums of ``mr`` rows × ``width`` vectors that are zero."""
    acc = [[scratch((count,)) for _ in range(width)] for _ in range(mr)]
    for sums in acc:
        for total in sums:
            store(total, number(0.0, count), lanes(0, count))
    return acc


def multiply(
    rows: Rows, source: Expr, vectors: Vectors, weights: Expr, terms: int, step: int, acc: Sums, ahead: int = 0
) -> None:
    """``acc[r] += rows[r, term] · vectors[term]`` over ``terms`` that lie side by side from ``source`` and ``weights``
    on; ``step`` of them are loaded as one vector per row (1: single values are broadcast from memory). Meanwhile rows
    ``ahead`` floats further on are asked for, if any."""
    if step == 1 or terms < step:
        begun = 0
        if ahead:
            begun = terms - terms % LINE_FLOATS
            with serial(begun // LINE_FLOATS) as line:
                begin = let(big(line) * LINE_FLOATS)
                for r in range(len(acc)):
                    prefetch(rows.buffer, source + begin + (ahead + r * rows.distance))
                with serial(LINE_FLOATS) as index:
                    _terms(rows, source, vectors, weights, let(begin + index), range(1), acc)
        if terms > begun:
            with serial(terms - begun) as index:
                _terms(rows, source, vectors, weights, let(big(index) + begun), range(1), acc)
        return
    with serial(terms // step) as chunk:
        _terms(rows, source, vectors, weights, let(big(chunk) * step), range(step), acc)
    if rest := terms % step:  # the last lanes of a vector that overlaps the one before
        _terms(rows, source, vectors, weights, big(terms - step), range(step - rest, step), acc)


def _terms(rows: Rows, source: Expr, vectors: Vectors, weights: Expr, first: Expr, some: range, acc: Sums) -> None:
    """``some`` of as many terms from ``first`` on as it ends after."""
    count, step = vectors.count, some.stop
    xs = [rows.buffer[lanes(source + first * rows.spacing + r * rows.distance, step)] for r in range(len(acc))]
    xs = [let(x) for x in xs] if step > 1 else xs
    for k in some:
        at = weights + (first + k) * count
        w = [let(vectors.buffer[lanes(at + v * vectors.distance, count)]) for v in range(len(acc[0]))]
        for x, sums in zip(xs, acc, strict=True):
            value = let(splat_lane(x, k, step, count) if step > 1 else splat(x, count))
            for v, total in enumerate(sums):
                store(total, total[lanes(0, count)] + value * w[v], lanes(0, count))


def rows_beside(machine: Machine, width: int) -> tuple[int, int]:
    """How many rows a tile of ``width`` vectors has room for in the registers, and its step, with one to spare."""
    step = 1 if machine.broadcast_loads else machine.vector_floats
    free = machine.registers - width - 2
    most = free // width if step == 1 else free // (width + 1)
    return max(1, min(most, machine.most_rows)), step
