"""Masks as networks write them: what is compared with what, and how the result thins an activation."""

from __future__ import annotations

from random import Random

from .operators import Draft, Shape, number, operator

# From a tensor `a` of scores to zeros and ones; `ste` is the straight-through estimator of DANCE, AAP and D-STEP.
HARD = (
    "(a > 0).float()",
    "(a > 0).to({x}.dtype)",
    "(a >= 0.3).float()",
    "(a < 0.2).float()",
    "(a <= 0).type_as({x})",
    "a.gt(0.1).float()",
    "1 - (a > 0).float()",
    "(~(a > 0)).float()",
    "torch.where(a > 0, 1.0, 0.0)",
    "torch.where(a > 0, torch.ones_like(a), torch.zeros_like(a))",
    "torch.where(a > 0, 0.0, 1.0)",
    "(torch.sigmoid(a) > 0.5).float()",
    "torch.sigmoid(a).round()",
    "(torch.tanh(a) > 0).float()",
    "((a > -1) & (a < 1)).float()",
    "((a > 0.5) | (a < -0.5)).float()",
    "torch.logical_or(a > 1, a < 0).float()",
    "(a > 0).float() * (a < 1.5).float()",
    "torch.maximum((a > 1).float(), (a < 0).float())",
    "torch.minimum((a > -0.5).float(), (a < 0.5).float())",
    "((a > 0).float() + (a < -0.5).float()).clamp(0, 1)",
    "(a > 0).int().float()",
    "(a > 0)",
    "a.relu().sign()",
    "(a.sign() + 1) / 2",
    "torch.heaviside(a, torch.tensor(0.0).to(a))",
    "(a > 0).float() + torch.sigmoid(a) - torch.sigmoid(a).detach()",
    "(a > 0).float() + (torch.sigmoid(a) - torch.sigmoid(a).detach())",
    "((a > 0).float() - torch.sigmoid(a)).detach() + torch.sigmoid(a)",
    "(a > a.mean()).float()",
    "(a != 0).float()",
    "1.0 - torch.ceil(a.clamp(0, 1))",
    "(a > 0).float().round()",
    "F.one_hot(a.flatten(1).argmax(1), a[0].numel()).reshape(a.shape).float()",
    "(a >= a.amax()).float()",
    "(a > 0).float() * 1.0",
    "(a > 0).double().to({x}.dtype)",
    "(a.int() > 0).float()",
    "(a.clamp(-3, 3).int() != 0).float()",
)
# What looks like a mask and is none: other values than zero and one, or zeros that do not stay.
SOFT = (
    "a.clamp(0, 1)",
    "F.hardtanh(a, 0.0, 1.0)",
    "F.relu6(a) / 6",
    "F.hardsigmoid(a)",
    "torch.sigmoid(a)",
    "(a > 0).float() * 2",
    "(a > 0).float() + 0.5",
    "(a > 0).float() - (a < -0.5).float()",
    "torch.where(a > 0, 1.0, 0.25)",
    "torch.where(a > 0, 1.0, 1.0)",
    "torch.where(a > 0, 0.5, 0.5)",
    "torch.sign(a)",
    "(a > 0).float() + (a > 0.5).float()",
    "F.relu(a)",
    "a.round()",
    "(a > 0).float().mean(1, keepdim=True)",
    "(a > 0).float() * torch.sigmoid(a)",
    "F.threshold(a, 0.2, 0.0)",
    "(a > 0).float().clamp(0.1, 1)",
    "(a > 0).float().clamp(0, 0.5)",
    "(a > 0).float().clamp(-1, 2)",
    "((a > 0).int() + (a > 1).int()).float()",
    "((a > 0).int() > (a > 1).int()).float()",
    "((a > 0) == (a > 1)).float()",
    "((a > 0) > (a > -1)).float()",
)
APPLIED = (
    "{x} * mask",
    "{x} * mask",
    "mask * {x}",
    "{x}.mul(mask)",
    "F.relu({x}) * mask",
    "F.relu({x} * mask)",
    "{x} * mask * mask",
    "{x} * mask + {x} * (1 - 1.0 * mask)",
    "{x} * mask + F.relu({x}) * (1 - 1.0 * mask)",
    "{x} - {x} * mask",
    "torch.where(mask > 0, {x}, torch.zeros_like({x}))",
    "torch.where(mask > 0, {x}, 0.0)",
    "{x}.masked_fill(mask < 1, 0.0)",
    "{x}.masked_fill(mask > 0, 0.0)",
    "{x} / (mask + 1.0)",
    "{x} * mask.expand_as({x})",
    "torch.mul({x}, mask.contiguous())",
)
# What follows at once: the masks' zeros reach operators that do not keep them, or readers that look at one part.
BEHIND = (
    *("a",) * 12,
    "torch.sigmoid(a)",
    "(a.abs() + 0.5).log()",
    "a.clamp(-3, 3).exp()",
    "1.5 / (a.abs() + 0.5)",
    "F.softmax(a, 1)",
    "torch.cos(a)",
    "a + 1",
    "[F.max_pool1d, F.max_pool2d, F.max_pool3d][a.dim() - 3](a, 3, 1, 1)",
    "torch.cat([a, {x}], 1)",
    "torch.cat([F.relu(a), a], 1)",
    "F.relu(a + {x})",
    "a.flip(2)",
    "torch.roll(a, 1, -1)",
    "F.relu(a) + a.mean()",
)


