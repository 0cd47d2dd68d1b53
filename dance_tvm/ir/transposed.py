"""Transposed convolutions in a graph: which have kernels, and what they are as ordinary convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm import relax

from dance_tvm.ir.graph import constant, dtype_of, is_tensor, shape_of

TRANSPOSED = {"nn.conv1d_transpose", "nn.conv2d_transpose", "nn.conv3d_transpose"}


@dataclass(frozen=True)
class Ordinary:
    """The ordinary convolution of stride 1 over the spread input: zeros added before and behind it."""

    strides: list[int]
    before: list[int]
    behind: list[int]

    @staticmethod
    def of(call: relax.Call) -> Ordinary:
        """That of a call."""
        attrs = call.attrs
        kernel = shape_of(call.args[1])[2:]
        rank = len(kernel)
        strides, dilation, extra = (
            [int(value) for value in getattr(attrs, key)] for key in ("strides", "dilation", "output_padding")
        )
        cut = [int(value) for value in attrs.padding]
        cut = cut * 2 if len(cut) == rank else cut
        reach = [step * (extent - 1) for step, extent in zip(dilation, kernel, strict=True)]
        before = [far - own for far, own in zip(reach, cut[:rank], strict=True)]
        behind = [far - own + more for far, own, more in zip(reach, cut[rank:], extra, strict=True)]
        return Ordinary(strides, before, behind)


def takes_kernel(call: relax.Call) -> bool:
    """Whether a transposed convolution has a kernel of its own: one group, constant weights, nothing cut off."""
    return not why_no_kernel(call)


def why_no_kernel(call: relax.Call) -> str:
    """Why a transposed convolution has no kernel of its own; empty if it has."""
    attrs, weight = call.attrs, constant(call.args[1])
    if weight is None or weight.dtype != np.float32:
        return "its weights are not constant float32"
    if weight.ndim not in (4, 5) or int(attrs.groups) != 1:
        return "it has groups, or its input is neither a picture nor a clip"
    if not is_tensor(call.args[0]) or dtype_of(call.args[0]) != "float32" or 0 in shape_of(call.args[0]):
        return "its input is not float32, or empty"
    ordinary = Ordinary.of(call)
    if max(int(step) for step in attrs.dilation) > 1 or max(ordinary.strides) == 1:
        return "it is dilated, or has no stride"
    return "its padding cuts off more than its kernel reaches" if min(ordinary.before) < 0 else ""


def turned(weight: np.ndarray) -> np.ndarray:
    """Weights (C_in, C_out, …) of one group as those of the ordinary convolution, (C_out, C_in, …)."""
    return np.ascontiguousarray(np.flip(weight.swapaxes(0, 1), tuple(range(2, weight.ndim))))


def spread_by_zeros(builder: relax.BlockBuilder, x: relax.Expr, strides: Sequence[int]) -> relax.Expr:
    """``x`` (N, C, …) with ``stride - 1`` zeros after each element of each spatial axis."""
    emit = builder.emit
    for axis, step in enumerate(strides, start=2):
        if step == 1:
            continue
        shape = shape_of(x)
        x = emit(relax.op.expand_dims(x, axis + 1))
        width = [0] * (2 * len(shape) + 2)
        width[2 * axis + 3] = step - 1
        x = emit(relax.op.nn.pad(x, width))
        x = emit(relax.op.reshape(x, [*shape[:axis], shape[axis] * step, *shape[axis + 1 :]]))
    return x


def crop_negative(
    builder: relax.BlockBuilder, x: relax.Expr, before: list[int], behind: list[int]
) -> tuple[relax.Expr, list[int], list[int]]:
    """Padding cannot be negative in Relax: cut instead."""
    shape = shape_of(x)[2:]
    axes = [axis for axis in range(len(before)) if before[axis] < 0 or behind[axis] < 0]
    if axes:
        begin = [max(0, -before[axis]) for axis in axes]
        end = [shape[axis] - max(0, -behind[axis]) for axis in axes]
        x = builder.emit(relax.op.strided_slice(x, [axis + 2 for axis in axes], begin, end))
    return x, [max(0, pad) for pad in before], [max(0, pad) for pad in behind]


def over_zeros(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """A transposed convolution that ``takes_kernel``, channels first, as an ordinary one over the spread input."""
    ordinary, weight = Ordinary.of(call), constant(call.args[1])
    assert weight is not None
    x = spread_by_zeros(builder, call.args[0], ordinary.strides)
    # The spread input ends in stride - 1 zeros that the transposed convolution does not have.
    behind = [pad - step + 1 for pad, step in zip(ordinary.behind, ordinary.strides, strict=True)]
    x, before, behind = crop_negative(builder, x, ordinary.before, behind)
    convolution = (relax.op.nn.conv2d, relax.op.nn.conv3d)[weight.ndim - 4]
    return convolution(x, relax.const(turned(weight)), padding=[*before, *behind])
