"""Changes of layout: channels first to channels last and back, or any two runs of axes that change places.

Element by element one side would be read or written a float of each cache line at a time. Here a tile of one line by
one line is read along its rows into a small buffer and written along its columns, so that every line is touched once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from ..emit import Expr, argument, big, choose, flat, kernel, lanes, let, parallel, scratch, serial, store

#: Rows and columns of a tile, in floats: those of a cache line.
LINE = 16


@dataclass(frozen=True)
class Transpose:
    """``y[b, c, r] = x[b, r, c]`` for ``batch`` × ``rows`` × ``columns`` float32."""

    batch: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int], order: Sequence[int]) -> Transpose | None:
        """What moving the axes of ``shape`` into ``order`` comes to, as ``permute_dims`` does; None for others.

        Axes of extent one do not count, and axes that stay neighbours count as one.
        """
        axes = [axis for axis in order if shape[axis] > 1]
        runs: list[list[int]] = []
        for axis in axes:
            between = range(runs[-1][-1] + 1, axis) if runs else ()
            if runs and axis > runs[-1][-1] and all(shape[other] == 1 for other in between):
                runs[-1].append(axis)
            else:
                runs.append([axis])
        extents = [math.prod(shape[axis] for axis in run) for run in runs]
        ranks = [sorted(runs).index(run) for run in runs]
        if ranks == [1, 0]:
            return cls(1, extents[1], extents[0])
        if ranks == [0, 2, 1]:
            return cls(extents[0], extents[2], extents[1])
        return None


def transpose(
    plan: Transpose, shape: Sequence[int], result: Sequence[int], vector_floats: int, name: str = "transpose"
) -> tirx.PrimFunc:
    """Emit the kernel: x of ``shape``, y of shape ``result``."""
    rows, columns = plan.rows, plan.columns
    # Bands of the longer axis are shared out over the threads; ``at`` orders (along it, across it) as (row, column).
    by_rows = rows >= columns
    length, width = (rows, columns) if by_rows else (columns, rows)
    bands = -(-length // LINE)

    def at(along: Expr, across: Expr) -> tuple[Expr, Expr]:
        return (along, across) if by_rows else (across, along)

    with kernel(name) as built:
        source, target = argument("x", shape), argument("y", result)
        x, y = flat(source), flat(target)

        def tile(begin: Expr, row: Expr, column: Expr) -> None:
            waiting = scratch((LINE * LINE,))
            begin_x, begin_y = let(begin + big(row) * columns + column), let(begin + big(column) * rows + row)
            with serial(LINE) as r:
                for c in range(0, LINE, vector_floats):
                    value = x[lanes(begin_x + big(r) * columns + c, vector_floats)]
                    store(waiting, value, lanes(r * LINE + c, vector_floats))
            with serial(LINE) as c:
                for r in range(0, LINE, vector_floats):
                    values = [waiting[(r + index) * LINE + c] for index in range(vector_floats)]
                    vector = tirx.Shuffle(values, list(range(vector_floats))) if vector_floats > 1 else values[0]
                    store(y, vector, lanes(begin_y + big(c) * rows + r, vector_floats))

        def singly(begin: Expr, first: tuple[Expr, Expr], extents: tuple[Expr, Expr]) -> None:
            with serial(extents[1]) as c, serial(extents[0]) as r:
                row, column = first[0] + r, first[1] + c
                store(y, x[begin + big(row) * columns + column], begin + big(column) * rows + row)

        with parallel(plan.batch * bands) as task:
            begin = let(big(tirx.floordiv(task, bands)) * (rows * columns))
            first = let(tirx.floormod(task, bands) * LINE)

            def whole_band() -> None:
                with serial(width // LINE) as step:
                    tile(begin, *at(first, let(step * LINE)))
                if width % LINE:
                    singly(begin, at(first, width - width % LINE), at(LINE, width % LINE))

            def last_band() -> None:
                singly(begin, at(first, 0), at(length % LINE, width))

            if length % LINE:
                choose(first + LINE <= length, whole_band, last_band)
            else:
                whole_band()
    return built.func
