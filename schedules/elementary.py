"""exp, log, tanh, erf and their like in vectors: what stands on a CPU in the place of one libm call for each lane.

Kernels and all other operators say ``tirx.exp`` and the like. ``written_out`` turns those of float32 into operators of
our own, which TVM keeps whole until loops have become vectors and then lowers to calls of functions in LLVM's own
language, one for each number of lanes, which come with the kernel and are inlined. They are polynomials and quotients
without a branch, so that AVX2, AVX-512 and NEON all run them by the vector.

LLVM's language (:mod:`~.vector_code`), because there a value that is read twice has a name. In TVM's it is ``Let``, and
TVM simplifies every named value with all that it names written out, which grows without bound for functions within
functions.

==================  ==========================================================================
function            largest error, over all float32 values (tests/test_elementary.py)
==================  ==========================================================================
exp                 2 ulp; results below the normal numbers within the least of them
log                 2 ulp
tanh, erf           1e-6 of the value
sigmoid             6e-7 of the value; zero below -88.37
log1p               3 ulp
sinh, cosh          5 ulp
sin, cos, tan, pow  0.51 ulp (:mod:`~.wide_functions`); 1 where libm is asked
asin, acos, atan(2) 0.51 ulp
==================  ==========================================================================

``short_sigmoid``, ``short_silu`` and ``short_tanh`` are for float32 values that are rounded to half precision next,
whose 11 bits need fewer terms: once rounded they are within 0.71 ulp of half precision, of which rounding takes 0.5.
Whoever stores the result asks for them (:func:`short`).

NaN stays NaN, infinities give what the limits are, and zeros keep their sign.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from . import operators, past_caches, wide_functions
from .vector_code import FLOAT, INT, Body, Value, clamped, neon_instruction, polynomial, select

#: (e^r - 1 - r) / r² for |r| ≤ log(2) / 2.
EXP = (0.0013941146899014711, 0.00836319662630558, 0.04166637361049652, 0.16666576266288757, 0.5)
#: e^r for |r| ≤ log(2) / 2 to 9.2e-8 of the value.
SIGMOID_EXP = (
    *(0.008290314633048143, 0.04189792933692833, 0.1666763619611944),
    *(0.49999149530286635, 0.9999997071890461, 1.0),
)
#: (h + SHORT_ROOT) (h² + SHORT_SQUARE) is 2^(h + 3 + SHORT_SHIFT) for |h - 1| ≤ 1 / 2 to 9.6e-5 of the value: a cubic
#: about this very point has a power of two before its cube, and no linear term in its square factor.
SHORT_ROOT, SHORT_SQUARE, SHORT_SHIFT = 1.31126573, 6.67683686, 0.14933283
#: (log(1 + x) - x + x² / 2) / x³ for 1 / √2 ≤ 1 + x ≤ √2 (Cephes).
LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1),
    *(2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
#: tanh(x) / x as a quotient of polynomials of x² (Eigen's), for |x| up to where the quotient is above 1 by more than
#: its rounding: cut off, it is 1 from there to infinity, so that 1 + tanh(-∞) is 0.
TANH_ABOVE = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
    *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
)
TANH_BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
TANH_END = 10.0
#: The same to 3.3e-5 of the value, up to where the result is 1 in half precision.
SHORT_TANH_ABOVE, SHORT_TANH_BELOW = (
    (0.0007095575837070204, 0.10362376669459053, 0.9999679317717943),
    (*(0.01319677941297293, 0.4367460750851799, 1.0),),
)
SHORT_TANH_END = 4.6
#: erf(x) / x likewise.
ERF_ABOVE = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
ERF_BELOW = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03),
    -1.42647390514189e-02,
)
ERF_END = 4.2
#: (sinh(x) - x) / x³ for |x| ≤ 1 as a polynomial of x² (Cephes).
SINH = (2.03721912945e-4, 8.33028376239e-3, 1.66667160211e-1)
#: log(2) in two parts, the first of so few bits that its products with an exponent are exact.
LOG2_HIGH, LOG2_LOW = 0.693359375, -2.12194440e-4
#: A number that leaves the nearest integer in the low bits of its sum with a smaller one: 1.5 · 2²³, and its bits.
ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000
#: Beyond these e^x is infinite, and rounds to zero.
EXP_MOST, EXP_LEAST = 89.0, -104.0
#: Beyond these 1 + e^-x is infinite, and 1.
SIGMOID_LEAST, SIGMOID_MOST = -89.0, 87.0
#: Beyond these 1 + 2^t is infinite, and 1.
SHORT_MOST, SHORT_LEAST = 131.0, -60.0
#: The bits of 1 / √2, of a number's mantissa, and how many those are.
HALF_ROOT_BITS, MANTISSA, MANTISSA_BITS = 0x3F3504F3, 0x007FFFFF, 23
#: Lanes that vectors have; others are left to TVM.
WIDTHS = (1, 2, 4, 8, 16, 32)


def _bounded(x: Value, least: float, most: float) -> Value:
    """The same in one instruction for either bound on NEON and AVX alike, for bounds other than zero."""
    return x.body.call("minimum", x.body.call("maximum", x, least), most)


def _power_of_two(exponent: Value) -> Value:
    """2^exponent for exponents of normal numbers."""
    return (exponent + 127).shifted(MANTISSA_BITS).seen_as(FLOAT)


def exp(x: Value) -> Value:
    """e^x = 2^n e^r with |r| ≤ log(2) / 2; 2^n in two factors, of which neither leaves the normal numbers."""
    x = clamped(x, EXP_LEAST, EXP_MOST)
    moved = x * (1 / math.log(2)) + ROUNDER
    n = moved.seen_as(INT) - ROUNDER_BITS
    whole = moved - ROUNDER
    r = x - whole * LOG2_HIGH - whole * LOG2_LOW
    value = polynomial(r, EXP) * (r * r) + r + 1.0
    half = n.shifted(-1)
    return value * _power_of_two(half) * _power_of_two(n - half)


def log(x: Value) -> Value:
    """log(2^e m) = e log(2) + log(m) with 1 / √2 ≤ m < √2."""
    tiny = x.compared("olt", 2.0**-126)
    bits = select(tiny, x * 2.0**24, x).seen_as(INT) - HALF_ROOT_BITS
    m = (bits.masked(MANTISSA) + HALF_ROOT_BITS).seen_as(FLOAT)
    e = bits.shifted(-MANTISSA_BITS).as_float() - select(tiny, 24.0, 0.0)
    y = m - 1.0
    square = y * y
    rest = polynomial(y, LOG) * (y * square) + e * LOG2_LOW - square * 0.5
    result = y + rest + e * LOG2_HIGH
    result = select(x.compared("olt", 0.0), math.nan, result)
    result = select(x.compared("oeq", 0.0), -math.inf, result)
    return select(x.compared("olt", math.inf), result, x)  # NaN and infinity are their own logarithms


def log1p(x: Value) -> Value:
    """log(1 + x), corrected for what the sum has lost (Kahan): log(u) x / (u - 1)."""
    u = x + 1.0
    lost = u - 1.0
    finite = select(x.compared("olt", math.inf), log(u) * (x / lost), x)
    return select(lost.compared("oeq", 0.0), x, finite)


def _quotient(x: Value, above: Sequence[float], below: Sequence[float], end: float) -> Value:
    x = clamped(x, -end, end)
    square = x * x
    last = below[-1]  # 1 after the division, so that products with numbers below the normal ones keep their bits
    dividend, divisor = ([factor / last for factor in factors] for factors in (above, below))
    return clamped(x * polynomial(square, dividend) / polynomial(square, divisor), -1.0, 1.0)


def tanh(x: Value) -> Value:
    """A quotient of polynomials."""
    return _quotient(x, TANH_ABOVE, TANH_BELOW, TANH_END)


def erf(x: Value) -> Value:
    """A quotient of polynomials."""
    return _quotient(x, ERF_ABOVE, ERF_BELOW, ERF_END)


def sigmoid(x: Value) -> Value:
    """1 / (1 + e^-x), whose rounding leaves e^-x fewer terms than ``exp`` has, and one factor 2^n."""
    bounded = _bounded(x, SIGMOID_LEAST, SIGMOID_MOST)
    moved = bounded * (-1 / math.log(2)) + ROUNDER
    whole = moved - ROUNDER
    r = 0.0 - bounded - whole * math.log(2)
    power = (moved.seen_as(INT).shifted(MANTISSA_BITS) + (127 << MANTISSA_BITS)).seen_as(FLOAT)
    return 1.0 / (polynomial(r, SIGMOID_EXP) * power + 1.0)


def _power_and_sum(x: Value) -> tuple[Value, Value]:
    """p and p (1 + e^-x) in few instructions: p is the power of two, zero from where the sum is infinite, that makes
    the exponential a polynomial."""
    t = _bounded(x * (-1 / math.log(2)) - SHORT_SHIFT, SHORT_LEAST, SHORT_MOST)
    top = ROUNDER + 127 + 4  # in its low bits: the exponent of 2^4
    moved = top - t
    h = t - (top - 1 - moved)
    power = moved.seen_as(INT).shifted(MANTISSA_BITS).seen_as(FLOAT)
    return power, (h + SHORT_ROOT) * (h * h + SHORT_SQUARE) + power


def _short_quotient(x: Value, y: Value) -> Value:
    """x / y for a result in half precision. NEON estimates 1 / y to 8 bits, and one step of Newton's makes them 16:
    four short instructions, where a division keeps its unit busy for the time of thirty."""
    if not x.body.neon:
        return x / y
    estimate = neon_instruction("frecpe", y)
    return x * estimate * neon_instruction("frecps", y, estimate)


def short_sigmoid(x: Value) -> Value:
    """1 / (1 + e^-x) for a result in half precision."""
    power, sum_ = _power_and_sum(x)
    return _short_quotient(power, sum_)


def short_silu(x: Value) -> Value:
    """x / (1 + e^-x) for a result in half precision."""
    power, sum_ = _power_and_sum(x)
    return _short_quotient(x * power, sum_)


def short_tanh(x: Value) -> Value:
    """A quotient of polynomials for a result in half precision."""
    x = _bounded(x, -SHORT_TANH_END, SHORT_TANH_END)
    square = x * x
    return _short_quotient(x * polynomial(square, SHORT_TANH_ABOVE), polynomial(square, SHORT_TANH_BELOW))


def _exponentials(x: Value) -> tuple[Value, Value]:
    """e^|x| / 2 and e^-|x| / 2, by halves, so that the first is infinite only where the result is."""
    size = select(x.compared("olt", 0.0), 0.0 - x, x)
    root = exp(size * 0.5)
    large = root * 0.5 * root
    return large, 0.25 / large


def sinh(x: Value) -> Value:
    """Half the difference of e^x and e^-x; below 1, where they are alike, a polynomial."""
    large, small = _exponentials(x)
    size = large - small
    signed = select(x.compared("olt", 0.0), 0.0 - size, size)
    square = x * x
    near = x * (square * polynomial(square, SINH)) + x
    return select(square.compared("olt", 1.0), near, signed)


def cosh(x: Value) -> Value:
    """Half the sum of e^x and e^-x."""
    large, small = _exponentials(x)
    return large + small


#: By the names that they have in ``tirx``, with as many values as they are given there.
FUNCTIONS: dict[str, Callable[..., Value]] = {
    "exp": exp,
    "log": log,
    "log1p": log1p,
    "tanh": tanh,
    "erf": erf,
    "sigmoid": sigmoid,
    "sinh": sinh,
    "cosh": cosh,
    **wide_functions.FUNCTIONS,
}
#: Those whose results are rounded to half precision next.
SHORT: dict[str, Callable[[Value], Value]] = {
    "short_sigmoid": short_sigmoid,
    "short_silu": short_silu,
    "short_tanh": short_tanh,
}


@cache
def _text(name: str) -> str:
    """The function called ``name`` in LLVM's language, for all widths and each kind of processor that has its own."""
    if name == past_caches.NAME:
        return past_caches.text()
    functions = []
    function = (FUNCTIONS | SHORT)[name]
    values = [f"%{value}" for value in inspect.signature(function).parameters]
    for neon, lanes in product((False, True) if name in SHORT else (False,), WIDTHS):
        body = Body(lanes, neon)
        result, kind = function(*(Value(body, value, FLOAT) for value in values)), body.type(FLOAT)
        head = f"define {kind} @{_symbol(name, lanes, neon)}({', '.join(f'{kind} {value}' for value in values)}) {{"
        functions.append("\n".join([head, "entry:", *body.lines, f"  ret {kind} {result.name}", "}"]))
    return "\n".join(functions)


