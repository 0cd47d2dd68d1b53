"""Input for checks: random, of the right shapes and types, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

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


def random_inputs(specs: Iterable[Spec], seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays by input name: normal floats, bytes 0 to 255, integers 0 to 9, truth values."""
    generator = np.random.default_rng(seed)
    return {spec.name: _random(generator, tuple(spec.shape), np.dtype(spec.dtype)) for spec in specs}


def _random(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return generator.standard_normal(shape, dtype=np.float32).astype(dtype)
    top = {"b": 2, "u": 256}.get(dtype.kind, 10)
    return generator.integers(0, top, shape).astype(dtype)
