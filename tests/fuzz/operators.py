"""What programs are made of: each function draws one step that fits the shape it is given, or None."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

Shape = tuple[int, ...]


@dataclass
class Draft:
    """A step before its place is known."""

    body: list[str]
    init: list[str] = field(default_factory=list)
    mask: list[int] | None = None


Drawer = Callable[[Random, Shape], "Draft | None"]
OPERATORS: dict[str, tuple[int, Drawer]] = {}


def operator(weight: int, ranks: tuple[int, ...] = (3, 4, 5)) -> Callable[[Drawer], Drawer]:
    """Registers a step for tensors with that many axes, drawn in proportion to ``weight``."""

    def register(draw: Drawer) -> Drawer:
        def fitting(rng: Random, shape: Shape) -> Draft | None:
            return draw(rng, shape) if len(shape) in ranks and 0 not in shape else None

        OPERATORS[draw.__name__] = weight, fitting
        return draw

    return register


def layer(text: str) -> Draft:
    return Draft(["{y} = {l}({x})"], ["{l} = " + text])


def expression(text: str) -> Draft:
    return Draft(["{y} = " + text])


def some(rng: Random, choices: Any, count: int) -> tuple[Any, ...]:
    return tuple(rng.choice(choices) for _ in range(count))


def maybe_same(rng: Random, values: tuple[int, ...]) -> str:
    """One number where all are alike, now and then."""
    return str(values[0]) if len(set(values)) == 1 and rng.random() < 0.5 else str(values)


def number(rng: Random) -> float:
    return round(rng.uniform(-2, 2), 2) or 0.5


# --- convolutions ---


def _kernel(rng: Random, extents: Shape, padding: Shape) -> tuple[Shape, Shape]:
    """Kernel and dilation that fit the padded extents; often the factorised forms (1, 3, 3) and (3, 1, 1)."""
    rank = len(extents)
    kernel = some(rng, (1, 2, 3, 3, 3, 4, 5), rank)
    if rng.random() < 0.4:
        kernel = (3,) * rank
    elif rank == 3 and rng.random() < 0.5:
        kernel = rng.choice([(1, 3, 3), (3, 1, 1), (1, 1, 1), (3, 3, 1), (1, 1, 3), (1, 7, 7), (2, 1, 3)])
    dilation = some(rng, (1, 1, 1, 1, 2, 3), rank) if rng.random() < 0.4 else (1,) * rank
    kernel = tuple(min(k, n + 2 * p) for k, n, p in zip(kernel, extents, padding, strict=True))
    dilation = tuple(
        d if d * (k - 1) + 1 <= n + 2 * p else 1 for d, k, n, p in zip(dilation, kernel, extents, padding, strict=True)
    )
    return kernel, dilation


def _convolution(rng: Random, shape: Shape, *, groups: int | None = None, out: int | None = None) -> tuple[int, str]:
    """Output channels and the arguments behind them."""
    channels, extents = shape[1], shape[2:]
    rank = len(extents)
    padding = some(rng, (0, 1, 1, 2), rank) if rng.random() < 0.5 else (rng.choice((0, 1, 1)),) * rank
    kernel, dilation = _kernel(rng, extents, padding)
    stride = some(rng, (1, 1, 2, 3), rank) if rng.random() < 0.4 else (1,) * rank
    common = [g for g in (2, 3, 4) if channels % g == 0]
    if groups is None:
        groups = rng.choice(common) if common and rng.random() < 0.15 else 1
    out = out or groups * rng.choice((1, 2, 3, 4, 5, 8, 9, 16, 17)) // (groups if rng.random() < 0.5 else 1) or groups
    out = max(groups, out - out % groups)
    mode = rng.choice(("zeros",) * 8 + ("replicate", "circular", "reflect"))
    if any(p >= n for p, n in zip(padding, extents, strict=True)):
        mode = "zeros"
    pad = repr("same") if stride == (1,) * rank and rng.random() < 0.1 else maybe_same(rng, padding)
    words = [maybe_same(rng, kernel), f"stride={maybe_same(rng, stride)}", f"padding={pad}"]
    if set(dilation) != {1}:
        words.append(f"dilation={maybe_same(rng, dilation)}")
    if groups != 1:
        words.append(f"groups={groups}")
    if mode != "zeros":
        words.append(f"padding_mode={mode!r}")
    if rng.random() < 0.3:
        words.append("bias=False")
    return out, ", ".join(words)


@operator(30)
def convolution(rng: Random, shape: Shape) -> Draft:
    out, words = _convolution(rng, shape)
    return layer(f"nn.Conv{len(shape) - 2}d({{c}}, {out}, {words})")


@operator(6)
def depthwise(rng: Random, shape: Shape) -> Draft:
    channels = shape[1]
    out, words = _convolution(rng, shape, groups=channels, out=channels * rng.choice((1, 1, 2)))
    return layer(f"nn.Conv{len(shape) - 2}d({{c}}, {out}, {words})")


@operator(7)
def transposed_convolution(rng: Random, shape: Shape) -> Draft:
    channels, extents = shape[1], shape[2:]
    rank = len(extents)
    kernel, stride = some(rng, (1, 2, 3, 4), rank), some(rng, (1, 2, 2, 3), rank)
    dilation = some(rng, (1, 1, 1, 2), rank)
    padding = tuple(rng.randrange(0, d * (k - 1) + 1) for k, d in zip(kernel, dilation, strict=True))
    extra = tuple(rng.randrange(0, max(s, d)) for s, d in zip(stride, dilation, strict=True))
    groups = rng.choice([1, 1, 1, *(g for g in (2, 3, channels) if channels % g == 0)])
    out = groups * rng.choice((1, 2, 3, 5))
    words = f"{kernel}, stride={stride}, padding={padding}, output_padding={extra}, dilation={dilation}"
    return layer(f"nn.ConvTranspose{rank}d({{c}}, {out}, {words}, groups={groups}, bias={rng.random() < 0.7})")


@operator(7, (4, 5))
def pruned_convolution(rng: Random, shape: Shape) -> Draft:
    """RT3D's schemes, baked into the weights or as the parametrisation that training has."""
    scheme = rng.choice(("kgs", "kgs", "vanilla", "filter"))
    gm, gn, share = rng.choice((2, 4, 8)), rng.choice((1, 2, 4)), rng.choice((0.2, 0.5, 0.8, 1.0))
    out, words = _convolution(rng, shape, groups=1, out=rng.choice((4, 8, 9, 16, 20)))
    init = [
        "from dance_tvm.sparsity.rt3d.masks import add_mask, bake_masks, set_mask",
        "from dance_tvm.sparsity.rt3d.schemes import Scheme",
        f"{{l}} = nn.Conv{len(shape) - 2}d({{c}}, {out}, {words})",
        f"scheme = Scheme({scheme!r}, {gm}, {gn})",
        f"keep = (torch.rand(scheme.norms({{l}}.weight.detach()).shape) > {share}).float()",
        "add_mask({l})",
        "set_mask({l}, scheme.expand(keep, {l}.weight).bool())",
    ]
    return Draft(["{y} = {l}({x})"], init + (["bake_masks({l})"] if rng.random() < 0.6 else []))