def _symbol(name: str, lanes: int, neon: bool) -> str:
    return f"dance_{name}_{'neon_' if neon else ''}f32x{lanes}"


def short(name: str, x: tirx.Expr) -> tirx.Expr:
    """One of ``SHORT`` of a float32 vector, for a kernel of a CPU that rounds its result to half precision."""
    return operators.call(name, [x], x.ty)


def written_out(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """``func`` for a CPU with these functions of float32 in their own form, which comes with it, as stores past the
    caches do."""
    used: set[str] = set()

    def replace(call: tvm.ir.Call) -> tvm.ir.Call:
        space, _, name = str(getattr(call.op, "name", "")).partition(".")
        if space == "dance" and (name in SHORT or name == past_caches.NAME):
            used.add(name)
            return call
        if space != "tirx" or name not in FUNCTIONS or str(call.ty.dtype).partition("x")[0] != "float32":
            return call
        used.add(name)
        return operators.call(name, call.args, call.ty)

    body = tvm_ffi.structural_map(func.body, (tvm.ir.Call, replace))
    if not used:
        return func
    text = tvm.ir.StringImm("\n".join(_text(name) for name in sorted(used)))

    def importing(statement: tirx.Stmt) -> tirx.Stmt:
        return tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", text, statement)

    if isinstance(body, s_tir.SBlockRealize):  # Relax looks for a root block in every function that it calls
        root = body.block
        parts = (root.init, root.alloc_buffers, root.match_buffers, root.annotations)
        inner = s_tir.SBlock(root.iter_vars, root.reads, root.writes, root.name_hint, importing(root.body), *parts)
        return func.with_body(s_tir.SBlockRealize(body.iter_values, body.predicate, inner))
    return func.with_body(importing(body))


def _lower(call: tvm.ir.Call, neon: bool = False) -> tvm.ir.Call:
    """TVM's rule for one of our operators, asked after loops have become vectors."""
    name, lanes = operators.name_of(call.op), int(call.ty.dtype.lanes)
    if lanes not in WIDTHS:
        return tvm.ir.Call(tvm.ir.Op.get(f"tirx.{name}"), call.args, ret_ty=call.ty)
    return tirx.call_pure_extern(call.ty.dtype, _symbol(name, lanes, neon), *call.args)


def _lower_neon(call: tvm.ir.Call) -> tvm.ir.Call:
    """The same on Arm processors, where TVM asks it before the rule for all."""
    return _lower(call, neon=True)


for _name in FUNCTIONS | SHORT:
    _neon = {"llvm.aarch64": _lower_neon} if _name in SHORT else {}
    operators.define(_name, f"{_name} by the vector", {"default": _lower, **_neon})
