"""Random small networks with masks agree with PyTorch in float64, whatever memory held before."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import tvm
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.machines.target import load_target

#: How many networks a run tries; ``LIVENESS_NETWORKS=500`` searches.
NETWORKS = int(os.environ.get("LIVENESS_NETWORKS", "6"))
CHANNELS, FRAMES, HEIGHT, WIDTH = 8, 4, 6, 5
SHOWN = {
    "channels": (CHANNELS, 1, 1, 1),
    "frames": (1, FRAMES, 1, 1),
    "positions": (1, 1, HEIGHT, WIDTH),
    "tubes": (1, FRAMES, HEIGHT, WIDTH),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky relu": F.leaky_relu,
    "gelu": F.gelu,
    "abs": torch.abs,
    "clamp around zero": lambda x: x.clamp(-0.5, 1),
    "clamp off zero": lambda x: x.clamp(0.25, 1),
    "square": torch.square,
    "softplus": F.softplus,
    "exp": lambda x: torch.exp(x.clamp(max=3.0)),
    "log": lambda x: torch.log(x.abs() + 0.1),
    "log of softplus": lambda x: torch.log(F.softplus(x)),
    "reciprocal": lambda x: 1 / F.softplus(x),
    "sqrt": lambda x: torch.sqrt(F.softplus(x)),
    "one minus": lambda x: 1 - x,
    "floor": lambda x: torch.floor(8 * x + 0.37) / 8,
    "unit norm": lambda x: x / (x.square().mean((2, 3, 4), keepdim=True) + 1).sqrt(),
    "softmax": lambda x: F.softmax(x, 1),
    "flat and back": lambda x: torch.relu(x.flatten(2)).unflatten(2, x.shape[2:]),
    "axes swapped": lambda x: torch.relu(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3),
    "rolled": lambda x: x.roll(1, 2),
    "shuffled": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if x.shape[1] % 2 == 0 else x,
}
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, m: x * (m > 0).to(x.dtype),
    "product from the left": lambda x, m: (m >= 0.1).to(x.dtype) * x,
    "where": lambda x, m: torch.where(m > 0, x, 0.0),
    "rounded": lambda x, m: x * m.sigmoid().round(),
    "the other": lambda x, m: x * (1 - (m > 0).to(x.dtype)),
    "between": lambda x, m: x * ((m > -0.5) & (m < 0.7)).to(x.dtype),
    "clamped": lambda x, m: x * (m > 0).to(x.dtype).clamp(0, 1),
    "no mask: clamped": lambda x, m: x * (m > 0).to(x.dtype).clamp(0.5, 1),
    "no mask: soft": lambda x, m: x * m.sigmoid(),
    "no mask: a choice": lambda x, m: torch.where(m > 0, x, x.neg()),
    "no mask: counted": lambda x, m: x * ((m > 0).to(x.dtype) + (m > -0.5).to(x.dtype)),
}


@dataclass
class Step:
    """One value of a network: ``apply`` of earlier values and the masks."""

    name: str
    sources: list[int]
    apply: Callable[..., Tensor]
    layer: nn.Module | None = None


@dataclass
class Plan:
    """What has been drawn: the steps, what each value's shape is, and which values leave the network."""

    steps: list[Step] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)


