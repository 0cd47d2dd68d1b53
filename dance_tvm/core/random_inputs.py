"""Input for checks: random, of the right shapes and types, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

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
    def range(self) -> Sequence[float] | None:
        """Its least and greatest value, where they are known: of an index, what it may pick from."""


#: ``normal``: floats of mean 0 and deviation 1. ``offset``: of mean 100 and deviation 1. ``ranged``: evenly from the
#: declared range, where there is one. ``varied``: blocks of frames, rows and columns that differ in size and offset,
#: zeros among them. ``picture``: a few bright blocks on zeros, 0 to 1.
#: Whole numbers lie in their range, else bytes in 0 to 255, others in 0 to 9.
Kind = Literal["normal", "offset", "ranged", "varied", "picture"]

#: NumPy's kinds of floats, bfloat16 among them.
_FLOATS = "fV"

#: A block of a varied input keeps its size and offset over at most this much of an axis.
_BLOCKS = 4


def random_inputs(
    specs: Iterable[Spec], seed: int = 0, kind: Kind = "normal", scale: float = 1.0
) -> dict[str, np.ndarray]:
    """Arrays by input name; ``scale`` is that of varied floats and pictures."""
    generator = np.random.default_rng(seed)
    return {spec.name: _DRAWN[kind](generator, spec, scale) for spec in specs}


def _normal(generator: np.random.Generator, spec: Spec, _scale: float) -> np.ndarray:
    dtype = dtype_of(spec.dtype)
    if dtype.kind in _FLOATS:
        return np.asarray(generator.standard_normal(tuple(spec.shape), dtype=np.float32)).astype(dtype)
    low, high = _whole_range(spec)
    return generator.integers(low, high + 1, tuple(spec.shape)).astype(dtype)


def _offset(generator: np.random.Generator, spec: Spec, scale: float) -> np.ndarray:
    dtype = dtype_of(spec.dtype)
    if dtype.kind not in _FLOATS:
        return _normal(generator, spec, scale)
    return np.asarray(100 + generator.standard_normal(tuple(spec.shape), dtype=np.float32)).astype(dtype)


def _ranged(generator: np.random.Generator, spec: Spec, scale: float) -> np.ndarray:
    if not has_float_range(spec):
        return _normal(generator, spec, scale)
    low, high = spec.range or (0.0, 1.0)
    return np.asarray(generator.uniform(low, high, tuple(spec.shape))).astype(dtype_of(spec.dtype))


def _varied(generator: np.random.Generator, spec: Spec, scale: float) -> np.ndarray:
    dtype, shape = dtype_of(spec.dtype), tuple(spec.shape)
    if dtype.kind not in _FLOATS + "u" or not shape:
        return _normal(generator, spec, scale)
    sizes = _in_blocks(generator, shape, [0.0, 0.1, 1.0, 3.0])
    values = sizes * (generator.standard_normal(shape, dtype=np.float32) + _in_blocks(generator, shape, [-2, 0, 0, 2]))
    if dtype.kind in _FLOATS:
        return (scale * values).astype(dtype)
    low, high = _whole_range(spec)
    return np.clip(np.rint((low + high) / 2 + (high - low) / 6 * values), low, high).astype(dtype)


def _picture(generator: np.random.Generator, spec: Spec, scale: float) -> np.ndarray:
    dtype, shape = dtype_of(spec.dtype), tuple(spec.shape)
    if dtype.kind not in _FLOATS + "u" or not shape:
        return _normal(generator, spec, scale)
    values = _in_blocks(generator, shape, [0.0, 0.0, 0.0, 1.0]) * generator.uniform(0.5, 1.0, shape)
    if dtype.kind in _FLOATS:
        return (scale * values).astype(dtype)
    low, high = _whole_range(spec)
    return np.rint(low + (high - low) * values).astype(dtype)


def has_float_range(spec: Spec) -> bool:
    """Whether the input is of floats with a declared range."""
    return spec.range is not None and dtype_of(spec.dtype).kind in _FLOATS


def crossed_inputs(
    generator: np.random.Generator, one: dict[str, np.ndarray], other: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Blocks of one and of the other; floats may be a mixture of both instead."""
    mixture = generator.uniform()
    crossed = {}
    for name, array in one.items():
        if array.dtype.kind in _FLOATS and mixture < 0.5:
            crossed[name] = ((0.5 + mixture) * array + (0.5 - mixture) * other[name]).astype(array.dtype)
        else:
            crossed[name] = np.where(_in_blocks(generator, array.shape, [False, True]), array, other[name])
    return crossed


def mixed_inputs(one: dict[str, np.ndarray], other: dict[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """``share`` of the way from one to the other; truth values are those of the nearer one."""
    mixed = {}
    for name, array in one.items():
        if array.dtype.kind == "b":
            mixed[name] = other[name] if share > 0.5 else array
        else:
            value = (1 - share) * array.astype(np.float64) + share * other[name].astype(np.float64)
            mixed[name] = (value if array.dtype.kind in _FLOATS else np.rint(value)).astype(array.dtype)
    return mixed


def _in_blocks(generator: np.random.Generator, shape: tuple[int, ...], values: Sequence[float]) -> np.ndarray:
    """One of ``values`` for every block of ``shape``."""
    blocks = generator.choice(values, tuple(min(extent, _BLOCKS) for extent in shape))
    for axis, extent in enumerate(shape):
        blocks = np.take(blocks, np.arange(extent) * min(extent, _BLOCKS) // extent, axis)
    return blocks


def _whole_range(spec: Spec) -> tuple[int, int]:
    """Least and greatest value of an input of whole numbers or truth values."""
    if spec.range is not None:
        return int(spec.range[0]), int(spec.range[1])
    return 0, {"b": 1, "u": 255}.get(dtype_of(spec.dtype).kind, 9)


_DRAWN = {"normal": _normal, "offset": _offset, "ranged": _ranged, "varied": _varied, "picture": _picture}


def dtype_of(name: str) -> np.dtype:
    """NumPy's type of this name; ``bfloat16`` is a type of the ml_dtypes package, which TVM brings along."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
