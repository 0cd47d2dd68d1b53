"""Steps on values of other types than float32: bytes, integers, booleans, half and double precision, scalars."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from .operators import Draft, Shape, expression, number, operator

#: What networks are given besides float32, as often as that.
DTYPES = ("uint8", "uint8", "int64", "int64", "int32", "bool", "float16", "float64", "int8", "int16")
_FLOAT = "{x}.to(torch.get_default_dtype())"  # float64 where the answer is computed
_TO_FLOAT = (_FLOAT,) * 6 + ("{x} * 0.5", "{x} / 3", "{x} - 1.5", "torch.where({x} > 1, {x} * 0.5, -1.0)")
_TO_FLOAT += ("torch.where({x} > 0, 1.0, 0.25)", "{x} / ({x}.abs() + 1)", "torch.sigmoid({x})", "torch.sqrt({x}.abs())")
_SAME = ("{x}.flip(-1)", "{x}[..., ::2]", "F.pad({x}, (1, 0), value=1)", "torch.cat([{x}, {x}], 0)[:{s}[0]]")
_SAME += ("{x}.transpose(1, -1)", "{x}.clone()", "torch.roll({x}, 1, -1)", "{x}.repeat_interleave(2, -1)")
_WHOLE = (
    "{x} // 3",
    "{x} % 5",
    "{x} % -3",
    "{x} // -2",
    "torch.div({x}, 3, rounding_mode='trunc')",
    "torch.fmod({x}, 3)",
)
_WHOLE += ("{x} & 6", "{x} | 1", "{x} ^ 3", "~{x}", "{x} << 1", "{x} >> 1", "{x}.clamp(-2, 3)", "{x}.clamp(max=2)")
_WHOLE += ("{x} * 3 - 1", "7 - {x}", "-{x}", "{x}.abs()", "{x}.sign()", "{x} ** 2", "{x}.square()", "F.relu({x})")
_WHOLE += (
    "torch.maximum({x}, {x}.flip(-1))",
    "torch.where({x} > 1, {x}, 0)",
    "{x}.sort(-1)[0]",
    "{x}.masked_fill({x} > 2, 1)",
)
_WHOLE += ("{x}.to(torch.uint8)", "{x}.to(torch.int8)", "{x}.int()", "{x}.long()", "{x}.bool()", "{x}.to(torch.int16)")
_WHOLE += ("{x} > 1", "{x} == 2", "{x} != {x}.flip(-1)", "{x} % 3 == 0", "torch.remainder({x}, 4) - 2", "{x} + True")
_WHOLE += ("F.one_hot({x}.long() % 4, 4)", "F.embedding({x}.long() % 5, {l})", "{l}[({x} % 5).long()]")
_WHOLE += (
    "torch.bitwise_left_shift({x}, 2)",
    "torch.rsub({x}, 2)",
    "torch.addcmul({x}, {x}, {x})",
    "{x}.cummax(-1)[0]",
)
_ALONG = ("{x}.sum(%d)", "{x}.sum(%d, keepdim=True)", "{x}.cumsum(%d)", "{x}.amax(%d, keepdim=True)", "{x}.argmax(%d)")
_ALONG += (
    "{x}.prod(%d)",
    "{x}.any(%d)",
    "{x}.all(%d, keepdim=True)",
    "{x}.argmin(%d, keepdim=True)",
    "{x}.diff(dim=%d)",
)
_BOOLS = ("~{x}", "{x} & {x}.flip(-1)", "{x} | {x}.flip(-1)", "{x} ^ {x}.flip(-1)", "{x} + {x}", "{x} * 2", "{x} * {x}")
_BOOLS += (
    "torch.where({x}, 1.0, -0.5)",
    "torch.where({x}, 3, 2)",
    "{x}.int() - 1",
    "{x}.logical_not()",
    "{x} == {x}.flip(-1)",
)
_BOOLS += (
    "{x} > False",
    "{x}.float().cumsum(-1)",
    "{x} / 2",
    "1 - {x}.to(torch.uint8)",
    "{x}.sort(-1)[0]",
    "{x} << 1",
    "{x} + 1",
)
_REAL = (
    "{x} * 2",
    "{x} + 0.5",
    "F.relu({x})",
    "{x}.clamp(-1, 1)",
    "{x} * {x}",
    "{x}.abs().sqrt()",
    "{x} > 0.2",
    "torch.tanh({x})",
)
_REAL += ("{x}.float()", "{x}.double()", "({x} * 4).int()", "{x}.mean(-1, keepdim=True)", "F.softmax({x}, -1)")


def typed_step(rng: Random, shape: Shape, dtype: torch.dtype) -> Draft | None:
    """A step on a value that is no float32; half of them make it one."""
    if 0 in shape:
        return None
    init = ["{l} = nn.Parameter(torch.randn(5, 3))"]
    if dtype.is_floating_point:
        return expression(rng.choice((_FLOAT,) * 12 + _SAME + _REAL))
    if rng.random() < 0.4:
        return expression(rng.choice(_TO_FLOAT))
    along = tuple(form % rng.randrange(len(shape)) for form in _ALONG) if shape else ()
    form = rng.choice((*(_BOOLS if dtype == torch.bool else _WHOLE), *_SAME, *along))
    return Draft(["{y} = " + form], init if "{l}" in form else [])


def mixed(rng: Random, one: Tensor, other: Tensor) -> Draft | None:
    """Two values of which one is no float32, or a scalar, joined as PyTorch promotes them."""
    forms = ["{x} + {x1}", "{x} * {x1}", "{x1} - {x}", "torch.maximum({x}, {x1})", "{x} > {x1}", "{x} == {x1}"]
    forms += ["torch.where({x1} > 0, {x}, {x} * 2)", "torch.where({x1} > 0, {x}, {x1})", "{x} * ({x1} > 0)"]
    forms += ["{x}.masked_fill({x1} > 1, 0)", "torch.stack([{x}, {x1}.to({x}.dtype).expand_as({x})])"]
    forms += [
        "{x} * {x1}.to({x}.dtype)",
        "{x} + {x1}.to({x}.dtype)",
        "{x} / ({x1}.abs() + 1)",
        "{x} // ({x1}.abs() + 1)",
    ]
    forms += ["{x} % (2 + {x1}.abs())", "torch.cat([{x}, {x1}], -1)", "{x} & {x1}", "{x} ^ {x1}", "{x} | {x1}"]
    if not other.is_floating_point() and one.dim() > 1:
        dim = rng.randrange(1, one.dim())
        index = f"({{x1}}.long() % {one.shape[dim]})"
        forms += [
            f"{{x}}.index_select({dim}, {index}.flatten()[:3])",
            f"{{x}}.take_along_dim({index}.reshape(-1)[:1].reshape([1] * {{x}}.dim()), {dim})",
        ]
        forms += [
            f"torch.gather({{x}}, {dim}, {index})",
            f"{{x}}.scatter({dim}, {index}, {{x}} * 2)",
            f"{{x}}.scatter_add({dim}, {index}, {{x}})",
        ]
    return expression(rng.choice(forms))


@operator(3)
def to_another_type(rng: Random, shape: Shape) -> Draft:
    dim = rng.randrange(1, len(shape))
    forms = [
        "({x} * 4).int()",
        "({x} * 3).round().long()",
        "{x} > 0.1",
        "({x}.abs() * 9).to(torch.uint8)",
        "{x}.double()",
    ]
    forms += [
        f"{{x}}.argmax({dim})",
        f"{{x}}.argmin({dim}, keepdim=True)",
        "torch.floor({x} * 2).to(torch.int8)",
        "{x} == {x}",
    ]
    forms += ["{x}.trunc().to(torch.int16)", f"({{x}} > 0).sum({dim})", "{x}.isnan()", "{x}.sign().int()"]
    return expression(rng.choice(forms))


@operator(2, (2, 3, 4, 5))
def nothing(rng: Random, shape: Shape) -> Draft:
    """Slices of no elements, beside what has some."""
    dim = rng.randrange(1, len(shape))
    none = f"{{x}}.narrow({dim}, {rng.randrange(shape[dim] + 1)}, 0)"
    forms = [f"{{y}} = torch.cat([{none}, {{x}}, {none}], {dim})", f"{{y}} = {{x}} + {none}.sum({dim}, keepdim=True)"]
    forms += [
        f"{{y}} = {none}",
        f"a = {{x}}.clone(); {none.replace('{x}', 'a')}.fill_(3); {{y}} = a",
        f"{{y}} = {none}.sum() + {{x}}",
    ]
    forms += [
        f"{{y}} = {{x}}.split([0, {shape[dim]}], {dim})[1]",
        f"{{y}} = {none}.amax(0) if 0 else {{x}} * {number(rng)}",
    ]
    forms += [
        f"{{y}} = F.pad({none}, [0, 0] * ({{x}}.dim() - 1 - {dim}) + [1, 2], value=0.5)",
        f"{{y}} = {none}.prod({dim}, keepdim=True) * {{x}}",
    ]
    return Draft([rng.choice(forms)])
