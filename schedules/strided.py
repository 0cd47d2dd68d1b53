"""Matrices that lie in a tensor at constant distances, wherever it is read without being copied first."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from .emit import Expr, big, let

#: Extent and distance in elements of one digit of an index.
Digit = tuple[int, int]


@dataclass(frozen=True)
class Strided:
    """One matrix after the other: element (row, column) of matrix ``index`` lies at ``base`` + what the digits of
    ``index`` (``outer``, the last one counting fastest) come to + ``row · rows + column · columns``."""

    outer: tuple[Digit, ...]
    rows: int
    columns: int
    base: int = 0

    def start(self, index: Expr) -> Expr:
        """Where matrix ``index`` begins."""
        place: Expr = tirx.IntImm("int64", self.base)
        for extent, distance in reversed(self.outer):
            if distance:
                place = place + big(tirx.floormod(index, extent)) * distance
            index = tirx.floordiv(index, extent)
        return let(place)
