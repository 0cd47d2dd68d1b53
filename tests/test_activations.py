"""Activations as PyTorch exports them, taken into the kernel of the layer before them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from torch import nn

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend.importer import import_model
from dance_tvm.machines.target import load_target


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


def compiled(network: nn.Module, x: torch.Tensor) -> tuple[list[np.ndarray], list[str]]:
    target = load_target("host")
    lowered = lower(import_model(network.eval(), example_inputs=(x,), check=False).mod, target, Options())
    machine = tvm.relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(1)), tvm.cpu())
    given = [x.numpy(), *lowered.weights.values()]
    found = [value.numpy() for value in machine["main"](*map(tvm.runtime.tensor, given))]
    return found, [str(gvar.name_hint) for gvar in lowered.mod.get_global_vars()]


ALMOST = [nn.Hardtanh(-1, 6), nn.Hardtanh(0, 5)]


@pytest.mark.parametrize(
    "activations",
    [[nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.ReLU()], ALMOST],
    ids=["fused", "almost"],
)
def test_activations_behind_convolutions(activations):
    network, x = Behind(*activations), 4 * torch.randn(1, 3, 6, 40, 40)  # too large to be joined with small operators
    found, names = compiled(network, x)
    for ours, theirs in zip(found, network(x), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
    words = ("sigmoid", "clip", "divide", "small", "multiply")
    left = [name for name in names if any(word in name for word in words)]
    assert bool(left) == (activations is ALMOST), names


def test_what_others_read_is_not_taken():
    network, x = ReadTwice(), torch.randn(1, 3, 2, 5, 6)
    found, _ = compiled(network, x)
    for ours, theirs in zip(found, network(x), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
