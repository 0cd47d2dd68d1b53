"""Sums and sums of squares in float64, and the reductions that follow from them: sum, mean, variance, deviation.

A float32 and its square are exact in float64, so one sweep is enough whatever the mean is beside the deviation, and
the result is the exact one rounded once. Differences are taken from the first element that is reduced, so that equal
elements have a variance of exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tvm import tirx

from ..emit import Expr, flat, lanes, let, parallel, scratch, serial, splat, store
from ..reduction import Reduction

DOUBLE = "float64"
#: Vectors whose sums are held in registers at once: each takes two registers for each kind of sum.
MOST_SUMS = 4
#: Elements that one task sums before another thread is worth waking for the rest.
TASK_ELEMENTS = 16384
#: Lanes kept of one task where they are many: four kilobytes of each row.
TASK_LANES = 1024


def double(value: Expr, count: int = 1) -> Expr:
    """``value`` as float64 in ``count`` lanes."""
    return tirx.Cast(DOUBLE if count == 1 else f"{DOUBLE}x{count}", value)


def single(value: Expr, count: int = 1) -> Expr:
    """``value`` rounded to float32 in ``count`` lanes."""
    return tirx.Cast("float32" if count == 1 else f"float32x{count}", value)


def real(value: float, count: int = 1) -> Expr:
    """A float64 constant in ``count`` lanes."""
    return splat(tirx.FloatImm(DOUBLE, value), count)


def lanes_for(extent: int, vector_floats: int) -> int:
    """The widest vector that ``extent`` elements fill."""
    return min(vector_floats, 1 << (extent.bit_length() - 1))


def each_chunk(extent: int, count: int, most: int, visit: Callable[[Expr, list[int]], None]) -> None:
    """Cover ``extent`` lanes by vectors of ``count``: ``visit(first, offsets)`` with at most ``most`` offsets.

    The last vector overlaps the one before where they do not come out even: ``visit`` must not mind.
    """
    width = most * count
    passes = extent // width
    if passes:
        with serial(passes) as index:
            visit(let(index * width), [v * count for v in range(most)])
    first, rest = passes * width, extent % width
    if rest:
        starts = [*range(0, rest - count + 1, count)]
        if rest % count:
            starts.append(rest - count)  # before `first` where the rest does not fill a vector
        visit(tirx.IntImm("int32", first), starts)


class Moments(NamedTuple):
    """Sums of ``x - pivot`` and of its square, each in float64 lanes."""

    sums: tirx.Buffer
    squares: tirx.Buffer | None


def accumulate(
    x: tirx.Buffer,
    source: Expr,
    rows: Expr,
    stride: int,
    offsets: list[int],
    count: int,
    pivots: list[Expr] | None,
    squares: bool,
) -> list[Moments]:
    """Moments of ``rows`` vectors of ``count`` lanes from ``x[source + offset]`` on, ``stride`` apart, by offset.

    Several rows are summed side by side where there are few offsets, to hide the latency of additions.
    """
    ways = max(1, MOST_SUMS // (len(offsets) * (2 if squares else 1)))
    made = [[_cleared(count, squares) for _ in offsets] for _ in range(ways)]

    def add(moments: list[Moments], at: Expr) -> None:
        for index, offset in enumerate(offsets):
            value = double(x[lanes(at + offset, count)], count)
            if pivots is not None:
                value = value - pivots[index]
            value = let(value)
            both = moments[index]
            store(both.sums, both.sums[lanes(0, count)] + value, lanes(0, count))
            if both.squares is not None:
                store(both.squares, both.squares[lanes(0, count)] + value * value, lanes(0, count))

    whole = rows // ways if isinstance(rows, int) else let(tirx.floordiv(rows, ways))
    with serial(whole) as row:
        for way in range(ways):
            add(made[way], let(source + (row * ways + way) * stride))
    if ways > 1:
        with serial(rows - whole * ways) as row:
            add(made[0], let(source + (whole * ways + row) * stride))
        for way in range(1, ways):
            for index in range(len(offsets)):
                _add(made[0][index], made[way][index], count)
    return made[0]


def _cleared(count: int, squares: bool) -> Moments:
    buffers = [scratch((count,), DOUBLE) for _ in range(1 + squares)]
    for buffer in buffers:
        store(buffer, real(0.0, count), lanes(0, count))
    return Moments(buffers[0], buffers[1] if squares else None)


def _add(into: Moments, other: Moments, count: int) -> None:
    for target, source in zip(into, other, strict=True):
        if target is not None and source is not None:
            store(target, target[lanes(0, count)] + source[lanes(0, count)], lanes(0, count))


def accumulate_line(
    x: tirx.Buffer, source: Expr, length: Expr, count: int, pivot: Expr | None, squares: bool
) -> tuple[Expr, Expr | None]:
    """Moments of ``length`` consecutive elements."""
    pivots = None if pivot is None else [splat(pivot, count)]
    whole = length // count if isinstance(length, int) else let(tirx.floordiv(length, count))
    wide = accumulate(x, source, whole, count, [0], count, pivots, squares)[0]
    total = scratch((2,), DOUBLE)
    for index, buffer in enumerate(wide):
        value = real(0.0)
        if buffer is not None:
            for at in range(count):
                value = value + buffer[at]
        store(total, value, index)
    if not isinstance(length, int) or length % count:
        last = let(source + whole * count)
        one = accumulate(x, last, length - whole * count, 1, [0], 1, None if pivot is None else [pivot], squares)[0]
        for index, buffer in enumerate(one):
            if buffer is not None:
                store(total, total[index] + buffer[0], index)
    return let(total[0]), let(total[1]) if squares else None


@dataclass(frozen=True)
class VectorReduction(Reduction):
    """As :class:`..reduction.Reduction`, in vectors of ``vector_floats`` lanes, shared out over ``threads``."""

    vector_floats: int = 1
    threads: int = 1

    @property
    def with_squares(self) -> bool:
        """Whether squares are summed."""
        return self.centred or self.squared

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Along lines, or lanes that stay apart."""
        x, y = flat(args["x"]), flat(args["y"])
        (_reduce_lines if self.inner == 1 else _reduce_rows)(self, x, y)

    def result(self, sums: Expr, squares: Expr | None, count: int) -> Expr:
        """What the moments of all elements give, in ``count`` lanes of float32."""
        number = real(1.0 / self.reduced, count)
        if self.centred:
            value = variance_of(sums, squares, self.reduced, count)
            return single(tirx.sqrt(value) if self.statistic == "std" else value, count)
        total = squares if self.squared else sums
        return single(total if self.statistic == "sum" else total * number, count)


