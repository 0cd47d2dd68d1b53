"""exp, log, tanh and erf in vectors: what LLVM makes of them on a CPU, in the place of one libm call for each lane.

TVM asks a rule for each intrinsic when it lowers a function, after loops have become vectors. The rules here take
float32 alone and leave other types to TVM's own; every kernel and every other operator of a CPU goes through them, as
nothing but ``tirx.exp`` and the like stands in a kernel. They are polynomials and quotients without a branch, so that
AVX2, AVX-512 and NEON all run them by the vector.

==================  ==========================================================================
function            largest error, over all float32 values (tests/test_elementary.py)
==================  ==========================================================================
exp                 2 ulp; results below the normal numbers within the least of them
log                 2 ulp
tanh, erf           1e-6 of the value
sigmoid             3 ulp; zero from where ``exp(-x)`` overflows
log1p               3 ulp
==================  ==========================================================================

Of functions within functions the inner two are written out, and those around them stay TVM's own: LLVM's code
generator simplifies each named value with all that it names written out again, so that its time multiplies with every
function within another. A `Select` multiplies it most, which is why clamping is done by `Max` and `Min`.

NaN stays NaN, infinities give what the limits are, and zeros keep their sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx

Expr = Any
#: Names the value of an expression that is read more than once.
Bind = Callable[[Expr], Expr]

#: (e^r - 1 - r) / r² for |r| ≤ log(2) / 2.
EXP = (0.0013941146899014711, 0.00836319662630558, 0.04166637361049652, 0.16666576266288757, 0.5)
#: (log(1 + x) - x + x² / 2) / x³ for 1 / √2 ≤ 1 + x ≤ √2 (Cephes).
LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1),
    *(2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
#: tanh(x) / x as a quotient of polynomials of x², for |x| up to where the result is 1 (Eigen's).
TANH_ABOVE = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
    *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
)
TANH_BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
TANH_END = 7.90531110763549805
#: erf(x) / x likewise.
ERF_ABOVE = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
ERF_BELOW = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03),
    -1.42647390514189e-02,
)
ERF_END = 4.0
#: log(2) in two parts, the first of so few bits that its products with an exponent are exact.
LOG2_HIGH, LOG2_LOW = 0.693359375, -2.12194440e-4
#: A number that leaves the nearest integer in the low bits of its sum with a smaller one: 1.5 · 2²³, and its bits.
ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000
#: Beyond these e^x is infinite, and rounds to zero.
EXP_MOST, EXP_LEAST = 89.0, -104.0


def lanes_of(x: Expr) -> int:
    """In how many lanes ``x`` is."""
    return int(x.ty.dtype.lanes)


def _like(x: Expr, value: float) -> Expr:
    lanes = lanes_of(x)
    scalar = tirx.FloatImm("float32", value)
    return tirx.Broadcast(scalar, lanes) if lanes > 1 else scalar


def _whole(x: Expr, value: int) -> Expr:
    lanes = lanes_of(x)
    scalar = tirx.IntImm("int32", value)
    return tirx.Broadcast(scalar, lanes) if lanes > 1 else scalar


def _bits(x: Expr) -> Expr:
    lanes = lanes_of(x)
    return tirx.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", x)


def _from_bits(bits: Expr) -> Expr:
    lanes = lanes_of(bits)
    return tirx.reinterpret("float32" if lanes == 1 else f"float32x{lanes}", bits)


def _clamped(x: Expr, least: float, most: float, bind: Bind) -> Expr:
    """``x`` between two numbers; NaN stays, as comparisons with it are false and ``x`` is what is left then."""
    x = bind(tirx.Max(_like(x, least), x))
    return bind(tirx.Min(_like(x, most), x))


def _polynomial(x: Expr, factors: Sequence[float]) -> Expr:
    value = _like(x, factors[0])
    for factor in factors[1:]:
        value = value * x + _like(x, factor)
    return value


def _power_of_two(exponent: Expr) -> Expr:
    """2^exponent for exponents of normal numbers."""
    return _from_bits((exponent + _whole(exponent, 127)) << _whole(exponent, 23))


def exp(x: Expr, bind: Bind) -> Expr:
    """e^x = 2^n e^r with |r| ≤ log(2) / 2; 2^n in two factors, of which neither leaves the normal numbers."""
    x = _clamped(x, EXP_LEAST, EXP_MOST, bind)
    shifted = bind(x * _like(x, 1 / math.log(2)) + _like(x, ROUNDER))
    n = bind(_bits(shifted) - _whole(x, ROUNDER_BITS))
    whole = bind(shifted - _like(x, ROUNDER))
    r = bind(x - whole * _like(x, LOG2_HIGH) - whole * _like(x, LOG2_LOW))
    value = _polynomial(r, EXP) * (r * r) + r + _like(x, 1.0)
    half = bind(n >> _whole(n, 1))
    return value * _power_of_two(half) * _power_of_two(n - half)


def log(x: Expr, bind: Bind) -> Expr:
    """log(2^e m) = e log(2) + log(m) with 1 / √2 ≤ m < √2."""
    tiny = x < _like(x, 2.0**-126)
    scaled = bind(tirx.Select(tiny, x * _like(x, 2.0**24), x))
    # The bits of 1 / √2, taken away, leave the exponent of m in the upper bits whatever the lower ones are.
    moved = bind(_bits(scaled) - _whole(x, 0x3F3504F3))
    exponent = bind(moved >> _whole(x, 23))
    m = _from_bits(bind((moved & _whole(x, 0x007FFFFF)) + _whole(x, 0x3F3504F3)))
    lanes = lanes_of(x)
    whole = tirx.Cast("float32" if lanes == 1 else f"float32x{lanes}", exponent)
    e = bind(whole - tirx.Select(tiny, _like(x, 24.0), _like(x, 0.0)))
    y = bind(m - _like(x, 1.0))
    square = bind(y * y)
    rest = _polynomial(y, LOG) * (y * square) + e * _like(x, LOG2_LOW) - square * _like(x, 0.5)
    result = bind(y + rest + e * _like(x, LOG2_HIGH))
    result = tirx.Select(x < _like(x, 0.0), _like(x, math.nan), result)
    result = bind(tirx.Select(x == _like(x, 0.0), _like(x, -math.inf), result))
    finite = x < _like(x, math.inf)  # false for NaN too, which is then its own logarithm, as infinity is
    return tirx.Select(finite, result, x)


def log1p(x: Expr, bind: Bind) -> Expr:
    """log(1 + x), corrected for what the sum has lost (Kahan): log(u) x / (u - 1)."""
    u = bind(x + _like(x, 1.0))
    lost = bind(u - _like(x, 1.0))
    whole = bind(log(u, bind) * (x / lost))
    below = tirx.Select(x < _like(x, math.inf), whole, x)
    return tirx.Select(lost == _like(x, 0.0), x, below)


def tanh(x: Expr, bind: Bind) -> Expr:
    """A quotient of polynomials."""
    return _quotient(x, TANH_ABOVE, TANH_BELOW, TANH_END, bind)


def erf(x: Expr, bind: Bind) -> Expr:
    """A quotient of polynomials."""
    return _quotient(x, ERF_ABOVE, ERF_BELOW, ERF_END, bind)


def _quotient(x: Expr, above: Sequence[float], below: Sequence[float], end: float, bind: Bind) -> Expr:
    x = _clamped(x, -end, end, bind)
    square = bind(x * x)
    last = below[-1]  # 1 after the division, so that products with numbers below the normal ones keep their bits
    dividend, divisor = ([factor / last for factor in factors] for factors in (above, below))
    value = bind(x * _polynomial(square, dividend) / _polynomial(square, divisor))
    return _clamped(value, -1.0, 1.0, bind)


def sigmoid(x: Expr, bind: Bind) -> Expr:
    """1 / (1 + e^-x)."""
    return _like(x, 1.0) / (_like(x, 1.0) + exp(_like(x, 0.0) - x, bind))


FUNCTIONS: dict[str, Callable[[Expr, Bind], Expr]] = {
    "exp": exp,
    "log": log,
    "log1p": log1p,
    "tanh": tanh,
    "erf": erf,
    "sigmoid": sigmoid,
}


def _is_float32(x: Expr) -> bool:
    return str(x.ty.dtype).partition("x")[0] == "float32"


def _depth(x: Expr) -> int:
    """How many of these functions stand within one another in ``x``; a value named before counts as one."""
    inner = [_depth(arg) for arg in x.args] if isinstance(x, tvm.ir.Call) else []
    if inner:
        return max(inner) + (str(getattr(x.op, "name", "")).removeprefix("tirx.") in FUNCTIONS)
    if isinstance(x, tirx.Var):
        return int(isinstance(x.ty, tvm.ir.PrimType) and _is_float32(x))
    parts = (getattr(x, part, None) for part in ("a", "b", "value", "body", "condition", "true_value", "false_value"))
    return max((_depth(part) for part in parts if isinstance(part, tvm.ir.Expr)), default=0)


def _lowered(function: Callable[[Expr, Bind], Expr], own: Callable[[Expr], Expr] | None) -> Callable[[Expr], Expr]:
    """TVM's rule: float32 by ``function``, what it names bound around the result; else as TVM does."""

    def rule(call: Expr) -> Expr:
        (x,) = call.args
        if not _is_float32(x) or _depth(x) > 1:
            return call if own is None else own(call)
        named: list[tuple[tirx.Var, Expr]] = []

        def bind(value: Expr) -> Expr:
            var = tirx.Var("v", value.ty)
            named.append((var, value))
            return var

        result = function(bind(x), bind)
        for var, value in reversed(named):
            result = tirx.Let(var, value, result)
        return result

    return rule


def _register() -> None:
    for name, function in FUNCTIONS.items():
        op = tvm.ir.Op.get(f"tirx.{name}")
        own = op.get_attr("llvm.FLowerIntrinsic") or op.get_attr("default.FLowerIntrinsic")
        tirx.op.register_intrin_lowering(f"tirx.{name}", target="llvm", f=_lowered(function, own), level=99)
        if not op.get_attr("TVectorizable"):
            tvm.ir.register_op_attr(f"tirx.{name}", "TVectorizable", True)


_register()
