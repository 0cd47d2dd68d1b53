"""Normalisations of ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.frontend.onnx_conversions.operator import (
    Conversion,
    Operator,
    UnsupportedError,
    shape_of,
    shaped_like_axis,
)


def _batch_norm(op: Operator) -> Any:
    x, scale, bias, mean, var = op.inputs[:5]
    epsilon, rank = op.number("epsilon", 1e-5), len(shape_of(x))
    if not op.flag("training_mode"):
        if rank > 1:
            return relax.op.nn.batch_norm(x, scale, bias, mean, var, 1, epsilon, training=False)
        raise UnsupportedError("is not supported on vectors")
    axes = [axis for axis in range(rank) if axis != 1]
    own_mean, own_var = op.emit(relax.op.mean(x, axes)), op.emit(relax.op.variance(x, axes))
    y = op.emit(relax.op.nn.batch_norm(x, scale, bias, own_mean, own_var, 1, epsilon, training=False))
    momentum = op.number("momentum", 0.9)
    y = op.emit(relax.TupleGetItem(y, 0))
    kept = [
        op.emit(
            relax.op.add(
                op.emit(relax.op.multiply(old, op.like(momentum, old))),
                op.emit(relax.op.multiply(new, op.like(1 - momentum, new))),
            )
        )
        for old, new in ((mean, own_mean), (var, own_var))
    ]
    return [y, *kept]


def _layer_norm(op: Operator) -> Any:
    x, scale, bias = op.input(0), op.input(1), op.input(2)
    rank = len(shape_of(x))
    axes = list(range(op.flag("axis", -1) % rank, rank))
    shape, epsilon, emit = [shape_of(x)[axis] for axis in axes], op.number("epsilon", 1e-5), op.emit
    if shape_of(scale) == shape and op.outputs == 1:
        zeros = op.constant(np.zeros(shape, np.float32)) if bias is None else bias
        return relax.op.nn.layer_norm(x, scale, zeros, axes, epsilon)
    mean = emit(relax.op.mean(x, axes, True))
    apart = emit(relax.op.subtract(x, mean))
    var = emit(relax.op.mean(emit(relax.op.multiply(apart, apart)), axes, True))
    inverse = emit(relax.op.divide(op.like(1, x), emit(relax.op.sqrt(emit(relax.op.add(var, op.like(epsilon, x)))))))
    y = emit(relax.op.multiply(emit(relax.op.multiply(apart, inverse)), scale))
    return [y if bias is None else emit(relax.op.add(y, bias)), mean, inverse][: op.outputs]


def _rms_norm(op: Operator) -> Any:
    x, scale, emit = op.input(0), op.input(1), op.emit
    rank = len(shape_of(x))
    axes = list(range(op.flag("axis", -1) % rank, rank))
    square = emit(relax.op.mean(emit(relax.op.multiply(x, x)), axes, True))
    norm = emit(relax.op.sqrt(emit(relax.op.add(square, op.like(op.number("epsilon", 1e-5), x)))))
    return relax.op.multiply(emit(relax.op.divide(x, norm)), scale)


def along(op: Operator, scale: Any, x: Any, axis: int) -> Any:
    """Scales or zero points spread over the axis, or the blocks of the axis, that they are of."""
    shape, block = shape_of(x), op.flag("block_size")
    if block and len(shape_of(scale)) == len(shape):
        repeated = op.emit(relax.op.repeat(scale, block, axis % len(shape)))
        return op.emit(relax.op.strided_slice(repeated, [axis % len(shape)], [0], [shape[axis]]))
    return shaped_like_axis(op, scale, len(shape), axis)


CONVERSIONS: dict[str, Conversion] = {
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
}
