"""Products of a constant matrix with vectors in registers, what its rows and columns share computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tvm import tirx

from ..emit import INT, Expr, lanes, let, number, serial, store
from ..geometry import Triple


def linear(matrix: np.ndarray, values: Sequence[Expr], count: int) -> list[Expr]:
    """``matrix @ values`` with what pairs of points ±a share computed once.

    Columns that agree in some rows and differ in sign in the others are added and subtracted first; rows that do so
    over the columns become a sum and a difference.
    """
    matrix, values = _fold_columns(matrix, list(values))
    results: list[Expr | None] = [None] * len(matrix)
    for row, coefficients in enumerate(matrix):
        if results[row] is not None:
            continue
        twin = _twin(matrix, row, [r for r in range(row + 1, len(matrix)) if results[r] is None])
        if twin is None:
            results[row] = let(_sum(coefficients, values, count))
            continue
        same = np.isclose(matrix[twin], coefficients)
        even = let(_sum(np.where(same, coefficients, 0), values, count))
        odd = let(_sum(np.where(same, 0, coefficients), values, count))
        results[row], results[twin] = let(even + odd), let(even - odd)
    return results


def _fold_columns(matrix: np.ndarray, values: list[Expr]) -> tuple[np.ndarray, list[Expr]]:
    columns, folded, left = [], [], list(range(matrix.shape[1]))
    while left:
        column = left.pop(0)
        twin = _twin(matrix.T, column, left)
        if twin is None:
            columns.append(matrix[:, column])
            folded.append(values[column])
            continue
        left.remove(twin)
        same = np.isclose(matrix[:, twin], matrix[:, column])
        columns += [np.where(same, matrix[:, column], 0), np.where(same, 0, matrix[:, column])]
        folded += [let(values[column] + values[twin]), let(values[column] - values[twin])]
    return np.stack(columns, axis=1), folded


def _twin(matrix: np.ndarray, row: int, others: list[int]) -> int | None:
    """A row equal to ``row`` up to some signs, each of the two parts shared being worth a sum of its own."""
    for other in others:
        same = np.isclose(matrix[other], matrix[row])
        opposite = np.isclose(matrix[other], -matrix[row])
        nonzero = ~np.isclose(matrix[row], 0)
        if (same | opposite).all() and (same & nonzero).any() and (opposite & nonzero).any():
            return other
    return None


def _sum(coefficients: np.ndarray, values: Sequence[Expr], count: int) -> Expr:
    total: Expr | None = None
    for coefficient, value in zip(coefficients, values, strict=True):
        if np.isclose(coefficient, 0):
            continue
        if total is None:
            total = value if coefficient == 1 else value * number(float(coefficient), count)
        elif coefficient == 1:
            total = total + value
        elif coefficient == -1:
            total = total - value
        else:
            total = total + value * number(float(coefficient), count)
    return number(0.0, count) if total is None else total


def along_axes(
    matrices: Mapping[int, np.ndarray],
    alpha: Triple,
    read: Callable[[list[Expr]], Expr],
    write: Callable[[Expr, Expr], None],
    waiting: tirx.Buffer,
    count: int,
) -> None:
    """Multiply a tile of vectors by ``matrices`` along each of their axes in turn, lines between the first and the last
    axis in ``waiting``.

    The first axis reads by ``read(place)``; the last one writes by ``write(place in the tile, value)``, a place being
    counted over ``alpha`` whatever has been reduced.
    """
    stride = (alpha[1] * alpha[2], alpha[2], 1)
    for position, (axis, matrix) in enumerate(matrices.items()):
        others = [other for other in range(3) if other != axis]
        before = list(matrices)[:position]
        # Of an axis before it is transformed, and after that.
        extents = [matrices[other].shape[0 if other in before else 1] if other in matrices else 1 for other in others]
        with serial(extents[0]) as i, serial(extents[1]) as j:
            place: list[Expr] = [0, 0, 0]
            for other, extent, index in zip(others, extents, (i, j), strict=True):
                place[other] = 0 if extent == 1 else index
            base = let(sum((place[other] * stride[other] for other in others), start=tirx.IntImm(INT, 0)))
            line = []
            for offset in range(matrix.shape[1]):
                place[axis] = offset
                if position == 0:
                    line.append(let(read(list(place))))
                else:
                    line.append(let(waiting[lanes((base + offset * stride[axis]) * count, count)]))
            for offset, value in enumerate(linear(matrix, line, count)):
                at = base + offset * stride[axis]
                if position == len(matrices) - 1:
                    write(at, value)
                else:
                    store(waiting, value, lanes(at * count, count))
