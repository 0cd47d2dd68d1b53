"""Operators of ONNX that work element by element, and running ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.frontend.onnx_conversions.operator import (
    Conversion,
    Operator,
    UnsupportedError,
    dtype_of,
    is_float,
    shape_of,
    shaped_like_axis,
)
from dance_tvm.ir import division


def _cast(op: Operator) -> Any:
    """Another type; other floats are computed in float32."""
    from onnx.helper import tensor_dtype_to_np_dtype

    dtype = str(tensor_dtype_to_np_dtype(op.flag("to")))
    return _as_type(op, "float32" if dtype in ("float16", "bfloat16", "float64") else dtype)


def _cast_like(op: Operator) -> Any:
    return _as_type(op, dtype_of(op.input(1)))


def _as_type(op: Operator, dtype: str) -> Any:
    x = op.input(0)
    if dtype == dtype_of(x):
        return x
    if (dtype not in ("float32", "bool") and not dtype.startswith(("int", "uint"))) or dtype.endswith(("int4", "int2")):
        raise UnsupportedError(f"makes {dtype} of its input, in which nothing is computed")
    if dtype == "bool":
        return relax.op.not_equal(x, op.like(0, x))
    return relax.op.astype(x, dtype)


def _clip(op: Operator) -> Any:
    x, bounds = op.input(0), (op.input(1), op.input(2))
    known = [op.value(1), op.value(2)]
    if known[0] is not None and known[1] is not None and is_float(x):
        low, high = float(known[0].item()), float(known[1].item())
        return relax.op.clip(x, min(low, high), high)  # crossed bounds: the upper one everywhere
    for bound, function in zip(bounds, (relax.op.maximum, relax.op.minimum), strict=True):
        x = x if bound is None else op.emit(function(x, bound))
    return x


def _celu(op: Operator) -> Any:
    x, emit = op.input(0), op.emit
    alpha, one = op.like(op.number("alpha", 1.0), x), op.like(1.0, x)
    below = emit(relax.op.divide(emit(relax.op.minimum(x, op.like(0.0, x))), alpha))
    below = emit(relax.op.multiply(alpha, emit(relax.op.subtract(emit(relax.op.exp(below)), one))))
    return relax.op.add(emit(relax.op.nn.relu(x)), below)


def _elu(op: Operator) -> Any:
    x, emit = op.input(0), op.emit
    below = emit(relax.op.subtract(emit(relax.op.exp(emit(relax.op.minimum(x, op.like(0.0, x))))), op.like(1.0, x)))
    return relax.op.add(emit(relax.op.nn.relu(x)), emit(relax.op.multiply(op.like(op.number("alpha", 1.0), x), below)))


def _is_inf(op: Operator) -> Any:
    x = op.input(0)
    infinite = op.emit(relax.op.isinf(x))
    if op.flag("detect_negative", 1) and op.flag("detect_positive", 1):
        return infinite
    if not op.flag("detect_negative", 1) and not op.flag("detect_positive", 1):
        return op.constant(np.zeros(shape_of(x), bool))
    side = relax.op.greater if op.flag("detect_positive", 1) else relax.op.less
    return relax.op.logical_and(infinite, op.emit(side(x, op.like(0.0, x))))


def _scan_along(function: Callable[..., Any]) -> Conversion:
    def convert(op: Operator) -> Any:
        x, axis = op.input(0), int(op.required(1, "an axis").item())
        axis %= len(shape_of(x))
        back = bool(op.flag("reverse"))
        x = op.emit(relax.op.flip(x, axis)) if back else x
        if op.flag("exclusive"):  # the first element's sum is of nothing
            first = 0.0 if function is relax.op.cumsum else 1.0
            x = op.emit(relax.op.strided_slice(x, [axis], [0], [shape_of(x)[axis] - 1]))
            width = [0] * (2 * len(shape_of(x)))
            width[2 * axis] = 1
            x = op.emit(relax.op.nn.pad(x, width, pad_value=first))
        found = op.emit(function(x, axis, dtype_of(x)))
        return relax.op.flip(found, axis) if back else found

    return convert


def _variadic(function: Callable[..., Any]) -> Conversion:
    def convert(op: Operator) -> Any:
        found = op.inputs[0]
        for x in op.inputs[1:]:
            found = op.emit(function(found, x))
        return found

    return convert


def _mean(op: Operator) -> Any:
    total = _variadic(relax.op.add)(op)
    return relax.op.divide(total, op.like(len(op.inputs), total))


def _lp_normalization(op: Operator) -> Any:
    x, axis, emit = op.input(0), op.flag("axis", -1), op.emit
    if op.flag("p", 2) == 1:
        norm = emit(relax.op.sum(emit(relax.op.abs(x)), [axis], True))
    else:
        norm = emit(relax.op.sqrt(emit(relax.op.sum(emit(relax.op.multiply(x, x)), [axis], True))))
    safe = emit(relax.op.where(emit(relax.op.equal(norm, op.like(0, x))), op.like(1, x), norm))
    return relax.op.divide(x, safe)


def _shrink(op: Operator) -> Any:
    x, emit = op.input(0), op.emit
    bias, limit = op.like(op.number("bias", 0.0), x), op.number("lambd", 0.5)
    above, below = emit(relax.op.greater(x, op.like(limit, x))), emit(relax.op.less(x, op.like(-limit, x)))
    inner = emit(relax.op.where(below, emit(relax.op.add(x, bias)), op.like(0, x)))
    return relax.op.where(above, emit(relax.op.subtract(x, bias)), inner)


def _thresholded_relu(op: Operator) -> Any:
    x = op.input(0)
    above = op.emit(relax.op.greater(x, op.like(op.number("alpha", 1.0), x)))
    return relax.op.where(above, x, op.like(0, x))


def _leaky_relu(op: Operator) -> Any:
    return relax.op.nn.leakyrelu(op.input(0), op.number("alpha", 0.01))


def _prelu(op: Operator) -> Any:
    x, slope = op.inputs
    if op.opset < 7:  # a slope for each channel, which later versions would have along the last axis
        slope = shaped_like_axis(op, slope, len(shape_of(x)), 1)
    below = op.emit(relax.op.less(x, op.like(0, x)))
    return relax.op.where(below, op.emit(relax.op.multiply(x, slope)), x)


def _dropout(op: Operator) -> Any:
    training = op.value(2)
    if op.input(2) is not None and (training is None or bool(training.item())):
        raise UnsupportedError("is in training mode", "export the network for inference")
    return [op.input(0), op.constant(np.ones(shape_of(op.input(0)), bool))]


def _mod(op: Operator) -> Any:
    """With the sign of the divisor, as Python has it; with that of the dividend where ``fmod``."""
    a, b = op.inputs
    if op.flag("fmod"):
        return relax.op.mod(a, b)
    if not is_float(a):
        return relax.op.floor_mod(a, b)
    return division.remainder(op.emit, a, b, dtype_of(a))


def _sign(op: Operator) -> Any:
    """That of NaN is NaN, unlike PyTorch's."""
    x = op.input(0)
    sign = relax.op.sign(x)
    return relax.op.where(op.emit(relax.op.isnan(x)), x, op.emit(sign)) if is_float(x) else sign


def _pow(op: Operator) -> Any:
    x, exponent = op.inputs
    if is_float(x) and not is_float(exponent):
        exponent = op.emit(relax.op.astype(exponent, dtype_of(x)))
    if not is_float(x):
        found = op.emit(relax.op.power(*(op.emit(relax.op.astype(v, "float64")) for v in (x, exponent))))
        return relax.op.astype(found, dtype_of(x))
    return relax.op.power(x, exponent)


CONVERSIONS: dict[str, Conversion] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "Celu": _celu,
    "Clip": _clip,
    "CumProd": _scan_along(relax.op.cumprod),
    "CumSum": _scan_along(relax.op.cumsum),
    "Dropout": _dropout,
    "Elu": _elu,
    "IsInf": _is_inf,
    "LeakyRelu": _leaky_relu,
    "LpNormalization": _lp_normalization,
    "Max": _variadic(relax.op.maximum),
    "Mean": _mean,
    "Min": _variadic(relax.op.minimum),
    "Mod": _mod,
    "PRelu": _prelu,
    "Pow": _pow,
    "Shrink": _shrink,
    "Sign": _sign,
    "Sum": _variadic(relax.op.add),
    "ThresholdedRelu": _thresholded_relu,
}
