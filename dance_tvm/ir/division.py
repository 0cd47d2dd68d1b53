"""Division of floats rounded down and its remainder, as PyTorch and Python have them: exact, through ``fmod``.

The floor of a rounded quotient is another number wherever the divisor is not a power of two: 0.5 / 0.1 rounds to 5, and
0.5 holds 0.1 as a float four times.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

Emit = Callable[[relax.Expr], relax.Expr]


def remainder(emit: Emit, a: relax.Expr, b: relax.Expr, dtype: str) -> relax.Expr:
    """The rest of ``a`` divided by ``b``, with the sign of ``b``; NaN where ``b`` is zero or ``a`` infinite."""
    rest = emit(relax.op.mod(a, b))
    return emit(relax.op.where(_against(emit, rest, b, dtype), emit(relax.op.add(rest, b)), rest))


def floor_divide(emit: Emit, a: relax.Expr, b: relax.Expr, dtype: str) -> relax.Expr:
    """The largest whole number of times that ``b`` goes into ``a``; ``a / b`` where ``b`` is zero.

    Source: ``c10::div_floor_floating`` of PyTorch, which follows Python's ``float.__floordiv__``.
    """

    def number(value: float) -> relax.Expr:
        return relax.const(value, dtype)

    rest, quotient = emit(relax.op.mod(a, b)), emit(relax.op.divide(a, b))
    whole = emit(relax.op.divide(emit(relax.op.subtract(a, rest)), b))  # but for rounding
    below = emit(relax.op.subtract(whole, number(1)))
    whole = emit(relax.op.where(_against(emit, rest, b, dtype), below, whole))
    floor = emit(relax.op.floor(whole))
    over = emit(relax.op.greater(emit(relax.op.subtract(whole, floor)), number(0.5)))
    floor = emit(relax.op.where(over, emit(relax.op.add(floor, number(1))), floor))
    signed_zero = emit(relax.op.multiply(quotient, number(0)))
    floor = emit(relax.op.where(emit(relax.op.equal(whole, number(0))), signed_zero, floor))
    return emit(relax.op.where(emit(relax.op.equal(b, number(0))), quotient, floor))


def _against(emit: Emit, rest: relax.Expr, b: relax.Expr, dtype: str) -> relax.Expr:
    """Where the rest is not zero and its sign is not the divisor's."""
    zero = relax.const(0, dtype)
    opposite = emit(relax.op.not_equal(emit(relax.op.less(rest, zero)), emit(relax.op.less(b, zero))))
    return emit(relax.op.logical_and(opposite, emit(relax.op.not_equal(rest, zero))))