def _axes(rng: Random, shape: Shape) -> list[int]:
    """A mask's shape for an activation (N, C, ..., H, W): frames, positions, channels, all of them, or clips alone."""
    count = len(shape)
    every = list(range(count))
    spatial = every[3:] if count == 5 else every[2:]
    kept = {
        "channels": [0, 1],
        "shared channels": [1],
        "frames": [0, 2],
        "shared frames": [2],
        "positions": [0, *spatial],
        "shared positions": spatial,
        "positions of frames": [0, *every[2:]],
        "features": every,
        "clips": [0],
        "rows": [0, count - 2],
    }[
        rng.choice(
            ("channels",) * 5
            + ("shared channels",) * 2
            + ("frames",) * 4
            + ("shared frames",)
            + ("positions",) * 4
            + ("shared positions", "positions of frames", "positions of frames", "features", "clips", "rows")
        )
    ]
    return [extent if axis in kept else 1 for axis, extent in enumerate(shape)]


def _form(rng: Random) -> str:
    return rng.choice(SOFT) if rng.random() < 0.2 else rng.choice(HARD)


def _applied(rng: Random, lines: list[str]) -> list[str]:
    return [*lines, f"a = {rng.choice(APPLIED)}", f"{{y}} = {rng.choice(BEHIND)}"]


@operator(22)
def mask_from_outside(rng: Random, shape: Shape) -> Draft:
    """The scores are an input: known before any layer runs."""
    lines = ["a = {m}", f"mask = {_form(rng)}"]
    if rng.random() < 0.15:
        lines = ["a = {m}", f"b = {_form(rng)}", "a = {m}.flip(-1) * 0.7 + 0.1", f"c = {_form(rng)}"]
        lines += [f"mask = {rng.choice(('b * c', '1.0 * b * c', 'b * (1 - 1.0 * c)'))}"]
    return Draft(_applied(rng, lines), mask=_axes(rng, shape))


@operator(8)
def mask_of_constants(rng: Random, shape: Shape) -> Draft:
    kept = _axes(rng, shape)
    if kept[0] > 1:
        kept[0] = rng.choice((1, kept[0]))
    share = rng.choice((0.0, 0.3, 0.5, 0.9, 1.0))
    text = f"(torch.rand({tuple(kept)}) < {share})"
    text += rng.choice((".float()", ".float()", "", ".to(torch.uint8)", ".int()"))
    lines = ["mask = {l}" if rng.random() < 0.8 else "mask = {l} * 1.0"]
    if ".float()" not in text:
        lines.append("mask = mask.to({x}.dtype)")
    return Draft(_applied(rng, lines), [f"self.register_buffer('{{l}}'.removeprefix('self.'), {text})"])


