"""What reductions have in common, on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .emit import FLOAT, short
from .kernel import Kernel, Operand, output


@dataclass(frozen=True)
class Reduction(Kernel):
    """Reduce the middle of ``(outer, reduced, inner)``, as which ``shape`` is seen; the result is ``out_shape``.

    ``squared``: of the elements' squares (a sum or mean). ``statistic`` variance and deviation divide by the number of
    elements.
    """

    kind = "reduction"
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    outer: int
    reduced: int
    inner: int
    statistic: Literal["sum", "mean", "variance", "std", "max", "min"]
    squared: bool = False
    #: How x is stored; the result is float32.
    dtype: str = FLOAT

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"reduce_{self.statistic}{'_squares' if self.squared else ''}_{short(self.dtype)}"

    @property
    def centred(self) -> bool:
        """Whether differences from the first element are summed."""
        return self.statistic in ("variance", "std")

    def operands(self) -> list[Operand]:
        """x, y."""
        return [Operand("x", self.shape, self.dtype), output("y", self.out_shape)]
