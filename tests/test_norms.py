"""Norms, means, variances and sums against float64, beside PyTorch's own float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import tvm
from convolutions import call, on_processor, tensor
from torch import nn

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.importer import import_model
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu import moments
from dance_tvm.schedules.cpu.moments import VectorReduction
from dance_tvm.schedules.cpu.norm import Norm

#: Two units in the last place of the largest value: what rounding factors and products to float32 may come to.
FLOOR = 2.4e-7


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()


def compiled(
    module: nn.Module, *inputs: torch.Tensor, threads: int = 2
) -> tuple[Callable[..., list[np.ndarray]], Lowered]:
    """The compiled network, called with inputs like these, and what it was lowered to."""
    target = load_target("host")
    mod = import_model(module, example_inputs=inputs, check=False).mod
    lowered = lower(mod, target, Options(threads=threads))
    machine = tvm.relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(threads)), tvm.cpu())

    def outputs(*values: torch.Tensor) -> list[np.ndarray]:
        found = machine["main"](*(tensor(value.numpy()) for value in values), *map(tensor, lowered.weights.values()))
        return [found.numpy()] if hasattr(found, "numpy") else [each.numpy() for each in found]

    return outputs, lowered


def run(module: nn.Module, *inputs: torch.Tensor, threads: int = 2) -> tuple[list[np.ndarray], Lowered]:
    """The compiled network's outputs, and what it was lowered to."""
    outputs, lowered = compiled(module, *inputs, threads=threads)
    return outputs(*inputs), lowered


def kernels(lowered: Lowered) -> list[str]:
    return [str(gvar.name_hint) for gvar in lowered.mod.get_global_vars() if gvar.name_hint not in ("main", "counts")]


def errors(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300))


class Several(nn.Module):
    """Layers side by side, each on its own input: one build for many."""

    def __init__(self, *layers: nn.Module | Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer for layer in layers if isinstance(layer, nn.Module)])
        self.calls = layers

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(call(x) for call, x in zip(self.calls, inputs, strict=True))


def on_double(module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    # The layers that are called are those of the module list: a deep copy keeps both the same.
    double = copy.deepcopy(module).double()
    return [value.detach().numpy() for value in double(*(x.double() for x in inputs))]


def no_worse_than_pytorch(module: Several, inputs: Sequence[torch.Tensor]) -> None:
    found, _ = run(module, *inputs)
    exact = on_double(module, inputs)
    theirs = [value.detach().numpy() for value in module(*inputs)]
    for index, (ours, torchs, truth) in enumerate(zip(found, theirs, exact, strict=True)):
        own = errors(torchs, truth)
        assert errors(ours, truth) <= max(2 * own, FLOOR), (index, module.calls[index], errors(ours, truth), own)


NORMS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.InstanceNorm3d(6), (1, 6, 3, 20, 9)),
    (lambda: nn.InstanceNorm3d(6, affine=True), (2, 6, 3, 20, 9)),
    (lambda: nn.InstanceNorm1d(5, affine=True), (3, 5, 77)),
    (lambda: nn.GroupNorm(3, 6), (2, 6, 3, 20, 9)),
    (lambda: nn.GroupNorm(1, 6), (2, 6, 40)),
    (lambda: nn.GroupNorm(4, 40), (7, 40)),
    (lambda: nn.GroupNorm(2, 6, affine=False), (2, 6, 11, 5)),
    (lambda: nn.LayerNorm(33), (2, 11, 33)),
    (lambda: nn.LayerNorm((5, 33)), (2, 5, 33)),
    (lambda: nn.LayerNorm(1), (4, 1)),
    (lambda: nn.RMSNorm(33), (2, 11, 33)),
    (lambda: nn.BatchNorm3d(6, track_running_stats=False), (2, 6, 3, 10, 9)),
]


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_norms_of_an_offset_input(mean):
    layers = seeded(Several(*(make() for make, _ in NORMS)))
    generator = torch.Generator().manual_seed(1)
    no_worse_than_pytorch(layers, [torch.randn(shape, generator=generator) + mean for _, shape in NORMS])


