"""Convolutions of ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from dance_tvm.frontend.onnx_conversions.operator import (
    Conversion,
    Operator,
    UnsupportedError,
    dtype_of,
    shape_of,
    shaped_like_axis,
)


def padded_window(
    op: Operator, extents: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations, and padding (before every axis, then after every axis) as the attributes give them."""
    rank = len(extents)
    strides, dilations = op.ints("strides", [1] * rank), op.ints("dilations", [1] * rank)
    automatic = op.text("auto_pad", "NOTSET")
    if automatic in ("NOTSET", ""):
        return strides, dilations, op.ints("pads", [0] * (2 * rank))
    if automatic == "VALID":
        return strides, dilations, [0] * (2 * rank)
    spans = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, kernel, strict=True)]
    total = [
        max(0, (-(-extent // stride) - 1) * stride + span - extent)
        for extent, stride, span in zip(extents, strides, spans, strict=True)
    ]
    return strides, dilations, _shared_out(total, automatic)


def _shared_out(total: Sequence[int], automatic: str) -> list[int]:
    """Padding as SAME_UPPER and SAME_LOWER share it: the odd one goes after, or before."""
    less, more = [n // 2 for n in total], [n - n // 2 for n in total]
    return less + more if automatic == "SAME_UPPER" else more + less


def _rank(op: Operator, x: Any, weight: Any) -> int:
    """Over how many axes it goes. Raises UnsupportedError where there is no kernel, or attribute and weights differ."""
    rank, kernel = len(shape_of(x)) - 2, shape_of(weight)[2:]
    if rank not in (1, 2, 3):
        raise UnsupportedError(f"is not supported over {rank} axes")
    if op.ints("kernel_shape", kernel) != kernel:
        problem = f"has kernel_shape {op.ints('kernel_shape', kernel)} and weights of {kernel}"
        raise UnsupportedError(problem, "export the network again")
    return rank


def convolution(op: Operator) -> Any:
    """A convolution, its bias added behind it."""
    x, weight, bias = op.input(0), op.input(1), op.input(2)
    rank = _rank(op, x, weight)
    strides, dilations, pads = padded_window(op, shape_of(x)[2:], shape_of(weight)[2:])
    function = (relax.op.nn.conv1d, relax.op.nn.conv2d, relax.op.nn.conv3d)[rank - 1]
    out_dtype = "int32" if dtype_of(x).startswith("int") else None
    y = op.emit(function(x, weight, strides, pads, dilations, op.flag("group", 1), out_dtype=out_dtype))
    return y if bias is None else relax.op.add(y, shaped_like_axis(op, bias, rank + 2, 1))


def _conv_transpose(op: Operator) -> Any:
    x, weight, bias = op.input(0), op.input(1), op.input(2)
    extents, rank = shape_of(x)[2:], _rank(op, x, weight)
    strides, dilations = op.ints("strides", [1] * rank), op.ints("dilations", [1] * rank)
    extra = op.ints("output_padding", [0] * rank)
    weight = _dilated(op, weight, dilations)
    spans = shape_of(weight)[2:]
    full = [stride * (n - 1) + span for stride, n, span in zip(strides, extents, spans, strict=True)]
    begin, sizes = _kept(op, full, extra, extents, strides)
    fewer = [min(size, whole - first) for size, whole, first in zip(sizes, full, begin, strict=True)]
    after = [whole - first - size for whole, first, size in zip(full, begin, fewer, strict=True)]
    function = (relax.op.nn.conv1d_transpose, relax.op.nn.conv2d_transpose, relax.op.nn.conv3d_transpose)[rank - 1]
    simple = fewer == sizes and all(n >= 0 for n in [*begin, *after])
    y = op.emit(function(x, weight, strides, begin + after if simple else 0, groups=op.flag("group", 1)))
    if not simple:  # rows past the end of what the kernel reaches hold the bias alone
        cut = [max(0, n) for n in begin]
        axes = list(range(2, rank + 2))
        y = op.emit(relax.op.strided_slice(y, axes, cut, [c + n for c, n in zip(cut, fewer, strict=True)]))
        missing = [(0, size - n) for size, n in zip(sizes, fewer, strict=True)]
        y = op.emit(relax.op.nn.pad(y, [0, 0, 0, 0, *(n for pair in missing for n in pair)]))
    return y if bias is None else relax.op.add(y, shaped_like_axis(op, bias, rank + 2, 1))


def _kept(
    op: Operator, full: list[int], extra: list[int], extents: list[int], strides: list[int]
) -> tuple[list[int], list[int]]:
    """Of all that a transposed convolution reaches, where what it keeps begins, and its size."""
    rank, automatic = len(full), op.text("auto_pad", "NOTSET")
    pads = op.ints("pads", [0] * (2 * rank))
    wanted = op.ints("output_shape")[-rank:]
    if not wanted and automatic in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * stride for n, stride in zip(extents, strides, strict=True)]
    if wanted:
        total = [whole + more - size for whole, more, size in zip(full, extra, wanted, strict=True)]
        pads = _shared_out(total, automatic)  # the odd one before, unless SAME_UPPER
        return [max(0, n) for n in pads[:rank]], wanted
    sizes = [
        whole + more - before - after
        for whole, more, before, after in zip(full, extra, pads[:rank], pads[rank:], strict=True)
    ]
    return pads[:rank], sizes


def _dilated(op: Operator, weight: Any, dilations: Sequence[int]) -> Any:
    """A kernel with zeros between its taps."""
    for at, dilation in enumerate(dilations):
        axis, shape = at + 2, shape_of(weight)
        if dilation == 1 or shape[axis] == 1:
            continue
        spread = op.emit(relax.op.reshape(weight, [*shape[: axis + 1], 1, *shape[axis + 1 :]]))
        width = [0] * (2 * (len(shape) + 1))
        width[2 * (axis + 1) + 1] = dilation - 1
        spread = op.emit(relax.op.nn.pad(spread, width))
        shape[axis] *= dilation
        spread = op.emit(relax.op.reshape(spread, shape))
        weight = op.emit(relax.op.strided_slice(spread, [axis], [0], [shape[axis] - dilation + 1]))
    return weight


CONVERSIONS: dict[str, Conversion] = {
    "Conv": convolution,
    "ConvTranspose": _conv_transpose,
}
