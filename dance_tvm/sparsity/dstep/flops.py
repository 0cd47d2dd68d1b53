"""How much work decisions leave: equation 2 as the paper counts it, and what equation 1 needs.

Both are shares of the dense network's multiply-accumulates, the paper's F / F_S. Only the first two convolutions of
each block are thinned; the stem, shortcuts, a bottleneck's last convolution and the head count in full, the policies
themselves do not (they are counted apart, by `policy_macs`). What equation 1 needs is found by the compiler's own rules
(`dance_tvm.liveness`): the masks as operands of the two convolutions, padding left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from dance_tvm.liveness.analysis import Key, Liveness
from dance_tvm.liveness.expressions import Factor
from dance_tvm.liveness.macs import ConvolutionWork
from dance_tvm.liveness.torch_graph import ModuleView, evaluate
from dance_tvm.models.macs import count_layers
from dance_tvm.models.resnet import Block, VideoResNet
from dance_tvm.sparsity.dstep.policy import Decision


class DenseMacs(NamedTuple):
    """Multiply-accumulates of one clip in the dense network: all of them, and each block's first two convolutions'."""

    total: int
    first: tuple[int, ...]
    second: tuple[int, ...]


class Shares(NamedTuple):
    """Of one block's first and second convolution, what is left: a share for each clip (N,), unless it says else."""

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


class Needed:
    """Counts what equation 1 needs of each block: what kernels that walk the masks' lists execute."""

    def __init__(self, network: VideoResNet, clip_shape: Sequence[int]) -> None:
        counted = {layer.name: layer for layer in count_layers(network, _on_meta(network, clip_shape))}
        self._blocks = [
            _NeededOfBlock(block, counted[f"{name}.conv1"].input_shape) for name, block in network.residual_blocks()
        ]

    def macs(self, decisions: Sequence[Decision], count: int) -> list[Shares]:
        """By block, the multiply-accumulates of its two convolutions in each frame and clip, (T*N,)."""
        return [block.macs(decision, count) for block, decision in zip(self._blocks, decisions, strict=True)]

    def shares(self, decisions: Sequence[Decision], count: int) -> list[Shares]:
        """By block, the shares that are left for each clip (N,)."""
        return [
            Shares(*(_by_clip(macs, count) / work.dense for macs, work in zip(found, block.works, strict=True)))
            for block, found in zip(self._blocks, self.macs(decisions, count), strict=True)
        ]


class _NeededOfBlock:
    """What is alive and what is read in one block, as expressions of its masks; `shape` is its input's (N, C, H, W)."""

    def __init__(self, block: Block, shape: Sequence[int]) -> None:
        graph = fx.symbolic_trace(_Thinned(block))
        x = torch.empty(1, *shape[1:], device="meta")
        result = graph.get_submodule("conv1")(x)
        shown, channels = result[:, :1], result[..., :1, :1]
        ShapeProp(graph).propagate(x, shown, channels, channels, result)
        view = _MaskedView(graph)
        liveness = Liveness.of(view)
        self.works = []
        for key in view.order:
            operation = view.operation(key)
            if operation is not None and operation.name == "nn.conv2d" and operation.window is not None:
                conv = view.module(key)
                assert isinstance(conv, nn.Conv2d)
                self.works.append(
                    ConvolutionWork(
                        operation.window,
                        conv.in_channels,
                        conv.out_channels,
                        alive=liveness.alive_in(operation.operands[0]),
                        read=liveness.wanted(key),
                        lists_inputs=True,
                    )
                )

    def macs(self, decision: Decision, count: int) -> Shares:
        """Of each convolution in each frame and clip, (T*N,)."""
        compute, one = decision.compute, decision.compute.new_ones(1, 1, 1, 1, 1)
        masks = {"shown": decision.mask, "computed": compute, "live": _live(decision, count)}

        def value(factor: Factor) -> Tensor:
            mask = masks[str(factor.var)]
            return one if mask is None else mask.permute(0, 2, 3, 1)[:, None]

        values = partial(evaluate, value=value, known={})
        return Shares(*(work.macs(values, len(compute), one) for work in self.works))


class _Thinned(nn.Module):
    """What is thinned of a block: its first convolution writes, and its second reads, what the masks leave."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = (_on_meta_device(part) for part in (block.conv1, block.bn1, block.conv2))

    def forward(self, x: Tensor, shown: Tensor, computed: Tensor, live: Tensor, reused: Tensor) -> Tensor:
        """As `network.merge` has it; `reused` is what comes from the frame before."""
        fresh = shown * (computed * torch.relu(self.bn1(self.conv1(x))))
        return self.conv2(shown * (live * (fresh + reused)))


class _MaskedView(ModuleView):
    def dtype(self, key: Key) -> str:
        return "bool" if str(key) in ("shown", "computed", "live") else super().dtype(key)


def _on_meta_device(module: nn.Module) -> nn.Module:
    return deepcopy(module).to("meta")


def _live(decision: Decision, count: int) -> Tensor:
    """Which channels of the merged map may be nonzero, (T*N, C, 1, 1): those whose chain of reuse starts computed."""
    if decision.reuse is None:
        return decision.compute
    compute, reuse = (ways.unflatten(0, (-1, count)) for ways in (decision.compute, decision.reuse))
    live = [compute[0]]
    for computes, reuses in zip(compute[1:], reuse[1:], strict=True):
        live.append(torch.maximum(computes, reuses * live[-1]))
    return torch.cat(live)


def _by_clip(values: Tensor, count: int) -> Tensor:
    return values.unflatten(0, (-1, count)).mean(0)


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
