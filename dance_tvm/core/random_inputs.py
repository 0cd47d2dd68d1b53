"""Input for checks: random, of the right shapes and types, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np


class Spec(Protocol):
    """What an input is: an artifact's or an imported network's own description of it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> Sequence[int]:
        """Its extents."""

    @property
    def dtype(self) -> str:
        """NumPy's name of its type."""

    @property
    def largest(self) -> int | None:
        """The largest value that an integer input takes: an index has a range. None where nothing is known."""


def random_inputs(specs: Iterable[Spec], seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays by input name: normal floats, bytes 0 to 255, integers 0 to 9 or to their largest value, truth values."""
    generator = np.random.default_rng(seed)
    return {spec.name: _random(generator, spec) for spec in specs}


def _random(generator: np.random.Generator, spec: Spec) -> np.ndarray:
    shape, dtype = tuple(spec.shape), dtype_of(spec.dtype)
    if spec.dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        largest = {"u": 255, "i": 9}[dtype.kind] if spec.largest is None else spec.largest
        return generator.integers(0, largest, shape, endpoint=True).astype(dtype)
    return np.asarray(generator.standard_normal(shape, dtype=np.float32)).astype(dtype)


def dtype_of(name: str) -> np.dtype:
    """NumPy's type of this name; ``bfloat16`` is a type of the ml_dtypes package, which TVM brings along."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
