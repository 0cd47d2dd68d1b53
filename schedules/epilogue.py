"""What a kernel does to each of its results before it stores them: an activation by name, or a program of steps.

A program is text, so that workloads and tuning records hold it as it is: ``exp(x); add(%0, 1.0); log(%1)``. Each step
applies one of ``STEPS`` to the kernel's result ``x``, to what an earlier step gave (``%0`` the first) and to numbers.
The last step's value is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from .elementary import short
from .emit import ACTIVATIONS, FLOAT, Activation, Expr, at_least, at_most, cast, lanes, let, number, store, write

#: An operand of a step: a vector, or a number that is known when compiling.
Value = Any
Step = Callable[[int, Sequence[Value]], Expr]


def _vector(value: Value, count: int) -> Expr:
    return number(value, count) if isinstance(value, float) else value


def _unary(function: Callable[[Expr, int], Expr]) -> Step:
    return lambda count, values: function(_vector(values[0], count), count)


def _binary(function: Callable[[Expr, Expr], Expr]) -> Step:
    return lambda count, values: function(_vector(values[0], count), _vector(values[1], count))


def _divide(count: int, values: Sequence[Value]) -> Expr:
    left, right = values
    if isinstance(right, float) and math.isfinite(right) and right:
        return _vector(left, count) * number(1.0 / right, count)
    return _vector(left, count) / _vector(right, count)


def _extreme(larger: bool) -> Step:
    """The larger or smaller of two, NaN where one is."""
    bound = at_least if larger else at_most

    def step(count: int, values: Sequence[Value]) -> Expr:
        left, right = values
        if isinstance(left, float) or isinstance(right, float):
            fixed, value = (left, right) if isinstance(left, float) else (right, left)
            return bound(fixed, _vector(value, count), count)
        first = left > right if larger else left < right
        return tirx.Select(first, left, tirx.Select(tirx.isnan(left), left, right))

    return step


def _clip(count: int, values: Sequence[Value]) -> Expr:
    x, low, high = values
    x = x if low == -math.inf else at_least(low, x, count)
    return x if high == math.inf else at_most(high, let(x), count)


def _where(count: int, values: Sequence[Value]) -> Expr:
    condition, then, otherwise = values
    return tirx.Select(condition, _vector(then, count), _vector(otherwise, count))


def _leaky(count: int, values: Sequence[Value]) -> Expr:
    x, slope = values
    return tirx.Select(x < number(0.0, count), x * number(slope, count), x)


def _sign(x: Expr, count: int) -> Expr:
    below = tirx.Select(x < number(0.0, count), number(-1.0, count), x)  # zero and NaN are their own sign
    return tirx.Select(x > number(0.0, count), number(1.0, count), below)


def _gelu(x: Expr, count: int) -> Expr:
    half = x * number(0.5, count)
    return half + half * tirx.erf(x * number(math.sqrt(0.5), count))


def _gelu_tanh(x: Expr, count: int) -> Expr:
    half, inner = x * number(0.5, count), x + x * x * x * number(0.044715, count)
    return half + half * tirx.tanh(inner * number(math.sqrt(2 / math.pi), count))


#: What a step may be, by the name of the Relax operator without ``nn.``.
STEPS: dict[str, Step] = {
    **{name: _unary(function) for name, function in ACTIVATIONS.items() if name},
    "exp": _unary(lambda x, _: tirx.exp(x)),
    "log": _unary(lambda x, _: tirx.log(x)),
    "tanh": _unary(lambda x, _: tirx.tanh(x)),
    "erf": _unary(lambda x, _: tirx.erf(x)),
    "sqrt": _unary(lambda x, _: tirx.sqrt(x)),
    "abs": _unary(lambda x, _: tirx.abs(x)),
    "negative": _unary(lambda x, count: number(-1.0, count) * x),
    "square": _unary(lambda x, _: x * x),
    "sign": _unary(_sign),
    "gelu": _unary(_gelu),
    "gelu_tanh": _unary(_gelu_tanh),
    "add": _binary(lambda left, right: left + right),
    "subtract": _binary(lambda left, right: left - right),
    "multiply": _binary(lambda left, right: left * right),
    "divide": _divide,
    "maximum": _extreme(larger=True),
    "minimum": _extreme(larger=False),
    "greater": _binary(lambda left, right: left > right),
    "greater_equal": _binary(lambda left, right: left >= right),
    "less": _binary(lambda left, right: left < right),
    "less_equal": _binary(lambda left, right: left <= right),
    "clip": _clip,
    "leakyrelu": _leaky,
    "where": _where,
}
#: Steps that take tens of instructions.
FUNCTIONS = {"sigmoid", "silu", "exp", "log", "tanh", "erf", "gelu", "gelu_tanh"}
#: Steps whose result is true or false, not a number.
COMPARISONS = ("greater", "greater_equal", "less", "less_equal")


def _short_gelu_tanh(x: Expr, count: int) -> Expr:
    inner = x + x * x * x * number(0.044715, count)
    return x * short("short_sigmoid", inner * number(2 * math.sqrt(2 / math.pi), count))  # 1 + tanh(u) = 2 sigmoid(2 u)


#: Activations of results that are rounded to half precision, which need fewer terms.
SHORT_ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": lambda x, _: short("short_sigmoid", x),
    "silu": lambda x, _: short("short_silu", x),
    "tanh(x)": lambda x, _: short("short_tanh", x),
    "gelu_tanh(x)": _short_gelu_tanh,
}


def step_text(name: str, operands: Sequence[str | float]) -> str:
    """One step as a program has it; numbers keep all of their digits."""
    return f"{name}({', '.join(each if isinstance(each, str) else repr(float(each)) for each in operands)})"


def has_functions(activation: str) -> bool:
    """Whether an activation, or a step of a program, is an elementary function."""
    return any(step.partition("(")[0] in FUNCTIONS for step in activation.split("; "))


def activate(activation: str, value: Expr, count: int) -> Expr:
    """``value``, ``count`` lanes of a kernel's results, after the named activation or the program."""
    if activation in ACTIVATIONS:
        return ACTIVATIONS[activation](value, count)
    x = let(value)
    found: list[Expr] = []
    for step in activation.split("; "):
        name, _, rest = step[:-1].partition("(")
        operands = [_operand(text, x, found) for text in rest.split(", ")]
        result = STEPS[name](count, operands)
        found.append(result if name in COMPARISONS else let(result))
    return found[-1]


def write_activated(buffer: tirx.Buffer, activation: str, value: Expr, at: Expr, count: int) -> None:
    """Store float32 values on a CPU after the activation, as what ``buffer`` holds. Rounding changes no sign, so that
    halves are rectified as they are stored: half as many instructions."""
    if activation == "relu" and buffer.dtype != FLOAT:
        rounded = let(cast(value, str(buffer.dtype), count))
        store(buffer, at_least(0.0, rounded, count, str(buffer.dtype)), lanes(at, count))
        return
    write(buffer, activate_for(str(buffer.dtype), activation, value, count), at, count)


def activate_for(dtype: str, activation: str, value: Expr, count: int) -> Expr:
    """As :func:`activate`, for a CPU that stores the result as ``dtype``."""
    if dtype != FLOAT and activation in SHORT_ACTIVATIONS:
        return SHORT_ACTIVATIONS[activation](let(value), count)
    return activate(activation, value, count)


def _operand(text: str, x: Expr, found: Sequence[Expr]) -> Value:
    if text == "x":
        return x
    return found[int(text[1:])] if text.startswith("%") else float(text)
