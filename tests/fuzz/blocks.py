"""Blocks of networks for phones, chains of activations, and operators that order values."""

from __future__ import annotations

from random import Random

from .operators import ACTIVATIONS, Draft, Shape, expression, layer, maybe_same, operator, some

_MODULES = ("nn.ReLU()", "nn.ReLU6()", "nn.SiLU()", "nn.Hardswish()", "nn.GELU()", "nn.Identity()", "nn.ELU(0.7)")


@operator(8, (4, 5))
def pointwise(rng: Random, shape: Shape) -> Draft:
    """A kernel of one, to any number of channels."""
    rank = len(shape) - 2
    out = rng.choice((1, 2, 3, 5, 7, 11, 13, 16, 19, 24, 33))
    stride = some(rng, (1, 2), rank) if rng.random() < 0.2 else (1,) * rank
    text = f"nn.Conv{rank}d({{c}}, {out}, 1, stride={maybe_same(rng, stride)}, bias={rng.random() < 0.7})"
    behind = rng.choice(("", "", f", nn.BatchNorm{rank}d({out})"))
    return Draft(["{y} = {l}({x})"], [f"{{l}} = nn.Sequential({text}{behind}, {rng.choice(_MODULES)})"])


@operator(8, (4, 5))
def depthwise_block(rng: Random, shape: Shape) -> Draft:
    """A depthwise layer of any window, stride, dilation and multiplier, with what is fused behind it."""
    rank, extents = len(shape) - 2, shape[2:]
    kernel = some(rng, (1, 2, 3, 3, 4, 5, 7), rank) if rng.random() < 0.5 else (rng.choice((3, 3, 5)),) * rank
    dilation = some(rng, (1, 1, 2, 3), rank) if rng.random() < 0.4 else (1,) * rank
    padding = tuple(rng.choice((d * (k - 1) // 2, 0, 1)) for k, d in zip(kernel, dilation, strict=True))
    fits = [n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in zip(extents, padding, dilation, kernel, strict=True)]
    kernel = tuple(k if good else 1 for k, good in zip(kernel, fits, strict=True))
    stride = some(rng, (1, 1, 2, 3), rank)
    out = shape[1] * rng.choice((1, 1, 1, 2, 3, 4))
    words = f"{kernel}, stride={stride}, padding={padding}, dilation={dilation}, bias={rng.random() < 0.5}"
    text = f"nn.Conv{rank}d({{c}}, {out}, {words}, groups={{c}})"
    behind = rng.choice((f"nn.BatchNorm{rank}d({out}), ", "", ""))
    return Draft(["{y} = {l}({x})"], [f"{{l}} = nn.Sequential({text}, {behind}{rng.choice(_MODULES)})"])


@operator(5, (4, 5))
def squeeze_and_excitation(rng: Random, shape: Shape) -> Draft:
    """Channels scaled by what their means say, by linear layers or by convolutions of one."""
    rank, channels = len(shape) - 2, shape[1]
    dims, ones = tuple(range(2, len(shape))), ", None" * rank
    middle, act = rng.choice((1, 2, 4, 5, 8)), rng.choice(("relu", "silu", "hardswish"))
    gate = rng.choice(("torch.sigmoid", "F.hardsigmoid", "torch.sigmoid"))
    init = [f"{{l}} = nn.Linear({channels}, {middle})", f"{{l}}b = nn.Linear({middle}, {channels})"]
    body = f"{{y}} = {{x}} * {gate}({{l}}b(F.{act}({{l}}({{x}}.mean({dims})))))[:, :{ones}]"
    if rng.random() < 0.5:
        init = [f"{{l}} = nn.Conv{rank}d({{c}}, {middle}, 1)", f"{{l}}b = nn.Conv{rank}d({middle}, {{c}}, 1)"]
        body = f"{{y}} = {gate}({{l}}b(F.{act}({{l}}(F.adaptive_avg_pool{rank}d({{x}}, 1))))) * {{x}}"
    behind = rng.choice(("", "", f"; {{y}} = F.{act}({{y}})"))
    return Draft([body + behind], init)


@operator(5, (4, 5))
def inverted_residual(rng: Random, shape: Shape) -> Draft:
    """Widen, depthwise, scale, narrow, as networks for phones have it."""
    rank, channels = len(shape) - 2, shape[1]
    wide = channels * rng.choice((1, 2, 3))
    stride = rng.choice((1, 1, 2))
    out = channels if rng.random() < 0.6 else rng.choice((3, 8, 11))
    act = rng.choice(_MODULES)
    norm = f"nn.BatchNorm{rank}d" if rng.random() < 0.7 else "nn.Identity"
    parts = f"nn.Conv{rank}d({{c}}, {wide}, 1, bias=False), {norm}({wide}), {act}, "
    parts += f"nn.Conv{rank}d({wide}, {wide}, 3, {stride}, 1, groups={wide}, bias=False), {norm}({wide}), {act}"
    init = [f"{{l}} = nn.Sequential({parts})", f"{{l}}b = nn.Conv{rank}d({wide}, {out}, 1)"]
    dims, ones = tuple(range(2, len(shape))), ", None" * rank
    scale = rng.choice(("", f"a = a * torch.sigmoid({{l}}c(a.mean({dims})))[:, :{ones}]; "))
    if scale:
        init.append(f"{{l}}c = nn.Linear({wide}, {wide})")
    added = " + {x}" if stride == 1 and out == channels else ""
    return Draft([f"a = {{l}}({{x}}); {scale}{{y}} = {{l}}b(a){added}"], init)


@operator(5)
def activations_in_a_chain(rng: Random, shape: Shape) -> Draft:
    """Several behind one another, on a layer's result or a norm's."""
    rank, out = len(shape) - 2, rng.choice((2, 5, 8, 16))
    text = "{l}({x})"
    for chosen in rng.sample(ACTIVATIONS, rng.choice((2, 2, 3))):
        text = chosen.replace("{x}", f"({text})") if chosen.count("{x}") == 1 else text
    kinds = (f"nn.Conv{rank}d({{c}}, {out}, {rng.choice((1, 3))}, padding=1)", f"nn.BatchNorm{rank}d({{c}})")
    return Draft([f"{{y}} = {text}"], ["{l} = " + rng.choice(kinds)])


@operator(4, (2, 3, 4, 5))
def ordering(rng: Random, shape: Shape) -> Draft | None:
    """Values in order, of which equal ones may stand anywhere: no places."""
    dim = rng.randrange(1, len(shape))
    extent, largest = shape[dim], rng.random() < 0.5
    forms = [f"{{x}}.sort({dim}, descending={largest})[0]", f"{{x}}.cummax({dim})[0]", f"{{x}}.cummin({dim})[0]"]
    forms += [f"{{x}}.topk({rng.randrange(1, extent + 1)}, {dim}, largest={largest})[0]"]
    forms += [f"{{x}}.kthvalue({rng.randrange(1, extent + 1)}, {dim}, keepdim=True)[0]"]
    forms += [f"{{x}} - {{x}}.median({dim}, keepdim=True)[0]", f"{{x}}.quantile(0.3, {dim}, keepdim=True) + {{x}}"]
    return expression(rng.choice(forms))


@operator(2, (4, 5))
def group_of_few(rng: Random, shape: Shape) -> Draft | None:
    """Convolutions whose groups are of 2, 3 or 4 channels."""
    rank, channels = len(shape) - 2, shape[1]
    sizes = [size for size in (2, 3, 4) if channels % size == 0]
    if not sizes:
        return None
    groups = channels // rng.choice(sizes)
    out = groups * rng.choice((1, 2, 3, 4))
    return layer(f"nn.Conv{rank}d({{c}}, {out}, 3, {rng.choice((1, 2))}, 1, groups={groups})")
