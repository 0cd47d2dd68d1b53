"""Activations as PyTorch exports them, taken into the kernel of the layer before them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import tvm
from torch import nn

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend.importer import import_model
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.epilogue import STEPS


class Behind(nn.Module):
    """A convolution with each activation behind it."""

    def __init__(self, *activations: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList([nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)) for _ in activations])
        self.activations = nn.ModuleList(activations)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(act(conv(x)) for conv, act in zip(self.convolutions, self.activations, strict=True))


class ReadTwice(nn.Module):
    """An activation whose input, or whose gate, somebody else reads too: it stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.other = nn.Conv3d(3, 8, 1), nn.Conv3d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, z = self.conv(x), self.other(x)
        gate = torch.sigmoid(z)
        return nn.functional.relu6(y), y, z * gate, gate


class Written(nn.Module):
    """An activation as a function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def left_over(names: list[str]) -> list[str]:
    """Functions that apply a step of an activation on their own."""
    layers = [name for name in names if "concatenate" not in name]  # those put together what was counted
    return [name for name in layers if any(step in name for step in (*STEPS, "tir_"))]


def compiled(network: nn.Module, x: torch.Tensor) -> tuple[list[np.ndarray], list[str]]:
    target = load_target("host")
    lowered = lower(import_model(network.eval(), example_inputs=(x,), check=False).mod, target, Options())
    machine = tvm.relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(1)), tvm.cpu())
    given = [x.numpy(), *lowered.weights.values()]
    found = [value.numpy() for value in machine["main"](*map(tvm.runtime.tensor, given))]
    return found, [str(gvar.name_hint) for gvar in lowered.mod.get_global_vars()]


NAMED = {
    **{type(each).__name__: each for each in (nn.ReLU(), nn.ReLU6(), nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.SELU())},
    **{type(each).__name__: each for each in (nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Softsign())},
    **{type(each).__name__: each for each in (nn.Tanhshrink(), nn.LogSigmoid(), nn.Hardshrink(), nn.Softshrink())},
    "GELU by tanh": nn.GELU("tanh"),
    "LeakyReLU": nn.LeakyReLU(0.1),
    "ELU": nn.ELU(0.7),
    "CELU": nn.CELU(0.7),
    "Softplus": nn.Softplus(2.0, 15.0),
    "Hardtanh": nn.Hardtanh(-2, 3),
    "PReLU of one slope": nn.PReLU(1, 0.3),
    "Threshold": nn.Threshold(0.1, -1.0),
    "GELU as a network writes it": Written(lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    "SiLU as a network writes it": Written(lambda x: x / (1 + torch.exp(-x))),
    "clamps": Written(lambda x: torch.clamp(x, min=-1.0) + torch.clamp(x, max=2.0)),
}


def test_every_activation_is_fused():
    """Behind a convolution: only kernels of ours are left, and their results are PyTorch's."""
    network, x = (
        Behind(*NAMED.values()),
        4 * torch.randn(1, 3, 6, 40, 40),
    )  # too large to be joined with small operators
    found, names = compiled(network, x)
    for name, ours, theirs in zip(NAMED, found, network.double()(x.double()), strict=True):
        exact = theirs.detach().numpy()
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5, err_msg=name)
    assert not left_over(names)


def test_silu_by_parts_is_the_named_one():
    """Layers of one shape share a kernel where their activations are the same."""
    parts = [Written(lambda x: x * torch.sigmoid(x)), Written(lambda x: torch.sigmoid(x) * x), nn.SiLU()]
    _, names = compiled(Behind(*parts), torch.randn(1, 3, 2, 9, 9))
    assert len([name for name in names if name.startswith("conv3d")]) == 1


class Elsewhere(nn.Module):
    """Activations behind a depthwise layer, a linear one, norms and a convolution by Winograd's algorithm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.depthwise, self.linear = nn.Conv3d(16, 16, 3, padding=1, groups=16), nn.Linear(40, 24)
        self.group, self.layer = nn.GroupNorm(4, 16), nn.LayerNorm(40)
        self.wide = nn.Conv3d(16, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        f = nn.functional
        first = f.mish(self.depthwise(x)), f.gelu(self.linear(x)), f.leaky_relu(self.group(x), 0.2)
        return *first, f.hardswish(self.layer(x)), f.elu(self.wide(x))


def test_activations_behind_other_kernels():
    network, x = Elsewhere(), torch.randn(1, 16, 4, 28, 40)
    found, names = compiled(network, x)
    for ours, theirs in zip(found, network.double()(x.double()), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=2e-5)
    assert any(name.startswith("conv3d_winograd") for name in names)
    assert not left_over(names)


def test_nan_and_infinities_pass_as_in_pytorch():
    """``where``, ``clip`` and the extremes keep NaN; a 1×1×1 convolution by ones hands on what it gets."""
    kinds = ["ReLU6", "Hardtanh", "LeakyReLU", "Threshold", "Hardshrink", "GELU", "Tanh", "SiLU", "clamps"]
    network = Behind(*(NAMED[name] for name in kinds))
    network.convolutions = nn.ModuleList([nn.Conv3d(3, 8, 1, bias=False) for _ in kinds])
    for layer in network.convolutions:
        layer.weight.data.fill_(1)
    x = torch.zeros(1, 3, 1, 16, 16)
    x[0, 0, 0, 0, :4] = torch.tensor([torch.nan, 100.0, -100.0, 1e30])
    found, _ = compiled(network, x)
    for name, ours, theirs in zip(kinds, found, network(x), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_others_read_is_not_taken():
    network, x = ReadTwice(), torch.randn(1, 3, 2, 5, 6)
    found, _ = compiled(network, x)
    for ours, theirs in zip(found, network(x), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)


class Masked(nn.Module):
    """A mask of frames, positions or channels behind each activation, also behind those that must see every value."""

    def __init__(self, *activations: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.convolutions = nn.ModuleList([nn.Conv3d(3, 8, 3, padding=1) for _ in activations for _ in range(3)])
        self.activations = activations
        self.scores = nn.Buffer(torch.tensor([1.0, -2.0, 3.0, -4.0, -5.0, 6.0, 7.0, -8.0]).view(1, 8, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = x.mean((1, 3, 4), keepdim=True), x.mean((1, 2), keepdim=True), x.mean() * self.scores
        masks = [(score > 0).to(x.dtype) for score in scores]
        layers = iter(self.convolutions)
        return tuple(act(next(layers)(x)) * mask for act in self.activations for mask in masks)


def test_masks_behind_activations_hold():
    network = Masked(lambda y: 1 / y, lambda y: torch.log(y.abs()), lambda y: torch.exp(y) + 2, nn.functional.gelu)
    x = torch.randn(1, 3, 4, 6, 7)
    found, _ = compiled(network, x)
    with torch.no_grad():
        wanted = network.double()(x.double())
    for ours, theirs in zip(found, wanted, strict=True):
        scale = float(theirs.abs().max())
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5 * scale)
        assert 0 < float((theirs == 0).double().mean()) < 1
