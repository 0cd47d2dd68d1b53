"""A square of vectors whose rows and columns change places without leaving the registers."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from ..emit import Expr, let


def transposed(rows: Sequence[Expr]) -> list[Expr]:
    """Vector ``i`` of the result holds lane ``i`` of each of ``rows``, of which there are as many as lanes, a power of
    two: in each step blocks of half the size change places between pairs of vectors."""
    count, vectors = len(rows), list(rows)
    size = count // 2
    while size:
        low = [lane if not lane & size else lane - size + count for lane in range(count)]
        high = [lane + size if not lane & size else lane + count for lane in range(count)]
        for first in (index for index in range(count) if not index & size):
            pair = [vectors[first], vectors[first + size]]
            vectors[first] = let(tirx.Shuffle(pair, low))
            vectors[first + size] = let(tirx.Shuffle(pair, high))
        size //= 2
    return vectors
