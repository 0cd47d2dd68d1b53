"""Transposed convolutions by phases, against PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from test_norms import Several, errors, on_double, run
from torch import nn

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend.importer import import_model
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.geometry import Triple, Window
from dance_tvm.schedules.spread import Spread


class Joined(nn.Module):
    """What a decoder does with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.side = nn.ConvTranspose3d(6, 20, 2, 2), nn.BatchNorm3d(20), nn.Conv3d(6, 20, 1)
        self.norm.running_mean = torch.randn(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.up(x)) + self.side(x).repeat_interleave(2, 2).tile(1, 1, 1, 2, 2))


def kernels(lowered: Lowered) -> list[str]:
    return [layer.kernel for layer in lowered.layers]


def test_transposed_convolutions_are_kernels_and_right() -> None:
    torch.manual_seed(0)
    layers = [
        nn.ConvTranspose3d(9, 33, 3, 2, 1, 1),
        nn.Sequential(nn.ConvTranspose3d(8, 16, 4, 2, 1), nn.SiLU()),
        nn.ConvTranspose3d(5, 7, (1, 5, 3), (1, 3, 2), (0, 1, 0), (0, 2, 1), bias=False),
        nn.ConvTranspose3d(5, 3, (2, 1, 2), (2, 2, 3), output_padding=(0, 1, 0)),
        nn.ConvTranspose2d(8, 12, 2, 2),
        Joined(),
    ]
    module = Several(*layers).eval()
    shapes = [(1, 9, 2, 3, 17), (2, 8, 3, 2, 4), (1, 5, 2, 3, 4), (2, 5, 2, 3, 4), (2, 8, 5, 14), (2, 6, 3, 4, 5)]
    inputs = [torch.randn(shape) for shape in shapes]
    found, lowered = run(module, *inputs)
    for layer, ours, truth in zip(layers, found, on_double(module, inputs), strict=True):
        assert errors(ours, truth) < 2e-6, layer
    assert sum(name.startswith("conv3d_transposed") for name in kernels(lowered)) == len(layers)
    assert lowered.layers[0].macs == 9 * 33 * 27 * math.prod(shapes[0][2:])


def test_other_transposed_convolutions_multiply_zeros() -> None:
    torch.manual_seed(0)
    module = Several(
        nn.ConvTranspose3d(6, 4, 3, 2, groups=2), nn.ConvTranspose3d(3, 4, 3, (1, 2, 2), dilation=(1, 2, 1))
    ).eval()
    inputs = [torch.randn(1, 6, 2, 3, 4), torch.randn(1, 3, 2, 3, 4)]
    found, lowered = run(module, *inputs)
    for ours, truth in zip(found, on_double(module, inputs), strict=True):
        assert errors(ours, truth) < 2e-6
    assert not [name for name in kernels(lowered) if name.startswith("conv3d_transposed")]


def test_half_precision_has_the_kernel_too() -> None:
    mod = import_model(nn.ConvTranspose3d(8, 8, 2, 2).eval(), example_inputs=(torch.randn(1, 8, 2, 2, 2),)).mod
    lowered = lower(mod, load_target("snapdragon"), Options(dtype="float16"))
    assert [name for name in kernels(lowered) if name.startswith("conv3d_transposed_f16_")]


@pytest.mark.parametrize(
    ("spread", "kernel", "padding"), [((1, 2, 3), (2, 3, 4), (1, 1, 2)), ((2, 2, 2), (2, 2, 2), (1, 1, 1))]
)
def test_phases_are_what_the_spread_input_gives(spread: Triple, kernel: Triple, padding: Triple) -> None:
    size = (3, 4, 2)
    wide = tuple((n - 1) * s + 1 for n, s in zip(size, spread, strict=True))
    out = tuple((n - 1) * s + 2 for n, s in zip(size, spread, strict=True))
    geometry = Spread(Window(1, wide, out, kernel, (1, 1, 1), padding), spread)
    assert geometry.size == size
    for axis in range(3):
        for output in range(out[axis]):
            reads = [(tap, output - padding[axis] + tap) for tap in range(kernel[axis])]
            expected = [
                (tap, place // spread[axis])
                for tap, place in reads
                if 0 <= place < wide[axis] and place % spread[axis] == 0
            ]
            remainder, index = output % spread[axis], output // spread[axis]
            phase, window = geometry.phase(axis, remainder), geometry.within(axis, remainder)
            live = window.live_taps(axis, index)
            found = [(phase.first + at * spread[axis], phase.source + index + at) for at in live]
            assert found == expected
    assert geometry.tap_positions == math.prod(
        sum(len(geometry.within(axis, o % spread[axis]).live_taps(axis, o // spread[axis])) for o in range(out[axis]))
        for axis in range(3)
    )
    assert sorted(geometry.width_taps) == list(range(kernel[2]))
