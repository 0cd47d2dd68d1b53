"""How far an output is from what it should be: the one measure of every check against a source."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

#: Largest difference allowed between what was built and its source, as a share of the output's largest value.
TOLERANCE = 1e-4
#: The same where activations and weights are stored in half precision, and where a processor computes in it.
HALF_TOLERANCE = 2e-2
HALF_ON_PROCESSOR = 1e-2

#: Scale of an output whose values are all smaller, zeros among them; below it float32 has no full precision left.
LEAST_SCALE = 1e-30

#: NumPy's kinds of truth values and whole numbers.
_EXACT = "biu"

#: A fill is at least this much, and this many times the largest other magnitude of its output.
LEAST_FILL = 1000.0


def allowed_of(expected: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """The ``difference`` allowed from ``expected``: of whole numbers and truth values none, of floats kept with
    less than single precision one step more."""
    kind = np.asarray(expected).dtype
    if kind.kind in _EXACT:
        return 0.0
    return tolerance + (float(ml_dtypes.finfo(kind).eps) if kind.itemsize < 4 else 0.0)


def scale_of(expected: np.ndarray) -> float:
    """What differences of an output are shares of: its largest finite size, at least ``LEAST_SCALE``."""
    sizes = np.abs(np.asarray(expected, dtype=np.float64))
    return max(LEAST_SCALE, float(sizes.max(initial=0.0, where=np.isfinite(sizes))))


def _scales(expected: np.ndarray) -> np.ndarray | float:
    """The scale of all values, or of each where a fill would hide the others.

    A whole number in several places and far above all other sizes stands for want of a value, as -1e9 does under an
    attention's mask, and says nothing of the others: they have their own largest size.
    """
    sizes, fill = np.abs(expected), scale_of(expected)
    if fill >= LEAST_FILL and fill.is_integer() and (sizes == fill).sum() > 1:
        rest = float(sizes.max(initial=0.0, where=sizes < fill))
        if 0 < LEAST_FILL * rest < fill:
            return np.where(sizes < fill, max(LEAST_SCALE, rest), fill)
    return fill


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest finite size expected.

    Infinite where shapes differ, where only one of the two is of whole numbers, and where the two do not agree in which
    values are NaN, which are infinite, and with which sign. Of truth values and whole numbers it is the share of values
    that differ: none is nearly right.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape or (found.dtype.kind in _EXACT) != (expected.dtype.kind in _EXACT):
        return math.inf
    if expected.size == 0:
        return 0.0
    if expected.dtype.kind in _EXACT:
        return float(np.mean(found != expected))
    got, want = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(want)
    if not (np.isfinite(got) == finite).all():
        return math.inf
    if not finite.all() and not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return math.inf
    apart = np.abs(np.subtract(got, want, where=finite, out=np.zeros_like(want)))
    return float((apart / _scales(want)).max(initial=0.0))
