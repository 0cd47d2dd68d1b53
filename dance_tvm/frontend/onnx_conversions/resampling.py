"""Operators of ONNX that read between elements."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.frontend.onnx_conversions.interpolation import interpolation_matrix, nearest_positions
from dance_tvm.frontend.onnx_conversions.operator import (
    Conversion,
    Operator,
    UnsupportedError,
    dtype_of,
    is_float,
    shape_of,
)


def _resize(op: Operator) -> Any:
    """Each axis by itself: picked by index where the mode is nearest, a product with a matrix where it is not."""
    x = op.input(0)
    shape = shape_of(x)
    axes = [axis % len(shape) for axis in op.ints("axes", range(len(shape)))]
    first = 1 if op.kind == "Upsample" or op.opset < 11 else 2
    given, wanted = op.known(first, "scales"), op.known(3, "sizes") if first == 2 else None
    mode = op.text("mode", "nearest")
    transform = op.text("coordinate_transformation_mode", "half_pixel" if first == 2 else "asymmetric")
    roi = op.known(1, "a region") if first == 2 and transform == "tf_crop_and_resize" else None
    if op.flag("antialias") and mode != "nearest":
        transform = f"{transform}+antialias"
    extents = [shape[axis] for axis in axes]
    scales, sizes = _scales_and_sizes(op, extents, given, wanted)
    if transform.startswith("align_corners") and given is not None and given.size:
        _require_one_meaning(op, extents, scales, sizes)
    if (known := _as_an_operator(op, x, axes, sizes, scales, mode, transform)) is not None:
        return known
    for at, axis in enumerate(axes):
        window = None if roi is None else (float(roi[at]), float(roi[at + len(axes)]))
        x = _resized(op, x, axis, sizes[at], scales[at], mode, transform, window)
    return x


def _require_one_meaning(op: Operator, extents: list[int], scales: list[float], sizes: list[int]) -> None:
    """Raise UnsupportedError where corners cannot be aligned both as the standard has it and as its runtime does.

    The standard divides by ``scale * extent - 1``; where that is not whole, the last element lies inside. PyTorch,
    which exports such scales, and ONNX Runtime put it on the end.
    """
    whole = all(abs(n * scale - size) < 1e-4 for n, scale, size in zip(extents, scales, sizes, strict=True))
    if not whole and op.importer.producer != "pytorch":
        raise UnsupportedError(
            "has align_corners and scales that give no whole sizes, which ONNX and ONNX Runtime read differently",
            "give it sizes in place of scales",
        )


def _scales_and_sizes(
    op: Operator, extents: list[int], scales: np.ndarray | None, sizes: np.ndarray | None
) -> tuple[list[float], list[int]]:
    if scales is not None and scales.size:
        return [float(scale) for scale in scales], [
            math.floor(extent * float(scale) + 1e-6) for extent, scale in zip(extents, scales, strict=True)
        ]
    if sizes is None:
        raise UnsupportedError("has neither scales nor sizes", "export the network again")
    ratios = [int(size) / extent for size, extent in zip(sizes, extents, strict=True)]
    policy = op.text("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return ratios, [int(size) for size in sizes]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [ratio] * len(extents), [math.floor(extent * ratio + 0.5) for extent in extents]


def _as_an_operator(
    op: Operator, x: Any, axes: list[int], sizes: list[int], scales: list[float], mode: str, transform: str
) -> Any:
    """Linear upsampling of pictures and clips as PyTorch has it, which has an operator of its own; else None."""
    shape, rank = shape_of(x), len(shape_of(x)) - 2
    target = list(shape)
    for axis, size in zip(axes, sizes, strict=True):
        target[axis] = size
    exact = all(abs(size - scale * shape[axis]) < 1e-6 for axis, size, scale in zip(axes, sizes, scales, strict=True))
    usual = transform == "align_corners" or (transform == "half_pixel" and exact)
    if rank not in (2, 3) or target[:2] != shape[:2] or mode != "linear" or not usual or min(target) == 0:
        return None
    if not is_float(x):
        return None
    if transform == "align_corners" and min(target[2:]) == 1:
        return None
    function = (relax.op.image.resize2d, relax.op.image.resize3d)[rank - 2]
    return function(x, tuple(target[2:]), method="linear", coordinate_transformation_mode=transform)


def _resized(
    op: Operator,
    x: Any,
    axis: int,
    size: int,
    scale: float,
    mode: str,
    transform: str,
    window: tuple[float, float] | None,
) -> Any:
    extent, rank = shape_of(x)[axis], len(shape_of(x))
    if size == extent and scale == 1.0 and window is None:
        return x
    if mode == "nearest":
        usual = "floor" if op.kind == "Upsample" or op.opset < 11 else "round_prefer_floor"
        positions, outside = nearest_positions(extent, size, scale, transform, op.text("nearest_mode", usual), window)
        picked = op.emit(relax.op.take(x, op.constant(positions), axis))
        if not outside.any():
            return picked
        mask = op.constant(outside.reshape([-1 if at == axis else 1 for at in range(rank)]))
        return op.emit(relax.op.where(mask, op.like(op.number("extrapolation_value", 0.0), x), picked))
    matrix, outside = interpolation_matrix(
        extent,
        size,
        scale,
        mode,
        transform,
        window,
        op.number("cubic_coeff_a", -0.75),
        bool(op.flag("exclude_outside")),
    )
    dtype = dtype_of(x)
    x = x if is_float(x) else op.emit(relax.op.astype(x, "float32"))
    last = [*(at for at in range(rank) if at != axis), axis]
    y = op.emit(relax.op.permute_dims(x, last)) if last != list(range(rank)) else x
    y = op.emit(relax.op.matmul(y, op.constant(matrix.T.astype(np.float32))))
    if outside.any():
        y = op.emit(relax.op.where(op.constant(outside), op.like(op.number("extrapolation_value", 0.0), y), y))
    back = np.argsort(last).tolist()
    y = op.emit(relax.op.permute_dims(y, back)) if last != list(range(rank)) else y
    return y if dtype_of(y) == dtype else op.emit(relax.op.astype(op.emit(relax.op.round(y)), dtype))


def _grid_sample(op: Operator) -> Any:
    x, grid = op.inputs
    rank = len(shape_of(x)) - 2
    method = {"linear": "bilinear", "cubic": "bicubic"}.get(name := op.text("mode", "linear"), name)
    if rank not in (2, 3) or (rank == 3 and method == "bicubic"):
        raise UnsupportedError(f"is not supported with mode={name!r} over {rank} axes")
    grid = op.emit(relax.op.permute_dims(grid, [0, rank + 1, *range(1, rank + 1)]))
    return relax.op.image.grid_sample(
        x,
        grid,
        method=method,
        layout="NCHW" if rank == 2 else "NCDHW",
        padding_mode=op.text("padding_mode", "zeros"),
        align_corners=bool(op.flag("align_corners")),
    )


def _roi_align(op: Operator) -> Any:
    x, boxes, batches = op.inputs
    mode = op.text("mode", "avg")
    if mode != "avg":
        raise UnsupportedError(f"is not supported with mode={mode!r}", "use the mean")
    batches = op.emit(relax.op.reshape(op.emit(relax.op.astype(batches, dtype_of(x))), [-1, 1]))
    return relax.op.vision.roi_align(
        x,
        op.emit(relax.op.concat([batches, boxes], 1)),
        (op.flag("output_height", 1), op.flag("output_width", 1)),
        op.number("spatial_scale", 1.0),
        op.flag("sampling_ratio"),
        aligned=op.opset >= 16 and op.text("coordinate_transformation_mode", "half_pixel") == "half_pixel",
    )


CONVERSIONS: dict[str, Conversion] = {
    "GridSample": _grid_sample,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "Upsample": _resize,
}
