"""Softmax and its logarithm over one run of axes, in one sweep for each of largest, sum and result.

``exp(x - largest) / sum``, or ``x - largest - log(sum)``; the sum is one of float64. NaN is passed over in the search
for the largest, as it makes the sum NaN anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import FLOAT, Expr, flat, lanes, let, number, parallel, read, scratch, serial, short, splat, store
from ..kernel import Kernel, Operand, output
from .moments import DOUBLE, TASK_LANES, double, each_chunk, lanes_for, real, single

#: Vectors that are searched, summed and divided side by side.
SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class Softmax(Kernel):
    """Over the middle of ``(outer, reduced, inner)``, as which ``shape`` is seen; ``log``: its logarithm."""

    kind = "norm"
    shape: tuple[int, ...]
    outer: int
    reduced: int
    inner: int
    log: bool
    vector_floats: int
    x_dtype: str = FLOAT

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"{'log_' if self.log else ''}softmax_{short(self.x_dtype)}"

    def operands(self) -> list[Operand]:
        """x, y."""
        return [Operand("x", self.shape, self.x_dtype), output("y", self.shape)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Along lines, or lanes that stay apart."""
        (_lines if self.inner == 1 else _rows)(self, flat(args["x"]), flat(args["y"]))

    def raised(self, below: Expr) -> Expr:
        """What is kept of an element's difference from the largest until the sum is known."""
        return below if self.log else tirx.exp(below)

    def result(self, kept: Expr, total: Expr) -> Expr:
        """The result from that and from the sum, or its logarithm."""
        return kept - total if self.log else kept / total


def _lines(spec: Softmax, x: tirx.Buffer, y: tirx.Buffer) -> None:
    """Each line by itself: its elements are read from the cache when they are raised and divided."""
    count, length = lanes_for(spec.reduced, spec.vector_floats), spec.reduced
    whole = length // count
    tail = range(whole * count, length)
    with parallel(spec.outer) as line:
        top = let(line * length)
        most, found = scratch((count,)), scratch((1,))
        store(most, number(-math.inf, count), lanes(0, count))
        with serial(whole) as index:
            store(most, tirx.max(most[lanes(0, count)], read(x, top + index * count, count)), lanes(0, count))
        store(found, _over(most, count, tirx.max), 0)
        _each(tail, lambda at: store(found, tirx.max(found[0], read(x, top + at)), 0))
        largest = let(found[0])
        sums, total = scratch((count,), DOUBLE), scratch((1,), DOUBLE)
        store(sums, real(0.0, count), lanes(0, count))

        def raise_(at: Expr, wide: int, into: tirx.Buffer) -> None:
            below = let(read(x, at, wide) - splat(largest, wide))
            store(y, spec.raised(below), lanes(at, wide))
            raised = tirx.exp(below) if spec.log else y[lanes(at, wide)]
            store(into, into[lanes(0, wide)] + double(raised, wide), lanes(0, wide))

        with serial(whole) as index:
            raise_(let(top + index * count), count, sums)
        store(total, _over(sums, count, lambda a, b: a + b), 0)
        _each(tail, lambda at: raise_(let(top + at), 1, total))
        divisor = let(single(tirx.log(total[0]) if spec.log else total[0]))

        with serial(whole) as index:
            at = lanes(let(top + index * count), count)
            store(y, spec.result(y[at], splat(divisor, count)), at)
        _each(tail, lambda at: store(y, spec.result(y[top + at], divisor), top + at))


def _over(buffer: tirx.Buffer, count: int, join: Callable[[Expr, Expr], Expr]) -> Expr:
    """All elements of a vector as one, in pairs of pairs."""
    values = [buffer[index] for index in range(count)]
    while len(values) > 1:
        values = [join(*values[at : at + 2]) if at + 1 < len(values) else values[at] for at in range(0, len(values), 2)]
    return values[0]


def _each(places: range, visit: Callable[[Expr], None]) -> None:
    """Single elements behind the vectors."""
    if len(places):
        with serial(len(places)) as index:
            visit(places.start + index)


def _rows(spec: Softmax, x: tirx.Buffer, y: tirx.Buffer) -> None:
    """Lanes are elements that stay apart."""
    reduced, inner = spec.reduced, spec.inner
    count = lanes_for(inner, spec.vector_floats)
    # Tasks must not overlap, as each reads again what it has written.
    chunks = next(parts for parts in range(-(-inner // TASK_LANES), inner + 1) if inner % parts == 0)
    chunks = chunks if inner // chunks >= count else 1
    width = inner // chunks
    with parallel(spec.outer * chunks) as task:
        start = let(tirx.floormod(task, chunks) * width)
        top = let(tirx.floordiv(task, chunks) * (reduced * inner) + start)

        def visit(lane: Expr, offsets: list[int]) -> None:
            found = [scratch((count,)) for _ in offsets]
            totals = [scratch((count,), DOUBLE) for _ in offsets]
            every = lanes(0, count)
            for most, total in zip(found, totals, strict=True):
                store(most, number(-math.inf, count), every)
                store(total, real(0.0, count), every)
            with serial(reduced) as row:
                here = let(top + row * inner + lane)
                for most, offset in zip(found, offsets, strict=True):
                    store(most, tirx.max(most[every], read(x, here + offset, count)), every)
            with serial(reduced) as row:
                here = let(top + row * inner + lane)
                for most, total, offset in zip(found, totals, offsets, strict=True):
                    below = let(read(x, here + offset, count) - most[every])
                    raised = let(tirx.exp(below))
                    store(y, below if spec.log else raised, lanes(here + offset, count))
                    store(total, total[every] + double(raised, count), every)
            divisors = [let(single(tirx.log(total[every]) if spec.log else total[every], count)) for total in totals]
            with serial(reduced) as row:
                here = let(top + row * inner + lane)
                places = [lanes(here + offset, count) for offset in offsets]
                kept = [let(y[at]) for at in places]  # all before the first is overwritten: the last two may overlap
                for at, value, divisor in zip(places, kept, divisors, strict=True):
                    store(y, spec.result(value, divisor), at)

        each_chunk(width, count, SIDE_BY_SIDE, visit)
