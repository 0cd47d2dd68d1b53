"""sin, cos, tan, their inverses and pow of float32 vectors, computed in float64 and rounded once: 0.51 ulp.

In float64 sums that cancel keep more bits than a result has, numbers below the normal ones of float32 are normal, and
what leaves float32's range becomes infinite, or loses bits, by the one rounding at the end. That takes half of the
lanes of an instruction, and saves the care that float32 would need. Nothing here depends on whether products and sums
are fused.

The polynomials are the least in their largest error (Lawson's weights), within 2^-34 of the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .vector_code import DOUBLE, LONG, Value, clamped, polynomial, select

#: (sin(r) / r - 1) / r² and (cos(r) - 1) / r² as polynomials of r², for |r| ≤ π / 4.
SIN = (2.718304227180524e-06, -0.00019839334082740514, 0.008333329383581275, -0.16666666641606984)
COS = (2.439036907032014e-05, -0.001388676294815333, 0.041666623298416305, -0.4999999972488869)
#: π / 2 in two parts, the first of 31 bits, so that its products with whole numbers of 22 bits are exact.
RIGHT_HIGH = math.ldexp(math.floor(math.ldexp(math.pi / 2, 30)), -30)
RIGHT_LOW = 6.077100506506192e-11
#: Up to here those numbers have no more, and what is left of an angle is within 2^-60; beyond it libm is asked.
ANGLE_END = 2.0**22
#: (atanh(s) / s - 1) / s² as a polynomial of s², for |s| ≤ (√2 - 1) / (√2 + 1).
ATANH = (0.09796098105794807, 0.11087833439473216, 0.14286060344041257, 0.19999997761463847, 0.33333333338029797)
#: (2^f - 1) / f for |f| ≤ 1 / 2.
POWER = (
    *(1.5314974183061977e-05, 0.00015467135622149978, 0.0013333430674922475, 0.009618036837727256),
    *(0.0555041096269812, 0.24022651076303475, 0.6931471805416228),
)
#: Powers of two beyond these are infinite, or zero, once they are float32.
POWER_END = 200.0
#: (atan(q) / q - 1) / q² as a polynomial of q², for |q| ≤ 1.
ATAN = (
    *(-0.0007113043753815215, 0.004999313763814286, -0.016471447938643188, 0.03470464364522301, -0.05470447361174042),
    *(0.0726938349094235, -0.08988791802901211, 0.1109520239484356, -0.14284250858806086, 0.1999993219701114),
    -0.33333332235307983,
)
#: Whole float32 numbers from here on are even.
EVEN = 2.0**25
#: A number that leaves the nearest integer in the low bits of its sum with a smaller one: 1.5 · 2⁵², and its bits.
ROUNDER, ROUNDER_BITS = 1.5 * 2.0**52, 0x4338000000000000
#: The bits of 1 / √2 and of 1, of a number's mantissa, how many those are, and of its sign.
HALF_ROOT_BITS, ONE_BITS, MANTISSA, MANTISSA_BITS = 0x3FE6A09E667F3BCD, 0x3FF << 52, (1 << 52) - 1, 52
EXPONENT_OF_ONE = 1023
SIGN_BITS, SIGN = -(1 << 63), 63


def _nearest(x: Value) -> tuple[Value, Value]:
    """The nearest whole number, and an integer whose low bits are that number's."""
    moved = x + ROUNDER
    return moved - ROUNDER, moved.seen_as(LONG)


def _turned(x: Value) -> tuple[Value, Value, Value]:
    """x = n π / 2 + r with |r| ≤ π / 4: sin(r), cos(r), and an integer with the low bits of n."""
    x = x.wide()
    whole, n = _nearest(x * (2 / math.pi))
    r = x - whole * RIGHT_HIGH - whole * RIGHT_LOW
    square = r * r
    return r * (polynomial(square, SIN) * square + 1.0), polynomial(square, COS) * square + 1.0, n


def _of_angle(name: str, x: Value, found: Value) -> Value:
    """``found``, or what libm finds for angles whose turns have too many bits (and for infinity: NaN)."""
    far = x.body.call("fabs", x).compared("ogt", ANGLE_END)
    return x.body.mended(found.rounded(), far, lambda: x.body.call(name, x))


def _sine(x: Value, quarters: int) -> Value:
    """sin(x + quarters π / 2)."""
    sine, cosine, n = _turned(x)
    n = n + quarters
    return select(n.has_bit(0), cosine, sine).flipped(n.shifted(SIGN - 1).masked(SIGN_BITS))


def sin(x: Value) -> Value:
    """The sine or cosine of what is left of whole quarter turns."""
    return _of_angle("sin", x, _sine(x, 0))


