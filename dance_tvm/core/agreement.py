"""How far an output is from what it should be: the one measure of every check against a source."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

#: Largest difference allowed between what was built and its source, as a share of the output's largest value.
TOLERANCE = 1e-4
#: The same where activations and weights are stored in half precision.
HALF_TOLERANCE = 2e-2

#: Scale of an output whose values are all smaller, zeros among them; below it float32 has no full precision left.
LEAST_SCALE = 1e-30


def allowed_of(expected: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """The ``difference`` allowed from ``expected``: of whole numbers and truth values none, of floats kept with
    less than single precision one step more."""
    kind = np.asarray(expected).dtype
    if kind.kind in "biu":
        return 0.0
    return tolerance + (float(ml_dtypes.finfo(kind).eps) if kind.itemsize < 4 else 0.0)


def scale_of(expected: np.ndarray) -> float:
    """What differences of an output are shares of: its largest finite size, at least ``LEAST_SCALE``."""
    sizes = np.abs(np.asarray(expected, dtype=np.float64))
    return max(LEAST_SCALE, float(sizes.max(initial=0.0, where=np.isfinite(sizes))))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest finite size expected.

    Infinite where shapes differ, and where the two do not agree in which values are NaN, which are infinite, and with
    which sign. Of truth values and whole numbers it is the share of values that differ: none is nearly right.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return math.inf
    if expected.size == 0:
        return 0.0
    if expected.dtype.kind in "biu":
        return float(np.mean(found != expected))
    got, want = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(want)
    if not (np.isfinite(got) == finite).all():
        return math.inf
    if not finite.all() and not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return math.inf
    apart = np.abs(np.subtract(got, want, where=finite, out=np.zeros_like(want)))
    return float(apart.max(initial=0.0) / scale_of(want))
