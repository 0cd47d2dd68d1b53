"""Changes of layout: channels first to channels last and back, or any two runs of axes that change places.

Element by element one side would be read or written a float of each cache line at a time. Here tiles of one line by one
line are turned in registers, so that every line is touched once, and a few tiles side by side along the longer axis, so
that memory is read or written in runs of lines. The two to four channels of pictures are interleaved in registers. What
is stored may have another type than what is read: values are converted on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from ..emit import FLOAT, HALF, Expr, argument, big, cast, flat, kernel, lanes, let, parallel, serial, store
from .transposed import transposed

#: Rows and columns of a tile, in floats: those of a cache line.
LINE = 16
#: Tiles side by side: on 192 × 6,272 floats four take 0.65 of the time of one, and eight no less.
SIDE_BY_SIDE = 4
#: Rows or columns that are interleaved: processors have instructions for so many vectors, or shuffles that do it.
FEW = (2, 3, 4)
#: Vectors of each row that one part of the work interleaves, of those that threads share out.
VECTORS_OF_A_PART = 256


@dataclass(frozen=True)
class Transpose:
    """``y[b, c, r] = x[b, r, c]`` for ``batch`` × ``rows`` × ``columns``."""

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

    @property
    def worthwhile(self) -> bool:
        """Whether it goes by vectors: whole lines each way, or a few rows or columns."""
        few, many = sorted((self.rows, self.columns))
        return few >= LINE or (few in FEW and many >= LINE)


def transpose(
    plan: Transpose,
    shape: Sequence[int],
    result: Sequence[int],
    vector_floats: int,
    name: str = "transpose",
    dtypes: tuple[str, str] = (FLOAT, FLOAT),
    one_thread: bool = False,
) -> tirx.PrimFunc:
    """Emit the kernel: x of ``shape``, y of shape ``result``, of these ``dtypes``."""
    count = min(vector_floats * (2 if dtypes[1] == HALF else 1), LINE)
    with kernel(name, one_thread=one_thread) as built:
        source, target = argument("x", shape, dtypes[0]), argument("y", result, dtypes[1])
        x, y = flat(source), flat(target)
        if min(plan.rows, plan.columns) >= LINE:
            _by_tiles(plan, x, y, count)
        elif plan.worthwhile:
            _by_interleaving(plan, x, y, count)
        else:
            with parallel(plan.batch) as index, serial(plan.columns) as column, serial(plan.rows) as row:
                begin = let(big(index) * (plan.rows * plan.columns))
                value = x[begin + big(row) * plan.columns + column]
                store(y, _as(value, y, 1), begin + big(column) * plan.rows + row)
    return built.func


def _as(value: Expr, target: tirx.Buffer, count: int) -> Expr:
    """``count`` lanes as ``target`` stores them."""
    dtype = str(target.dtype)
    return value if value.ty.dtype.with_lanes(1) == dtype else cast(value, dtype, count)


def _by_tiles(plan: Transpose, x: tirx.Buffer, y: tirx.Buffer, count: int) -> None:
    """Tiles of vectors of ``count`` lanes that are turned in registers, side by side along the longer axis."""
    rows, columns = plan.rows, plan.columns
    by_rows = rows >= columns
    length, width = (rows, columns) if by_rows else (columns, rows)

    def tile(begin: Expr, row: Expr, column: Expr) -> None:
        with serial(LINE // count) as down, serial(LINE // count) as right:
            first, other = let(row + down * count), let(column + right * count)
            begin_x, begin_y = let(begin + big(first) * columns + other), let(begin + big(other) * rows + first)
            vectors = [let(_as(x[lanes(begin_x + index * columns, count)], y, count)) for index in range(count)]
            for index, value in enumerate(transposed(vectors)):
                store(y, value, lanes(begin_y + index * rows, count))

    def band(begin: Expr, first: Expr, tiles: int) -> None:
        with serial(-(-width // LINE)) as step:
            across = let(tirx.min(step * LINE, width - LINE))  # the last tile overlaps the one before
            for index in range(tiles):
                along = let(tirx.min(first + index * LINE, length - LINE))
                tile(begin, *((along, across) if by_rows else (across, along)))

    tiles = -(-length // LINE)
    bands = -(-tiles // SIDE_BY_SIDE)
    each = -(-tiles // bands)
    with parallel(plan.batch * bands) as task:
        begin = let(big(tirx.floordiv(task, bands)) * (rows * columns))
        band(begin, let(tirx.floormod(task, bands) * (each * LINE)), each)


def _by_interleaving(plan: Transpose, x: tirx.Buffer, y: tirx.Buffer, count: int) -> None:
    """``count`` columns of a few rows at a time into as many short rows, or the other way round."""
    few, many = sorted((plan.rows, plan.columns))
    vectors = -(-many // count)
    parts = -(-vectors // VECTORS_OF_A_PART)
    each = -(-vectors // parts)
    with parallel(plan.batch * parts) as task:
        begin = let(big(tirx.floordiv(task, parts)) * (few * many))
        first = let(tirx.floormod(task, parts) * each)
        with serial(each) as index:
            at = let(big(tirx.min((first + index) * count, many - count)))  # the last vectors overlap those before
            if plan.rows == few:
                found = [let(_as(x[lanes(begin + row * many + at, count)], y, count)) for row in range(few)]
                order = [row * count + lane for lane in range(count) for row in range(few)]
                store(y, tirx.Shuffle(found, order), lanes(begin + at * few, few * count))
            else:
                whole = let(_as(x[lanes(begin + at * few, few * count)], y, few * count))
                for row in range(few):
                    one = tirx.Shuffle([whole], [lane * few + row for lane in range(count)])
                    store(y, one, lanes(begin + row * many + at, count))
