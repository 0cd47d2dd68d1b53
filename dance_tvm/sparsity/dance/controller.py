"""AAP's controller: from the first layer's activations to hard masks for every site, as ordinary tensor operations.

Its input is coarse: the first activation averaged over tiles, and how much each tile changes from frame to frame.
Three small heads score frames, groups of channels and tiles of positions of each site between 0 and 1. What scores
above the learned threshold theta stays (mask 1), the rest is pruned (mask 0). In training the masks carry a
straight-through gradient: hard going forward, going back that of sigmoid(score's logit - theta's), which is steepest
at the threshold and fades slowly on either side, so that what was pruned can come back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dance_tvm.sparsity.dance.options import AXES
from dance_tvm.sparsity.dance.sites import Site
from dance_tvm.sparsity.units import SiteUnits

_FIRST_SCORE = 0.0  # logit of every score at the start: 0.5, well above the threshold, so nothing is pruned yet
_FIRST_THRESHOLD = 0.05
_LEAST_SCORE = 1e-6  # keeps logits finite


class Masks(NamedTuple):
    """One site's masks of 0 and 1: frames (N, 1, T, 1, 1), channels (N, C, 1, 1, 1), positions (N, 1, 1, H, W)."""

    frames: Tensor | None
    channels: Tensor | None
    positions: Tensor | None


