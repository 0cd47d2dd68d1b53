"""Special functions of ATen that Relax has no operator for, each as a formula; and what inference makes of noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_values import (
    Conversion,
    Importer,
    arguments,
    cast,
    constant,
    dtype_of,
    name_of,
    shape_of,
)

#: M. Giles, "Approximating the erfinv function": coefficients for the centre and for the tails, highest power first.
_ERFINV_CENTRE = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_ERFINV_TAILS = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)

#: Lanczos' approximation of the gamma function, g = 7, n = 9.
_LANCZOS_G = 7.0
_LANCZOS = (
    *(0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059),
    *(12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7),
)

#: The running sums of exponentials are computed from all pairs of an axis; beyond this many it takes too much.
_MOST_PAIRS = 1 << 24


def _polynomial(importer: Importer, x: relax.Expr, coefficients: Sequence[float]) -> relax.Expr:
    emit, dtype = importer.block_builder.emit, dtype_of(x)
    total: relax.Expr = relax.const(coefficients[0], dtype)
    for coefficient in coefficients[1:]:
        total = emit(relax.op.add(emit(relax.op.multiply(total, x)), relax.const(coefficient, dtype)))
    return total


def _erfinv(node: fx.Node, importer: Importer) -> relax.Expr:
    """A polynomial of ``-log(1 - x²)``, times x; infinite at one and minus one, NaN beyond."""
    emit, dtype = importer.block_builder.emit, name_of(node.meta["val"].dtype)
    x = cast(importer, importer.env[node.args[0]], dtype)

    def number(value: float) -> relax.Expr:
        return relax.const(value, dtype)

    one_less, one_more = emit(relax.op.subtract(number(1), x)), emit(relax.op.add(number(1), x))
    w = emit(relax.op.negative(emit(relax.op.log(emit(relax.op.multiply(one_less, one_more))))))
    centre = _polynomial(importer, emit(relax.op.subtract(w, number(2.5))), _ERFINV_CENTRE)
    tails = _polynomial(importer, emit(relax.op.subtract(emit(relax.op.sqrt(w)), number(3))), _ERFINV_TAILS)
    inside = emit(relax.op.multiply(emit(relax.op.where(emit(relax.op.less(w, number(5))), centre, tails)), x))
    at_the_end = emit(relax.op.equal(emit(relax.op.abs(x)), number(1)))
    return emit(relax.op.where(at_the_end, emit(relax.op.multiply(x, number(math.inf))), inside))


def _lgamma(node: fx.Node, importer: Importer) -> relax.Expr:
    """The logarithm of the gamma function's size by Lanczos; below a half by reflection."""
    emit, dtype = importer.block_builder.emit, name_of(node.meta["val"].dtype)
    x = cast(importer, importer.env[node.args[0]], dtype)

    def number(value: float) -> relax.Expr:
        return relax.const(value, dtype)

    small = emit(relax.op.less(x, number(0.5)))
    z = emit(relax.op.where(small, emit(relax.op.negative(x)), emit(relax.op.subtract(x, number(1)))))
    series = number(_LANCZOS[0])
    for step, factor in enumerate(_LANCZOS[1:], 1):
        term = emit(relax.op.divide(number(factor), emit(relax.op.add(z, number(step)))))
        series = emit(relax.op.add(series, term))
    t = emit(relax.op.add(z, number(_LANCZOS_G + 0.5)))
    power = emit(relax.op.multiply(emit(relax.op.add(z, number(0.5))), emit(relax.op.log(t))))
    direct = emit(relax.op.add(emit(relax.op.subtract(power, t)), emit(relax.op.log(series))))
    direct = emit(relax.op.add(direct, number(0.5 * math.log(2 * math.pi))))
    # Γ(x) Γ(1 - x) = π / sin(πx), whose sine is taken of what is left of x behind whole numbers.
    rest = emit(relax.op.subtract(x, emit(relax.op.floor(x))))
    sine = emit(relax.op.abs(emit(relax.op.sin(emit(relax.op.multiply(rest, number(math.pi)))))))
    reflected = emit(relax.op.subtract(number(math.log(math.pi)), emit(relax.op.log(sine))))
    found = emit(relax.op.where(small, emit(relax.op.subtract(reflected, direct)), direct))
    infinite = emit(relax.op.equal(emit(relax.op.abs(x)), number(math.inf)))
    pole = emit(relax.op.logical_and(small, emit(relax.op.equal(rest, number(0)))))
    return emit(relax.op.where(emit(relax.op.logical_or(infinite, pole)), number(math.inf), found))


