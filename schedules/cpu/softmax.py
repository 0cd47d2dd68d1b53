"""Softmax and its logarithm over one run of axes, in one sweep for each of largest, sum and result.

``exp(x - largest) / sum``, or ``x - largest - log(sum)``; the sum is one of float64. NaN is passed over in the search
for the largest, as it makes the sum NaN anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import FLOAT, Expr, flat, lane, lanes, let, number, parallel, read, scratch, serial, short, splat, store
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

    def result(self, kept: Expr, total: Expr) -> Expr:
        """The logarithm, from a difference from the largest and the sum's logarithm; else the result, from what the
        difference is raised to and one over the sum."""
        return kept - total if self.log else kept * total

    def of_sum(self, total: Expr, count: int = 1) -> Expr:
        """What :meth:`result` takes of the sum."""
        return single(tirx.log(total) if self.log else real(1.0, count) / total, count)


def _lines(spec: Softmax, x: tirx.Buffer, y: tirx.Buffer) -> None:
    """Each line by itself: its elements are read from the cache when they are raised and divided."""
    count, length = lanes_for(spec.reduced, spec.vector_floats), spec.reduced
    with parallel(spec.outer) as line:
        top = let(line * length)
        most, found = scratch((count,)), scratch((1,))
        store(most, number(-math.inf, count), lanes(0, count))
        store(found, number(-math.inf), 0)

        def search(at: Expr, wide: int, ways: int) -> None:
            values = [read(x, at + way * wide, wide) for way in range(ways)]
            if wide == count:
                store(most, tirx.max(most[lanes(0, count)], _joined(values, tirx.max)), lanes(0, count))
            else:
                store(found, tirx.max(found[0], _joined(_lanes(values[0], wide), tirx.max)), 0)

        _each(top, length, count, search)
        largest = let(tirx.max(found[0], _joined([most[index] for index in range(count)], tirx.max)))
        sums, total = scratch((count,), DOUBLE), scratch((1,), DOUBLE)
        store(sums, real(0.0, count), lanes(0, count))
        store(total, real(0.0), 0)

        def raise_(at: Expr, wide: int, ways: int) -> None:
            raised = []
            for way in range(ways):
                below = let(read(x, at + way * wide, wide) - splat(largest, wide))
                raised.append(let(tirx.exp(below)))
                store(y, below if spec.log else raised[-1], lanes(at + way * wide, wide))
            if wide == count:
                few = double(_joined(raised, _plus), count)
                store(sums, sums[lanes(0, count)] + few, lanes(0, count))
            else:
                store(total, total[0] + double(_joined(_lanes(raised[0], wide), _plus)), 0)

        _each(top, length, count, raise_)
        every = let(total[0] + _joined([sums[index] for index in range(count)], _plus))
        divisor = let(spec.of_sum(every))

        def divide(at: Expr, wide: int, ways: int) -> None:
            for way in range(ways):
                here = lanes(at + way * wide, wide)
                store(y, spec.result(y[here], splat(divisor, wide)), here)

        _each(top, length, count, divide)


def _plus(one: Expr, other: Expr) -> Expr:
    return one + other


def _lanes(vector: Expr, count: int) -> list[Expr]:
    if count == 1:
        return [vector]
    vector = let(vector)
    return [lane(vector, index) for index in range(count)]


def _joined(values: list[Expr], join: Callable[[Expr, Expr], Expr]) -> Expr:
    """All values as one, in pairs of pairs."""
    while len(values) > 1:
        values = [join(*values[at : at + 2]) if at + 1 < len(values) else values[at] for at in range(0, len(values), 2)]
    return values[0]


def _each(top: Expr, length: int, count: int, visit: Callable[[Expr, int, int], None]) -> None:
    """Cover a line: ``visit(at, lanes, ways)`` some vectors side by side, then single vectors, then narrower ones."""
    first, narrower = 0, [(count >> bit, 1) for bit in range(count.bit_length())]
    for wide, ways in [(count, SIDE_BY_SIDE), *narrower]:
        passes = (length - first) // (wide * ways)
        if passes:
            with serial(passes) as index:
                visit(let(top + first + index * (wide * ways)), wide, ways)
        first += passes * wide * ways


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
            divisors = [let(spec.of_sum(total[every], count)) for total in totals]
            with serial(reduced) as row:
                here = let(top + row * inner + lane)
                places = [lanes(here + offset, count) for offset in offsets]
                kept = [let(y[at]) for at in places]  # all before the first is overwritten: the last two may overlap
                for at, value, divisor in zip(places, kept, divisors, strict=True):
                    store(y, spec.result(value, divisor), at)

        each_chunk(width, count, SIDE_BY_SIDE, visit)
