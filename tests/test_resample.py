"""Resampling of clips and pictures in one kernel, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from test_attention import emitted_by
from test_norms import Several, errors, on_double, run
from torch import nn

from dance_tvm.lowering import lower_points, lower_resampling


def between(channels: int, out: int, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv3d(channels, out, 1), *layers)


class Read(nn.Module):
    """What lies between two axes has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv3d(4, 20, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.before(x)
        wide = x.index_select(4, torch.tensor([0, 0, 1, 1, 2, 2]))
        return wide.index_select(3, torch.tensor([2, 0, 1])), wide + 1


def test_resampling_is_one_kernel_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    emitted = emitted_by(lower_resampling, monkeypatch)
    torch.manual_seed(0)
    module = Several(
        between(8, 21, nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv3d(21, 5, 1)),
        between(8, 70, nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear")),
        between(8, 16, nn.Upsample((5, 7, 9), mode="trilinear", align_corners=True), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 33, 3), nn.UpsamplingBilinear2d(scale_factor=3)),
        nn.Sequential(nn.Conv2d(8, 17, 3), nn.Upsample(scale_factor=2, mode="nearest")),
    ).eval()
    clip, picture = torch.randn(2, 8, 3, 4, 5), torch.randn(1, 8, 9, 11)
    inputs = [clip, clip, clip, picture, picture]
    found, _ = run(module, *inputs)
    for index, (ours, truth) in enumerate(zip(found, on_double(module, inputs), strict=True)):
        assert errors(ours, truth) < 2e-6, index
    assert emitted == ["resample"] * 5


class AtPoints(nn.Module):
    """Points inside and outside of a picture and of a clip; a sum of rows that is read in the middle, too."""

    def forward(self, picture: torch.Tensor, clip: torch.Tensor, at: torch.Tensor, rows: torch.Tensor):
        deep, weights = torch.cat([at, at[..., :1]], -1)[:, None], at[0].reshape(72, 2)
        first, second = weights[:, :1], weights[:, 1:]
        taken = [rows.index_select(0, torch.arange(72) % count) for count in (7, 5, 3)]
        half = taken[0] * first + taken[1] * second
        return (
            nn.functional.grid_sample(picture, at, align_corners=False),
            nn.functional.grid_sample(picture, at, padding_mode="border", align_corners=True),
            nn.functional.grid_sample(clip, deep, align_corners=False),
            (half, half + taken[2] * first),
        )


def test_points_of_a_grid_are_one_kernel_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    emitted = emitted_by(lower_points, monkeypatch)
    torch.manual_seed(0)
    inputs = torch.randn(2, 37, 6, 5), torch.randn(2, 32, 3, 4, 5), torch.randn(2, 8, 9, 2), torch.randn(7, 64)
    module = AtPoints().eval()
    found, _ = run(module, *inputs)
    *sampled, (half, whole) = module(*(each.double() for each in inputs))
    for index, (ours, truth) in enumerate(zip(found, (*sampled, half, whole), strict=True)):
        assert errors(ours, truth.detach().numpy()) < 1e-5, index
    assert emitted == ["weighted_rows"] * 4


def test_what_others_read_between_stays() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 8, 3, 3)
    module = Read().eval()
    found, _ = run(module, x)
    for ours, truth in zip(found, on_double(module, [x]), strict=True):
        assert errors(ours, truth) < 2e-6