def cos(x: Value) -> Value:
    """The sine a quarter turn on."""
    return _of_angle("cos", x, _sine(x, 1))


def tan(x: Value) -> Value:
    """sin(r) / cos(r), and a quarter turn on -cos(r) / sin(r)."""
    sine, cosine, n = _turned(x)
    odd = n.has_bit(0)
    quotient = select(odd, cosine, sine) / select(odd, sine, cosine)
    return _of_angle("tan", x, quotient.flipped(n.shifted(SIGN)))


def _log2(x: Value) -> Value:
    """log₂(2^e m) = e + 2 atanh((m - 1) / (m + 1)) / log(2) with 1 / √2 ≤ m < √2, for x that is not below zero."""
    bits = x.seen_as(LONG) + (ONE_BITS - HALF_ROOT_BITS)
    m = (bits.masked(MANTISSA) + HALF_ROOT_BITS).seen_as(DOUBLE)
    e = (bits.without_low(MANTISSA_BITS) + (ROUNDER_BITS - EXPONENT_OF_ONE)).seen_as(DOUBLE) - ROUNDER
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    result = s * (polynomial(square, ATANH) * square + 1.0) * (2 / math.log(2)) + e
    result = select(x.compared("oeq", 0.0), -math.inf, result)
    return select(x.compared("olt", math.inf), result, x)  # NaN and infinity are their own logarithms


def _exp2(x: Value) -> Value:
    """2^(n + f) with |f| ≤ 1 / 2, to what is infinite or zero as a float32."""
    x = clamped(x, -POWER_END, POWER_END)
    whole, n = _nearest(x)
    f = x - whole
    return (polynomial(f, POWER) * f + 1.0) * (n + EXPONENT_OF_ONE).shifted(MANTISSA_BITS).seen_as(DOUBLE)


def pow(x: Value, y: Value) -> Value:
    """2^(y log₂|x|), and C's rules for signs, zeros and infinities: anything to the zeroth is 1, 1 to any power is 1,
    and so is -1 to an infinite one; a finite number below zero has whole powers alone, the odd ones below zero."""
    x, y = x.wide(), y.wide()
    log = _log2(x.body.call("fabs", x))
    exponent = select(y.compared("oeq", 0.0), 0.0, select(log.compared("oeq", 0.0), 0.0, y * log))
    size = _exp2(exponent)
    bounded = clamped(y, -EVEN, EVEN)
    whole, n = _nearest(bounded)
    is_whole = whole.compared("oeq", bounded)
    broken = select(x.compared("olt", 0.0), select(x.compared("ogt", -math.inf), math.nan, size), size)
    sign = x.seen_as(LONG).masked(n.shifted(SIGN))
    return select(is_whole, size.flipped(sign), broken).rounded()


def _direction(y: Value, x: Value) -> Value:
    """The angle of the point (x, y): the arc tangent of the smaller size over the larger, put into its eighth."""
    height, width = x.body.call("fabs", y), x.body.call("fabs", x)
    steep = height.compared("ogt", width)
    small, large = select(steep, width, height), select(steep, height, width)
    q = select(small.compared("oeq", 0.0), 0.0, select(small.compared("oeq", math.inf), 1.0, small / large))
    square = q * q
    angle = q * (polynomial(square, ATAN) * square + 1.0)
    angle = select(steep, math.pi / 2 - angle, angle)
    angle = select(x.seen_as(LONG).below_zero(), math.pi - angle, angle)
    return select(y.compared("uno", x), math.nan, x.body.call("copysign", angle, y)).rounded()


def atan2(y: Value, x: Value) -> Value:
    """The angle of a point."""
    return _direction(y.wide(), x.wide())


def atan(x: Value) -> Value:
    """The angle of (1, x)."""
    return _direction(x.wide(), x.body.constant(1.0, DOUBLE))


def _leg(x: Value) -> Value:
    """√(1 - x²), NaN beyond ±1."""
    return x.body.call("sqrt", (1.0 - x) * (x + 1.0))


def asin(x: Value) -> Value:
    """The angle of the point on the circle at this height."""
    x = x.wide()
    return _direction(x, _leg(x))


def acos(x: Value) -> Value:
    """The angle of the point on the circle at this width."""
    x = x.wide()
    return _direction(_leg(x), x)


FUNCTIONS: dict[str, Callable[..., Value]] = {
    "sin": sin,
    "cos": cos,
    "tan": tan,
    "asin": asin,
    "acos": acos,
    "atan": atan,
    "atan2": atan2,
    "pow": pow,
}
