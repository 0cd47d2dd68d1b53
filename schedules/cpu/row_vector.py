"""One row times packed weights, by the row's values that are not zero: what activations and masks left as zeros is not
multiplied, and its weights are not read.

A layer of one row reads each weight once, so that memory is what it waits for; a list of the row's values costs one
sweep over them.
"""

from __future__ import annotations

from tvm import tirx

from ..emit import INT, Expr, big, lanes, let, number, prefetch, scratch, serial, splat, store, when
from .row_products import Sums, Vectors

#: Bytes of weights from which on the list pays: those of smaller layers stay in a cache.
WORTH_LISTING = 1 << 20
#: Values whose weights are asked for ahead: as many cache lines of each vector's weights.
AHEAD = 16


class LiveTerms:
    """The places of the values that are not zero of the first ``terms`` of ``row``; NaN is not zero."""

    def __init__(self, row: tirx.Buffer, terms: int) -> None:
        self.row = row
        self.places, found = scratch((terms + AHEAD,), INT), scratch((1,), INT)
        store(found, tirx.IntImm(INT, 0), 0)
        with serial(terms) as term:
            value = let(row[term])
            with when(tirx.any(value != number(0.0), tirx.isnan(value))):
                store(self.places, term, found[0])
                store(found, found[0] + 1, 0)
        self.count = let(found[0])
        with serial(AHEAD) as behind:  # what is asked for past the end
            store(self.places, tirx.IntImm(INT, 0), self.count + behind)

    def multiply(self, vectors: Vectors, weights: Expr, acc: Sums) -> None:
        """``acc[0] += row[term] · vectors[term]`` over them, the vectors' terms from ``weights`` on."""
        (sums,), count = acc, vectors.count
        with serial(self.count) as index:
            place, ahead = let(big(self.places[index])), let(big(self.places[index + AHEAD]))
            value = let(splat(self.row[place], count))
            for v, total in enumerate(sums):
                start = weights + v * vectors.distance
                prefetch(vectors.buffer, start + ahead * count)
                weight = vectors.buffer[lanes(start + place * count, count)]
                store(total, total[lanes(0, count)] + value * weight, lanes(0, count))
