"""Every row of the table of liveness holds in PyTorch, on random and on adversarial values."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dance_tvm.liveness.rules import PAIRWISE, RULES, UNARY, Operation, Reads, Rule, Values, When, Zeros, answer
from dance_tvm.schedules.geometry import Window

INF, NAN = float("inf"), float("nan")
#: Finite numbers for which a row of the table must hold.
FINITE = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    0.25,
    -0.75,
    1 / 3,
    1e-40,
    -1e-30,
    2.0,
    6.0,
    7.0,
    -3.0,
    88.9,
    -104.0,
    2.0**60,
    -(2.0**60),
]
BITS, UNIT = [0.0, -0.0, 1.0], [0.0, -0.0, 1e-40, 0.2, 0.5, 0.75, 1 - 2**-24, 1.0]
SHAPE = (1, 2, 3, 3, 8)


@dataclass(frozen=True)
class Example:
    """An operator of the table as PyTorch has it, on ``operands`` tensors of one shape."""

    apply: Callable[..., Tensor]
    operands: int = 1
    numbers: Mapping[str, float] = field(default_factory=dict)
    constants: tuple[float | None, ...] = ()
    window: Window | None = None

    def operation(self, name: str) -> Operation:
        constants = tuple(None if number is None else np.float32(number) for number in self.constants)
        constants += (None,) * (self.operands - len(constants))
        return Operation(name, (), SHAPE, (SHAPE,) * self.operands, constants, numbers=self.numbers, window=self.window)


def clip(low: float, high: float) -> Example:
    return Example(lambda x: x.clamp(low, high), numbers={"low": low, "high": high})


def one_hot(on: float, off: float) -> Example:
    return Example(
        lambda x: torch.where(F.one_hot(x.nan_to_num(0, 0, 0).long() % 4, 4) > 0, on, off),
        numbers={"on": on, "off": off},
    )


def full(number: float) -> Example:
    return Example(lambda x: torch.full((4,), number), 1, {"fill": number})


def of_constant(apply: Callable[[Tensor, Tensor], Tensor], number: float) -> Example:
    """``number`` as the second operand."""
    return Example(lambda x: apply(x, torch.tensor(number)), constants=(None, number))


def from_constant(number: float) -> Example:
    return Example(lambda x: number - x, constants=(number,))


POOL = Window(1, (4, 4, 4), (2, 2, 2), (2, 2, 2), (2, 2, 2))
PADDED = Window(1, (4, 4, 4), (6, 6, 6), (2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1))
FAR = Window(1, (2, 2, 2), (1, 1, 1), (2, 2, 2), (1, 1, 1), (1, 1, 1), (3, 3, 3))  # both taps lie outside

EXAMPLES: dict[str, list[Example]] = {
    "nn.relu": [Example(torch.relu)],
    "nn.relu6": [Example(F.relu6)],
    "nn.leakyrelu": [Example(F.leaky_relu), Example(lambda x: F.leaky_relu(x, -2.0))],
    "abs": [Example(torch.abs)],
    "square": [Example(torch.square)],
    "sign": [Example(torch.sign)],
    "round": [Example(torch.round)],
    "floor": [Example(torch.floor)],
    "ceil": [Example(torch.ceil)],
    "trunc": [Example(torch.trunc)],
    "nn.silu": [Example(F.silu)],
    "nn.gelu": [Example(F.gelu)],
    "nn.gelu_tanh": [Example(lambda x: F.gelu(x, approximate="tanh"))],
    "nn.prelu": [Example(lambda x: F.prelu(x, torch.tensor([-0.5])))],
    "negative": [Example(torch.neg)],
    "tanh": [Example(torch.tanh)],
    "sin": [Example(torch.sin)],
    "erf": [Example(torch.erf)],
    "atan": [Example(torch.atan)],
    "cos": [Example(torch.cos)],
    "nn.softplus": [Example(F.softplus)],
    "nn.selu": [Example(F.selu)],
    "nn.dropout": [Example(nn.Dropout(0.5).eval())],
    "nn.batch_norm": [Example(lambda x: (x - 0.3) * (1.7 + 1e-5) ** -0.5 * 2.0 + 1.0)],
    "astype": [Example(lambda x: x.bool()), Example(lambda x: x.double()), Example(lambda x: x.long())],
    "sigmoid": [Example(torch.sigmoid)],
    "clip": [clip(-1, 2), clip(0, 1), clip(0.25, 1), clip(0, 0.5), clip(-3, -1), clip(0.2, 0.8), clip(0, 6)],
    "sqrt": [Example(torch.sqrt)],
    "log": [Example(torch.log)],
    "rsqrt": [Example(torch.rsqrt)],
    "exp": [Example(torch.exp)],
    "add": [Example(torch.add, 2)],
    "subtract": [Example(torch.sub, 2), from_constant(1.0), from_constant(2.0)],
    "multiply": [Example(torch.mul, 2)],
    "divide": [
        Example(torch.div, 2),
        of_constant(torch.div, -4.0),
        of_constant(torch.div, 0.0),
        of_constant(torch.div, NAN),
    ],
    "maximum": [Example(torch.maximum, 2)],
    "minimum": [Example(torch.minimum, 2)],
    "power": [of_constant(torch.pow, e) for e in (0.0, 0.5, 1.0, 2.0, -1.0, 4.0)] + [Example(torch.pow, 2)],
    "floor_divide": [Example(torch.floor_divide, 2)],
    "floor_mod": [Example(torch.remainder, 2)],
    "mod": [Example(torch.fmod, 2)],
    "bitwise_and": [Example(lambda a, b: torch.bitwise_and(integers(a), integers(b)), 2)],
    "bitwise_or": [Example(lambda a, b: torch.bitwise_or(integers(a), integers(b)), 2)],
    "where": [
        Example(lambda c, a, b: torch.where(c > 0, a, b), 3),
        Example(lambda c, a: torch.where(c > 0, a, 0.0), 2),
    ],
    "equal": [Example(torch.eq, 2)],
    "not_equal": [Example(torch.ne, 2)],
    "less": [Example(torch.lt, 2)],
    "less_equal": [Example(torch.le, 2)],
    "greater": [Example(torch.gt, 2)],
    "greater_equal": [Example(torch.ge, 2)],
    "isnan": [Example(torch.isnan)],
    "isfinite": [Example(torch.isfinite)],
    "isinf": [Example(torch.isinf)],
    "logical_and": [Example(torch.logical_and, 2)],
    "logical_or": [Example(torch.logical_or, 2)],
    "logical_xor": [Example(torch.logical_xor, 2)],
    "logical_not": [Example(torch.logical_not)],
    "concat": [Example(lambda a, b: torch.cat([a, b]), 2)],
    "reshape": [Example(lambda x: halves(x))],
    "expand_dims": [Example(lambda x: x[:, None])],
    "squeeze": [Example(lambda x: x.squeeze())],
    "permute_dims": [Example(lambda x: halves(x).T)],
    "broadcast_to": [Example(lambda x: x.expand(3, *x.shape))],
    "repeat": [Example(lambda x: x.repeat_interleave(2))],
    "tile": [Example(lambda x: x.tile(2))],
    "flatten": [Example(torch.flatten)],
    "split": [Example(lambda x: x.flatten().split(2)[0])],
    "strided_slice": [Example(lambda x: x.flatten()[1::2])],
    "take": [Example(lambda x: x.flatten()[torch.tensor([0, 1, 1])])],
    "max": [Example(lambda x: halves(x).amax(0))],
    "min": [Example(lambda x: halves(x).amin(1))],
    "nn.softmax": [Example(lambda x: F.softmax(halves(x), 1))],
    "one_hot": [one_hot(1, 0), one_hot(0, 1), one_hot(2, 0), one_hot(1, -1)],
    "zeros": [full(0)],
    "ones": [full(1)],
    "zeros_like": [full(0)],
    "ones_like": [full(1)],
    "full": [full(0), full(1), full(0.5)],
    "full_like": [full(1), full(-1), Example(lambda x: torch.full((4,), 3.0))],
    "nn.max_pool3d": [
        Example(lambda x: F.max_pool3d(tiled(x), 2), window=POOL),
        Example(lambda x: F.max_pool3d(tiled(x), 2, 1, 1), window=PADDED),
        Example(lambda x: F.max_pool3d(tiled(x)[..., :2, :2, :2], 2, 1, 1, 3), window=FAR),
    ],
    "nn.avg_pool3d": [Example(lambda x: F.avg_pool3d(tiled(x), 2), window=POOL)],
    "nn.conv3d": [Example(lambda x: F.conv3d(tiled(x), torch.full((1, 1, 2, 2, 2), -1.5), stride=2), window=POOL)],
}
EXAMPLES |= {name.replace("3d", "2d"): EXAMPLES[name] for name in list(EXAMPLES) if name.endswith("3d")}

ALL = [(name, example) for name, examples in EXAMPLES.items() for example in examples]


def tiled(x: Tensor) -> Tensor:
    """(1, 1, 4, 4, 4) out of any values."""
    return x.flatten().repeat(1 + 64 // x.numel())[:64].reshape(1, 1, 4, 4, 4)


def integers(x: Tensor) -> Tensor:
    """int64 out of any values."""
    return x.nan_to_num(0, 0, 0).long()


def halves(x: Tensor) -> Tensor:
    """(2, n) out of any values."""
    return x.flatten()[: x.numel() // 2 * 2].reshape(2, -1)


def said(name: str, example: Example) -> tuple[Zeros, Reads, Values]:
    rule, operation = RULES[name], example.operation(name)
    return answer(rule.zeros, operation), answer(rule.reads, operation), answer(rule.values, operation)


def every(values: list[float], operands: int) -> list[Tensor]:
    """Every combination of ``values`` as operands, and random ones drawn from them."""
    grid = torch.cartesian_prod(*[torch.tensor(values)] * operands).reshape(-1, operands)
    drawn = torch.tensor(values)[torch.randint(len(values), (64, operands), generator=torch.Generator().manual_seed(1))]
    return list(torch.cat([grid, drawn]).T)


def test_every_row_has_an_example() -> None:
    assert set(EXAMPLES) == set(RULES)


@pytest.mark.parametrize(("name", "example"), ALL, ids=[name for name, _ in ALL])
def test_zeros_stay_zeros(name: str, example: Example) -> None:
    zeros, _, _ = said(name, example)
    zero, any_number = torch.tensor([0.0, -0.0]), torch.tensor(FINITE)
    if zeros in (Zeros.FIRST, Zeros.WINDOW):
        assert (example.apply(zero) == 0).all()
    if zeros is Zeros.ALL and example.operands == 2:
        assert (example.apply(*every([0.0, -0.0], 2)) == 0).all()
    if zeros is Zeros.ONE:
        for nothing in (0.0, -0.0):
            assert (example.apply(any_number, torch.tensor(nothing)) == 0).all()
            assert (example.apply(torch.tensor(nothing), any_number) == 0).all()
    if zeros is Zeros.CHOSEN and example.operands == 2:  # the other branch is the constant 0
        poison = torch.tensor([NAN, INF, -INF, 1.0])
        assert (example.apply(torch.zeros(4), poison) == 0).all()
        assert (example.apply(torch.ones(2), zero) == 0).all()


@pytest.mark.parametrize(("name", "example"), ALL, ids=[name for name, _ in ALL])
def test_what_is_left_out_stays_finite(name: str, example: Example) -> None:
    _, reads, _ = said(name, example)
    if reads is Reads.EVERYTHING:
        return
    found = example.apply(*every(FINITE, example.operands))
    window = name in ("nn.max_pool3d", "nn.max_pool2d") and example.window is FAR
    assert window or torch.isfinite(found.double()).all()


@pytest.mark.parametrize(("name", "example"), ALL, ids=[name for name, _ in ALL])
def test_masks_are_masks(name: str, example: Example) -> None:
    """NaN aside, as rows promise; a comparison's result is a mask of NaN too."""
    _, _, values = said(name, example)

    def inside(found: Tensor, wanted: Values) -> bool:
        found = found.double()
        found = found[~found.isnan()]
        if wanted is Values.UNIT:
            return bool(((found >= 0) & (found <= 1)).all())
        return bool(((found == 0) | (found == 1)).all())

    anything = every([*FINITE, INF, -INF, NAN], example.operands)
    if values is Values.BITS:
        assert inside(example.apply(*anything), Values.BITS)
        assert not example.apply(*anything).double().isnan().any()
    if values in (Values.UNIT, Values.CUT):
        assert inside(example.apply(*anything), Values.UNIT)
    if values in (Values.AS_OPERANDS, Values.AS_BRANCHES, Values.CUT):
        for numbers, kind in ((BITS, Values.BITS), (UNIT, Values.UNIT)):
            assert inside(example.apply(*every(numbers, example.operands)), kind)
    if values is Values.ROUNDED:
        assert inside(example.apply(torch.tensor(UNIT)), Values.BITS)