@operator(3)
def reparametrised_convolution(rng: Random, shape: Shape) -> Draft:
    """Weight norm, spectral norm and pruning hooks, which compute the weight in every pass."""
    rank = len(shape) - 2
    out, words = _convolution(rng, shape)
    if rng.random() < 0.3:
        text = f"nn.ConvTranspose{rank}d({{c}}, {rng.choice((2, 3, 8))}, 3, stride={rng.choice((1, 2))})"
    else:
        text = f"nn.Conv{rank}d({{c}}, {out}, {words})"
    how = rng.choice(
        (
            "{l} = nn.utils.parametrizations.weight_norm({l})",
            "{l} = nn.utils.parametrizations.spectral_norm({l}).eval()",
            "import torch.nn.utils.prune as prune; prune.random_unstructured({l}, 'weight', 0.5)",
            "import torch.nn.utils.prune as prune; prune.random_structured({l}, 'weight', 0.5, dim=0)",
        )
    )
    return Draft(["{y} = {l}({x})"], [f"{{l}} = {text}", how])


@operator(5)
def batch_norm_after_convolution(rng: Random, shape: Shape) -> Draft:
    rank = len(shape) - 2
    out, words = _convolution(rng, shape)
    between = rng.choice(("", "nn.ReLU(), ", "")) if rng.random() < 0.3 else ""
    activation = rng.choice(("", ", nn.ReLU()", ", nn.ReLU(inplace=True)", ", nn.SiLU()"))
    init = (
        f"{{l}} = nn.Sequential(nn.Conv{rank}d({{c}}, {out}, {words}), {between}nn.BatchNorm{rank}d({out}){activation})"
    )
    return Draft(["{y} = {l}({x})"], [init])