class BehindConvolution(nn.Module):
    """A norm of activations whose channels lie innermost; the convolution passes its input on as it is."""

    def __init__(self, after: nn.Module | Callable[[torch.Tensor], torch.Tensor], channels: int = 6) -> None:
        super().__init__()
        self.same = nn.Conv3d(channels, channels, 1)
        self.after = after
        with torch.no_grad():
            self.same.weight.copy_(torch.eye(channels).reshape(channels, channels, 1, 1, 1))
            self.same.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.same(x))


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_norms_of_channels_innermost(mean):
    norms = [
        nn.InstanceNorm3d(6, affine=True),
        nn.GroupNorm(2, 6),
        nn.GroupNorm(1, 6),
        nn.GroupNorm(6, 6),
        nn.LayerNorm((6, 2, 7, 9)),
        nn.LayerNorm((7, 9)),
        nn.BatchNorm3d(6, track_running_stats=False),
        nn.Softmax(1),
        nn.LogSoftmax(1),
    ]
    layers = Several(*(BehindConvolution(seeded(each)) for each in norms)).eval()
    generator = torch.Generator().manual_seed(2)
    no_worse_than_pytorch(layers, [torch.randn((2, 6, 2, 7, 9), generator=generator) + mean for _ in norms])


def test_reductions_over_any_axes():
    calls = [
        lambda x: x.mean((2, 3, 4)),
        lambda x: x.mean((0, 2, 4), keepdim=True),
        lambda x: x.mean(),
        lambda x: x.sum((1, 3)),
        lambda x: x.sum(0),
        lambda x: x.var((2, 3, 4)),
        lambda x: x.var((1, 3), correction=0, keepdim=True),
        lambda x: x.std(1),
        lambda x: (x * x).mean((1, 4)),
        lambda x: x.square().sum((2, 3, 4)),
        lambda x: nn.functional.avg_pool3d(x, (3, 8, 10)),
        lambda x: nn.functional.adaptive_avg_pool3d(x, 1),
        lambda x: nn.functional.adaptive_avg_pool3d(x, (1, 4, 2)),
        lambda x: x.softmax(2),
        lambda x: x.log_softmax(4),
    ]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn((2, 5, 3, 8, 10), generator=generator) + 10 for _ in calls]
    no_worse_than_pytorch(Several(*calls), inputs)


def test_a_long_reduction():
    calls = [lambda x: x.mean((2, 3, 4)), lambda x: x.var((2, 3, 4)), lambda x: x.sum(), nn.InstanceNorm3d(1)]
    x = torch.rand((1, 1, 64, 128, 128), generator=torch.Generator().manual_seed(4)) + 1
    no_worse_than_pytorch(Several(*calls), [x] * len(calls))


def test_equal_elements_have_no_variance():
    """Whatever their value: what comes out is beta."""
    layers = seeded(Several(nn.LayerNorm(40), BehindConvolution(nn.InstanceNorm3d(6, affine=True)), nn.GroupNorm(2, 8)))
    with torch.no_grad():
        layers.layers[1].same.weight.copy_(torch.eye(6).reshape(6, 6, 1, 1, 1))
    inputs = [torch.full(shape, 0.1234567e3) for shape in ((3, 40), (1, 6, 2, 9, 7), (2, 8, 50))]
    (layer, instance, group), _ = run(layers, *inputs)
    betas = [layers.layers[0].bias, layers.layers[1].after.bias, layers.layers[2].bias]
    np.testing.assert_array_equal(layer, np.broadcast_to(betas[0].detach().numpy(), layer.shape))
    np.testing.assert_array_equal(group, np.broadcast_to(betas[2].detach().numpy()[:, None], group.shape))
    per_channel = instance.reshape(6, -1)
    assert (per_channel == per_channel[:, :1]).all()


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_tiny_and_huge_values(scale):
    """Squares that are no float32 are none of our business: sums are wider."""
    layers = Several(nn.LayerNorm(50, eps=0.0), lambda x: x.var(1), lambda x: x.mean(1))
    x = (torch.randn((4, 50), generator=torch.Generator().manual_seed(5)) * scale).float()
    found, _ = run(layers, x, x, x)
    exact = on_double(layers, [x, x, x])
    assert errors(found[0], exact[0]) < FLOOR
    if scale < 1:
        assert errors(found[1], exact[1]) < 1e-3  # a denormal
    assert errors(found[2], exact[2]) < FLOOR


def test_what_is_no_number_stays_none():
    layers = Several(nn.LayerNorm(8), BehindConvolution(nn.InstanceNorm3d(6)), lambda x: x.var(0))
    bad = [torch.randn(shape) for shape in ((3, 8), (1, 6, 2, 3, 4), (5, 4))]
    bad[0][1, 2], bad[1][0, 3, 1, 1, 1], bad[2][2, 1] = float("nan"), float("inf"), float("-inf")
    found, _ = run(layers, *bad)
    assert np.isnan(found[0][1]).all()
    assert np.isfinite(found[0][[0, 2]]).all()
    assert np.isnan(found[2][1])
    assert np.isfinite(found[2][[0, 2, 3]]).all()


