"""The two policies of a block (D-STEP, sections 3.1 and 3.2): which tiles matter, and each channel's fate.

In training both draw hard decisions with Gumbel noise and pass the gradient of the soft ones through. In evaluation
they are comparisons of the logits and a cast: ordinary operators with hard 0/1 results, no randomness.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decision(NamedTuple):
    """What one block decided, frames as the batch axis (T*N).

    `mask` (T*N, 1, h, w) is 1 where the first convolution's output matters, `tiles` (T*N, 1, ceil(h/p), ceil(w/p)) the
    same by tile; `compute` and `reuse` (T*N, C_mid, 1, 1) are never both 1, and both 0 mean skip. None: not decided,
    that is, all tiles matter, or nothing is reused. In training `settled` is what inference would decide here, with a
    gradient: what the sparsity loss counts, so that the target is met without noise.
    """

    tiles: Tensor | None
    mask: Tensor | None
    compute: Tensor
    reuse: Tensor | None
    settled: Decision | None = None

    @property
    def shown(self) -> Tensor | None:
        """What maps are multiplied by: `mask`, or a single tile as it is, so that a compiler sees whole frames live or
        die."""
        return self.tiles if self.tiles is not None and self.tiles.shape[2:] == (1, 1) else self.mask


class Ways(NamedTuple):
    """compute and (None: never) reuse of each channel, (B, out, 1, 1) of 0 and 1."""

    compute: Tensor
    reuse: Tensor | None


class SpatialPolicy(nn.Module):
    """Average pooling over tiles, then one 3x3 convolution to one logit a tile.

    A tile is p x p positions of the block's first convolution's output, so `p * stride` squared of its input. Where
    tiles do not divide the map, the last ones reach over its edge and average zeros there.
    """

    def __init__(self, channels: int, tile: int, stride: int) -> None:
        super().__init__()
        self.tile, self.stride = tile, stride
        self.conv = nn.Conv2d(channels, 1, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.1 / channels**0.5)
        # A positive start: all tiles count until the losses say otherwise.
        nn.init.constant_(self.conv.get_parameter("bias"), 1.0)

    def average(self, x: Tensor) -> Tensor:
        """Tile means (B, C, a, b) of the block's input x (B, C, H, W)."""
        edge = self.tile * self.stride
        height, width = x.shape[2:]
        right, bottom = -width % edge, -height % edge
        padded = F.pad(x, (0, right, 0, bottom)) if right or bottom else x
        return F.avg_pool2d(padded, edge)

    def forward(self, averages: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Which tiles matter, (B, 1, a, b) of 0 and 1, from their averages (B, C, a, b): as drawn, and as settled."""
        logits = self.conv(averages)
        if self.training:
            return gumbel_sigmoid(logits, temperature), hard_sigmoid(logits)
        tiles = (logits > 0).to(logits.dtype)
        return tiles, tiles

    def upsampled(self, tiles: Tensor, height: int, width: int) -> Tensor:
        """The mask (B, 1, height, width) of the first convolution's output."""
        batch, _, rows, columns = tiles.shape
        edge = self.tile
        repeated = tiles.reshape(batch, 1, rows, 1, columns, 1).expand(-1, -1, -1, edge, -1, edge)
        return repeated.reshape(batch, 1, rows * edge, columns * edge)[:, :, :height, :width]

    def masked_means(self, averages: Tensor, tiles: Tensor, positions: int) -> Tensor:
        """Channel means (B, C) of the masked input, of `positions` positions.

        The mask is constant over a tile, so the mean over positions is a weighted sum of tile means: the input itself
        is read once, for both policies.
        """
        edge = self.tile * self.stride
        return (averages * tiles).sum((2, 3)) * (edge * edge / positions)


class TemporalPolicy(nn.Module):
    """A two-layer MLP from the channel means of two consecutive frames to compute, reuse or skip for each channel.

    Without `reuse` there are two ways, compute or skip, decided on the frame alone (dynamic channel pruning).
    `group` channels, one beside the other, share a decision; the last group may be smaller.
    """

    def __init__(self, channels: int, out: int, hidden: int, reuse: bool, group: int = 1) -> None:
        super().__init__()
        self.out, self.reuse, self.group = out, reuse, group
        self.groups = -(-out // group)
        self.fc1 = nn.Linear(channels * (2 if reuse else 1), hidden)
        self.fc2 = nn.Linear(hidden, self.groups * (3 if reuse else 2))
        nn.init.normal_(self.fc2.weight, std=0.1 / hidden**0.5)
        nn.init.zeros_(self.fc2.bias)
        # Most channels are computed at first, so that a trained network's weights start from what they were.
        nn.init.constant_(self.fc2.bias[self.groups : 2 * self.groups].data, 2.0)

    def forward(self, before: Tensor, now: Tensor, temperature: float) -> tuple[Ways, Ways]:
        """The ways of each channel from the means (B, C) of the frame before and this one: as drawn, and as settled."""
        ways = self.logits(before, now).split(self.groups, 1)
        settled = self._shaped(*_largest(ways))
        if not self.training:
            return settled, settled
        stacked = torch.stack(ways)
        soft = torch.softmax(stacked, 0)
        compute, reuse = _largest(ways)
        settled = self._shaped(_passing(compute, soft[1]), None if reuse is None else _passing(reuse, soft[2]))
        drawn = F.gumbel_softmax(stacked, temperature, hard=True, dim=0)
        return self._shaped(drawn[1], drawn[2] if self.reuse else None), settled

    def _shaped(self, compute: Tensor, reuse: Tensor | None) -> Ways:
        return Ways(self._by_channel(compute), None if reuse is None else self._by_channel(reuse))

    def _by_channel(self, decided: Tensor) -> Tensor:
        """Decisions (B, groups) as those of each channel, (B, out, 1, 1)."""
        if self.group > 1:
            batch = decided.shape[0]
            repeated = decided.reshape(batch, self.groups, 1).expand(-1, -1, self.group)
            decided = repeated.reshape(batch, self.groups * self.group)[:, : self.out]
        return decided.reshape(-1, self.out, 1, 1)

    def logits(self, before: Tensor, now: Tensor) -> Tensor:
        """Skip's, compute's and (with `reuse`) reuse's logits, (B, ways * groups)."""
        means = torch.cat([before, now], 1) if self.reuse else now
        return self.fc2(F.relu(self.fc1(means)))


def _largest(ways: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """(compute, reuse) as 0 and 1 by the largest of the ways' logits (B, C); ties go to compute, then to reuse."""
    skip, compute, *rest = ways
    if not rest:
        return (compute >= skip).to(skip.dtype), None
    computed = (compute >= torch.maximum(skip, rest[0])).to(skip.dtype)
    return computed, (rest[0] >= skip).to(skip.dtype) * (1 - computed)


def hard_sigmoid(logits: Tensor) -> Tensor:
    """The likelier of 0 and 1 forward, the sigmoid's gradient backward."""
    return _passing((logits > 0).to(logits.dtype), torch.sigmoid(logits))


def _passing(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` forward, the gradient of `soft` backward."""
    return hard + (soft - soft.detach())


def gumbel_sigmoid(logits: Tensor, temperature: float) -> Tensor:
    """Bernoulli draws of `sigmoid(logits)`, hard 0/1 forward, the relaxed draw's gradient backward (section 3.2).

    The difference of two Gumbel variables is logistic, so one logistic draw stands for both.
    """
    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((logits + torch.log(uniform) - torch.log1p(-uniform)) / temperature)
    hard = (soft > 0.5).to(logits.dtype)
    return _passing(hard, soft)
