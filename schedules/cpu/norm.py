"""Normalisation by the statistics of the input itself: instance, group, layer and RMS norm, batch norm in training.

``y = act((x - mean) / √(variance + ε) · gamma + beta + residual)``. The statistics are exact (:mod:`~.moments`) in one
sweep, and the mean is kept in two parts, so that what is subtracted is the mean and not the mean rounded to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import FLOAT, Expr, flat, lanes, let, parallel, read, scratch, serial, short, splat, store
from ..epilogue import write_activated
from ..kernel import Kernel, Operand, constant, output
from .moments import (
    DOUBLE,
    MOST_SUMS,
    accumulate,
    accumulate_line,
    blocks_of,
    double,
    each_chunk,
    joined,
    lanes_for,
    real,
    single,
    variance_of,
)

#: Vectors that are normalised side by side.
SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class Norm(Kernel):
    """Normalise ``(outer, rows, lanes)``, as which ``shape`` is seen.

    Statistics are those of all ``rows`` of ``group`` consecutive lanes. With one row and one group the kernel goes line
    by line, each read from the cache when it is normalised. ``affine``: how gamma and beta are given: ``"lanes"`` one
    for each lane, ``"lines"`` one for each of the ``outer`` lines (or for each of a divisor of them, over and over), or
    ``""`` not at all. ``centred``: whether the mean is subtracted; RMS norm does not.
    """

    kind = "norm"
    shape: tuple[int, ...]
    outer: int
    rows: int
    lanes: int
    group: int
    epsilon: float
    vector_floats: int
    threads: int = 1
    affine: str = ""
    scales: int = 0
    centred: bool = True
    residual: bool = False
    activation: str = ""
    #: How x, residual and y are stored; all between is float32 and float64.
    x_dtype: str = FLOAT
    residual_dtype: str = FLOAT
    y_dtype: str = FLOAT

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"norm{'' if self.centred else '_rms'}_{short(self.x_dtype)}"

    @property
    def lines(self) -> bool:
        """Whether each line has statistics of its own."""
        return self.rows == 1 and self.group == self.lanes

    @property
    def elements(self) -> int:
        """Over how many elements statistics are taken."""
        return self.rows * self.group

    def operands(self) -> list[Operand]:
        """x, gamma and beta (``scales`` each) where ``affine``, residual where asked for, y."""
        affine = [constant(name, (self.scales,)) for name in ("gamma", "beta")] if self.affine else []
        residual = [Operand("residual", self.shape, self.residual_dtype, "residual")] if self.residual else []
        return [Operand("x", self.shape, self.x_dtype), *affine, *residual, output("y", self.shape, self.y_dtype)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Line by line, or channel by channel."""
        emitter = _Emitter(self, args)
        if self.lines:
            emitter.by_line()
        else:
            emitter.by_channel()


