"""How much work decisions leave: equation 2 as the paper counts it, and what equation 1 needs.

Both are shares of the dense network's multiply-accumulates, the paper's F / F_S. Only the first two convolutions of
each block are thinned; the stem, shortcuts, a bottleneck's last convolution and the head count in full, the policies
themselves do not (they are counted apart, by `policy_macs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dance_tvm.models.macs import count_layers
from dance_tvm.models.resnet import VideoResNet
from dance_tvm.sparsity.dstep.policy import Decision


class DenseMacs(NamedTuple):
    """Multiply-accumulates of one clip in the dense network: all of them, and each block's first two convolutions'."""

    total: int
    first: tuple[int, ...]
    second: tuple[int, ...]


class Shares(NamedTuple):
    """One block's share of its first and of its second convolution, for each clip (N,)."""

    first: Tensor
    second: Tensor


def dense_macs(network: VideoResNet, clip_shape: Sequence[int]) -> DenseMacs:
    """Counts a network, with or without policies, on clips of shape (C, T, H, W)."""
    layers = {layer.name: layer.macs for layer in count_layers(network, _on_meta(network, clip_shape))}
    names = [name for name, _ in network.residual_blocks()]
    return DenseMacs(
        total=sum(macs for name, macs in layers.items() if not name.startswith("policies.")),
        first=tuple(layers[f"{name}.conv1"] for name in names),
        second=tuple(layers[f"{name}.conv2"] for name in names),
    )


def policy_macs(network: VideoResNet, clip_shape: Sequence[int]) -> tuple[int, int]:
    """Multiply-accumulates of one clip in the spatial policies' convolutions and in the temporal policies' MLPs."""
    layers = count_layers(network, _on_meta(network, clip_shape))
    policies = [layer for layer in layers if layer.name.startswith("policies.")]
    return (
        sum(layer.macs for layer in policies if ".spatial." in layer.name),
        sum(layer.macs for layer in policies if ".temporal." in layer.name),
    )


def paper_shares(decision: Decision, count: int) -> Shares:
    """Equation 2: a channel is computed in frame t where it is computed there or reused in frame t+1."""
    shown, compute, reuse = _by_frame(decision, count)
    reused_next = torch.cat([reuse[1:], torch.zeros_like(reuse[:1])])
    computed = 1 - (1 - compute) * (1 - reused_next)
    return Shares(_mean(shown, computed), _mean(shown, compute + reuse))


def needed_shares(decision: Decision, count: int) -> Shares:
    """What equation 1 needs: computed channels, and as inputs those whose chain of reuse starts at a computed one."""
    shown, compute, reuse = _by_frame(decision, count)
    live = [compute[0]]
    for computes, reuses in zip(compute[1:], reuse[1:], strict=True):
        live.append(computes + reuses * live[-1])
    return Shares(_mean(shown, compute), _mean(shown, torch.stack(live)))


def network_share(dense: DenseMacs, shares: Sequence[Shares]) -> Tensor:
    """Share of the dense network's multiply-accumulates that is left, for each clip (N,). Differentiable."""
    saved = torch.stack(
        [
            first * (1 - share.first) + second * (1 - share.second)
            for first, second, share in zip(dense.first, dense.second, shares, strict=True)
        ]
    )
    return 1 - saved.sum(0) / dense.total


def density(decision: Decision, count: int) -> Tensor:
    """Share of positions that the tile mask keeps, for each clip (N,)."""
    return _by_frame(decision, count)[0].mean(0)


def _on_meta(network: VideoResNet, clip_shape: Sequence[int]) -> Tensor:
    return torch.empty(1, *clip_shape, device="meta", dtype=network.fc.weight.dtype)


def _by_frame(decision: Decision, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(shown (T, N), compute (T, N, C), reuse (T, N, C)), shown being the mask's mean over positions."""
    compute = decision.compute.flatten(1).unflatten(0, (-1, count))
    reuse = torch.zeros_like(compute) if decision.reuse is None else decision.reuse.flatten(1).unflatten(0, (-1, count))
    frames = compute.shape[0]
    shown = compute.new_ones(frames, count)
    if decision.mask is not None:
        shown = decision.mask.mean((1, 2, 3)).unflatten(0, (-1, count))
    return shown, compute, reuse


def _mean(shown: Tensor, channels: Tensor) -> Tensor:
    return (shown * channels.mean(2)).mean(0)