class Controller(nn.Module):
    """Masks of every site from the first site's activation (N, C, T, H, W).

    `axes` are those that may be pruned; channels are decided in groups of `group`, positions in tiles: about
    `grid` x `grid` of them at full resolution, and never finer than a site's own positions. With `units`, one for each
    site, frames and channels are decided by the site's units, and positions by the smallest tiles of whole units of
    which at most `grid` stand along an edge; an axis of a single unit is kept whole.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        axes: Sequence[str] = AXES,
        group: int = 8,
        grid: int = 8,
        hidden: int = 16,
        units: Sequence[SiteUnits] = (),
    ) -> None:
        super().__init__()
        self.axes = tuple(axes)
        self._sites = tuple(sites)
        self._units: list[SiteUnits | None] = [unit.at_most(grid) for unit in units] or [None for _ in sites]
        self._groups = [unit.channels for unit in units] or [group] * len(sites)
        self.theta = nn.Parameter(torch.tensor(math.log(_FIRST_THRESHOLD / (1 - _FIRST_THRESHOLD))))
        channels, frames, height, width = sites[0].shape
        self._tile = (max(1, height // grid), max(1, width // grid))
        self._grid = (height // self._tile[0], width // self._tile[1])
        self._frames = frames
        statistics = 2 * channels
        self.norm = nn.BatchNorm3d(statistics)
        if "frames" in axes:
            self.frame_stem = nn.Conv2d(2 * statistics, hidden, (3, 1), padding=(1, 0))  # frames are its rows
            self.frame_heads = nn.ModuleList(_head(nn.Conv2d(hidden, 1, 1)) for _ in sites)
        if "channels" in axes:
            self.channel_stem = nn.Linear(2 * statistics, 2 * hidden)
            self.channel_heads = nn.ModuleList(_head(nn.Linear(2 * hidden, count)) for count in self.groups)
        if "positions" in axes:
            self.position_stem = nn.Conv2d(2 * statistics, hidden, 3, padding=1)
            self.position_heads = nn.ModuleList(_head(nn.Conv2d(hidden, 1, 1)) for _ in sites)
        self.decisions: list[Masks] = []
        self.scores: list[Masks] = []

    @property
    def threshold(self) -> Tensor:
        """theta between 0 and 1."""
        return self.theta.sigmoid()

    def forward(self, first: Tensor) -> list[Masks]:
        statistics = self._statistics(first)
        frames = self._frame_scores(statistics) if "frames" in self.axes else None
        channels = self._channel_scores(statistics) if "channels" in self.axes else None
        positions = self._position_scores(statistics) if "positions" in self.axes else None
        scores, decisions = [], []
        for index in range(len(self._sites)):
            decided = zip((frames, channels, positions), self._divided(index), strict=True)
            scores.append(Masks(*(axis[index] if axis and divided else None for axis, divided in decided)))
            decisions.append(self._decide(scores[-1], index))
        if not torch.compiler.is_exporting():
            self.scores, self.decisions = scores, decisions
        return decisions

    def _statistics(self, first: Tensor) -> Tensor:
        """(N, 2C, T, tiles, tiles): each tile's mean, and how far it is from the frame before."""
        tiles = functional.avg_pool3d(first, (1, *self._tile))
        change = (tiles[:, :, 1:] - tiles[:, :, :-1]).abs()
        change = torch.cat([change[:, :, :1], change], dim=2)
        statistics: Tensor = self.norm(torch.cat([tiles, change], dim=1))
        return statistics

    def _frame_scores(self, statistics: Tensor) -> list[Tensor]:
        seen = torch.cat([statistics.mean(dim=(3, 4)), _largest(statistics, frames=False)[..., 0, 0]], dim=1)
        hidden = functional.relu(self.frame_stem(seen[..., None]))
        scores = []
        for site, unit, head in zip(self._sites, self._units, self.frame_heads, strict=True):
            step = self._frames // site.shape[1] * (unit.frames if unit else 1)
            pooled = functional.avg_pool2d(hidden, (step, 1), ceil_mode=unit is not None) if step > 1 else hidden
            score = head(pooled).sigmoid()[:, 0, :, 0]
            scores.append(score.narrow(1, 0, unit.counts[0]) if unit else score)
        return scores

    def _channel_scores(self, statistics: Tensor) -> list[Tensor]:
        seen = torch.cat([statistics.mean(dim=(2, 3, 4)), _largest(statistics)[..., 0, 0, 0]], dim=1)
        hidden = functional.relu(self.channel_stem(seen))
        return [head(hidden).sigmoid() for head in self.channel_heads]

    def _position_scores(self, statistics: Tensor) -> list[Tensor]:
        seen = torch.cat([statistics.mean(dim=2), _largest(statistics, positions=False)[:, :, 0]], dim=1)
        hidden = functional.relu(self.position_stem(seen))
        scores = []
        for site, unit, head in zip(self._sites, self._units, self.position_heads, strict=True):
            entries = unit.counts[2] if unit else site.shape[2:]
            step = tuple(max(1, grid // own) for grid, own in zip(self._grid, entries, strict=True))
            pooled = functional.avg_pool2d(hidden, step) if max(step) > 1 else hidden
            score = head(pooled).sigmoid()[:, 0]
            scores.append(_fitted(_fitted(score, 1, entries[0]), 2, entries[1]) if unit else score)
        return scores

    def _divided(self, site: int) -> tuple[bool, bool, bool]:
        """Whether frames, channels and positions of a site have more than one unit, so that a part can be left out."""
        unit = self._units[site]
        if unit is None:
            return True, True, True
        frames, channels, (rows, columns) = unit.counts
        return frames > 1, channels > 1, rows * columns > 1

    @property
    def groups(self) -> list[int]:
        """How many groups of channels each site has."""
        return [math.ceil(site.shape[0] / group) for site, group in zip(self._sites, self._groups, strict=True)]

    def masks_of_groups(self, site: int, groups: Tensor) -> Masks:
        """The masks that leave the channel groups (groups,) of ones or True to every clip, and all else as it is."""
        return Masks(None, self._of_channels(groups.to(self.theta.dtype)[None], site), None)

    @torch.no_grad()
    def start_channels(self, above: Sequence[Tensor]) -> None:
        """Starts every clip with the same channel scores: logits `above` (groups,) the threshold, site by site."""
        for head, logits in zip(self.channel_heads, above, strict=True):
            assert isinstance(head, nn.Linear)
            head.weight.zero_()
            head.bias.copy_(self.theta + logits)

    def _of_channels(self, kept: Tensor, site: int) -> Tensor:
        return _repeated(kept, 1, self._groups[site], self._sites[site].shape[0])[..., None, None, None]

    def _decide(self, scores: Masks, site: int) -> Masks:
        _, frames, height, width = self._sites[site].shape
        kept = Masks(*(None if score is None else self._keep(score) for score in scores))
        return Masks(
            None if kept.frames is None else self._of_frames(kept.frames, site, frames)[:, None, :, None, None],
            None if kept.channels is None else self._of_channels(kept.channels, site),
            None if kept.positions is None else self._of_positions(kept.positions, site, height, width)[:, None, None],
        )

    def _of_frames(self, kept: Tensor, site: int, frames: int) -> Tensor:
        unit = self._units[site]
        return _repeated(kept, 1, unit.frames, frames) if unit else _fitted(kept, 1, frames)

    def _of_positions(self, kept: Tensor, site: int, height: int, width: int) -> Tensor:
        unit = self._units[site]
        if unit is None:
            return _fitted(_fitted(kept, 1, height), 2, width)
        return _repeated(_repeated(kept, 1, unit.positions[0], height), 2, unit.positions[1], width)

    def _keep(self, score: Tensor) -> Tensor:
        hard = (score > self.threshold).to(score.dtype)
        if not self.training:
            return hard
        soft = (score.logit(_LEAST_SCORE) - self.theta).sigmoid()
        return hard + soft - soft.detach()


class Prune(nn.Module):
    """Multiplies an activation by its site's masks.

    With `watching` set, `activity` keeps what the last call saw before masking: the mean activation of each frame
    (N, T), channel (N, C) and position (N, H, W), without gradients. With `hinted` set, `seen` keeps the activation
    itself, with them.
    """

    activity: tuple[Tensor, Tensor, Tensor]
    seen: Tensor

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.watching = self.hinted = False

    def forward(self, x: Tensor, decisions: list[Masks]) -> Tensor:
        if self.hinted and self.training:
            self.seen = x
        if self.watching:
            seen = x.detach()
            self.activity = (seen.mean(dim=(1, 3, 4)), seen.mean(dim=(2, 3, 4)), seen.mean(dim=(1, 2)))
        frames, channels, positions = self.decided(decisions)
        if self.training and frames is not None and positions is not None:
            frames, positions = frames * positions, None  # one product with the whole activation less
        for mask in (frames, channels, positions):
            if mask is not None:
                x = x * mask
        return x

    def decided(self, decisions: Sequence[Masks]) -> Masks:
        """This site's masks out of all sites'."""
        return decisions[self.index]


def _largest(x: Tensor, *, frames: bool = True, positions: bool = True) -> Tensor:
    """The largest over frames, positions or both of (N, C, T, H, W), kept as size 1: a pooling, known to importers."""
    _, _, length, height, width = x.shape
    return functional.max_pool3d(x, (length if frames else 1, *((height, width) if positions else (1, 1))))


def _head(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Starts with small weights around one score for all, so that training begins with nothing pruned."""
    nn.init.normal_(layer.weight, std=0.02)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, _FIRST_SCORE)
    return layer


def _repeated(mask: Tensor, axis: int, times: int, size: int) -> Tensor:
    """Each entry along `axis` `times` over, cut to `size`: expand and reshape, which every exporter carries."""
    if times > 1:
        shape = list(mask.shape)
        expanded = mask.unsqueeze(axis + 1).expand(*shape[: axis + 1], times, *shape[axis + 1 :])
        mask = expanded.reshape(*shape[:axis], shape[axis] * times, *shape[axis + 1 :])
    return mask.narrow(axis, 0, size) if mask.shape[axis] > size else mask


def _fitted(mask: Tensor, axis: int, size: int) -> Tensor:
    """`size` entries along `axis`, each that of the nearest entry of `mask`."""
    count = mask.shape[axis]
    if size % count == 0:
        return _repeated(mask, axis, size // count, size)
    nearest = torch.arange(size, device=mask.device) * count // size
    return mask.index_select(axis, nearest)
