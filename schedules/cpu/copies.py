"""One tensor put together from boxes of others, as slices, concatenations, pads and moved axes do after one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from ..emit import Expr, argument, big, flat, kernel, let, number, parallel, read, serial, write

#: Pieces with fewer elements than this are copied on one thread: waking the others costs more.
PARALLEL_ELEMENTS = 16384


@dataclass(frozen=True)
class Piece:
    """A box of a result, from ``begin``, of ``extents``: element x of it is element ``first + Σ strides · x`` of the
    source of that number, or without a source ``fill``."""

    begin: tuple[int, ...]
    extents: tuple[int, ...]
    source: int | None = None
    first: int = 0
    strides: tuple[int, ...] = ()
    fill: float = 0.0

    @classmethod
    def whole(cls, shape: Sequence[int], source: int | None, fill: float = 0.0) -> Piece:
        """All of a tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape), source, 0, row_major(shape), fill)

    def within(self, begin: Sequence[int], end: Sequence[int]) -> Piece | None:
        """What of it lies in a box, seen from the box's first corner; None where nothing does."""
        low = [max(own, bound) for own, bound in zip(self.begin, begin, strict=True)]
        high = [min(own + extent, bound) for own, extent, bound in zip(self.begin, self.extents, end, strict=True)]
        if any(above <= below for below, above in zip(low, high, strict=True)):
            return None
        further = sum((at - own) * stride for at, own, stride in zip(low, self.begin, self.strides, strict=True))
        return Piece(
            tuple(at - bound for at, bound in zip(low, begin, strict=True)),
            tuple(above - below for below, above in zip(low, high, strict=True)),
            self.source,
            self.first + further,
            self.strides,
            self.fill,
        )

    def shifted(self, by: Sequence[int]) -> Piece:
        """The same elsewhere in the result."""
        begin = tuple(own + step for own, step in zip(self.begin, by, strict=True))
        return Piece(begin, self.extents, self.source, self.first, self.strides, self.fill)

    def moved(self, order: Sequence[int | None]) -> Piece:
        """Its axes in ``order``; None stands for a new one of extent one, and axes left out have that extent."""
        begin, extents, strides = (
            tuple(other if axis is None else values[axis] for axis in order)
            for values, other in ((self.begin, 0), (self.extents, 1), (self.strides, 0))
        )
        return Piece(begin, extents, self.source, self.first, strides, self.fill)

    def loops(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Extent, step in the result and step in the source of each loop that copies it, neighbours joined that step
        on together."""
        found: list[tuple[int, int, int]] = []
        for extent, step, stride in zip(self.extents, row_major(shape), self.strides, strict=True):
            if extent == 1:
                continue
            if found and found[-1][1] == extent * step and (self.source is None or found[-1][2] == extent * stride):
                extent *= found.pop()[0]
            found.append((extent, step, stride))
        return found

    def by_runs(self, shape: Sequence[int]) -> bool:
        """Whether elements that follow one another in the result do so in the source, and the other way round."""
        loops = self.loops(shape)
        return self.source is None or not loops or (loops[-1][1] == 1) == (loops[-1][2] == 1)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The step of each axis of a tensor that lies in memory as it is indexed."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def copies(
    pieces: Sequence[Piece], sources: Sequence[Sequence[int]], shape: Sequence[int], vector_floats: int, threads: int
) -> tirx.PrimFunc:
    """Emit the kernel: sources of these shapes, then the float32 result of ``shape``."""
    with kernel("copy_pieces") as built:
        arguments = [argument(f"x{index}", extents) for index, extents in enumerate(sources)] + [argument("y", shape)]
        *given, result = map(flat, arguments)

        def run(piece: Piece, target: Expr, source: Expr, length: int) -> None:
            def vector(at: Expr, lanes: int) -> None:
                filled = piece.source is None
                value = number(piece.fill, lanes) if filled else read(given[piece.source or 0], source + at, lanes)
                write(result, value, target + at, lanes)

            if length >= vector_floats:
                with serial(length // vector_floats) as step:
                    vector(big(step) * vector_floats, vector_floats)
            done, lanes = length // vector_floats * vector_floats, vector_floats
            while done < length:
                lanes //= 2
                if length - done >= lanes:
                    vector(big(done), lanes)
                    done += lanes

        def loop(piece: Piece, loops: list[tuple[int, int, int]], target: Expr, source: Expr, shared: bool) -> None:
            if not loops or (len(loops) == 1 and loops[0][1] == 1):
                run(piece, target, source, loops[0][0] if loops else 1)
                return
            (extent, step, stride), *inner = loops
            with (parallel if shared else serial)(extent) as index:
                loop(piece, inner, let(target + big(index) * step), let(source + big(index) * stride), False)

        for piece in pieces:
            begin = sum(at * step for at, step in zip(piece.begin, row_major(shape), strict=True))
            shared = threads > 1 and math.prod(piece.extents) >= PARALLEL_ELEMENTS
            loop(piece, piece.loops(shape), big(begin), big(piece.first), shared)
    return built.func
