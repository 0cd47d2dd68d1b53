"""What is folded into weights and biases when compiled: along which axis it lies decides."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
import tvm
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend.importer import import_model
from dance_tvm.machines.target import load_target


def same_as_pytorch(network: nn.Module, *inputs: torch.Tensor) -> list[str]:
    """Compile and compare; the names of the kernels."""
    target = load_target("host")
    network = network.eval()
    lowered = lower(import_model(network, example_inputs=inputs, check=False).mod, target, Options())
    machine = tvm.relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(1)), tvm.cpu())
    given = [*(value.numpy() for value in inputs), *lowered.weights.values()]
    found = machine["main"](*map(tvm.runtime.tensor, given))
    with torch.no_grad():
        expected = network(*inputs)
    found, expected = ([each] if hasattr(each, "numpy") else list(each) for each in (found, expected))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-5, atol=2e-5)
    return [str(gvar.name_hint) for gvar in lowered.mod.get_global_vars()]


class AddedBefore(nn.Module):
    """Convolutions with something added before a batch norm; every extent is 6, so that sizes tell nothing."""

    SHAPES = ((6,), (6, 1), (6, 1, 1), (1, 6, 1, 1), (6, 1, 1, 1), (1, 1, 6, 6), (6, 6, 6), (1,), ())

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1, bias=False) for _ in self.SHAPES])
        self.added = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in self.SHAPES])
        self.norms = nn.ModuleList([nn.BatchNorm2d(6) for _ in self.SHAPES])
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = zip(self.convolutions, self.added, self.norms, strict=True)
        pairs = [(conv(x), added, norm) for conv, added, norm in made]
        # On either side of the sum.
        return tuple(norm(y + b if at % 2 else b + y) for at, (y, b, norm) in enumerate(pairs))


def test_a_bias_is_folded_along_the_channels_alone():
    same_as_pytorch(AddedBefore(), torch.randn(6, 3, 6, 6))


def test_what_broadcasts_a_convolution_is_no_bias():
    """One output position, added to a whole picture: the sum is larger than the convolution's result."""

    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 5, bias=False), nn.BatchNorm2d(4)
            self.picture = nn.Parameter(torch.randn(1, 4, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.norm(self.conv(x) + self.picture))

    same_as_pytorch(Spread(), torch.randn(1, 3, 5, 5))


class Reparametrised(nn.Module):
    """Layers whose weights are computed: by weight norm, spectral norm and pruning, transposed ones too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        transposed = [nn.ConvTranspose3d(4, 6, 3, 2, 1, 1, groups=groups) for groups in (1, 2, 1)]
        prune.random_unstructured(transposed[1], "weight", 0.5)
        self.layers = nn.ModuleList(
            [
                weight_norm(transposed[0]),
                transposed[1],
                spectral_norm(transposed[2]),
                weight_norm(nn.ConvTranspose3d(4, 5, (1, 2, 3)), dim=1),
                weight_norm(nn.Conv3d(4, 5, 3)),
                prune.l1_unstructured(nn.Conv3d(4, 5, 3), "weight", 0.7),
            ]
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def test_weights_that_are_computed_become_constants():
    same_as_pytorch(Reparametrised(), torch.randn(2, 4, 3, 4, 5))


class Slopes(nn.Module):
    """PReLU with one slope and with one for each channel, where every extent is as long as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.line = nn.Conv3d(4, 4, 1), nn.Linear(4, 4)
        self.one, self.each, self.flat = nn.PReLU(), nn.PReLU(4), nn.PReLU(4)
        for layer in (self.one, self.each, self.flat):
            nn.init.normal_(layer.weight)

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x)
        return self.one(y), self.each(y), self.flat(self.line(rows)), self.each(rows), self.one(rows[0])


def test_slopes_lie_along_the_channels():
    same_as_pytorch(Slopes(), torch.randn(4, 4, 4, 4, 4), torch.randn(4, 4))


class AlongAnAxis(nn.Module):
    """Linear layers over rank 5, along the channels and along the width, behind masks of either."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv3d(3, 6, 1)
        self.channels, self.width = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last = nn.Conv3d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x)
        masks = [(y.mean(axes, keepdim=True) > 0).to(y.dtype) for axes in ((1, 2, 3, 4), (2, 3, 4), (1, 2, 3))]
        by_channel = [self.channels((y * mask).permute(0, 2, 3, 4, 1)) for mask in masks]
        by_width = [self.last(torch.relu(self.width(y * mask))) for mask in masks]
        return (*by_channel, *by_width)


def test_linear_layers_of_rank_five_under_masks():
    same_as_pytorch(AlongAnAxis(), torch.randn(2, 3, 2, 6, 6))


class Branches(nn.Module):
    """Branches whose concatenation is normed and activated; the second concatenation is read by something else too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.ModuleList([nn.Conv3d(3, width, 1, bias=width > 5) for width in (5, 6, 7)])
        self.second = nn.ModuleList([nn.Conv3d(18, width, (3, 1, 1), padding=(1, 0, 0)) for width in (4, 3)])
        self.norms = nn.ModuleList([nn.BatchNorm3d(18), nn.BatchNorm3d(7)])
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norms[0](torch.cat([branch(x) for branch in self.first], 1)))
        joined = torch.cat([branch(y) for branch in self.second], 1)
        return torch.relu(self.norms[1](joined)) + joined


def test_norms_behind_a_concatenation_are_folded_into_its_parts():
    same_as_pytorch(Branches(), torch.randn(2, 3, 4, 5, 6))


class Staged(nn.Module):
    """Convolutions before norms, in modules of modules whose names end in digits."""

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv3d(2, 4, 1)
        self.c11 = nn.Conv3d(4, 4, 1)
        block = (("c1", nn.Conv3d(4, 4, 3, padding=1)), ("b1", nn.BatchNorm3d(4)), ("act", nn.ReLU()))
        self.stages = nn.Sequential(*(nn.Sequential(OrderedDict(block)) for _ in range(2)))

    def forward(self, x):
        return self.c11(self.stages(self.c11(self.c1(x))))


def test_layers_are_called_by_their_modules_paths():
    imported = import_model(Staged().eval(), example_inputs=(torch.zeros(1, 2, 3, 4, 4),), check=False)
    lowered = lower(imported.mod, load_target("host"), Options(threads=1))
    assert [layer.name for layer in lowered.layers] == ["c1", "c11", "stages.0.c1", "stages.1.c1", "c11_1"]