@operator(4)
def residual(rng: Random, shape: Shape) -> Draft:
    rank, channels = len(shape) - 2, shape[1]
    middle = rng.choice((channels, 4, 8))
    inner = f"nn.Conv{rank}d({{c}}, {middle}, 3, padding=1), nn.ReLU(), nn.Conv{rank}d({middle}, {{c}}, 3, padding=1)"
    if rng.random() < 0.5:
        inner += f", nn.BatchNorm{rank}d({{c}})"
    form = rng.choice(("F.relu({l}({x}) + {x})", "{x} + {l}({x})", "F.relu({x} - {l}(F.relu({x})))"))
    return Draft(["{y} = " + form], [f"{{l}} = nn.Sequential({inner})"])


# --- pools ---


def _window(rng: Random, extents: Shape) -> tuple[Shape, Shape, Shape]:
    """Kernel, stride and padding of a pool."""
    rank = len(extents)
    kernel = some(rng, (1, 2, 2, 3, 3), rank) if rng.random() < 0.6 else (rng.choice((2, 3)),) * rank
    kernel = tuple(min(k, n) for k, n in zip(kernel, extents, strict=True))
    stride = some(rng, (1, 2, 2, 3), rank) if rng.random() < 0.6 else (rng.choice((1, 2)),) * rank
    padding = tuple(rng.choice((0, 0, k // 2)) for k in kernel)
    return kernel, stride, padding


@operator(10)
def max_pool(rng: Random, shape: Shape) -> Draft:
    kernel, stride, padding = _window(rng, shape[2:])
    ceil = f", ceil_mode={rng.random() < 0.4}"
    dilation = some(rng, (1, 1, 2), len(kernel)) if rng.random() < 0.2 else (1,) * len(kernel)
    padded = [n + 2 * p for n, p in zip(shape[2:], padding, strict=True)]
    if any(d * (k - 1) + 1 > n for d, k, n in zip(dilation, kernel, padded, strict=True)):
        dilation = (1,) * len(kernel)
    words = f"{maybe_same(rng, kernel)}, {maybe_same(rng, stride)}, {maybe_same(rng, padding)}, {dilation}{ceil}"
    repeats = rng.choice((1, 1, 1, 2))  # pools behind one another are joined into one function
    if repeats == 2:
        return layer(f"nn.Sequential(nn.MaxPool{len(kernel)}d(3, 1, 1), nn.MaxPool{len(kernel)}d({words}))")
    return layer(f"nn.MaxPool{len(kernel)}d({words})")


@operator(10)
def average_pool(rng: Random, shape: Shape) -> Draft:
    kernel, stride, padding = _window(rng, shape[2:])
    words = f"{maybe_same(rng, kernel)}, {maybe_same(rng, stride)}, {maybe_same(rng, padding)}"
    words += f", ceil_mode={rng.random() < 0.4}, count_include_pad={rng.random() < 0.5}"
    if len(kernel) > 1 and rng.random() < 0.15:
        words += f", divisor_override={rng.choice((2, 3, 7))}"
    return layer(f"nn.AvgPool{len(kernel)}d({words})")


@operator(4)
def adaptive_pool(rng: Random, shape: Shape) -> Draft:
    kind = rng.choice(("Avg", "Avg", "Max"))
    sizes = tuple(rng.choice((1, 1, 2, 3, n)) for n in shape[2:])
    words = str(sizes) if rng.random() < 0.7 else str(rng.choice((1, 2)))
    return layer(f"nn.Adaptive{kind}Pool{len(sizes)}d({words})")


@operator(2)
def power_pool(rng: Random, shape: Shape) -> Draft | None:
    if len(shape) == 5:
        return None
    return expression(f"F.lp_pool{len(shape) - 2}d({{x}}.abs() + 0.1, 2, {min(2, *shape[2:])})")


# --- norms and linear layers ---


@operator(9)
def norm(rng: Random, shape: Shape) -> Draft | None:
    rank, channels = len(shape) - 2, shape[1]
    offset = rng.choice(("", "", "", " + 30", " * 5 - 100", " + 300"))
    groups = rng.choice([g for g in (1, 2, 3, 4, channels) if channels % g == 0])
    kinds = [f"nn.BatchNorm{rank}d({{c}})"] * 2
    if math.prod(shape[2:]) > 1:
        kinds.append(f"nn.InstanceNorm{rank}d({{c}}, affine={rng.random() < 0.5})")
        kinds.append(f"nn.InstanceNorm{rank}d({{c}}, affine=True, track_running_stats=True)")
    if math.prod(shape[2:]) * (channels // groups) > 1:
        kinds.append(f"nn.GroupNorm({groups}, {{c}}, affine={rng.random() < 0.8})")
    dims = rng.randrange(1, len(shape))
    if math.prod(shape[-dims:]) > 1:
        kinds.append(f"nn.LayerNorm({{s}}[-{dims}:])")
    return Draft(["{y} = {l}({x}" + offset + ")"], ["{l} = " + rng.choice(kinds)])


@operator(3)
def norm_over_channels(rng: Random, shape: Shape) -> Draft | None:
    """As ConvNeXt and transformers have it: channels moved last, normalised, moved back."""
    if shape[1] < 2:
        return None
    kind = rng.choice(("nn.LayerNorm({c})", "nn.RMSNorm({c})"))
    return Draft(["{y} = {l}({x}.movedim(1, -1)).movedim(-1, 1)"], ["{l} = " + kind])


@operator(3)
def norm_by_hand(rng: Random, shape: Shape) -> Draft | None:
    dims = tuple(sorted(rng.sample(range(1, len(shape)), rng.randrange(1, len(shape)))))
    if math.prod(shape[d] for d in dims) < 2:
        return None
    unbiased = rng.random() < 0.5
    deviation = rng.choice(
        (
            f"({{x}}.var({dims}, keepdim=True, unbiased={unbiased}) + 1e-3).sqrt()",
            f"({{x}}.std({dims}, keepdim=True, unbiased={unbiased}) + 1e-2)",
            f"(({{x}} - {{x}}.mean({dims}, keepdim=True)).square().mean({dims}, keepdim=True) + 1e-3).sqrt()",
            f"({{x}}.norm(dim={dims}, keepdim=True) + 1e-2)",
        )
    )
    return expression(f"({{x}} - {{x}}.mean({dims}, keepdim=True)) / {deviation}")


@operator(5, (2, 3, 4, 5))
def linear(rng: Random, shape: Shape) -> Draft:
    out = rng.choice((1, 2, 3, 5, 8, 16, 17))
    return layer(f"nn.Linear({{s}}[-1], {out}, bias={rng.random() < 0.7})")


@operator(3)
def linear_over_channels(rng: Random, shape: Shape) -> Draft:
    body = "{y} = {l}({x}.movedim(1, -1)).movedim(-1, 1)"
    return Draft([body], [f"{{l}} = nn.Linear({{c}}, {rng.choice((2, 3, 8, 9))})"])


@operator(2, (2, 3, 4, 5))
def bilinear_form(rng: Random, shape: Shape) -> Draft:
    out = rng.choice((1, 3, 4, 8))
    form = rng.choice(
        ("{x} @ {l}", "torch.matmul({x}, {l})", "torch.einsum('...i,ij->...j', {x}, {l})", "F.linear({x}, {l}.t())")
    )
    return Draft(["{y} = " + form], [f"{{l}} = nn.Parameter(torch.randn({{s}}[-1], {out}) * 0.3)"])


# --- activations and arithmetic ---

ACTIVATIONS = (
    "F.relu({x})",
    "F.relu({x})",
    "F.relu6({x})",
    "F.leaky_relu({x}, 0.1)",
    "F.leaky_relu({x}, -0.2)",
    "F.elu({x}, 0.7)",
    "F.selu({x})",
    "F.celu({x}, 1.5)",
    "F.gelu({x})",
    "F.gelu({x}, approximate='tanh')",
    "F.silu({x})",
    "F.mish({x})",
    "F.hardswish({x})",
    "F.hardsigmoid({x})",
    "F.hardtanh({x}, -0.5, 0.8)",
    "F.softplus({x})",
    "F.softplus({x}, 2.0)",
    "F.softsign({x})",
    "F.tanhshrink({x})",
    "F.softshrink({x}, 0.3)",
    "F.logsigmoid({x})",
    "torch.sigmoid({x})",
    "torch.tanh({x})",
    "{x}.clamp(-1, 1)",
    "{x}.clamp(min=0.2)",
    "{x}.clamp(max=0.5)",
    "{x}.relu().sqrt()",
    "{x}.abs()",
    "{x}.abs().sqrt()",
    "{x}.square()",
    "{x}.pow(3)",
    "(-{x}.abs()).exp()",
    "{x}.clamp(-3, 3).exp()",
    "{x}.abs().log1p()",
    "({x}.abs() + 0.5).log()",
    "({x}.abs() + 0.5).reciprocal()",
    "({x}.abs() + 0.5).rsqrt()",
    "torch.erf({x})",
    "torch.sin({x})",
    "torch.cos({x})",
    "torch.atan({x})",
    "torch.expm1(-{x}.abs())",
    "-{x}",
)


@operator(14, (2, 3, 4, 5))
def activation(rng: Random, shape: Shape) -> Draft:
    return expression(rng.choice(ACTIVATIONS))


@operator(4)
def learned_activation(rng: Random, shape: Shape) -> Draft:
    return layer(rng.choice(("nn.PReLU({c})", "nn.PReLU()")))


@operator(6, (2, 3, 4, 5))
def arithmetic(rng: Random, shape: Shape) -> Draft:
    a = number(rng)
    forms = ("{x} * %s", "%s * {x}", "{x} + %s", "%s - {x}", "{x} / %s", "torch.maximum({x}, {x} * %s)")
    forms += ("torch.minimum({x}, %s - {x})", "{x} * {x} * %s", "torch.lerp({x}, {x}.square(), %s)")
    return expression(rng.choice(forms) % a)


@operator(5, (2, 3, 4, 5))
def parameter_arithmetic(rng: Random, shape: Shape) -> Draft:
    """A parameter of some of the axes, also where an axis that is 1 long or as long as another misleads."""
    kept = [rng.random() < 0.5 for _ in shape]
    inner = "(" + ", ".join(f"{{s}}[{i}]" if keep else "1" for i, keep in enumerate(kept)) + ",)"
    skipped = next((i for i, keep in enumerate(kept) if keep), len(shape)) if rng.random() < 0.5 else 0
    form = rng.choice(("{x} * {l}", "{x} + {l}", "{l} - {x}", "{x} / ({l}.abs() + 0.5)", "torch.maximum({x}, {l})"))
    return Draft(["{y} = " + form], [f"{{l}} = nn.Parameter(torch.randn({inner}[{skipped}:]))"])


@operator(2)
def branches(rng: Random, shape: Shape) -> Draft:
    return expression(
        rng.choice(
            (
                "torch.where({x} > 0.2, {x}, {x} * 0.1)",
                "torch.where({x} < 0, {x}.exp(), {x} + 1)",
                "torch.where({x} > 0, 0.5, {x})",
                "{x}.masked_fill({x} > 1, 1.0)",
                "F.threshold({x}, 0.1, 0.1)",
            )
        )
    )


# --- shapes ---


@operator(3)
def concatenation(rng: Random, shape: Shape) -> Draft:
    dim = rng.choice((1, 1, 1, *range(2, len(shape))))
    others = ("{x} * 2", "F.relu({x})", "-{x}", "{x}", "torch.zeros_like({x})", "torch.ones_like({x})")
    chosen = ", ".join(["{x}", *rng.sample(others, rng.choice((1, 1, 2)))])
    return expression(f"torch.cat([{chosen}], {dim - (len(shape) if rng.random() < 0.2 else 0)})")


@operator(3)
def branching(rng: Random, shape: Shape) -> Draft:
    """An inception module: convolutions and a pool side by side."""
    rank = len(shape) - 2
    a, b = rng.choice((1, 2, 5, 8)), rng.choice((2, 3, 8))
    pool = rng.choice(("max_pool", "avg_pool"))
    init = [f"{{l}} = nn.Conv{rank}d({{c}}, {a}, 1)", f"{{l}}b = nn.Conv{rank}d({{c}}, {b}, 3, padding=1)"]
    return Draft([f"{{y}} = torch.cat([{{l}}({{x}}), {{l}}b({{x}}), F.{pool}{rank}d({{x}}, 3, 1, 1)], 1)"], init)


@operator(4)
def splitting(rng: Random, shape: Shape) -> Draft | None:
    dims = [d for d in range(1, len(shape)) if shape[d] > 1]
    if not dims:
        return None
    dim = rng.choice(dims)
    cut = rng.randrange(1, shape[dim])
    forms = [
        f"a, b = {{x}}.split([{cut}, {{s}}[{dim}] - {cut}], {dim}); {{y}} = torch.cat([b, F.relu(a)], {dim})",
        f"a, *b = {{x}}.unbind({dim}); {{y}} = torch.stack([*b, a * 2], {dim})",
        f"a = {{x}}.split({cut}, {dim}); {{y}} = torch.cat([a[-1], *a[:-1]], {dim})",
        f"a = {{x}}.narrow({dim}, 0, {cut}); {{y}} = torch.cat([a, {{x}}.narrow({dim}, 0, {shape[dim] - cut})], {dim})",
    ]
    if shape[dim] % 2 == 0:
        forms += [
            f"a, b = {{x}}.chunk(2, {dim}); {{y}} = a * torch.sigmoid(b)",
            f"a, b = {{x}}.chunk(2, {dim}); {{y}} = torch.cat([a + b, a - b], {dim})",
            f"{{y}} = F.glu({{x}}, {dim})",
        ]
    return Draft([rng.choice(forms)])


@operator(5)
def rolling(rng: Random, shape: Shape) -> Draft:
    dims = rng.sample(range(1, len(shape)), rng.choice((1, 1, 2)))
    shifts = tuple(rng.choice((-2, -1, 1, 2, 3)) for _ in dims)
    forms = [f"torch.roll({{x}}, {shifts}, {tuple(dims)})", f"{{x}}.flip({tuple(dims)})"]
    a, b = rng.sample(range(2, len(shape)), 2) if len(shape) > 3 else (1, 2)
    forms += [f"{{x}}.transpose({a}, {b})", f"{{x}}.transpose({a}, {b}).contiguous()"]
    order = [0, *rng.sample(range(1, len(shape)), len(shape) - 1)]
    forms += [f"{{x}}.permute({tuple(order)})", f"torch.rot90({{x}}, {rng.choice((1, 2, 3))}, ({a}, {b}))"]
    return expression(rng.choice(forms))


@operator(4)
def reshaping(rng: Random, shape: Shape) -> Draft | None:
    channels, last = shape[1], shape[-1]
    forms = []
    for g in (2, 3, 4):
        if channels % g == 0:
            forms.append(f"{{x}}.unflatten(1, ({g}, {channels // g})).transpose(1, 2).flatten(1, 2)")
            forms.append(f"{{x}}.reshape({{s}}[0], {g}, {channels // g}, *{{s}}[2:]).mean(1)")
    if len(shape) == 4 and channels % 4 == 0:
        forms.append("F.pixel_shuffle({x}, 2)")
    if len(shape) == 4 and shape[2] % 2 == 0 and last % 2 == 0:
        forms.append("F.pixel_unshuffle({x}, 2)")
    if len(shape) == 5:
        forms.append("{x}.transpose(1, 2).flatten(0, 1).sin().unflatten(0, ({s}[0], {s}[2])).transpose(1, 2)")
        forms.append("{x}.flatten(1, 2)")
        forms.append("{x}.flatten(2, 3)")
        forms.append("{x}[:, :, 0]")
        forms.append("{x}.mean(2)")
    if len(shape) == 4:
        forms.append("{x}.unsqueeze(2)")
        forms.append("{x}[:, :, None].expand(-1, -1, 3, -1, -1)")
    forms.append("{x}.flatten(2).reshape({s})")
    forms.append("{x}.reshape({s}[0], {s}[1], *{s}[:1:-1])")
    if last % 2 == 0:
        forms.append(f"{{x}}.unflatten(-1, ({last // 2}, 2)).amax(-1)")
    return expression(rng.choice(forms))


def _slice(rng: Random, extent: int) -> str:
    start = rng.randrange(0, extent)
    stop = rng.randrange(start + 1, extent + 1)
    step = rng.choice((1, 1, 1, 2, 3))
    if rng.random() < 0.3:
        return f"{start - extent}:{'' if stop == extent else stop - extent}:{step}"
    return f"{start}:{stop}:{step}"


@operator(6)
def slicing(rng: Random, shape: Shape) -> Draft:
    dim = rng.randrange(1, len(shape))
    cut = ", ".join([":"] * dim + [_slice(rng, shape[dim])])
    forms = [f"{{x}}[{cut}]"] * 3
    picked = [rng.randrange(-shape[dim], shape[dim]) for _ in range(rng.choice((1, 2, 3)))]
    positive = [index % shape[dim] for index in picked]
    forms.append(f"{{x}}.index_select({dim}, torch.tensor({positive}))")
    forms.append(f"{{x}}[{', '.join([':'] * dim + [str(picked)])}]")
    if len(shape) > 3 and dim > 1:
        forms.append(f"{{x}}.select({dim}, {picked[0]})")
    return expression(rng.choice(forms))


@operator(7)
def slice_assignment(rng: Random, shape: Shape) -> Draft:
    dim = rng.randrange(1, len(shape))
    where = ", ".join([":"] * dim + [_slice(rng, shape[dim])])
    index = rng.randrange(shape[dim])
    other = [rng.randrange(shape[dim]) for _ in range(2)]
    base = rng.choice(("{x}.clone()", "torch.zeros_like({x})", "torch.ones({s}).to({x})", "{x} * 0.5"))
    whole = ", ".join([":"] * dim)
    picked = list(dict.fromkeys(other))
    forms = [
        f"a[{where}] = {{x}}[{where}] * 2",
        f"a[{where}] = {number(rng)}",
        f"a[{where}] = {{x}}.mean()",
        f"a[{where}] += 1",
        f"a[{where}].copy_(F.relu({{x}}[{where}]))",
        f"a[{where}].mul_(3)",
        f"a[{whole}, {index}] = {{x}}[{whole}, {shape[dim] - 1 - index}]",
        f"a[{whole}, {picked}] = {{x}}[{whole}, {picked[::-1]}]",
        f"a = torch.slice_scatter(a, {{x}}.narrow({dim}, 0, {index + 1}), {dim}, 0, {index + 1})",
        f"a = torch.select_scatter(a, {{x}}.select({dim}, 0), {dim}, {index})",
        f"a = a.index_copy({dim}, torch.tensor([{index}]), {{x}}.narrow({dim}, 0, 1))",
        f"a = a.index_fill({dim}, torch.tensor([{index}]), 0.5)",
        f"a = a.index_add({dim}, torch.tensor([{index}]), {{x}}.narrow({dim}, 0, 1))",
    ]
    return Draft([f"a = {base}", rng.choice(forms), rng.choice(("{y} = a", "{y} = a + {x}", "{y} = F.relu(a)"))])


@operator(3, (4, 5))
def temporal_shift(rng: Random, shape: Shape) -> Draft | None:
    """TSM, as its authors write it: some channels from the frame before, some from the frame behind."""
    dim, fold = (2, max(1, shape[1] // 4))
    if shape[1] < 3 or shape[dim] < 2:
        return None
    return Draft(
        [
            "a = torch.zeros_like({x})",
            f"a[:, :{fold}, :-1] = {{x}}[:, :{fold}, 1:]",
            f"a[:, {fold}:{2 * fold}, 1:] = {{x}}[:, {fold}:{2 * fold}, :-1]",
            f"a[:, {2 * fold}:] = {{x}}[:, {2 * fold}:]",
            "{y} = a",
        ]
    )


@operator(5)
def padding(rng: Random, shape: Shape) -> Draft:
    rank = len(shape) - 2
    mode = rng.choice(("constant", "constant", "reflect", "replicate", "circular"))
    widths = []
    for extent in reversed(shape[2:]):
        limit = extent - 1 if mode == "reflect" else extent
        widths += [min(limit, rng.choice((0, 1, 1, 2))), min(limit, rng.choice((0, 1, 1, 2)))]
        if mode == "constant" and rng.random() < 0.15 and extent > 2:
            widths[-1] = -1
    if mode == "constant":
        if rng.random() < 0.2:
            widths += [rng.choice((0, 1)), rng.choice((0, 2))]
        return expression(f"F.pad({{x}}, {tuple(widths)}, value={rng.choice((0.0, 0.0, 1.5))})")
    return expression(f"F.pad({{x}}, {tuple(widths[: 2 * rank])}, mode={mode!r})")


@operator(4)
def upsampling(rng: Random, shape: Shape) -> Draft:
    rank = len(shape) - 2
    smooth = ("linear", "bilinear", "trilinear")[rank - 1]
    mode = rng.choice(("nearest", "nearest", smooth, "nearest-exact"))
    align = f", align_corners={rng.random() < 0.5}" if mode == smooth else ""
    size = tuple(rng.choice((n, n + 1, 2 * n, max(1, n // 2))) for n in shape[2:])
    scale = rng.choice((2, 2, 1.5, 3)) if rank < 3 else 2
    how = f"size={size}" if rng.random() < 0.5 else f"scale_factor={scale}"
    if rng.random() < 0.15:
        return expression(f"{{x}}.repeat_interleave(2, {len(shape) - 1})")
    return expression(f"F.interpolate({{x}}, {how}, mode={mode!r}{align})")


@operator(7)
def reduction(rng: Random, shape: Shape) -> Draft:
    dims = tuple(sorted(rng.sample(range(1, len(shape)), rng.randrange(1, len(shape)))))
    kinds = ["mean", "mean", "sum", "amax", "amin"]
    if math.prod(shape[d] for d in dims) > 1:
        kinds += ["std", "var"]
    text = f"{{x}}.{rng.choice(kinds)}({dims}, keepdim=True)"
    one = dims[0]
    forms = [text] * 2 + [f"{{x}} - {text}", f"{{x}} * torch.sigmoid({text})"]
    forms += [f"torch.logsumexp({{x}}, {dims}, keepdim=True) + {{x}}", f"{{x}}.cumsum({one})"]
    forms += [f"{{x}}.max({one}, keepdim=True)[0] - {{x}}", f"{{x}} / ({{x}}.norm(dim={one}, keepdim=True) + 0.1)"]
    forms += [
        f"F.normalize({{x}}, dim={one}, eps=1e-2)",
        f"{{x}}.sort({one})[0]",
        f"{{x}}.median({one}, keepdim=True)[0]",
    ]
    return expression(rng.choice(forms[:8] * 4 + forms[8:]))


@operator(3)
def squeeze_and_excite(rng: Random, shape: Shape) -> Draft:
    dims = tuple(range(2, len(shape)))
    ones = ", 1" * len(dims)
    hidden = rng.choice((2, 4))
    gate = rng.choice(("nn.Sigmoid()", "nn.Hardsigmoid()"))
    init = [f"{{l}} = nn.Sequential(nn.Linear({{c}}, {hidden}), nn.ReLU(), nn.Linear({hidden}, {{c}}), {gate})"]
    return Draft([f"{{y}} = {{x}} * {{l}}({{x}}.mean({dims})).view(-1, {{c}}{ones})"], init)


@operator(4, (2, 3, 4, 5))
def softmax(rng: Random, shape: Shape) -> Draft:
    dim = rng.randrange(1, len(shape)) - rng.choice((0, 0, len(shape)))
    dim = dim if dim % len(shape) else -1
    return expression(
        rng.choice((f"F.softmax({{x}}, {dim})", f"F.log_softmax({{x}}, {dim})", f"F.softmin({{x}}, {dim})"))
    )


@operator(3)
def attention(rng: Random, shape: Shape) -> Draft | None:
    length = math.prod(shape[2:])
    if not 1 < length <= 80:
        return None
    tokens = "a = {x}.flatten(2).transpose(1, 2)"
    back = ".transpose(1, 2).reshape({s})"
    init = ["{l} = nn.Linear({c}, 3 * {c})"]
    parts = "q, k, v = {l}(a).chunk(3, -1)"
    hand = "b = F.softmax(q @ k.transpose(1, 2) / {c} ** 0.5, -1) @ v"
    fused = "b = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]"
    if rng.random() < 0.25 and shape[1] % 2 == 0:
        return Draft(
            [tokens, "{y} = {l}(a, a, a, need_weights=False)[0]" + back],
            ["{l} = nn.MultiheadAttention({c}, 2, batch_first=True)"],
        )
    return Draft([tokens, parts, rng.choice((hand, fused)), "{y} = b" + back], init)


@operator(2)
def head(rng: Random, shape: Shape) -> Draft:
    dims = tuple(range(2, len(shape)))
    out = rng.choice((2, 3, 10))
    pooled = rng.choice((f"{{x}}.mean({dims})", f"{{x}}.amax({dims})", f"{{x}}.mean({dims})"))
    return Draft([f"{{y}} = {{l}}({pooled})"], [f"{{l}} = nn.Linear({{c}}, {out})"])


@operator(1)
def flattened_head(rng: Random, shape: Shape) -> Draft:
    return Draft(["{y} = {l}({x}.flatten(1))"], [f"{{l}} = nn.Linear({math.prod(shape[1:])}, {rng.choice((2, 5))})"])


@operator(1, (2,))
def norm_of_features(rng: Random, shape: Shape) -> Draft | None:
    if shape[1] < 2:
        return None
    return layer(rng.choice(("nn.BatchNorm1d({c})", "nn.LayerNorm({c})")))


# --- two sources ---


def join(rng: Random, one: Shape, other: Shape) -> Draft | None:
    """Two values of which the second broadcasts to the first, or that agree but for one axis."""
    if one == other:
        forms = (
            "{x} + {x1}",
            "{x} - {x1}",
            "{x} * {x1}",
            "torch.maximum({x}, {x1})",
            "torch.where({x} > {x1}, {x}, {x1})",
        )
        forms += ("F.relu({x} + {x1})", "{x} / ({x1}.abs() + 0.5)", "torch.stack([{x}, {x1}], 1).mean(1)")
        forms += ("torch.cat([{x}, {x1}], 1)", "torch.cat([{x1}, {x}], -1)")
        return expression(rng.choice(forms))
    if len(one) != len(other):
        return None
    if all(b in (a, 1) for a, b in zip(one, other, strict=True)):
        return expression(rng.choice(("{x} + {x1}", "{x} * {x1}", "{x} * torch.sigmoid({x1})", "{x1} - {x}")))
    different = [axis for axis, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    if len(different) == 1 and different[0] > 0:
        return expression(f"torch.cat([{{x}}, {{x1}}], {different[0]})")
    if one[:2] == other[:2] and len(one) == 5:
        return expression("F.interpolate({x1}, size={s}[2:], mode='nearest') + {x}")
    return None
