"""What kernels have in common that compute the max pool behind a convolution too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..convolution import LayerKernel
from ..geometry import Triple, Window, side_by_side


@dataclass(frozen=True)
class EndsInPool(LayerKernel):
    """A max pool of ``pool`` frames, rows and columns, whose windows lie side by side, stands behind the convolution.

    Masks are those of the convolution's own outputs; ``zero_dead`` is of the pool's.
    """

    pool: Triple = (1, 1, 1)

    @property
    def pool_window(self) -> Window:
        """The pool's."""
        return side_by_side(self.window, self.pool)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """(N, T', H', W', C_out) of the pool."""
        return (self.window.batch, *self.pool_window.out, self.channels_out)

    def describe(self) -> dict[str, Any]:
        """Also how many outputs of the convolution each of the pool's is of."""
        return {**super().describe(), "pool": list(self.pool)}
