"""The standard's Resize along one axis: which elements each element of the result reads, and with what weights."""

from __future__ import annotations

import numpy as np

Window = tuple[float, float]


def nearest_positions(
    extent: int, size: int, scale: float, transform: str, rounding: str, window: Window | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For each of ``size`` elements the one of ``extent`` that it repeats, and whether it lies outside of them."""
    at = coordinates(extent, size, scale, transform, window)
    rounded = {
        "round_prefer_floor": np.ceil(at - 0.5),
        "round_prefer_ceil": np.floor(at + 0.5),
        "floor": np.floor(at),
        "ceil": np.ceil(at),
    }[rounding]
    return rounded.clip(0, extent - 1).astype(np.int64), _outside(at, extent, transform)


def interpolation_matrix(
    extent: int,
    size: int,
    scale: float,
    mode: str,
    transform: str,
    window: Window | None = None,
    cubic: float = -0.75,
    exclude_outside: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The weights, (size, extent), of each element read for each element made, and which ones lie outside."""
    transform, _, antialias = transform.partition("+")
    at = coordinates(extent, size, scale, transform, window)
    widened = max(1.0, 1.0 / scale) if antialias else 1.0
    reach = (1.0 if mode == "linear" else 2.0) * widened
    kernel = _linear if mode == "linear" else lambda distance: _cubic(distance, cubic)
    matrix = np.zeros((size, extent))
    for row, centre in enumerate(at):
        taps = np.arange(int(np.floor(centre - reach)), int(np.ceil(centre + reach)) + 1)
        weights = kernel(np.abs(taps - centre) / widened)
        if exclude_outside:
            weights = np.where((taps >= 0) & (taps < extent), weights, 0.0)
        total = weights.sum()
        np.add.at(matrix[row], taps.clip(0, extent - 1), weights / total if total else weights)
    return matrix, _outside(at, extent, transform)


def coordinates(extent: int, size: int, scale: float, transform: str, window: Window | None) -> np.ndarray:
    """Where each element of the result lies among the elements read, by the standard's names.

    In float32, as PyTorch and ONNX Runtime compute it: an element that lies between two is rounded as theirs.
    """
    if transform == "half_pixel_symmetric":  # ties are ONNX Runtime's in float64 alone
        return extent / 2 * (1 - size / (scale * extent)) + (np.arange(size) + 0.5) / scale - 0.5
    at, scale = np.arange(size, dtype=np.float32), np.float32(scale)
    if transform == "align_corners":
        return at * (extent - 1) / (size - 1) if size > 1 else np.zeros(size)
    if transform == "asymmetric":
        return at / scale
    if transform == "pytorch_half_pixel":
        return (at + 0.5) / scale - 0.5 if scale * extent > 1 else np.zeros(size)
    if transform == "tf_half_pixel_for_nn":
        return (at + 0.5) / scale
    if transform == "tf_crop_and_resize" and window is not None:
        start, end = window
        if size > 1:
            return start * (extent - 1) + at * (end - start) * (extent - 1) / (scale * extent - 1)
        return np.full(size, 0.5 * (start + end) * (extent - 1))
    return (at + 0.5) / scale - 0.5


def _outside(at: np.ndarray, extent: int, transform: str) -> np.ndarray:
    return (at < 0) | (at > extent - 1) if transform == "tf_crop_and_resize" else np.zeros(len(at), bool)


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - distance)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
