"""ATen's convolutions, as Relax operators."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from dance_tvm.frontend.torch_values import (
    Conversion,
    Importer,
    Operator,
    constant,
    shape_of,
)


def spread(argument: Any, rank: int) -> list[int]:
    """One number for every axis, or each its own."""
    values = [argument] if isinstance(argument, int) else list(argument)
    return values * rank if len(values) == 1 else values


LAYOUTS = {1: ("NCW", "OIW"), 2: ("NCHW", "OIHW"), 3: ("NCDHW", "OIDHW")}


_CONVOLUTIONS: dict[int, Operator] = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}


def _convolution(node: fx.Node, importer: Importer) -> relax.Expr:
    """Any convolution; a transposed one as an ordinary one over its input spread out by zeros, weights flipped."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = importer.retrieve_args(node)
    rank = len(shape_of(x)) - 2
    stride, padding, dilation = (spread(item, rank) for item in (stride, padding, dilation))
    before, after = padding, padding
    if transposed:
        kernel = shape_of(weight)[2:]
        weight = _turned_weight(node, importer, groups)
        x = _spread_by_zeros(importer, x, stride)
        reach = [dilation[axis] * (kernel[axis] - 1) - padding[axis] for axis in range(rank)]
        extra = spread(output_padding, rank)
        # The spread input ends in stride - 1 zeros that the transposed convolution does not have.
        before, after = reach, [reach[axis] + extra[axis] - stride[axis] + 1 for axis in range(rank)]
        x, before, after = _crop_negative(importer, x, before, after)
        stride = [1] * rank
    data_layout, kernel_layout = LAYOUTS[rank]
    y = importer.block_builder.emit(
        _CONVOLUTIONS[rank](
            x,
            weight,
            strides=stride,
            padding=[*before, *after],
            dilation=dilation,
            groups=groups,
            data_layout=data_layout,
            kernel_layout=kernel_layout,
        )
    )
    if bias is None:
        return y
    column = importer.block_builder.emit(relax.op.reshape(bias, (1, -1, *[1] * rank)))
    return importer.block_builder.emit(relax.op.add(y, column))


def _turned_weight(node: fx.Node, importer: Importer, groups: int) -> relax.Expr:
    """A transposed convolution's weight (in, out / groups, ...) as an ordinary one's (out, in / groups, ...)."""
    weight = importer.parameter(node.args[1])
    if weight is None:
        return _turned_at_run_time(importer, importer.env[node.args[1]], groups)
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    turned = grouped.reshape(groups * outputs, inputs // groups, *kernel).flip(tuple(range(2, weight.ndim)))
    return constant(np.ascontiguousarray(turned.numpy()))


def _turned_at_run_time(importer: Importer, weight: relax.Expr, groups: int) -> relax.Expr:
    emit = importer.block_builder.emit
    inputs, outputs, *kernel = shape_of(weight)
    rest = list(range(3, 3 + len(kernel)))
    grouped = emit(relax.op.reshape(weight, [groups, inputs // groups, outputs, *kernel]))
    turned = emit(relax.op.permute_dims(grouped, [0, 2, 1, *rest]))
    turned = emit(relax.op.reshape(turned, [groups * outputs, inputs // groups, *kernel]))
    for axis in range(2, 2 + len(kernel)):
        turned = emit(relax.op.flip(turned, axis))
    return turned


def _spread_by_zeros(importer: Importer, x: relax.Expr, stride: list[int]) -> relax.Expr:
    """``x`` with ``stride - 1`` zeros after each element of each spatial axis."""
    emit = importer.block_builder.emit
    for axis, step in enumerate(stride, start=2):
        if step == 1:
            continue
        shape = shape_of(x)
        x = emit(relax.op.expand_dims(x, axis + 1))
        width = [0] * (2 * len(shape) + 2)
        width[2 * axis + 3] = step - 1
        x = emit(relax.op.nn.pad(x, width))
        x = emit(relax.op.reshape(x, [*shape[:axis], shape[axis] * step, *shape[axis + 1 :]]))
    return x


def _crop_negative(
    importer: Importer, x: relax.Expr, before: list[int], after: list[int]
) -> tuple[relax.Expr, list[int], list[int]]:
    """Padding cannot be negative in Relax: cut instead."""
    shape = shape_of(x)[2:]
    axes = [axis for axis in range(len(before)) if before[axis] < 0 or after[axis] < 0]
    if axes:
        begin = [max(0, -before[axis]) for axis in axes]
        end = [shape[axis] - max(0, -after[axis]) for axis in axes]
        x = importer.block_builder.emit(relax.op.strided_slice(x, [axis + 2 for axis in axes], begin, end))
    return x, [max(0, pad) for pad in before], [max(0, pad) for pad in after]


CONVOLUTIONS: dict[str, Conversion] = {
    "convolution.default": _convolution,
}