def _logcumsumexp(node: fx.Node, importer: Importer) -> relax.Expr:
    """For each place the logarithm of the sum of all exponentials up to it, beside the largest of these."""
    emit, given, x = importer.block_builder.emit, arguments(node), importer.env[node.args[0]]
    shape, dtype = shape_of(x), dtype_of(x)
    if not shape:
        return x
    axis = int(given["dim"]) % len(shape)
    extent = shape[axis]
    if math.prod(shape) * extent > _MOST_PAIRS:
        raise DanceError(f"an axis of {extent} is too long for it here: export the network without it")
    upto = np.tri(extent, dtype=bool).reshape([extent, extent, *[1] * (len(shape) - axis - 1)])
    every = emit(relax.op.expand_dims(x, axis))
    seen = emit(relax.op.where(constant(upto), every, relax.const(-math.inf, dtype)))
    largest = emit(relax.op.max(seen, [axis + 1], True))
    # Where all are infinite, with one sign or the other, that is the result; a difference would be NaN.
    finite = emit(relax.op.where(emit(relax.op.isinf(largest)), relax.const(0.0, dtype), largest))
    total = emit(relax.op.sum(emit(relax.op.exp(emit(relax.op.subtract(seen, finite)))), [axis + 1], True))
    return emit(relax.op.squeeze(emit(relax.op.add(emit(relax.op.log(total)), finite)), [axis + 1]))


def _searchsorted(node: fx.Node, importer: Importer) -> relax.Expr:
    """Where each value would stand in a sorted line (``right``: behind equal ones), by halves as PyTorch searches.

    NaN stands behind all; a line that is not sorted gives what PyTorch gives.
    """
    emit, given = importer.block_builder.emit, arguments(node)
    line, value = importer.retrieve_args(node)[:2]
    if given.get("sorter") is not None:
        raise DanceError("is not supported with sorter: sort the sequence itself")
    value = cast(importer, value, dtype_of(line))
    shape, extent = shape_of(value), shape_of(line)[-1]
    beyond = relax.op.greater if given.get("right") or given.get("side") == "right" else relax.op.greater_equal
    low, high = constant(np.zeros(shape, "int64")), constant(np.full(shape, extent, "int64"))
    for _ in range(extent.bit_length()):
        middle = emit(relax.op.floor_divide(emit(relax.op.add(low, high)), relax.const(2, "int64")))
        at = emit(relax.op.minimum(middle, relax.const(max(0, extent - 1), "int64")))
        gathers = len(shape_of(line)) > 1
        found = emit(relax.op.gather_elements(line, at, len(shape) - 1) if gathers else relax.op.take(line, at, 0))
        before = emit(relax.op.logical_not(emit(beyond(found, value))))
        going = emit(relax.op.less(low, high))
        above = emit(relax.op.logical_and(going, before))
        below = emit(relax.op.logical_and(going, emit(relax.op.logical_not(before))))
        low = emit(relax.op.where(above, emit(relax.op.add(middle, relax.const(1, "int64"))), low))
        high = emit(relax.op.where(below, middle, high))
    return cast(importer, low, name_of(node.meta["val"].dtype))


def _leaky_relu_of_mean_slope(node: fx.Node, importer: Importer) -> relax.Expr:
    """A randomized ReLU in inference, whose slope is the middle of its range, and the noise, which is never read."""
    given, x = arguments(node), importer.env[node.args[0]]
    slope = (float(given.get("lower", 1 / 8)) + float(given.get("upper", 1 / 3))) / 2
    y = importer.block_builder.emit(relax.op.nn.leakyrelu(x, slope))
    return importer.block_builder.emit(relax.Tuple([y, y]))


SPECIAL: dict[str, Conversion] = {
    "erfinv.default": _erfinv,
    "erf_inv.default": _erfinv,
    "lgamma.default": _lgamma,
    "logcumsumexp.default": _logcumsumexp,
    "searchsorted.Tensor": _searchsorted,
    "searchsorted.Scalar": _searchsorted,
    "rrelu_with_noise_functional.default": _leaky_relu_of_mean_slope,
}
