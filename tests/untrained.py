"""Masks without training: a controller set at random to keep a chosen share, to measure speed on any network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn

from dance_tvm.sparsity.dance.method import controller_of
from dance_tvm.sparsity.dance.options import AXES, Axis


@torch.no_grad()
def keep_at_random(
    graph: fx.GraphModule, clips: Tensor, keep: float | Mapping[str, float], seed: int = 0
) -> fx.GraphModule:
    """Draws the controller anew and shifts each head so that `keep` of its entries stays, on average over `clips`.

    `keep` is a share 0 to 1, or one for each axis ("frames", "channels", "positions"). Decisions differ from clip to
    clip as a trained controller's do. `graph` (from `prune`) is changed in place and returned in evaluation mode.
    """
    controller = controller_of(graph.eval())
    shares = {axis: keep if isinstance(keep, int | float) else keep.get(axis, 1.0) for axis in AXES}
    generator = torch.Generator().manual_seed(seed)
    controller.theta.zero_()
    for layer in controller.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.weight[0].numel() ** 0.5)
    controller.norm.train().momentum = None  # the statistics of `clips`, which take the place of trained ones
    controller.norm.reset_running_stats()
    for axis, heads in _heads(controller):
        for head in heads:
            assert isinstance(head, nn.Conv2d | nn.Linear)
            assert head.bias is not None
            head.register_forward_hook(_Shift(shares[axis]))
    graph(clips)
    controller.norm.eval()
    for _, heads in _heads(controller):
        for head in heads:
            head._forward_hooks.clear()
    return graph


class _Shift:
    """Once a head has seen the clips: moves its bias to where the wanted share of its outputs is above zero."""

    def __init__(self, keep: float) -> None:
        self._keep = keep

    def __call__(self, head: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        assert isinstance(head, nn.Conv2d | nn.Linear)
        assert head.bias is not None
        ordered = outputs.flatten().sort(descending=True).values
        kept = round(self._keep * len(ordered))
        border = (ordered[max(0, kept - 1)] + ordered[min(kept, len(ordered) - 1)]) / 2
        if kept == len(ordered):
            border = ordered[-1] - 100  # other clips must not fall below it either
        head.bias.sub_(border)


def _heads(controller: nn.Module) -> list[tuple[Axis, nn.ModuleList]]:
    named: dict[Axis, str] = {"frames": "frame_heads", "channels": "channel_heads", "positions": "position_heads"}
    children = dict(controller.named_children())
    return [(axis, cast(nn.ModuleList, children[name])) for axis, name in named.items() if name in children]
