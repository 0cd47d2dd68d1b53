"""ATen operators that TVM's importer lacks or converts wrongly, each as a few Relax operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_axes import AXES
from dance_tvm.frontend.torch_convolutions import CONVOLUTIONS
from dance_tvm.frontend.torch_indexing import INDEXING
from dance_tvm.frontend.torch_order import ORDER
from dance_tvm.frontend.torch_pools import POOLS
from dance_tvm.frontend.torch_reductions import (
    REDUCTIONS,
)
from dance_tvm.frontend.torch_resampling import RESAMPLING
from dance_tvm.frontend.torch_scattering import SCATTERING
from dance_tvm.frontend.torch_special import SPECIAL
from dance_tvm.frontend.torch_values import (
    Conversion,
    Importer,
    Operator,
    arguments,
    cast,
    constant,
    dtype_of,
    name_of,
    shape_of,
)
from dance_tvm.ir import division


def _operands(node: fx.Node, importer: Importer) -> tuple[relax.Expr, relax.Expr, str]:
    """Both operands of ``node`` in the type that PyTorch computes in, and that type."""
    sources: list[Any] = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args[:2]]
    common = torch.result_type(*sources)
    if "div.Tensor" in str(node.target) and len(node.kwargs) == 0 and not common.is_floating_point:
        common = torch.get_default_dtype()
    dtype = name_of(common)
    a, b = importer.retrieve_args(node)[:2]
    return cast(importer, a, dtype), cast(importer, b, dtype), dtype


def _binary(operator: Operator, on_bool: Operator | None = None) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a, b, dtype = _operands(node, importer)
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            b = importer.block_builder.emit(relax.op.multiply(b, relax.const(alpha, dtype)))
        chosen = on_bool if dtype == "bool" and on_bool else operator
        return importer.block_builder.emit(chosen(a, b))

    return convert


def _floored(of_floats: Callable[..., relax.Expr], of_integers: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a, b, dtype = _operands(node, importer)
        emit = importer.block_builder.emit
        return of_floats(emit, a, b, dtype) if "float" in dtype else emit(of_integers(a, b))

    return convert


_floor_divide = _floored(division.floor_divide, relax.op.floor_divide)


def _divide_rounded(node: fx.Node, importer: Importer) -> relax.Expr:
    emit, mode = importer.block_builder.emit, node.kwargs.get("rounding_mode")
    if mode == "floor":
        return _floor_divide(node, importer)
    a, b, dtype = _operands(node, importer)
    if mode is None:
        return emit(relax.op.divide(cast(importer, a, "float32"), cast(importer, b, "float32")))
    quotient = emit(relax.op.divide(a, b))
    return quotient if "int" in dtype else emit(relax.op.trunc(quotient))


def _not(node: fx.Node, importer: Importer) -> relax.Expr:
    value = importer.env[node.args[0]]
    operator = relax.op.logical_not if dtype_of(value) == "bool" else relax.op.bitwise_not
    return importer.block_builder.emit(operator(value))


def _logical_not(node: fx.Node, importer: Importer) -> relax.Expr:
    return importer.block_builder.emit(relax.op.logical_not(cast(importer, importer.env[node.args[0]], "bool")))


def _logical(operator: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a, b = (cast(importer, value, "bool") for value in importer.retrieve_args(node))
        return importer.block_builder.emit(operator(a, b))

    return convert


def _where(node: fx.Node, importer: Importer) -> relax.Expr:
    condition, a, b = importer.retrieve_args(node)
    dtype = name_of(node.meta["val"].dtype)
    chosen = relax.op.where(cast(importer, condition, "bool"), cast(importer, a, dtype), cast(importer, b, dtype))
    return importer.block_builder.emit(chosen)


def _shift(operator: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        value, amount = importer.retrieve_args(node)
        return importer.block_builder.emit(operator(value, cast(importer, amount, dtype_of(value))))

    return convert


def _elu(node: fx.Node, importer: Importer) -> relax.Expr:
    """``scale * x`` above zero, ``scale * alpha * (exp(input_scale * x) - 1)`` below (SELU and CELU too)."""
    x, *factors = importer.retrieve_args(node)
    alpha, scale, input_scale = [*factors, 1.0, 1.0, 1.0][:3] if factors else (1.0, 1.0, 1.0)
    emit, dtype = importer.block_builder.emit, dtype_of(x)
    below = emit(relax.op.minimum(x, relax.const(0.0, dtype)))
    below = below if input_scale == 1 else emit(relax.op.multiply(below, relax.const(input_scale, dtype)))
    below = emit(relax.op.subtract(emit(relax.op.exp(below)), relax.const(1.0, dtype)))
    below = below if scale * alpha == 1 else emit(relax.op.multiply(below, relax.const(scale * alpha, dtype)))
    above = emit(relax.op.nn.relu(x))
    above = above if scale == 1 else emit(relax.op.multiply(above, relax.const(scale, dtype)))
    return emit(relax.op.add(above, below))


def _norm_without_statistics(node: fx.Node, importer: Importer) -> relax.Expr:
    """Batch norm by the batch's own mean and variance, as instance norm is exported."""
    given = arguments(node)
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    batch, channels, *extents = shape_of(x)
    weight, bias = _scale_and_shift(given, importer, channels)
    axes = [*([0] if batch > 1 else []), *range(2, 2 + len(extents))]
    y = emit(relax.op.nn.instance_norm(x, weight, bias, 1, axes, given["eps"]))
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise DanceError("the mean and deviation that it returns are not supported")
    return emit(relax.Tuple([y, weight, bias]))


