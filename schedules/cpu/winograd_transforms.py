"""Winograd's minimal filtering F(m, k) in one dimension: its three matrices, and points that keep it accurate.

``Y = Aᵀ [(G g) ⊙ (Bᵀ d)]`` for a filter ``g`` of ``k`` taps and ``m + k - 1`` inputs ``d`` gives ``m`` outputs: the
transposed Toom-Cook product, a polynomial interpolated at ``m + k - 2`` points and at infinity. In more dimensions the
matrices are applied along each axis in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..geometry import Triple
from ..preparation import Preparation

#: Interpolation points of F(m, 3) beside infinity, by m, chosen for the size of the rounding error: the largest gain
#: of noise ``max_i sqrt(Σ_j A[i,j]² |B[j]|² |G[j]|²)`` was searched over zero, pairs ±a and at most one point alone.
#: Where a rounder number is as good as the optimum it is taken. The textbook's 0, ±1, ±2 lose several times as much.
POINTS: dict[int, tuple[float, ...]] = {
    1: (0.0, 1.0),
    2: (0.0, 1.0, -1.0),
    3: (0.0, 0.7, -0.7, 1.85),
    4: (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5)),
    5: (0.0, 0.6, -0.6, 1.05, -1.05, 2.35),
    6: (0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0),
}


@cache
def matrices(m: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Aᵀ (m, α), G (α, taps) and Bᵀ (α, α) in float64 with α = m + taps - 1; identities where taps is 1.

    Rows of Bᵀ and of G are balanced: the same power of two is taken from one and given to the other, so that
    transformed inputs and weights have about the size of their sources.
    """
    if taps == 1:
        return np.eye(m), np.ones((m, 1)), np.eye(m)
    if taps != 3:
        raise ValueError(f"minimal filtering is tabulated for 3 taps, not {taps}")
    points = np.array(POINTS[m], np.longdouble)
    count = len(points) + 1

    def evaluate(size: int) -> np.ndarray:
        return np.vstack([np.vander(points, size, increasing=True), np.eye(size)[-1:]])

    filters = evaluate(taps)
    inputs = np.zeros((count, count), np.longdouble)
    for row, point in enumerate(points):
        others = np.delete(points, row)
        inputs[row, : count - 1] = _product_of_roots(others)
        filters[row] /= np.prod(point - others)
    inputs[-1] = _product_of_roots(points)
    scale = 2.0 ** np.round(np.log2(np.linalg.norm(inputs.astype("float64"), axis=1)))
    return (
        evaluate(m).T.astype("float64"),
        (filters * scale[:, None]).astype("float64"),
        (inputs / scale[:, None]).astype("float64"),
    )


def _product_of_roots(roots: np.ndarray) -> np.ndarray:
    """Coefficients of ``Π (x - root)``, lowest power first."""
    product = np.array([1.0], np.longdouble)
    for root in roots:
        product = np.convolve(product, np.array([-root, 1.0], np.longdouble))
    return product


def of_filters(m: int, taps: int, turned: bool = False) -> np.ndarray:
    """G (α, taps); of filters that are ``turned``, whose last tap comes first."""
    return matrices(m, taps)[1][:, :: -1 if turned else 1]


def transform_weights(
    weight: np.ndarray, m: tuple[int, int, int], transformed: tuple[bool, bool, bool], turned: bool = False
) -> np.ndarray:
    """Apply G along the transformed axes of (…, KT, KH, KW), filters ``turned`` there: float64 in between, float32 out.

    Each sum is made in the order of the taps, so that whoever does the same gets the same bits.
    """
    result = weight.astype("float64")
    for axis in range(3):
        if transformed[axis]:
            taps = np.moveaxis(result, -3 + axis, 0)
            points = []
            for row in of_filters(m[axis], weight.shape[-3 + axis], turned):
                total = row[0] * taps[0]
                for factor, tap in zip(row[1:], taps[1:], strict=True):
                    total = total + factor * tap
                points.append(total)
            result = np.stack(points, axis=-3 + axis)
    return result.astype("float32")


@dataclass(frozen=True)
class WinogradPanels(Preparation):
    """(C_out, C_in, KT, KH, KW) to (ξ, panels, taps, C_in, lanes): transformed along the axes whose tile ``m`` is asked
    for, ``taps`` are those of the other axes; filters may be ``turned``. float64 in between."""

    channels_out: int
    channels_in: int
    kernel: Triple
    m: Triple
    transformed: tuple[bool, bool, bool]
    lanes: int
    turned: bool = False
    kind = "WINOGRAD_PANELS"

    @property
    def points(self) -> tuple[int, ...]:
        """Taps of the transform along each axis."""
        return tuple(m + k - 1 if t else k for m, k, t in zip(self.m, self.kernel, self.transformed, strict=True))

    @property
    def taps(self) -> int:
        """Taps that are left as they are."""
        return int(np.prod([k for k, t in zip(self.kernel, self.transformed, strict=True) if not t]))

    def apply(self, weight: np.ndarray) -> np.ndarray:
        xi = int(np.prod(self.points)) // self.taps
        panels = -(-self.channels_out // self.lanes)
        packed = np.zeros((xi, panels, self.taps, self.channels_in, self.lanes), "float32")
        for panel in range(panels):
            filters = weight[panel * self.lanes : (panel + 1) * self.lanes]
            filters = filters.reshape(len(filters), self.channels_in, *self.kernel)
            part = transform_weights(filters, self.m, self.transformed, self.turned)
            part = part.reshape(len(part), self.channels_in, self.taps, xi).transpose(3, 2, 1, 0)
            packed[:, panel, ..., : len(filters)] = part
        return packed

    @property
    def sizes(self) -> tuple[int, ...]:
        axes = (*self.kernel, *self.points, *map(int, self.transformed))
        return (self.channels_out, self.channels_in, self.lanes, self.taps, *axes)

    @property
    def transforms(self) -> tuple[float, ...]:
        axes = zip(self.m, self.kernel, self.transformed, strict=True)
        used = [of_filters(m, k, self.turned) for m, k, on in axes if on]
        return tuple(float(entry) for matrix in used for entry in matrix.ravel())
