"""AVA's adaptors (supplement, "Adaptive Pruning Modules"): learned scales and the variability they leave behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

TINY = 1e-12  # an activation that is zero everywhere has no shares: 0 instead of NaN, as the shares' deviation is then


class AdaptorTemporal(nn.Module):
    """A learned scale for each of T frames; (x, deviation of the frames' shares of activation (N,), times 1/3)."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.bias_t = nn.Parameter(torch.ones(1, 1, frames, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu(x * self.bias_t)
        return x, _deviation(x.mean(dim=(1, 3, 4))) / 3


class AdaptorSpatial(nn.Module):
    """Learned scales for channels and positions; (x, 2/3 of the channels' deviation, 1/3 of the positions')."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.bias_ch = nn.Parameter(torch.ones(1, channels, 1, 1, 1))
        self.bias_sp = nn.Parameter(torch.ones(1, 1, 1, height, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = functional.relu(x * self.bias_ch)
        channels = 2 * _deviation(x.mean(dim=(3, 4)).flatten(1)) / 3
        x = functional.relu(x * self.bias_sp)
        return x, channels, _deviation(x.mean(dim=1).flatten(1)) / 3


class Adaptor(nn.Module):
    """Both adaptors after one convolution; the last call's weighted deviations stay in `variability`: three of (N,)."""

    variability: tuple[Tensor, Tensor, Tensor]

    def __init__(self, channels: int, frames: int, height: int, width: int) -> None:
        super().__init__()
        self.temporal = AdaptorTemporal(frames)
        self.spatial = AdaptorSpatial(channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        x, frames = self.temporal(x)
        x, channels, positions = self.spatial(x)
        self.variability = (frames, channels, positions)
        return x

    def channel_scale(self) -> Tensor:
        """(C,): what the adaptor multiplies each channel by, its frame and position scales by their mean."""
        rest = self.temporal.bias_t.clamp(min=0).mean() * self.spatial.bias_sp.clamp(min=0).mean()
        return self.spatial.bias_ch.clamp(min=0).flatten() * rest


def _deviation(activity: Tensor) -> Tensor:
    """Standard deviation (N,) of each entry's share of the row's sum; activity is (N, entries), never negative.

    One entry has all, and no deviation: as the only frame behind a mean over the clip.
    """
    if activity.shape[-1] == 1:
        return activity.new_zeros(len(activity))
    shares = activity / activity.sum(dim=-1, keepdim=True).clamp(min=TINY)
    return shares.std(dim=-1)