def _group_norm(node: fx.Node, importer: Importer) -> relax.Expr:
    """Also without weight and bias, or with one of them."""
    given = arguments(node)
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    weight, bias = _scale_and_shift(given, importer, shape_of(x)[1])
    axes = list(range(2, len(shape_of(x))))
    y = emit(relax.op.nn.group_norm(x, weight, bias, given["group"], 1, axes, given["eps"]))
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise DanceError("the mean and deviation that it returns are not supported")
    return emit(relax.Tuple([y, weight, bias]))


def _scale_and_shift(given: dict[str, Any], importer: Importer, channels: int) -> tuple[relax.Expr, relax.Expr]:
    """A norm's weight and bias; ones and zeros where it has none."""
    weight, bias = (importer.env[given[name]] if given.get(name) is not None else None for name in ("weight", "bias"))
    ones, zeros = constant(np.ones(channels, "float32")), constant(np.zeros(channels, "float32"))
    return (ones if weight is None else weight), (zeros if bias is None else bias)


def _clamp(node: fx.Node, importer: Importer) -> relax.Expr:
    """Both bounds numbers: one clip. Else a maximum and a minimum, in the type that PyTorch gives the result."""
    given = arguments(node)
    dtype, emit = name_of(node.meta["val"].dtype), importer.block_builder.emit
    x = cast(importer, importer.env[node.args[0]], dtype)
    bounds = given.get("min"), given.get("max")
    numbers = [bound for bound in bounds if isinstance(bound, (int, float)) and not math.isnan(bound)]
    if "float" in dtype and len(numbers) == 2:
        return emit(relax.op.clip(x, float(min(numbers)), float(numbers[1])))
    for bound, operator in zip(bounds, (relax.op.maximum, relax.op.minimum), strict=True):
        if bound is not None:
            bound = importer.env[bound] if isinstance(bound, fx.Node) else bound
            x = emit(operator(x, cast(importer, bound, dtype)))
    return x


def _composed(compute: Callable[..., relax.Expr]) -> Conversion:
    """An elementwise operator as a formula over Relax's: ``compute(emit, number, *tensors)``."""

    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        dtype = name_of(node.meta["val"].dtype)
        operands = [cast(importer, value, dtype) for value in importer.retrieve_args(node)]

        def number(value: float) -> relax.Expr:
            return relax.const(value, dtype)

        return compute(importer.block_builder.emit, number, *operands)

    return convert


