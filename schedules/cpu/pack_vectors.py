"""A matrix packed as vectors of columns, for tiles of rows to be multiplied with (:mod:`~.row_products`)."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from ..emit import Expr, big, lanes, let, number, serial, store
from ..strided import Strided
from .transposed import transposed


@dataclass(frozen=True)
class Packing:
    """``terms`` × ``columns`` become (vectors, terms, lanes) times ``scale``; lanes beyond the last column are zero."""

    terms: int
    columns: int
    count: int
    scale: float = 1.0

    @property
    def vectors(self) -> int:
        """Vectors that hold the columns."""
        return -(-self.columns // self.count)

    @property
    def size(self) -> int:
        """Floats of the result."""
        return self.vectors * self.terms * self.count

    def emit(self, source: tirx.Buffer, at: Strided, start: Expr, target: tirx.Buffer) -> None:
        """Pack the matrix that begins at ``start``, its rows and columns at the distances of ``at``."""
        whole = self.columns // self.count
        with serial(whole) as vector:
            begin, first = let(vector * (self.terms * self.count)), let(start + big(vector * self.count) * at.columns)
            if at.columns == 1:
                self._copy(source, at, first, target, begin)
            elif at.rows == 1:
                self._turn(source, at, first, target, begin)
            else:
                self._singly(source, at, first, (target, begin), (0, self.count))
        if self.columns > whole * self.count:
            begin, first = whole * self.terms * self.count, let(start + whole * self.count * at.columns)
            with serial(self.terms * self.count) as index:
                store(target, number(0.0), begin + index)
            self._singly(source, at, first, (target, begin), (0, self.columns - whole * self.count))

    def _scaled(self, value: Expr, count: int = 1) -> Expr:
        return value if self.scale == 1.0 else value * number(self.scale, count)

    def _copy(self, source: tirx.Buffer, at: Strided, first: Expr, target: tirx.Buffer, begin: Expr) -> None:
        """One vector of columns that lie side by side."""
        with serial(self.terms) as term:
            value = source[lanes(first + big(term) * at.rows, self.count)]
            store(target, self._scaled(value, self.count), lanes(begin + term * self.count, self.count))

    def _turn(self, source: tirx.Buffer, at: Strided, first: Expr, target: tirx.Buffer, begin: Expr) -> None:
        """One vector of columns whose terms lie side by side: squares of them, then the terms that are left."""
        count, squares = self.count, self.terms // self.count
        with serial(squares) as square:
            columns = [source[lanes(first + (square * count + lane * at.columns), count)] for lane in range(count)]
            for term, value in enumerate(transposed([let(column) for column in columns])):
                store(target, self._scaled(value, count), lanes(begin + (square * count + term) * count, count))
        self._singly(source, at, first, (target, begin), (squares * count, count))

    def _singly(
        self, source: tirx.Buffer, at: Strided, first: Expr, into: tuple[tirx.Buffer, Expr], rest: tuple[int, int]
    ) -> None:
        """The terms from the first one given on, of so many columns, one by one."""
        (target, begin), (done, columns) = into, rest
        with serial(self.terms - done) as index, serial(columns) as lane:
            term = let(done + index)
            value = source[first + big(term) * at.rows + big(lane) * at.columns]
            store(target, self._scaled(value), begin + term * self.count + lane)