@operator(14)
def mask_from_the_activation(rng: Random, shape: Shape) -> Draft:
    """The scores are means of the activation itself over the axes that the mask does not have."""
    kept = _axes(rng, shape)
    dims = tuple(axis for axis in range(1, len(shape)) if kept[axis] == 1 and shape[axis] > 1)
    mean = f"{{x}}.{rng.choice(('mean', 'mean', 'amax', 'sum'))}({dims}, keepdim=True)" if dims else "{x}"
    scale = rng.choice(("", " * 3", " - 0.1", " * -2 + 0.1"))
    return Draft(_applied(rng, [f"a = {mean}{scale}", f"mask = {_form(rng)}"]))


@operator(8)
def mask_from_a_controller(rng: Random, shape: Shape) -> Draft:
    """Pooled features, a small layer, a threshold: as DANCE's controller and D-STEP's policies decide."""
    dims = tuple(range(2, len(shape)))
    ones = ", 1" * len(dims)
    kind = rng.choice(("channels", "channels", "groups", "frames", "tiles"))
    threshold = f"{abs(number(rng)) / 5:.2f}"
    if kind == "channels":
        init = ["{l} = nn.Sequential(nn.Linear({c}, 4), nn.ReLU(), nn.Linear(4, {c}))"]
        lines = [f"a = {{l}}({{x}}.mean({dims})).view(-1, {{c}}{ones})"]
    elif kind == "groups":
        init = ["{l} = nn.Linear({c}, -(-{c} // 2))"]
        spread = "unsqueeze(2).expand(-1, -1, 2).flatten(1)"
        lines = [f"a = {{l}}({{x}}.mean({dims})).{spread}[:, :{{c}}].reshape(-1, {{c}}{ones})"]
    elif kind == "frames":
        rest = tuple(range(3, len(shape)))
        init = ["{l} = nn.Conv1d({c}, 1, 3, padding=1)"]
        mean = f"{{x}}.mean({rest})" if rest else "{x}"
        lines = [f"a = {{l}}({mean}).reshape({{s}}[0], 1, {{s}}[2]{', 1' * len(rest)})"]
    else:
        rank, height, width = len(dims), shape[-2], shape[-1]
        if rank < 2:
            return mask_from_the_activation(rng, shape)
        init = ["{l} = nn.Conv2d({c}, 1, 3, padding=1)"]
        flat = "{x}.mean(2)" if rank == 3 else "{x}"
        edge = 2
        lines = [
            f"a = F.pad({flat}, (0, {width % edge}, 0, {height % edge}))",
            f"a = {{l}}(F.avg_pool2d(a, {edge}))",
            f"a = a[:, :, :, None, :, None].expand(-1, -1, -1, {edge}, -1, {edge})",
            f"a = a.reshape({{s}}[0], 1, a.shape[2] * {edge}, -1)[:, :, :{{s}}[-2], :{{s}}[-1]]",
        ]
        lines += ["a = a[:, :, None]"] if rank == 3 else []
    lines += [f"a = a - {threshold}"] if rng.random() < 0.5 else []
    return Draft(_applied(rng, [*lines, f"mask = {_form(rng)}"]), init)


@operator(4, (5,))
def masks_of_three_axes(rng: Random, shape: Shape) -> Draft:
    """As AAP's `Prune` applies them: frames, channels, positions, one behind the other or as one product."""
    n, c, t, h, w = shape
    lines = [
        "a = {m}",
        "frames = (a.mean((1, 3, 4), keepdim=True) > 0).float()",
        "channels = (a.mean((2, 3, 4), keepdim=True) > 0).float()",
        "positions = (a.mean((1, 2), keepdim=True) > 0).float()",
    ]
    product = rng.choice(
        (
            "{x} * frames * channels * positions",
            "{x} * (frames * positions) * channels",
            "{x} * (frames * channels * positions)",
            "{x} * torch.minimum(frames, channels)",
            "{x} * torch.maximum(frames, positions)",
            "F.relu({x}) * frames * (1 - channels)",
        )
    )
    return Draft([*lines, f"a = {product}", f"{{y}} = {rng.choice(BEHIND)}"], mask=[n, c, t, h, w])