@pytest.mark.parametrize("shape", [(2, 5, 3, 37), (3, 67, 1030), (4, 163)])
def test_extremes_and_softmax_of_every_value(shape):
    """Over lines and lanes that fill no whole vectors: extremes to the bit; all infinite, NaN here and there."""
    extremes = [lambda x: x.amax(1), lambda x: x.amin(-1), lambda x: x.amax(0, keepdim=True), lambda x: x.amin()]
    softmaxes = [lambda x: x.softmax(-1), lambda x: x.softmax(1), lambda x: x.log_softmax(1), lambda x: x.softmax(0)]
    network = Several(*extremes, *softmaxes)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6)) * 5
    odd, infinite = x.clone(), torch.full(shape, float("-inf"))
    odd.view(-1)[3], odd.view(-1)[-2], infinite.view(-1)[1] = float("nan"), float("inf"), 0.0
    inputs = [x] * len(network.calls)
    outputs, lowered = compiled(network, *inputs)
    names = {name for info in lowered.kernels.values() for name in (info.name, *info.parts)}
    assert {"reduce_max_f32", "reduce_min_f32", "softmax_f32", "log_softmax_f32"} <= names
    for values in (x, odd, infinite, x * 1e30):
        inputs = [values] * len(network.calls)
        found = outputs(*inputs)
        exact = on_double(network, inputs)
        for ours, right in zip(found[:4], exact[:4], strict=True):
            np.testing.assert_array_equal(ours, right)
        for ours, right in zip(found[4:], exact[4:], strict=True):
            np.testing.assert_allclose(ours, right, rtol=2e-6, atol=1e-7)


