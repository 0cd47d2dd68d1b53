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
from dance_tvm.ir.transposed import crop_negative, spread_by_zeros, takes_kernel


def spread(argument: Any, rank: int) -> list[int]:
    """One number for every axis, or each its own."""
    values = [argument] if isinstance(argument, int) else list(argument)
    return values * rank if len(values) == 1 else values


LAYOUTS = {1: ("NCW", "OIW"), 2: ("NCHW", "OIHW"), 3: ("NCDHW", "OIDHW")}


_CONVOLUTIONS: dict[int, Operator] = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}


def _convolution(node: fx.Node, importer: Importer) -> relax.Expr:
    """Any convolution; a transposed one without kernel as an ordinary one over its input spread out by zeros, weights
    turned."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = importer.retrieve_args(node)
    rank = len(shape_of(x)) - 2
    stride, padding, dilation = (spread(item, rank) for item in (stride, padding, dilation))
    before, after = padding, padding
    if transposed and (found := _transposed(node, importer, (stride, padding, dilation))) is not None:
        return _with_bias(importer, found, bias)
    if transposed:
        kernel = shape_of(weight)[2:]
        weight = _turned_weight(node, importer, groups)
        x = spread_by_zeros(importer.block_builder, x, stride)
        reach = [dilation[axis] * (kernel[axis] - 1) - padding[axis] for axis in range(rank)]
        extra = spread(output_padding, rank)
        # The spread input ends in stride - 1 zeros that the transposed convolution does not have.
        before, after = reach, [reach[axis] + extra[axis] - stride[axis] + 1 for axis in range(rank)]
        x, before, after = crop_negative(importer.block_builder, x, before, after)
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
    return _with_bias(importer, y, bias)


def _with_bias(importer: Importer, y: relax.Expr, bias: relax.Expr | None) -> relax.Expr:
    if bias is None:
        return y
    column = importer.block_builder.emit(relax.op.reshape(bias, (1, -1, *[1] * (len(shape_of(y)) - 2))))
    return importer.block_builder.emit(relax.op.add(y, column))


def _transposed(
    node: fx.Node, importer: Importer, geometry: tuple[list[int], list[int], list[int]]
) -> relax.Expr | None:
    """A transposed convolution that kernels know; None for others."""
    x, _, _, _, _, _, _, output_padding, groups = importer.retrieve_args(node)
    weight, (stride, padding, dilation) = importer.parameter(node.args[1]), geometry
    if weight is None or len(stride) == 1:
        return None
    operator = (relax.op.nn.conv2d_transpose, relax.op.nn.conv3d_transpose)[len(stride) - 2]
    call = operator(
        x,
        constant(np.ascontiguousarray(weight.numpy())),
        strides=stride,
        padding=[*padding, *padding],
        output_padding=spread(output_padding, len(stride)),
        dilation=dilation,
        groups=groups,
    )
    return importer.block_builder.emit(call) if takes_kernel(call) else None


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


CONVOLUTIONS: dict[str, Conversion] = {
    "convolution.default": _convolution,
}
