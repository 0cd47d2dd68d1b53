"""`profile` of the C interface counts what Python counts of the same call; `counted_alike` is called elsewhere too."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from counting import counted_alike
from torch import nn

from dance_tvm.artifact.folder import load_artifact
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options


class Folded(nn.Module):
    """Single frames: a convolution whose input a mask of positions zeroes, a pointwise and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.point, self.deep = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, frames: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(frames))
        x = torch.relu(self.second(x * (positions > 0).to(x.dtype)))
        return self.deep(self.point(x))


class Clips(nn.Module):
    """Convolutions between masks of positions, frames and channels that differ by clip; a pool behind the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(4, 16, 3, padding=1), nn.Conv3d(16, 32, 3, padding=1)
        self.third, self.last = nn.Conv3d(32, 32, 3, padding=1), nn.Conv3d(32, 32, 3, padding=1)

    def forward(
        self, clip: torch.Tensor, positions: torch.Tensor, frames: torch.Tensor, channels: torch.Tensor
    ) -> torch.Tensor:
        x = nn.functional.max_pool3d(torch.relu(self.first(clip)), (1, 2, 2))
        x = torch.relu(self.second(x * (positions > 0).to(x.dtype))) * (frames > 0).to(x.dtype)
        return self.last(torch.relu(self.third(x)) * (channels > 0).to(x.dtype))


class Frames(nn.Module):
    """A convolution wide enough that Winograd transforms frames, some of which are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(4, 128, 1), nn.Conv3d(128, 128, 3, padding=1)

    def forward(self, clip: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(clip)) * (frames > 0).to(clip.dtype))


def counted(network: nn.Module, folder: Path, conv: Literal["direct", "winograd"], *inputs: torch.Tensor) -> str:
    """The kernels whose work was counted."""
    options = Options(threads=1, conv=conv)
    found = build_network(network.eval(), folder, example_inputs=inputs, check=False, options=options).artifact
    given = {tensor.name: value.numpy() for tensor, value in zip(found.manifest.inputs, inputs, strict=True)}
    work = counted_alike(found, given)
    assert len(work) == len([layer for layer in found.manifest.layers if layer.macs])
    return " ".join(work)


def test_planes_of_tiles_that_dead_frames_leave_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    frames = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 1, 1, 1]]).view(2, 1, 8, 1, 1).float()
    counted(Frames(), tmp_path / "a", "winograd", torch.randn(2, 4, 8, 7, 7), frames)
    (kernel,) = (each for each in load_artifact(tmp_path / "a").manifest.kernels.values() if each.tile)
    assert "tap_planes" in kernel.operands


def some(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) < 0.4).float()


def test_winograd_from_its_inputs_side_pointwise_and_depthwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kernels = counted(Folded(), tmp_path / "a", "winograd", torch.randn(3, 4, 20, 20), some(3, 1, 20, 20))
    assert all(kind in kernels for kind in ("winograd_inputs", "pointwise", "depthwise"))


@pytest.mark.parametrize("conv", ["direct", "winograd"])
def test_masks_of_every_axis(conv: Literal["direct", "winograd"], tmp_path: Path) -> None:
    torch.manual_seed(0)
    frames = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]]).view(2, 1, 4, 1, 1).float()
    positions = some(2, 1, 4, 24, 46)
    positions[..., :14] = 0  # whole tiles
    masks = positions, frames, some(2, 32, 1, 1, 1)
    network = Clips()
    if conv == "direct":
        network.third.weight.data[:16, 4:12] = 0
        network.third.weight.data[16:, :8, 0] = 0
    kernels = counted(network, tmp_path / "a", conv, torch.randn(2, 4, 4, 48, 92), *masks)
    assert all(mark in kernels for mark in ("_i_", *(["line_pool", "kgs_o_"] if conv == "direct" else ["_o_"])))