@pytest.mark.parametrize("name", sorted(UNARY | PAIRWISE))
def test_elements_stay_apart(name: str) -> None:
    """Changing one element of an operand changes the same element of the result alone."""
    for example in EXAMPLES[name]:
        operands = [torch.linspace(0.1, 0.9, 5) + place for place in range(example.operands)]
        before = example.apply(*operands)
        for operand in operands:
            kept, operand[2] = operand[2].clone(), 9.0
            changed = ~torch.isclose(example.apply(*operands).double(), before.double(), 0, 0, equal_nan=True)
            operand[2] = kept
            assert not changed[[0, 1, 3, 4]].any()


@pytest.mark.parametrize(
    ("name", "example"),
    [
        *(("clip", clip(low, high)) for low, high in ((0.25, 1), (0, 0.5), (0.5, 0.5), (1, 3), (-1, 0.9))),
        *(("one_hot", one_hot(on, off)) for on, off in ((2, 0), (1, -1), (0.5, 0))),
        ("subtract", Example(torch.sub, 2)),
        ("subtract", from_constant(0.5)),
        ("add", Example(torch.add, 2)),
        ("nn.avg_pool3d", EXAMPLES["nn.avg_pool3d"][0]),
        ("negative", Example(torch.neg)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_looks_like_a_mask_and_is_none(name: str, example: Example) -> None:
    """Operators that make other numbers of zeros and ones are not said to keep them."""
    _, _, values = said(name, example)
    assert values in (Values.ANY, Values.UNIT)


@pytest.mark.parametrize("name", ["log", "rsqrt", "exp", "sqrt", "divide", "power"])
def test_operators_that_may_blow_up_read_everything(name: str) -> None:
    assert said(name, EXAMPLES[name][-1])[1] is Reads.EVERYTHING


@pytest.mark.parametrize("number", [0.0, NAN, 1e-38])
def test_a_division_by_zero_is_no_division_by_a_number(number: float) -> None:
    zeros, reads, _ = said("divide", of_constant(torch.div, number))
    assert (zeros, reads) == (Zeros.UNKNOWN, Reads.EVERYTHING)


PAGE = Path(__file__).parents[1] / "docs" / "liveness.md"


def table() -> str:
    """The rows of docs/liveness.md: operators with the same answers share one."""
    rows: dict[Rule, list[str]] = {}
    for name, rule in RULES.items():
        rows.setdefault(rule, []).append(name)
    lines = ["| operators | zeros | reads | values | because |", "|---|---|---|---|---|"]
    for rule, names in rows.items():
        answers = " | ".join(told(part) for part in (rule.zeros, rule.reads, rule.values))
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {answers} | {rule.why} |")
    return "\n".join(lines)


def told(part: Zeros | Reads | Values | When) -> str:
    if isinstance(part, When):
        return f"{part.text}: {told(part.then)}; else {told(part.otherwise)}"
    return str(part.value)


def test_the_page_shows_this_table() -> None:
    """UPDATE_LIVENESS=1 writes it."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition("<!-- table -->\n")
    after = rest.partition("<!-- end of table -->")[2]
    wanted = f"{before}<!-- table -->\n{table()}\n<!-- end of table -->{after}"
    if os.environ.get("UPDATE_LIVENESS"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert page == wanted, "docs/liveness.md is not up to date: run this test with UPDATE_LIVENESS=1"
