"""Policies with random weights, set so that a wanted share of the work is left: for measuring speed without training.

Tiles, channels and frames are chosen by random projections of the input, so the decisions differ from clip to clip and
from frame to frame and cost what trained ones cost. Thresholds are then placed, block after block, on an example clip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn

from dance_tvm.core.errors import DanceError
from dance_tvm.models.resnet import VideoResNet
from dance_tvm.sparsity.dstep import flops
from dance_tvm.sparsity.dstep.network import BlockPolicy, DStepOptions, DStepResNet
from dance_tvm.sparsity.dstep.policy import SpatialPolicy, TemporalPolicy


class Mix(NamedTuple):
    """Shares of tiles kept, and of channels computed and reused; the other channels are skipped."""

    tiles: float
    compute: float
    reuse: float


def example_clip(shape: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """A clip (1, C, T, H, W) of smooth blobs whose brightness changes from frame to frame, about -2 to 2."""
    channels, frames, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(frames, channels, 7, 7, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    gain = 0.5 + torch.rand(frames, 1, 1, 1, generator=generator)
    fine = 0.1 * torch.randn(frames, channels, height, width, generator=generator)
    return (gain * smooth + fine).transpose(0, 1).unsqueeze(0)


def random_policies(
    network: VideoResNet,
    clip: Tensor,
    target: float,
    *,
    options: DStepOptions | None = None,
    seed: int = 0,
    tolerance: float = 0.005,
) -> DStepResNet:
    """`network` with random policies that leave `target` of its dense multiply-accumulates on `clip` (1, C, T, H, W).

    The share is what equation 1 needs (`flops.Needed`), which is no more than equation 2 counts. Raises
    DanceError when no mix of decisions comes within `tolerance` of it.
    """
    thinned = DStepResNet(network, options).eval()
    dense, needed = flops.dense_macs(thinned, clip.shape[1:]), flops.Needed(thinned, clip.shape[1:])
    aim, share = target, 1.0
    for _ in range(6):
        share = _share_with(thinned, dense, needed, clip, _mix_for(dense, aim), seed)
        if abs(share - target) <= tolerance:
            return thinned
        aim += target - share
    raise DanceError(f"random policies leave {share:.2f} of the work where {target:g} was wanted; choose another share")


def with_mix(
    network: VideoResNet, clip: Tensor, mix: Mix, *, options: DStepOptions | None = None, seed: int = 0
) -> DStepResNet:
    """`network` with random policies whose decisions on `clip` (1, C, T, H, W) have the shares of `mix`."""
    thinned = DStepResNet(network, options).eval()
    shape = clip.shape[1:]
    _share_with(thinned, flops.dense_macs(thinned, shape), flops.Needed(thinned, shape), clip, mix, seed)
    return thinned


def needed_share(network: DStepResNet, clips: Tensor) -> Tensor:
    """Share of the dense multiply-accumulates that equation 1 needs for each of clips (N, C, T, H, W)."""
    shape = clips.shape[1:]
    return _share(network, flops.dense_macs(network, shape), flops.Needed(network, shape), clips)


def _mix_for(dense: flops.DenseMacs, share: float) -> Mix:
    """The mix whose expected share of the work is `share`, were the blocks' decisions independent."""

    def left(severity: float) -> float:
        tiles, compute, reuse = _mix(severity)
        first, second = sum(dense.first), sum(dense.second)
        return 1 - (first * (1 - tiles * compute) + second * (1 - tiles * (compute + reuse))) / dense.total

    if left(1.0) >= share or left(0.0) <= share:
        return _mix(1.0 if left(1.0) >= share else 0.0)
    return _mix(brentq(lambda severity: left(severity) - share, 0.0, 1.0))


def _mix(severity: float) -> Mix:
    """From everything computed (0) to a mix below any target worth having (1)."""
    return Mix(tiles=1 - 0.6 * severity, compute=1 - 0.7 * severity, reuse=0.35 * severity)


def _share_with(
    network: DStepResNet, dense: flops.DenseMacs, needed: flops.Needed, clip: Tensor, mix: Mix, seed: int
) -> float:
    """Draws the policies anew, places their thresholds for `mix` and returns the share left on `clip`."""
    generator = torch.Generator().manual_seed(seed)

    def place(policy: nn.Module, inputs: tuple[Tensor, int, object, float]) -> None:
        assert isinstance(policy, BlockPolicy)
        x, count = inputs[0], inputs[1]
        if policy.spatial is not None:
            _place_tiles(policy.spatial, x, mix.tiles, generator)
        if policy.temporal is not None:
            _place_channels(policy, policy.temporal, x, count, mix, generator)

    hooks = [policy.register_forward_pre_hook(place) for policy in network.policies]
    try:
        return float(_share(network, dense, needed, clip))
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _share(network: DStepResNet, dense: flops.DenseMacs, needed: flops.Needed, clips: Tensor) -> Tensor:
    with network.watched() as decisions:
        network(clips)
    return flops.network_share(dense, needed.shares(decisions, len(clips)))


def _place_tiles(policy: SpatialPolicy, x: Tensor, share: float, generator: torch.Generator) -> None:
    policy.conv.weight.normal_(generator=generator)
    averages = policy.average(x)
    # A projection's weights sum to 0 over each tap, so that tiles differ rather than whole maps.
    policy.conv.weight -= policy.conv.weight.mean(1, keepdim=True)
    policy.conv.weight /= averages.std().clamp(min=1e-6) * policy.conv.weight.norm()
    assert policy.conv.bias is not None
    policy.conv.bias.zero_()
    policy.conv.bias.fill_(_offset(policy.conv(averages), share))


def _place_channels(
    policy: BlockPolicy, mlp: TemporalPolicy, x: Tensor, count: int, mix: Mix, generator: torch.Generator
) -> None:
    for layer in (mlp.fc1, mlp.fc2):
        layer.weight.normal_(generator=generator).div_(layer.in_features**0.5)
        layer.bias.zero_()
    logits = _logits(policy, mlp, x, count)
    # Frames sway each channel's logit by as much as channels differ.
    spread = logits.std(0).clamp(min=1e-3 * float(logits.abs().max()) + 1e-6)
    mlp.fc2.weight /= spread[:, None]
    mlp.fc2.bias.copy_(-logits.mean(0) / spread + torch.randn(len(spread), generator=generator))
    skip, compute, *reuse = _logits(policy, mlp, x, count).split(mlp.groups, 1)
    if reuse:
        rest = max(1e-6, 1 - mix.compute)
        shift = _offset(reuse[0] - skip, min(1.0, mix.reuse / rest))
        mlp.fc2.bias[2 * mlp.groups :] += shift
        skip = torch.maximum(skip, reuse[0] + shift)
    mlp.fc2.bias[mlp.groups : 2 * mlp.groups] += _offset(compute - skip, mix.compute)


def _logits(policy: BlockPolicy, mlp: TemporalPolicy, x: Tensor, count: int) -> Tensor:
    """The MLP's logits (T*N, ways * groups) for the block's input x, masks as they stand."""
    means = policy.means(x)[0]
    return mlp.logits(policy.before(means, count, None), means)


def _offset(logits: Tensor, share: float) -> float:
    """What to add so that `share` of the logits are positive: half-way between two of them."""
    ordered = logits.flatten().sort(descending=True).values
    kept = round(share * len(ordered))
    margin = float(ordered[0] - ordered[-1]) + 1.0
    above = ordered[kept - 1] if kept > 0 else ordered[0] + margin
    below = ordered[kept] if kept < len(ordered) else ordered[-1] - margin
    return -float(above + below) / 2
