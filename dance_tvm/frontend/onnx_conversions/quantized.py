"""Quantised operators of ONNX, computed in float32 with their rounding kept."""

from __future__ import annotations

from typing import Any

from tvm import relax

from dance_tvm.frontend.onnx_conversions.convolutions import convolution
from dance_tvm.frontend.onnx_conversions.norms import along
from dance_tvm.frontend.onnx_conversions.operator import (
    Conversion,
    Operator,
    UnsupportedError,
    dtype_of,
    is_float,
    shape_of,
    shaped_like_axis,
)


def _mat_mul_integer(op: Operator) -> Any:
    """Products of integers, summed in int32."""
    a, b = (_centred(op, op.input(at), op.input(at + 2), axis) for at, axis in ((0, -2), (1, -1)))
    return relax.op.matmul(a, b, "int32")


def _centred(op: Operator, x: Any, zero: Any, axis: int) -> Any:
    """Integers less their zero point, as int32."""
    x = op.emit(relax.op.astype(x, "int32"))
    if zero is None:
        return x
    zero = op.emit(relax.op.astype(zero, "int32"))
    return op.emit(relax.op.subtract(x, shaped_like_axis(op, zero, len(shape_of(x)), axis)))


def _range_of(dtype: str) -> tuple[int, int]:
    if not dtype.startswith(("int", "uint")):
        raise UnsupportedError(f"is not supported with {dtype}", "quantize to int8, uint8, int16 or uint16")
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _quantized(op: Operator, x: Any, scale: Any, zero: Any, dtype: str) -> Any:
    """``x`` in steps of ``scale``, rounded half to even, from ``zero`` on, within the range of ``dtype``."""
    low, high = _range_of(dtype)
    steps = op.emit(relax.op.round(op.emit(relax.op.divide(x, scale))))
    if zero is not None:
        steps = op.emit(relax.op.add(steps, op.emit(relax.op.astype(zero, "float32"))))
    return op.emit(relax.op.astype(op.emit(relax.op.clip(steps, float(low), float(high))), dtype))


def _quantize_linear(op: Operator) -> Any:
    from onnx.helper import tensor_dtype_to_np_dtype

    x, scale, zero = op.input(0), op.input(1), op.input(2)
    axis, kind = op.flag("axis", 1), op.flag("output_dtype")
    wanted = str(tensor_dtype_to_np_dtype(kind)) if kind else "uint8"
    dtype = wanted if zero is None else dtype_of(zero)
    x = x if is_float(x) else op.emit(relax.op.astype(x, "float32"))
    point = None if zero is None else along(op, zero, x, axis)
    return _quantized(op, x, along(op, scale, x, axis), point, dtype)


def _dequantized(op: Operator, x: Any, scale: Any, zero: Any, axis: int) -> Any:
    steps = op.emit(relax.op.astype(x, "float32"))
    if zero is not None:
        zero = op.emit(relax.op.astype(along(op, zero, x, axis), "float32"))
        steps = op.emit(relax.op.subtract(steps, zero))
    return op.emit(relax.op.multiply(steps, along(op, scale, x, axis)))


def _dequantize_linear(op: Operator) -> Any:
    return _dequantized(op, op.input(0), op.input(1), op.input(2), op.flag("axis", 1))


def _dynamic_quantize_linear(op: Operator) -> Any:
    x, emit = op.input(0), op.emit
    zero = op.like(0, x)
    least = emit(relax.op.minimum(emit(relax.op.min(x)), zero))
    most = emit(relax.op.maximum(emit(relax.op.max(x)), zero))
    scale = emit(relax.op.divide(emit(relax.op.subtract(most, least)), op.like(255, x)))
    point = emit(relax.op.divide(emit(relax.op.negative(least)), scale))
    point = emit(relax.op.clip(emit(relax.op.round(point)), 0.0, 255.0))
    return [_quantized(op, x, scale, point, "uint8"), scale, relax.op.astype(point, "uint8")]


def _qlinear_mat_mul(op: Operator) -> Any:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = op.inputs
    left, right = _dequantized(op, a, a_scale, a_zero, -2), _dequantized(op, b, b_scale, b_zero, -1)
    return _quantized(op, op.emit(relax.op.matmul(left, right)), y_scale, y_zero, dtype_of(y_zero))


def _qlinear_conv(op: Operator) -> Any:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = op.inputs[:8]
    bias = op.input(8)
    if bias is not None:
        step = op.emit(relax.op.multiply(x_scale, w_scale))
        bias = op.emit(relax.op.multiply(op.emit(relax.op.astype(bias, "float32")), step))
    inputs = [_dequantized(op, x, x_scale, x_zero, 1), _dequantized(op, w, w_scale, w_zero, 0), bias]
    y = op.emit(convolution(Operator(op.importer, "Conv", inputs, op.attributes, 1, op.opset)))
    return _quantized(op, y, y_scale, y_zero, dtype_of(y_zero))


def _conv_integer(op: Operator) -> Any:
    """Through float32, which holds each product of bytes and sums of a thousand of them exactly."""
    x, w = (
        op.emit(relax.op.astype(_centred(op, op.input(at), op.input(at + 2), axis), "float32"))
        for at, axis in ((0, 1), (1, 0))
    )
    y = op.emit(convolution(Operator(op.importer, "Conv", [x, w], op.attributes, 1, op.opset)))
    return relax.op.astype(op.emit(relax.op.round(y)), "int32")


CONVERSIONS: dict[str, Conversion] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize_linear,
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
    "MatMulInteger": _mat_mul_integer,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_mat_mul,
    "QuantizeLinear": _quantize_linear,
}