class _Emitter:
    def __init__(self, spec: Norm, args: Mapping[str, tirx.Buffer]) -> None:
        self.spec = spec
        self.x = flat(args["x"])
        self.residual = flat(args["residual"]) if spec.residual else None
        self.y = flat(args["y"])
        self.gamma, self.beta = args.get("gamma", args["x"]), args.get("beta", args["x"])  # unread where not given

    # -- line by line ------------------------------------------------------------------------------------------------

    def by_line(self) -> None:
        """Each line: its statistics, then its elements."""
        spec = self.spec
        count = lanes_for(spec.lanes, spec.vector_floats)
        with parallel(spec.outer) as line:
            top = let(line * spec.lanes)
            pivot = let(double(self.x[top])) if spec.centred else None
            sums, squares = accumulate_line(self.x, top, spec.lanes, count, pivot, True)
            center, low, scale = self._statistics(pivot, sums, squares)
            if spec.affine == "lines":
                at = tirx.floormod(line, spec.scales)
                scale = let(scale * double(self.gamma[at]))
            shift = let(-low * scale)
            if spec.affine == "lines":
                shift = let(shift + double(self.beta[at]))
            center, factor, term = (let(single(value)) for value in (center, scale, shift))

            def visit(first: Expr, offsets: list[int]) -> None:
                for offset in offsets:
                    at = lanes(first + offset, count)
                    gain, added = splat(factor, count), splat(term, count)
                    if spec.affine == "lanes":
                        added = added * self.gamma[at] + self.beta[at]
                        gain = gain * self.gamma[at]
                    self._store(top + first + offset, count, splat(center, count), gain, added)

            each_chunk(spec.lanes, count, SIDE_BY_SIDE, visit)

    def _statistics(self, pivot: Expr | None, sums: Expr, squares: Expr) -> tuple[Expr, Expr, Expr]:
        """The mean in float32, what is missing from it, and one over the deviation; float64 all three."""
        spec = self.spec
        if pivot is None:
            return real(0.0), real(0.0), let(self._inverse(let(squares * real(1.0 / spec.elements))))
        mean = let(pivot + sums * real(1.0 / spec.elements))
        center = let(double(single(mean)))
        return center, let(mean - center), let(self._inverse(variance_of(sums, squares, spec.elements, 1)))

    def _inverse(self, variance: Expr) -> Expr:
        return real(1.0) / tirx.sqrt(variance + real(self.spec.epsilon))

    def _store(self, at: Expr, count: int, center: Expr, gain: Expr, added: Expr) -> None:
        value = read(self.x, at, count)
        if self.spec.centred:
            value = value - center
        value = value * gain + added
        if self.residual is not None:
            value = value + read(self.residual, at, count)
        write_activated(self.y, self.spec.activation, value, at, count)

    # -- channels innermost ------------------------------------------------------------------------------------------

    def by_channel(self) -> None:
        """Moments of each lane, by blocks of rows; from them center, gain and term of each lane; then all elements."""
        spec = self.spec
        size = spec.outer * spec.lanes
        blocks = blocks_of(spec.outer, spec.rows * spec.lanes, spec.rows, spec.threads)
        parts = scratch((2 * size * blocks,), DOUBLE)
        self._sum(parts, blocks)
        constants = [scratch((size,)) for _ in range(3)]
        self._combine(parts, blocks, constants)
        count = lanes_for(spec.lanes, spec.vector_floats)
        per_block = -(-spec.rows // blocks)
        center, gain, term = constants
        with parallel(spec.outer * blocks) as task:
            clip, block = let(tirx.floordiv(task, blocks)), let(tirx.floormod(task, blocks))
            first = let(block * per_block)
            with serial(self._rows(first, per_block, blocks)) as row:
                top = let((clip * spec.rows + first + row) * spec.lanes)
                of = let(clip * spec.lanes)

                def visit(lane: Expr, offsets: list[int]) -> None:
                    for offset in offsets:
                        at = lanes(of + lane + offset, count)
                        self._store(top + lane + offset, count, center[at], gain[at], term[at])

                each_chunk(spec.lanes, count, SIDE_BY_SIDE, visit)

    def _rows(self, first: Expr, per_block: int, blocks: int) -> Expr:
        rows = self.spec.rows
        return rows if blocks == 1 else let(tirx.max(0, tirx.min(per_block, rows - first)))

    def _sum(self, parts: tirx.Buffer, blocks: int) -> None:
        """Into ``parts``: sums, then sums of squares, each (outer, blocks, lanes)."""
        spec = self.spec
        count = lanes_for(spec.lanes, spec.vector_floats)
        per_block, half = -(-spec.rows // blocks), spec.outer * blocks * spec.lanes
        with parallel(spec.outer * blocks) as task:
            clip, block = let(tirx.floordiv(task, blocks)), let(tirx.floormod(task, blocks))
            first = let(block * per_block)
            rows = self._rows(first, per_block, blocks)
            top = let(clip * (spec.rows * spec.lanes))

            def visit(lane: Expr, offsets: list[int]) -> None:
                pivots = None
                if spec.centred:
                    pivots = [let(double(self.x[lanes(top + lane + offset, count)], count)) for offset in offsets]
                source = let(top + first * spec.lanes + lane)
                made = accumulate(self.x, source, rows, spec.lanes, offsets, count, pivots, True)
                for offset, both in zip(offsets, made, strict=True):
                    for index, buffer in enumerate(both):
                        assert buffer is not None
                        at = task * spec.lanes + lane + (offset + index * half)
                        store(parts, buffer[lanes(0, count)], lanes(at, count))

            each_chunk(spec.lanes, count, MOST_SUMS // 2, visit)

    def _combine(self, parts: tirx.Buffer, blocks: int, constants: list[tirx.Buffer]) -> None:
        """Statistics of each group of lanes, and what they make of each lane's elements: center, gain and term."""
        spec = self.spec
        half = spec.outer * blocks * spec.lanes
        with serial(spec.outer) as clip, serial(spec.lanes // spec.group) as group:
            first = let(group * spec.group)

            def moments(lane: Expr) -> tuple[Expr, Expr]:
                at = clip * (blocks * spec.lanes) + lane
                return tuple(joined(parts, let(at + half * index), spec.lanes, blocks) for index in (0, 1))

            if spec.group == 1 or not spec.centred:
                pivot = let(double(self.x[clip * (spec.rows * spec.lanes) + first])) if spec.centred else None
                sums, squares = moments(first) if spec.group == 1 else (real(0.0), self._total(first, moments, 1))
            else:
                pivot, sums, squares = self._pooled(clip, first, moments)
            center, low, scale = self._statistics(pivot, sums, squares)
            with serial(spec.group) as member:
                lane = let(first + member)
                gain = let(scale * double(self.gamma[lane])) if spec.affine else scale
                term = -low * gain + double(self.beta[lane]) if spec.affine else -low * gain
                for buffer, value in zip(constants, (center, gain, term), strict=True):
                    store(buffer, single(value), clip * spec.lanes + lane)

    def _total(self, first: Expr, moments: Callable[[Expr], tuple[Expr, Expr]], index: int) -> Expr:
        total = scratch((1,), DOUBLE)
        store(total, real(0.0), 0)
        with serial(self.spec.group) as member:
            store(total, total[0] + moments(let(first + member))[index], 0)
        return let(total[0])

    def _pooled(self, clip: Expr, first: Expr, moments: Callable[[Expr], tuple[Expr, Expr]]) -> tuple[Expr, Expr, Expr]:
        """Moments of a whole group about its first lane's pivot, from those of its lanes about pivots of their own."""
        spec = self.spec
        top = let(clip * (spec.rows * spec.lanes))
        pivot = let(double(self.x[top + first]))
        total = scratch((2,), DOUBLE)
        for index in (0, 1):
            store(total, real(0.0), index)
        with serial(spec.group) as member:
            lane = let(first + member)
            sums, squares = moments(lane)
            apart = let(double(self.x[top + lane]) - pivot)
            count = real(float(spec.rows))
            store(total, total[0] + (sums + count * apart), 0)
            store(total, total[1] + (squares + real(2.0) * apart * sums + count * apart * apart), 1)
        return pivot, let(total[0]), let(total[1])