class Network(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(step.layer for step in plan.steps if step.layer is not None)

    def forward(
        self, x: Tensor, channels: Tensor, frames: Tensor, positions: Tensor, tubes: Tensor
    ) -> tuple[Tensor, ...]:
        masks = {"channels": channels, "frames": frames, "positions": positions, "tubes": tubes}
        values, layers = [x], iter(self.layers)
        for step in self.plan.steps:
            sources = [values[source] for source in step.sources]
            layer = None if step.layer is None else next(layers)
            values.append(step.apply(sources, masks, layer))
        return tuple(values[output] for output in self.plan.outputs)


def fitted(mask: Tensor, axis: str, shape: torch.Size, pooled: bool) -> Tensor:
    """A mask for an activation of ``shape``, from one at the network's own resolution."""
    if axis == "channels":
        return mask[:, : shape[1]]
    for dim in (2, 3, 4):
        if mask.shape[dim] > shape[dim]:
            step = -(-mask.shape[dim] // shape[dim])
            if pooled and mask.shape[dim] == step * shape[dim]:
                kernel = [step if other == dim else 1 for other in (2, 3, 4)]
                mask = F.max_pool3d(mask, kernel)
            else:
                mask = mask[(slice(None),) * dim + (slice(0, None, step),)]
    return mask


def may_mask(axis: str, shape: torch.Size) -> bool:
    """Whether ``fitted`` gives a mask of that activation."""
    if axis == "channels":
        return shape[1] <= CHANNELS
    wanted = {"frames": (2,), "positions": (3, 4), "tubes": (2, 3, 4)}[axis]
    own = (0, 0, FRAMES, HEIGHT, WIDTH)
    return all(-(-own[dim] // -(-own[dim] // shape[dim])) == shape[dim] <= own[dim] for dim in wanted)


@st.composite
def plans(draw: st.DrawFn, batch: int) -> Plan:
    torch.manual_seed(draw(st.integers(0, 99)))
    plan = Plan(values=[torch.randn(batch, 4, FRAMES, HEIGHT, WIDTH)])
    masks = {axis: torch.randn(1, *shape) for axis, shape in SHOWN.items()}

    def add(name: str, sources: list[int], apply: Callable[..., Tensor], layer: nn.Module | None = None) -> None:
        with torch.no_grad():
            value = apply([plan.values[source] for source in sources], masks, layer)
        plan.steps.append(Step(name, sources, apply, layer))
        plan.values.append(value)

    def convolution(source: int) -> None:
        shape = plan.values[source].shape
        kernel = tuple(draw(st.sampled_from([1, 3, 2] if size > 2 else [1])) for size in shape[2:])
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        stride = tuple(draw(st.sampled_from([1, 1, 2] if size > 3 else [1])) for size in shape[2:])
        out = draw(st.sampled_from([4, 8]))
        groups = draw(st.sampled_from([1, 1, 1, 2, 4])) if shape[1] % 4 == 0 else 1
        layer = nn.Conv3d(shape[1], out, kernel, stride, padding, groups=groups, bias=draw(st.booleans()))
        add(f"conv {kernel} / {stride} + {padding}, groups {groups}", [source], lambda v, m, layer: layer(v[0]), layer)

    def masked(source: int) -> None:
        shape = plan.values[source].shape
        axes = [axis for axis in SHOWN if may_mask(axis, shape)]
        if not axes:
            return
        axis, form, pooled = draw(st.sampled_from(axes)), draw(st.sampled_from(list(FORMS))), draw(st.booleans())
        if draw(st.integers(0, 3)) == 0 and len(axes) > 1:  # two axes at once, as a product of masks

            def twice(v: list[Tensor], m: dict[str, Tensor], _: None, axes: list[str] = axes[:2]) -> Tensor:
                one, two = (fitted(m[axis], axis, v[0].shape, False) > 0 for axis in axes)
                return v[0] * (one.to(v[0].dtype) * two.to(v[0].dtype))

            add(f"masked in {axes[:2]}", [source], twice)
            return
        add(
            f"masked in {axis}: {form}, pooled {pooled}",
            [source],
            lambda v, m, _: FORMS[form](v[0], fitted(m[axis], axis, v[0].shape, pooled)),
        )

    def pooled(source: int) -> None:
        shape = plan.values[source].shape
        kernel = tuple(draw(st.sampled_from([1, 2, 3] if size > 2 else [1])) for size in shape[2:])
        stride = tuple(draw(st.integers(1, k)) for k in kernel)
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        pool = draw(st.sampled_from([F.max_pool3d, F.avg_pool3d]))
        add(
            f"{pool.__name__} {kernel} / {stride} + {padding}",
            [source],
            lambda v, m, _: pool(v[0], kernel, stride, padding),
        )

    def combined(source: int) -> None:
        shape = plan.values[source].shape
        alike = [place for place, value in enumerate(plan.values) if value.shape == shape and place]
        together = [
            p for p, v in enumerate(plan.values) if v.shape[2:] == shape[2:] and v.shape[1] + shape[1] <= 16 and p
        ]
        way = draw(st.sampled_from(["add", "subtract", "multiply", "maximum", "minimum", "cat", "cat", "part", "add"]))
        if way == "cat" and together:
            add("cat", [source, draw(st.sampled_from(together))], lambda v, m, _: torch.cat(v, 1))
        elif way == "part":
            half = shape[1] // 2
            add("part", [source], lambda v, m, _: v[0][:, :half])
        elif alike and way in ("add", "subtract", "multiply", "maximum", "minimum"):
            join = getattr(torch, way)
            add(way, [source, draw(st.sampled_from(alike))], lambda v, m, _: join(*v))

    def activated(source: int) -> None:
        name = draw(st.sampled_from(list(ACTIVATIONS)))
        add(name, [source], lambda v, m, _: ACTIVATIONS[name](v[0]))

    kinds = [convolution, convolution, masked, masked, activated, pooled, combined]
    convolution(0)
    for _ in range(draw(st.integers(3, 9))):
        latest = len(plan.values) - 1
        source = latest if draw(st.integers(0, 3)) else draw(st.integers(min(1, latest), latest))
        draw(st.sampled_from(kinds))(source)
    latest = len(plan.values) - 1
    channels = plan.values[latest].shape[1]
    end = draw(st.sampled_from(["conv", "linear", "mean", "flat", "as it is"]))
    if end == "conv":
        convolution(latest)
    elif end == "linear":
        layer: nn.Module = nn.Linear(channels, 5)
        add("linear", [latest], lambda v, m, layer: layer(v[0].permute(0, 2, 3, 4, 1)), layer)
    elif end == "mean":
        add("mean", [latest], lambda v, m, _: v[0].mean((2, 3, 4)))
    elif end == "flat":
        layer = nn.Linear(plan.values[latest][0].numel(), 3)
        add("flat linear", [latest], lambda v, m, layer: layer(v[0].flatten(1)), layer)
    plan.outputs = [len(plan.values) - 1]
    if draw(st.integers(0, 3)) == 0:
        plan.outputs.append(draw(st.integers(1, len(plan.values) - 1)))
    return plan


@st.composite
def cases(draw: st.DrawFn) -> tuple[Plan, int, list[Tensor], Options]:
    batch = draw(st.sampled_from([1, 2, 3]))
    plan = draw(plans(batch))
    options = Options(conv=draw(st.sampled_from(["direct", "auto", "winograd"])), threads=draw(st.sampled_from([1, 2])))
    shapes = [(draw(st.sampled_from([1, batch])), *shape) for shape in SHOWN.values()]
    return plan, batch, [torch.randn(shape) for shape in shapes], options


@settings(
    max_examples=NETWORKS,
    deadline=None,
    derandomize=NETWORKS <= 10,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink) if NETWORKS > 10 else (Phase.generate,),
)
@given(cases())
def test_random_networks(case: tuple[Plan, int, list[Tensor], Options]) -> None:
    plan, batch, masks, options = case
    for place, step in enumerate(plan.steps, 1):
        note(f"{place}: {step.name} of {step.sources} {tuple(plan.values[place].shape)}")
    note(f"outputs {plan.outputs}, batch {batch}, masks {[mask.shape[0] for mask in masks]}, {options}")
    x = torch.randn(batch, 4, FRAMES, HEIGHT, WIDTH)
    network = Network(plan).eval()
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(x.double(), *(mask.double() for mask in masks))
    if not all(torch.isfinite(value).all() for value in expected):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mod = from_exported_program(torch.export.export(network, (x, *masks)))
    target = load_target("host")
    lowered = lower(mod, target, options)
    machine = relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(options.threads)), tvm.cpu())

    def run(*inputs: Tensor) -> list[np.ndarray]:
        weights = [tvm.runtime.tensor(value) for value in lowered.weights.values()]
        found = machine["main"](*(tvm.runtime.tensor(value.numpy()) for value in inputs), *weights)
        return [item.numpy() for item in found]

    run(torch.full_like(x, float("nan")), *(torch.full_like(mask, 0.3) for mask in masks))  # memory is full of NaN now
    for one, other in zip(run(x, *masks), expected, strict=True):
        scale = float(other.abs().max()) or 1.0
        np.testing.assert_allclose(one / scale, other.numpy() / scale, rtol=0, atol=1e-4)