class Residual(nn.Module):
    """A block that ends in two norms and a ReLU, and one with a plain shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv3d(6, 8, 1), nn.Conv3d(6, 8, 1)
        self.one, self.other = nn.InstanceNorm3d(8, affine=True), nn.GroupNorm(1, 8)
        self.last = nn.GroupNorm(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(self.left(x)) + self.other(self.right(x)))
        return torch.relu(x + self.last(x))


def test_a_norm_takes_shortcut_and_activation_with_it():
    network = seeded(Residual())
    x = torch.randn((2, 6, 3, 24, 36), generator=torch.Generator().manual_seed(6))  # too large to be joined
    (found,), lowered = run(network, x)
    assert errors(found, network(x).detach().numpy()) < 1e-6
    assert not [name for name in kernels(lowered) if "add" in name or "relu" in name]
    script = lowered.mod["main"].script()
    assert script.count("R.call_tir(norm_f32") == 3


SPECS = {
    "channels": Norm((2, 50, 12), 2, 50, 12, 1, 1e-5, 8, 2, "lanes", 12),
    "groups": Norm((2, 50, 12), 2, 50, 12, 4, 1e-5, 8, 2, "lanes", 12),
    "lines": Norm((6, 77), 6, 1, 77, 77, 1e-3, 8, 2, "lanes", 77),
    "by line": Norm((6, 3), 6, 1, 3, 3, 1e-5, 8, 2, "lines", 2),
    "root mean square": Norm((3, 40, 5), 3, 40, 5, 5, 1e-5, 8, 2, centred=False),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shared among threads"])
def test_the_kernel(name, shared, monkeypatch):
    """In blocks for several threads and in one; nothing else is written, and nothing is left unwritten."""
    monkeypatch.setattr(moments, "TASK_ELEMENTS", 16 if shared else 1 << 30)
    spec = replace(SPECS[name], residual=True, activation="relu")
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((spec.outer, spec.rows, spec.lanes)) + 5).astype("float32")
    residual = rng.standard_normal(x.shape).astype("float32")
    gamma, beta = rng.standard_normal((2, spec.scales or 1)).astype("float32")
    grouped = x.astype("float64").reshape(spec.outer, spec.rows, -1, spec.group)
    if spec.centred:
        grouped = grouped - grouped.mean((1, 3), keepdims=True)
    expected = grouped / np.sqrt((grouped**2).mean((1, 3), keepdims=True) + spec.epsilon)
    expected = expected.reshape(x.shape)
    if spec.affine:
        shape = (1, 1, -1) if spec.affine == "lanes" else (spec.outer, 1, 1)
        size = spec.lanes if spec.affine == "lanes" else spec.outer
        expected = expected * np.resize(gamma, size).reshape(shape) + np.resize(beta, size).reshape(shape)
    expected = np.maximum(expected + residual, 0)
    values = {"x": x.reshape(spec.shape), "gamma": gamma, "beta": beta, "residual": residual.reshape(spec.shape)}
    (y,) = on_processor(
        spec.primfunc(), [values[each.name] for each in spec.inputs()], [np.full(spec.shape, np.nan, "f4")]
    )
    np.testing.assert_allclose(y.reshape(x.shape), expected, atol=2e-6)


SIZES = [(2, 100, 12), (1, 33, 3), (3, 70, 1), (1, 9, 2500), (4, 1, 5)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reductions_in_blocks(size, monkeypatch):
    monkeypatch.setattr(moments, "TASK_ELEMENTS", 16)
    outer, _, inner = size
    x = (np.random.default_rng(8).standard_normal(size) + 3).astype("float32")
    exact = x.astype("float64")
    spec = VectorReduction(size, (outer, inner), *size, "variance", vector_floats=8, threads=2)
    for each, expected in (
        (spec, exact.var(1)),
        (replace(spec, statistic="mean", squared=True), (exact**2).mean(1)),
        (replace(spec, statistic="sum"), exact.sum(1)),
    ):
        np.testing.assert_allclose(call(each, x)[0], expected, rtol=2e-7, atol=1e-7)


def test_reductions_on_a_gpu():
    from dance_tvm.device.opencl import OpenCLSession
    from dance_tvm.device.opencl_network import run_function
    from dance_tvm.schedules.gpu.reduce import BlockReduction

    try:
        session = OpenCLSession(optimise=False)
    except DanceError as error:
        pytest.skip(str(error))
    for size in ((2, 700, 5), (1, 5000, 1), (1, 3, 70)):
        outer, _, inner = size
        x = (np.random.default_rng(9).standard_normal(size) + 30).astype("float32")
        exact = x.astype("float64")
        for kind, expected in (("mean", exact.mean(1)), ("variance", exact.var(1)), ("sum", exact.sum(1))):
            found, _ = call(BlockReduction(size, (outer, inner), *size, kind), x, run=partial(run_function, session))
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    same = np.full((1, 3001, 2), 123.4567, "float32")
    spec = BlockReduction(same.shape, (1, 2), *same.shape, "variance")
    found, _ = call(spec, same, run=partial(run_function, session))
    assert not found.any()


class Units(nn.Module):
    """Two levels of a segmentation network as MONAI builds them: residual units with instance norm and PReLU, strided
    down, transposed convolutions up, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, 1), nn.InstanceNorm3d(outputs), nn.PReLU())

        self.down, self.short = nn.Sequential(unit(1, 8, 2), unit(8, 8, 1)), nn.Conv3d(1, 8, 3, 2, 1)
        self.bottom, self.along = nn.Sequential(unit(8, 12, 1), unit(12, 12, 1)), nn.Conv3d(8, 12, 1)
        self.up = nn.Sequential(nn.ConvTranspose3d(20, 2, 3, 2, 1, 1), nn.InstanceNorm3d(2), nn.PReLU())
        self.head = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x) + self.short(x)
        x = self.up(torch.cat([x, self.bottom(x) + self.along(x)], 1))
        return self.head(x) + x


class Encoder(nn.Module):
    """A segmentation network as SegResNet: group norm and ReLU before each convolution, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()

        def half(channels: int) -> list[nn.Module]:
            return [nn.GroupNorm(4, channels), nn.ReLU(), nn.Conv3d(channels, channels, 3, padding=1, bias=False)]

        self.first = nn.Conv3d(1, 8, 3, padding=1, bias=False)
        self.block = nn.Sequential(*half(8), *half(8))
        self.down, self.below = nn.Conv3d(8, 16, 3, 2, 1, bias=False), nn.Sequential(*half(16), *half(16))
        self.narrow, self.up = nn.Conv3d(16, 8, 1, bias=False), nn.Upsample(scale_factor=2)
        self.last = nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv3d(8, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.block(x)
        low = self.down(x)
        low = low + self.below(low)
        return self.last(self.up(self.narrow(low)) + x)


@pytest.mark.parametrize("network", [Units, Encoder])
def test_segmentation_networks(network, tmp_path):
    from dance_tvm import build_network

    torch.manual_seed(0)
    module, x = network().eval(), torch.randn(1, 1, 8, 16, 16) + 20
    built = build_network(module, tmp_path / "built", target="host", threads=1, example_inputs=(x,))
    assert built.artifact.manifest.check.status == "passed"