def variance_of(sums: Expr, squares: Expr, elements: int, count: int) -> Expr:
    """The variance of ``elements`` elements; NaN stays NaN, and rounding does not make it negative."""
    share = real(1.0 / elements, count)
    mean = sums * share
    value = let(squares * share - mean * mean)
    return tirx.Select(value < real(0.0, count), real(0.0, count), value)


def blocks_of(tasks: int, elements: int, rows: int, threads: int) -> int:
    """Into how many blocks each of ``tasks`` cuts its ``rows``, so that no thread waits and each block is worth it."""
    if threads == 1 or tasks >= 2 * threads:
        return 1
    return max(1, min(rows, -(-2 * threads // tasks), elements // TASK_ELEMENTS))


def _reduce_rows(reduction: VectorReduction, x: tirx.Buffer, y: tirx.Buffer) -> None:
    """Lanes are elements that stay apart."""
    outer, reduced, inner = reduction.outer, reduction.reduced, reduction.inner
    count = lanes_for(inner, reduction.vector_floats)
    width = min(inner, TASK_LANES)
    chunks = -(-inner // width)
    tasks = outer * chunks
    blocks = blocks_of(tasks, reduced * width, reduced, reduction.threads)
    per_block = -(-reduced // blocks)
    parts = scratch((2 * outer * blocks * inner,), DOUBLE) if blocks > 1 else None
    most = MOST_SUMS // (1 + reduction.with_squares)
    with parallel(tasks * blocks) as task:
        block = let(tirx.floormod(task, blocks))
        chunk = let(tirx.floormod(tirx.floordiv(task, blocks), chunks))
        clip = let(tirx.floordiv(task, blocks * chunks))
        # The last chunk overlaps the one before: both write the same.
        start = let(tirx.min(chunk * width, inner - width))
        first = let(block * per_block)
        rows = let(tirx.min(per_block, reduced - first)) if blocks > 1 else reduced
        top = let(clip * (reduced * inner) + start)
        target = let((clip * blocks + block) * inner + start)

        def visit(lane: Expr, offsets: list[int]) -> None:
            pivots = None
            if reduction.centred:
                pivots = [let(double(x[lanes(top + lane + offset, count)], count)) for offset in offsets]
            source = let(top + first * inner + lane)
            sums = accumulate(x, source, rows, inner, offsets, count, pivots, reduction.with_squares)
            for offset, both in zip(offsets, sums, strict=True):
                values = [None if buffer is None else buffer[lanes(0, count)] for buffer in both]
                at = lanes(target + lane + offset, count)
                if parts is None:
                    store(y, reduction.result(values[0], values[1], count), at)
                    continue
                for index, value in enumerate(values):
                    if value is not None:
                        half = index * outer * blocks * inner
                        store(parts, value, lanes(target + lane + offset + half, count))

        each_chunk(width, count, most, visit)
    if parts is not None:
        with serial(outer) as clip, serial(inner) as lane:
            at = let(clip * (blocks * inner) + lane)
            store(y, _joined(reduction, parts, at, inner, blocks, outer * blocks * inner), clip * inner + lane)


def _reduce_lines(reduction: VectorReduction, x: tirx.Buffer, y: tirx.Buffer) -> None:
    """Lanes are elements that are summed."""
    outer, reduced = reduction.outer, reduction.reduced
    count = lanes_for(reduced, reduction.vector_floats)
    blocks = blocks_of(outer, reduced, -(-reduced // (MOST_SUMS * count)), reduction.threads)
    per_block = ceil_to(-(-reduced // blocks), MOST_SUMS * count) if blocks > 1 else reduced
    parts = scratch((2 * outer * blocks,), DOUBLE) if blocks > 1 else None
    with parallel(outer * blocks) as task:
        line, block = let(tirx.floordiv(task, blocks)), let(tirx.floormod(task, blocks))
        first = let(block * per_block)
        length = let(tirx.max(0, tirx.min(per_block, reduced - first))) if blocks > 1 else reduced
        top = let(line * reduced)
        pivot = let(double(x[top])) if reduction.centred else None
        sums, squares = accumulate_line(x, let(top + first), length, count, pivot, reduction.with_squares)
        if parts is None:
            store(y, reduction.result(sums, squares, 1), line)
        else:
            store(parts, sums, task)
            if squares is not None:
                store(parts, squares, task + outer * blocks)
    if parts is not None:
        with serial(outer) as line:
            store(y, _joined(reduction, parts, let(line * blocks), 1, blocks, outer * blocks), line)


def _joined(reduction: VectorReduction, parts: tirx.Buffer, at: Expr, stride: int, blocks: int, half: int) -> Expr:
    """The result for one element whose blocks' moments lie ``stride`` apart from ``parts[at]`` on."""
    sums, squares = (joined(parts, let(at + half * index), stride, blocks) for index in (0, 1))
    return reduction.result(sums, squares if reduction.with_squares else None, 1)


def joined(parts: tirx.Buffer, at: Expr, stride: int, blocks: int) -> Expr:
    """The sum of ``blocks`` values that lie ``stride`` apart."""
    total = scratch((1,), DOUBLE)
    store(total, real(0.0), 0)
    with serial(blocks) as block:
        store(total, total[0] + parts[at + block * stride], 0)
    return let(total[0])


def ceil_to(value: int, step: int) -> int:
    """The least multiple of ``step`` that is not under ``value``."""
    return -(-value // step) * step
