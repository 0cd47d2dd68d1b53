"""What operators do to masks, in one table: where a result is zero, what of an operand is read, what is a mask.

Three questions decide what may be left out. *Zeros*: where is the result exactly zero because operands are? *Reads*:
which elements of an operand does it take to get those of the result that somebody reads? *Values*: are all elements 0
or 1, so that the result can be a mask? Every row answers all three with its reason, and tests/test_liveness_rules.py
proves each against PyTorch. An operator without a row is alive everywhere, reads everything and makes no mask.

**The rule behind "reads".** What is never read is left out: its place in memory holds zero, or, where all readers walk
lists that skip it, anything. In the end a reader multiplies it by a mask's zero or does not look at it. 0 · ∞ and
0 · NaN are NaN, so what is left out may only pass through operators that are finite wherever their operands are finite:
log, division, sqrt and exp are not. A row that lets "reads" pass claims this for operands of magnitude up to 2^60, with
float32 arithmetic; a result in float16 never lets it pass.

**What masks promise.** Where a mask is zero the network's product counts as zero, as for all finite activations. (An
activation that is infinite or NaN under a zero of its mask makes NaN in PyTorch; it is not computed here.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from dance_tvm.schedules.geometry import Window

from .expressions import EVERYWHERE, Live, Shape, joined, part


class Zeros(Enum):
    """Where the result is zero."""

    UNKNOWN = "nowhere for certain"
    FIRST = "where the operand is"
    ALL = "where both operands are"
    ONE = "where one operand is"
    CHOSEN = "where the chosen branch is"
    WINDOW = "where the window holds nothing else"
    JOINED = "where the part is"


class Reads(Enum):
    """What it reads of an operand to know the elements of its result that are read."""

    EVERYTHING = "everything"
    SAME = "the same elements"
    UNMASKED = "the same elements, but for zeros of the other operand"
    CHOSEN = "the same elements, of a branch but where a mask does not choose it"
    LIVING_TAPS = "what windows cover, in frames and channels that are alive"
    TAPS = "what windows cover"
    PART = "the part's elements"


class Values(Enum):
    """What all elements of the result are, NaN aside; in this order each includes the one before."""

    BITS = "0 or 1"
    UNIT = "from 0 to 1"
    ANY = "any"
    AS_OPERANDS = "as the operands"
    AS_BRANCHES = "as both branches"
    ROUNDED = "0 or 1 of operands from 0 to 1"
    CUT = "from 0 to 1, and 0 or 1 of 0 and 1"


@dataclass(frozen=True)
class Operation:
    """One application of an operator, seen alike from every kind of graph.

    ``name`` is Relax's, without ``relax.``; ``operands`` are the graph's tensors, ``constants`` their values where they
    are known; shapes have channels innermost. ``numbers`` are the attributes that rules ask for.
    """

    name: str
    operands: tuple[Any, ...]
    shape: Shape
    operand_shapes: tuple[Shape | None, ...]
    constants: tuple[NDArray[Any] | None, ...]
    dtype: str = "float32"
    window: Window | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


#: Up to this exponent, whole powers of floats are written as products before liveness is asked.
MOST_FACTORS = 8

Answer = TypeVar("Answer", Zeros, Reads, Values)


@dataclass(frozen=True)
class When(Generic[Answer]):
    """An answer that depends on more than the operator."""

    text: str
    holds: Callable[[Operation], bool]
    then: Answer
    otherwise: Answer | When[Answer]


@dataclass(frozen=True)
class Rule:
    """One row. ``elementwise``: of how many operands it takes the same element to make one of the result; 0 where an
    element is made of others."""

    zeros: Zeros | When[Zeros]
    reads: Reads | When[Reads]
    values: Values | When[Values]
    why: str
    elementwise: int = 1


def answer(asked: Answer | When[Answer], operation: Operation) -> Answer:
    """What a row says of ``operation``."""
    while isinstance(asked, When):
        asked = asked.then if asked.holds(operation) else asked.otherwise
    return asked


# -- conditions --------------------------------------------------------------------------------------------------------


def _second(operation: Operation) -> NDArray[Any] | None:
    return operation.constants[1] if len(operation.constants) > 1 else None


def _divides_by_numbers(operation: Operation) -> bool:
    divisor = _second(operation)
    return divisor is not None and bool(np.all((np.abs(divisor) >= 2.0**-60) & np.isfinite(divisor)))


def _exponent_is(*wanted: float) -> Callable[[Operation], bool]:
    def holds(operation: Operation) -> bool:
        exponent = _second(operation)
        return exponent is not None and bool(np.isin(exponent, wanted).all())

    return holds


def _from_one(operation: Operation) -> bool:
    minuend = operation.constants[0]
    return minuend is not None and bool((minuend == 1).all())


def _clips(low_most: float, high_least: float) -> Callable[[Operation], bool]:
    return lambda operation: operation.numbers["low"] <= low_most and operation.numbers["high"] >= high_least


def _clips_into_unit(operation: Operation) -> bool:
    return operation.numbers["low"] >= 0 and operation.numbers["high"] <= 1


def _marks_by_bits(operation: Operation) -> bool:
    return {operation.numbers["on"], operation.numbers["off"]} <= {0, 1}


def _fills_with_bits(operation: Operation) -> bool:
    return operation.numbers.get("fill") in (0, 1)


def _windows_reach_inside(operation: Operation) -> bool:
    window = operation.window
    return window is not None and not any(() in classes for classes in window.classes)


# -- the table ---------------------------------------------------------------------------------------------------------

_KEEPS = Rule(Zeros.FIRST, Reads.SAME, Values.AS_OPERANDS, "f(0) = 0, f(1) = 1, finite of finite")
_KEEPS_ZERO = Rule(Zeros.FIRST, Reads.SAME, Values.ANY, "f(0) = 0, finite of finite")
_INTEGER = Rule(Zeros.FIRST, Reads.SAME, Values.ROUNDED, "integers of what lies between; f(0) = 0, finite of finite")
_FINITE = Rule(Zeros.UNKNOWN, Reads.SAME, Values.ANY, "f(0) is not 0; finite of finite")
_COMPARES = Rule(Zeros.UNKNOWN, Reads.EVERYTHING, Values.BITS, "true or false, of NaN too; nothing follows for 0", 2)
_MOVES = Rule(Zeros.UNKNOWN, Reads.EVERYTHING, Values.AS_OPERANDS, "the operand's elements in other places", 0)
_CONVOLUTION = Rule(
    Zeros.WINDOW, Reads.LIVING_TAPS, Values.ANY, "a sum of products without a bias, over all channels", 0
)
_MAX_POOL = Rule(
    When("every window reaches inside", _windows_reach_inside, Zeros.WINDOW, Zeros.UNKNOWN),
    Reads.TAPS,
    When("every window reaches inside", _windows_reach_inside, Values.AS_OPERANDS, Values.ANY),
    "one of the window's elements; a window of padding alone gives −∞",
    0,
)
_AVERAGE_POOL = Rule(Zeros.WINDOW, Reads.TAPS, Values.ANY, "the mean of the window; padding is zero", 0)
_PICKS = Rule(Zeros.UNKNOWN, Reads.EVERYTHING, Values.AS_OPERANDS, "one of the operand's elements", 0)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("nn.relu", "nn.relu6", "nn.leakyrelu", "abs", "square"), _KEEPS),
    **dict.fromkeys(("sign", "round", "floor", "ceil", "trunc"), _INTEGER),
    **dict.fromkeys(
        ("nn.silu", "nn.gelu", "nn.gelu_tanh", "nn.prelu", "negative", "tanh", "sin", "erf", "atan"), _KEEPS_ZERO
    ),
    **dict.fromkeys(("cos", "nn.softplus", "nn.selu"), _FINITE),
    "nn.dropout": replace(_KEEPS, why="when it runs, not when it trains, it changes nothing"),
    "nn.batch_norm": replace(_FINITE, why="with stored statistics a factor and a summand for each channel"),
    "astype": Rule(Zeros.FIRST, Reads.SAME, Values.AS_OPERANDS, "0 and 1 are numbers of every type"),
    "sigmoid": Rule(Zeros.UNKNOWN, Reads.SAME, Values.UNIT, "sigmoid(0) = 1/2"),
    "clip": Rule(
        When("low ≤ 0 ≤ high", _clips(0, 0), Zeros.FIRST, Zeros.UNKNOWN),
        Reads.SAME,
        When(
            "from 0 to 1",
            lambda operation: _clips(0, 1)(operation) and _clips_into_unit(operation),
            Values.CUT,
            When(
                "low ≤ 0, 1 ≤ high",
                _clips(0, 1),
                Values.AS_OPERANDS,
                When("0 ≤ low, high ≤ 1", _clips_into_unit, Values.UNIT, Values.ANY),
            ),
        ),
        "a number inside the bounds stays, one outside becomes the bound",
    ),
    "sqrt": Rule(Zeros.FIRST, Reads.EVERYTHING, Values.AS_OPERANDS, "f(0) = 0, f(1) = 1; NaN below zero"),
    **dict.fromkeys(
        ("log", "rsqrt", "exp"),
        Rule(Zeros.UNKNOWN, Reads.EVERYTHING, Values.ANY, "infinite or NaN for some finite numbers"),
    ),
    "add": Rule(Zeros.ALL, Reads.SAME, Values.ANY, "0 + 0 = 0; 1 + 1 is not a mask's", 2),
    "subtract": Rule(
        Zeros.ALL,
        Reads.SAME,
        When("from the constant 1", _from_one, Values.AS_OPERANDS, Values.ANY),
        "0 − 0 = 0; 1 − m is the other mask",
        2,
    ),
    "multiply": Rule(Zeros.ONE, Reads.UNMASKED, Values.AS_OPERANDS, "0 · x = 0 for finite x", 2),
    "divide": Rule(
        When("by constants without zeros", _divides_by_numbers, Zeros.FIRST, Zeros.UNKNOWN),
        When("by constants without zeros", _divides_by_numbers, Reads.SAME, Reads.EVERYTHING),
        Values.ANY,
        "x / 0 is infinite, 0 / 0 NaN",
        2,
    ),
    "maximum": Rule(Zeros.ALL, Reads.SAME, Values.AS_OPERANDS, "one of two elements", 2),
    "minimum": Rule(Zeros.ALL, Reads.SAME, Values.AS_OPERANDS, "one of two elements", 2),
    "power": Rule(
        When("to the constant 1 or 2", _exponent_is(1, 2), Zeros.FIRST, Zeros.UNKNOWN),
        When("to the constant 1 or 2", _exponent_is(1, 2), Reads.SAME, Reads.EVERYTHING),
        Values.ANY,
        "0^0 = 1; infinite or NaN for some exponents",
        2,
    ),
    **dict.fromkeys(
        ("floor_divide", "floor_mod", "mod"),
        Rule(Zeros.UNKNOWN, Reads.EVERYTHING, Values.ANY, "infinite or NaN where the divisor is 0", 2),
    ),
    **dict.fromkeys(
        ("bitwise_and", "bitwise_or"),
        Rule(Zeros.UNKNOWN, Reads.EVERYTHING, Values.ANY, "bits of integers, which are no activations", 2),
    ),
    "where": Rule(
        Zeros.CHOSEN,
        Reads.CHOSEN,
        Values.AS_BRANCHES,
        "an element of one branch; with 0 as the other a mask's product",
        3,
    ),
    **dict.fromkeys(
        ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or"), _COMPARES
    ),
    "logical_xor": _COMPARES,
    **dict.fromkeys(("logical_not", "isnan", "isfinite", "isinf"), replace(_COMPARES, elementwise=1)),
    **dict.fromkeys(("nn.conv2d", "nn.conv3d"), _CONVOLUTION),
    **dict.fromkeys(("nn.max_pool2d", "nn.max_pool3d"), _MAX_POOL),
    **dict.fromkeys(("nn.avg_pool2d", "nn.avg_pool3d"), _AVERAGE_POOL),
    "concat": Rule(Zeros.JOINED, Reads.PART, Values.AS_OPERANDS, "parts side by side; masks pass along channels", 0),
    **dict.fromkeys(
        ("reshape", "expand_dims", "squeeze", "permute_dims", "broadcast_to", "repeat", "tile", "flatten", "split"),
        _MOVES,
    ),
    **dict.fromkeys(("strided_slice", "take"), _MOVES),
    **dict.fromkeys(("max", "min"), _PICKS),
    "nn.softmax": Rule(Zeros.UNKNOWN, Reads.EVERYTHING, Values.UNIT, "shares that add up to 1", 0),
    "one_hot": Rule(
        Zeros.UNKNOWN,
        Reads.EVERYTHING,
        When("on and off are 0 or 1", _marks_by_bits, Values.BITS, Values.ANY),
        "on where the index is, off elsewhere",
        0,
    ),
    **dict.fromkeys(
        ("zeros", "ones", "zeros_like", "ones_like", "full", "full_like"),
        Rule(
            Zeros.UNKNOWN,
            Reads.EVERYTHING,
            When("the number is 0 or 1", _fills_with_bits, Values.BITS, Values.ANY),
            "one number everywhere",
            0,
        ),
    ),
}

#: Operators with values of their own by channel beside their operand's.
_BY_CHANNEL = {"nn.prelu", "nn.batch_norm"}
#: Operators that make each element of the same element of one operand and nothing else; those that make it of two.
UNARY = {name for name, rule in RULES.items() if rule.elementwise == 1} - _BY_CHANNEL
PAIRWISE = {name for name, rule in RULES.items() if rule.elementwise == 2}
#: Operators that make each element of the same element of all their operands, however many.
ELEMENTWISE = {name for name, rule in RULES.items() if rule.elementwise} - _BY_CHANNEL
#: Operators of one activation that make each channel of the same channel alone.
CHANNELWISE = UNARY | _BY_CHANNEL | {name for name, rule in RULES.items() if rule in (_MAX_POOL, _AVERAGE_POOL)}


# -- what the answers mean for masks -----------------------------------------------------------------------------------


def alive_after(operation: Operation, alive: Sequence[Live], masks: Sequence[Live | None]) -> Live:
    """Where the result may be nonzero, its operands alive in ``alive``; ``masks`` are operands that are masks of it."""
    rule = RULES.get(operation.name)
    zeros = answer(rule.zeros, operation) if rule else Zeros.UNKNOWN
    same = all(shape == operation.shape for shape in operation.operand_shapes)
    if zeros is Zeros.FIRST:
        return alive[0] if operation.operand_shapes[0] == operation.shape else EVERYWHERE
    if zeros is Zeros.ALL:
        return alive[0] | alive[1] if same else EVERYWHERE
    if zeros is Zeros.ONE:
        known = [found if mask is None else mask for mask, found in zip(masks, alive, strict=True)]
        return known[0] & known[1]
    if zeros is Zeros.CHOSEN:
        return _alive_branches(operation, alive, masks)
    if zeros is Zeros.WINDOW and operation.window is not None:
        through = alive[0].through(operation.window, forward=True)
        pooled = "pool" in operation.name
        return replace(through, channels=alive[0].channels) if pooled else through
    if zeros is Zeros.JOINED and operation.numbers["axis"] == len(operation.shape) - 1:
        union = alive[0]
        for other in alive[1:]:
            union = union | other
        channels = [(live.channels, _channels(shape)) for live, shape in _parts(operation, alive)]
        return replace(union, channels=joined(channels))
    return EVERYWHERE


def _alive_branches(operation: Operation, alive: Sequence[Live], masks: Sequence[Live | None]) -> Live:
    _, then, otherwise = operation.operand_shapes
    other = operation.constants[2]
    inner = alive[1] if then == operation.shape else EVERYWHERE
    if other is not None and not other.any():
        return inner if masks[0] is None else masks[0] & inner
    return inner | (alive[2] if otherwise == operation.shape else EVERYWHERE)


def _parts(operation: Operation, alive: Sequence[Live]) -> list[tuple[Live, Shape | None]]:
    return list(zip(alive, operation.operand_shapes, strict=True))


def _channels(shape: Shape | None) -> int:
    return shape[-1] if shape else 0


def reads(
    operation: Operation,
    index: int,
    wanted: Live,
    computed: Live,
    alive: Sequence[Live],
    masks: Sequence[Live | None],
) -> Live:
    """What is read of operand ``index`` where ``wanted`` is read of the result, and ``computed`` by a kernel that
    leaves out what it knows to be unread before it runs."""
    rule = RULES.get(operation.name)
    how = answer(rule.reads, operation) if rule else Reads.EVERYTHING
    same = operation.operand_shapes[index] == operation.shape and operation.dtype != "float16"
    if how is Reads.SAME:
        return wanted if same else EVERYWHERE
    if how is Reads.UNMASKED and same:
        other = 1 - index
        return wanted & (masks[other] or alive[other])
    if how is Reads.CHOSEN and same:
        chosen = masks[0] if index == 1 else None
        return wanted if chosen is None else wanted & chosen
    if how in (Reads.TAPS, Reads.LIVING_TAPS) and operation.window is not None and index == 0:
        through = computed.through(operation.window, forward=False)
        if how is Reads.TAPS:
            return replace(through, channels=computed.channels)
        return replace(through & alive[0], channels=alive[0].channels)
    if how is Reads.PART and operation.numbers["axis"] == len(operation.shape) - 1:
        begin = sum(_channels(shape) for shape in operation.operand_shapes[:index])
        end = begin + _channels(operation.operand_shapes[index])
        return replace(wanted, channels=part(wanted.channels, begin, end))
    return EVERYWHERE


def values_of(operation: Operation, operands: Sequence[Callable[[], Values]]) -> Values:
    """BITS, UNIT or ANY: what all elements of the result are; ``operands`` say the same of the operands when asked."""
    rule = RULES.get(operation.name)
    said = answer(rule.values, operation) if rule else Values.ANY
    if said is Values.ROUNDED:
        return Values.BITS if _worst(operands[:1]) is not Values.ANY else Values.ANY
    if said is Values.CUT:
        return Values.BITS if _worst(operands[:1]) is Values.BITS else Values.UNIT
    if said is Values.AS_BRANCHES:
        return _worst(operands[1:])
    if said is Values.AS_OPERANDS:
        if operation.name == "subtract":
            return _worst(operands[1:])
        return _worst(operands[:1] if operation.name == "take" else operands)
    return said


_ORDER = (Values.BITS, Values.UNIT, Values.ANY)


def _worst(operands: Sequence[Callable[[], Values]]) -> Values:
    """What includes all of ``operands``; the rest is not asked once one may be anything."""
    worst = Values.BITS
    for operand in operands:
        worst = max(worst, operand(), key=_ORDER.index)
        if worst is Values.ANY:
            break
    return worst
