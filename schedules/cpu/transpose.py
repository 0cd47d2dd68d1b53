"""Changes of layout: channels first to channels last and back, or any two runs of axes that change places.

Element by element one side would be read or written a float of each cache line at a time. Here tiles of one line by one
line are turned in registers, so that every line is touched once, and a few tiles side by side along the longer axis, so
that memory is read or written in runs of lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from ..emit import Expr, argument, big, flat, kernel, lanes, let, parallel, serial, store
from .transposed import transposed

#: Rows and columns of a tile, in floats: those of a cache line.
LINE = 16
#: Tiles side by side: on 192 × 6,272 floats four take 0.65 of the time of one, and eight no less.
SIDE_BY_SIDE = 4


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
    by_rows = rows >= columns
    length, width = (rows, columns) if by_rows else (columns, rows)
    count = min(vector_floats, LINE)

    with kernel(name) as built:
        source, target = argument("x", shape), argument("y", result)
        x, y = flat(source), flat(target)

        def tile(begin: Expr, row: Expr, column: Expr) -> None:
            with serial(LINE // count) as down, serial(LINE // count) as right:
                first, other = let(row + down * count), let(column + right * count)
                begin_x, begin_y = let(begin + big(first) * columns + other), let(begin + big(other) * rows + first)
                vectors = [let(x[lanes(begin_x + index * columns, count)]) for index in range(count)]
                for index, value in enumerate(transposed(vectors)):
                    store(y, value, lanes(begin_y + index * rows, count))

        def band(begin: Expr, first: Expr, tiles: int) -> None:
            with serial(-(-width // LINE)) as step:
                across = let(tirx.min(step * LINE, width - LINE))  # the last tile overlaps the one before
                for index in range(tiles):
                    along = let(tirx.min(first + index * LINE, length - LINE))
                    tile(begin, *((along, across) if by_rows else (across, along)))

        if min(rows, columns) < LINE:
            with parallel(plan.batch) as index, serial(columns) as column, serial(rows) as row:
                begin = let(big(index) * (rows * columns))
                store(y, x[begin + big(row) * columns + column], begin + big(column) * rows + row)
        else:
            tiles = -(-length // LINE)
            bands = -(-tiles // SIDE_BY_SIDE)
            each = -(-tiles // bands)
            with parallel(plan.batch * bands) as task:
                begin = let(big(tirx.floordiv(task, bands)) * (rows * columns))
                band(begin, let(tirx.floormod(task, bands) * (each * LINE)), each)
    return built.func
