"""Zeros around a convolution's input become its padding; what is no padding stays a copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dance_tvm import build_network
from dance_tvm.frontend import import_model
from dance_tvm.ir.reasons import Reasons
from dance_tvm.transform.fold_pads import FoldPads


class Padded(nn.Module):
    """A convolution behind a pad."""

    def __init__(self, width: tuple[int, ...], convolution: nn.Module, mode: str = "constant", value: float = 0.0):
        super().__init__()
        self.width, self.mode, self.value, self.convolution = width, mode, value, convolution

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(F.pad(x, self.width, self.mode, self.value if self.mode == "constant" else None))


def _folded(network: nn.Module, shape: tuple[int, ...]) -> str:
    return FoldPads(Reasons())(import_model(network.eval(), example_inputs=(torch.randn(shape),)).mod).script()


def test_more_zeros_behind_than_before_become_padding():
    text = _folded(Padded((0, 1, 2, 1, 0, 0), nn.Conv3d(3, 4, 3, 2, (1, 0, 1))), (1, 3, 4, 6, 7))
    assert "nn.pad" not in text
    assert "padding=[1, 2, 1, 1, 1, 2]" in text


@pytest.mark.parametrize(
    "network",
    [
        Padded((1, 1, 1, 1), nn.Conv2d(3, 4, 3), "reflect"),
        Padded((1, 1, 1, 1), nn.Conv2d(3, 4, 3), value=0.5),
        Padded((1, 1, -1, 0), nn.Conv2d(3, 4, 3)),
        Padded((0, 0, 0, 0, 0, 1), nn.Conv2d(4, 4, 3)),
    ],
    ids=["reflected", "another value", "cropped", "channels"],
)
def test_what_is_no_padding_stays(network):
    before = import_model(network.eval(), example_inputs=(torch.randn(1, 3, 6, 7),)).mod
    assert FoldPads(Reasons())(before).script() == before.script()


def test_every_kind_of_convolution_reads_the_padding_right(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        Padded((0, 1, 1, 2, 1, 0), nn.Conv3d(3, 6, 3, 2)),
        nn.SiLU(),
        Padded((2, 1, 0, 3, 1, 1), nn.Conv3d(6, 6, 3, groups=6)),
        nn.ReLU(),
        Padded((3, 0, 0, 0, 0, 0), nn.Conv3d(6, 5, 1)),
    )
    built = build_network(network.eval(), tmp_path / "a", target="host", example_inputs=(torch.randn(1, 3, 5, 9, 11),))
    assert built.artifact.manifest.check.status == "passed"
    assert not any("pad" in symbol for symbol in built.artifact.manifest.kernels)
