"""Values in order along an axis, with their places; how is the machine's own.

PyTorch's order: NaN counts as the largest, so it comes last in ascending order and first in descending order; equal
values stay in the order in which they stood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx

from .emit import FLOAT, INT, Expr
from .kernel import Kernel, Operand, output

#: What values are compared as, where their own type has no arithmetic.
_COMPARED_AS = {"float16": FLOAT, "bfloat16": FLOAT, "bool": INT}


@dataclass(frozen=True)
class Sort(Kernel):
    """Sort each of ``outer`` x ``inner`` lines of ``shape``, ``extent`` values long, and keep the first ``kept``.

    ``values``: whether they are written; ``places``: the integer type in which their places are, or "".
    """

    kind = "sort"
    shape: tuple[int, ...]
    axis: int
    kept: int
    descending: bool
    dtype: str = FLOAT
    values: bool = True
    places: str = ""

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        what = "sort" if self.values else "argsort"
        order = "descending" if self.descending else "ascending"
        return f"{what}_{order}_{self.dtype}"

    @property
    def extent(self) -> int:
        """How many values a line has."""
        return self.shape[self.axis]

    @property
    def inner(self) -> int:
        """How far the values of a line lie apart."""
        return math.prod(self.shape[self.axis + 1 :])

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return math.prod(self.shape[: self.axis]) * self.inner

    @property
    def comparisons(self) -> int:
        """How many pairs of values are compared, where each is with all others of its line."""
        return self.lines * self.extent**2

    @property
    def compared(self) -> str:
        """The type in which values are compared."""
        return _COMPARED_AS.get(self.dtype, self.dtype)

    def operands(self) -> list[Operand]:
        """x, the sorted values and their places."""
        out = (*self.shape[: self.axis], self.kept, *self.shape[self.axis + 1 :])
        values = [output("values", out, self.dtype)] if self.values else []
        places = [output("places", out, self.places)] if self.places else []
        return [Operand("x", self.shape, self.dtype), *values, *places]

    def precedes(self, a: Expr, b: Expr) -> Expr:
        """Whether ``a`` stands before ``b`` wherever they stood."""
        before = a > b if self.descending else a < b
        if not self._has_nan:
            return before
        first, second = (a, b) if self.descending else (b, a)
        return tirx.any(before, tirx.all(tirx.isnan(first), tirx.Not(tirx.isnan(second))))

    def stays_before(self, a: Expr, b: Expr) -> Expr:
        """Whether ``a``, which stood before ``b``, still does; ``not precedes(b, a)`` would be taken for ``a <= b``."""
        before = a >= b if self.descending else a <= b
        if not self._has_nan:
            return before
        return tirx.any(before, tirx.isnan(a if self.descending else b))

    @property
    def _has_nan(self) -> bool:
        return self.compared.startswith("float")