def _power(node: fx.Node, importer: Importer) -> relax.Expr:
    """A half is a root, as in PyTorch: NaN of minus infinity, which ``pow`` makes infinite."""
    exponent: Any = node.args[1]
    root = {0.5: relax.op.sqrt, -0.5: relax.op.rsqrt}.get(exponent)
    dtype = name_of(node.meta["val"].dtype)
    if root is None or "float" not in dtype:
        return importer._pow(node)
    return importer.block_builder.emit(root(cast(importer, importer.env[node.args[0]], dtype)))


def _erfc(emit: Any, number: Any, x: relax.Expr) -> relax.Expr:
    return emit(relax.op.subtract(number(1), emit(relax.op.erf(x))))


def _exp2(emit: Any, number: Any, x: relax.Expr) -> relax.Expr:
    return emit(relax.op.exp(emit(relax.op.multiply(x, number(math.log(2))))))


def _hypot(emit: Any, number: Any, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    squares = [emit(relax.op.multiply(value, value)) for value in (a, b)]
    root = emit(relax.op.sqrt(emit(relax.op.add(*squares))))
    endless = emit(relax.op.logical_or(*(emit(relax.op.isinf(value)) for value in (a, b))))
    return emit(relax.op.where(endless, number(math.inf), root))  # also beside NaN


def _copysign(emit: Any, number: Any, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    size = emit(relax.op.abs(a))
    # Of the two zeros only the reciprocal shows the sign.
    signed = emit(relax.op.where(emit(relax.op.equal(b, number(0))), emit(relax.op.divide(number(1), b)), b))
    return emit(relax.op.where(emit(relax.op.less(signed, number(0))), emit(relax.op.negative(size)), size))


def _signbit(node: fx.Node, importer: Importer) -> relax.Expr:
    """Below zero, or the zero whose reciprocal is."""
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    zero = relax.const(0, dtype_of(x))
    if "float" in dtype_of(x):
        x = emit(relax.op.where(emit(relax.op.equal(x, zero)), emit(relax.op.divide(relax.const(1.0), x)), x))
    return emit(relax.op.less(x, zero))


def _number_preferred(operator: Operator) -> Callable[..., relax.Expr]:
    """The larger or smaller of two, where one is NaN the other."""

    def compute(emit: Any, number: Any, a: relax.Expr, b: relax.Expr) -> relax.Expr:
        either = emit(operator(a, b))
        either = emit(relax.op.where(emit(relax.op.isnan(b)), a, either))
        return emit(relax.op.where(emit(relax.op.isnan(a)), b, either))

    return compute


def _batch_product_summed(node: fx.Node, importer: Importer) -> relax.Expr:
    """``beta * x + alpha * sum over the batch of a @ b``."""
    given, emit = arguments(node), importer.block_builder.emit
    x, a, b = (importer.env[node.args[i]] for i in range(3))
    total = emit(relax.op.sum(emit(relax.op.matmul(a, b)), [0]))
    for name, at in (("alpha", 1), ("beta", 0)):
        factor = given.get(name, 1)
        if factor != 1:
            scale = relax.const(factor, dtype_of(x))
            total, x = (emit(relax.op.multiply(total, scale)), x) if at else (total, emit(relax.op.multiply(x, scale)))
    return emit(relax.op.add(x, total)) if given.get("beta", 1) != 0 else total


def _trilinear(node: fx.Node, importer: Importer) -> relax.Expr:
    """The product of three tensors, each with axes of one put in, summed over some axes: a bilinear layer."""
    given, emit, result = arguments(node), importer.block_builder.emit, None
    for index in (1, 2, 3):
        value, axes = importer.env[given[f"i{index}"]], list(given[f"expand{index}"])
        value = emit(relax.op.expand_dims(value, axes)) if axes else value
        result = value if result is None else emit(relax.op.multiply(result, value))
    return emit(relax.op.sum(result, list(given["sumdim"])))


def _arithmetic() -> dict[str, Conversion]:
    operators: dict[str, Conversion] = {
        "add": _binary(relax.op.add, relax.op.logical_or),
        "sub": _binary(relax.op.subtract),
        "mul": _binary(relax.op.multiply, relax.op.logical_and),
        "div": _binary(relax.op.divide),
        "eq": _binary(relax.op.equal),
        "ne": _binary(relax.op.not_equal),
        "lt": _binary(relax.op.less),
        "le": _binary(relax.op.less_equal),
        "gt": _binary(relax.op.greater),
        "ge": _binary(relax.op.greater_equal),
        "remainder": _floored(division.remainder, relax.op.floor_mod),
        "fmod": _binary(relax.op.mod),
        "bitwise_and": _binary(relax.op.bitwise_and, relax.op.logical_and),
        "bitwise_or": _binary(relax.op.bitwise_or, relax.op.logical_or),
        "bitwise_xor": _binary(relax.op.bitwise_xor, relax.op.logical_xor),
        "__and__": _binary(relax.op.bitwise_and, relax.op.logical_and),
        "__or__": _binary(relax.op.bitwise_or, relax.op.logical_or),
        "__xor__": _binary(relax.op.bitwise_xor, relax.op.logical_xor),
        "__lshift__": _shift(relax.op.left_shift),
        "__rshift__": _shift(relax.op.right_shift),
        "bitwise_left_shift": _shift(relax.op.left_shift),
        "bitwise_right_shift": _shift(relax.op.right_shift),
    }
    return {
        f"{name}.{overload}": conversion
        for name, conversion in operators.items()
        for overload in ("Tensor", "Scalar", "Tensor_Scalar")
    }


CONVERSIONS: dict[str, Conversion] = {
    **_arithmetic(),
    "remainder.default": _floored(division.remainder, relax.op.floor_mod),  # of a number by a tensor, as prims have it
    "signbit.default": _signbit,
    "maximum.default": _binary(relax.op.maximum, relax.op.logical_or),
    "minimum.default": _binary(relax.op.minimum, relax.op.logical_and),
    "div.Tensor_mode": _divide_rounded,
    "div.Scalar_mode": _divide_rounded,
    "floor_divide.default": _floor_divide,
    "pow.Tensor_Scalar": _power,
    "pow.Tensor_Tensor": _binary(relax.op.power),
    "logical_and.default": _logical(relax.op.logical_and),
    "logical_or.default": _logical(relax.op.logical_or),
    "logical_xor.default": _logical(relax.op.logical_xor),
    "logical_not.default": _logical_not,
    "bitwise_not.default": _not,
    "where.self": _where,
    "elu.default": _elu,
    "_native_batch_norm_legit.no_stats": _norm_without_statistics,
    "native_group_norm.default": _group_norm,
    "clamp.default": _clamp,
    "clamp.Tensor": _clamp,
    "clamp_min.default": _clamp,
    "clamp_min.Tensor": _clamp,
    "clamp_max.default": _clamp,
    "clamp_max.Tensor": _clamp,
    "copy_strided.default": lambda node, importer: importer.env[node.args[0]],  # strides are no part of a value here
    "erfc.default": _composed(_erfc),
    "exp2.default": _composed(_exp2),
    "hypot.default": _composed(_hypot),
    "copysign.Tensor": _composed(_copysign),
    "copysign.Scalar": _composed(_copysign),
    "fmax.default": _composed(_number_preferred(relax.op.maximum)),
    "fmin.default": _composed(_number_preferred(relax.op.minimum)),
    "addbmm.default": _batch_product_summed,
    "_trilinear.default": _trilinear,
    **REDUCTIONS,
    **CONVOLUTIONS,
    **POOLS,
    **RESAMPLING,
    **AXES,
    **INDEXING,
    **SCATTERING,
    **ORDER,
    **SPECIAL,
}
