"""Where AAP may start: the channel groups that matter least left out at once, and the rest fitted to do without them.

Neither step needs labels or a gradient step. `leave_out_least` ranks groups by what the network's answers lose without
them for each multiply-add saved, and sets the controller's biases to that ranking, so that the budget is met before
training. `refit` then solves every layer's least squares: weights whose outputs, on masked inputs, are nearest to the
dense network's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dance_tvm.sparsity.dance.controller import Controller, Masks, Prune
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dance.sites import module_of

_RIDGE = 1e-3  # of the mean square of a layer's inputs: pulls towards the weights as they are
_FURTHEST = 4.0  # logits: no group starts further than this from the threshold, or it could never cross it
_SURE = 0.5  # logits above the threshold for groups that stay only because their site would fall below its floor


def leave_out_least(
    graph: fx.GraphModule, clips: Tensor, probe: Callable[[Any], Tensor], *, target: float, floor: float
) -> None:
    """Sets the channel heads of `graph`'s controller so that about `target` of the dense MACs stay, for every clip.

    `probe` is a random mixture of the network's outputs (`Task.probe`): its squared gradient by a group's mask, the
    mean over `clips` (N, …), says to first order how far the outputs move without the group. A group is worth that for
    each multiply-add that it costs. `floor` is the share of each site's groups that stays whatever they are worth.
    Where channels alone cannot meet the target, all that the floor allows is left out.
    """
    controller = cast(Controller, graph.get_submodule("controller"))
    worth = [
        (sensitivity.clamp(min=1e-30) / saving.clamp(min=1e-12)).log()
        for sensitivity, saving in zip(_sensitivity(graph, clips, probe), _savings(graph), strict=True)
    ]
    safe = [_best(each, max(1, round(floor * len(each)))) for each in worth]
    counter = MacCounter(graph)

    def share(threshold: float) -> float:
        kept = [(each > threshold) | always for each, always in zip(worth, safe, strict=True)]
        count = counter.count([controller.masks_of_groups(site, groups) for site, groups in enumerate(kept)], 1)
        return float(count.executed.mean() / count.dense)

    ordered = torch.cat(worth).sort().values
    low, high = 0, len(ordered) - 1  # the first group that has to go, or the last there is
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(float(ordered[middle])) <= target else (middle + 1, high)
    border = float(ordered[low : low + 2].mean())
    controller.start_channels(
        [
            torch.where(always, (each - border).clamp(min=_SURE), each - border).clamp(-_FURTHEST, _FURTHEST)
            for each, always in zip(worth, safe, strict=True)
        ]
    )


def _best(worth: Tensor, count: int) -> Tensor:
    """Which of `worth` (entries,) are its `count` largest."""
    return torch.zeros_like(worth, dtype=torch.bool).index_fill(0, worth.topk(count).indices, True)


def _ones(graph: fx.GraphModule) -> list[Tensor]:
    """For each site a one for each of its channel groups, with gradients."""
    controller = cast(Controller, graph.get_submodule("controller"))
    return [torch.ones(count, device=controller.theta.device, requires_grad=True) for count in controller.groups]


def _sensitivity(graph: fx.GraphModule, clips: Tensor, probe: Callable[[Any], Tensor]) -> list[Tensor]:
    """The mean squared gradient of `probe` by each site's group masks (groups,) at the unpruned network."""
    controller = cast(Controller, graph.get_submodule("controller"))
    kept = _ones(graph)
    masks: list[Masks] = []
    handle = controller.register_forward_hook(lambda *_: masks)
    found = [torch.zeros_like(groups) for groups in kept]
    training = graph.training
    graph.eval()
    try:
        for clip in clips:
            masks[:] = [controller.masks_of_groups(site, groups) for site, groups in enumerate(kept)]
            slopes = _gradients(probe(graph(clip[None])), kept)
            found = [total + slope**2 / len(clips) for total, slope in zip(found, slopes, strict=True)]
    finally:
        handle.remove()
        graph.train(training)
    return found


def _savings(graph: fx.GraphModule) -> list[Tensor]:
    """Multiply-adds that each group costs (groups,), as far as the first to be left out saves them."""
    controller = cast(Controller, graph.get_submodule("controller"))
    kept = _ones(graph)
    masks = [controller.masks_of_groups(site, groups) for site, groups in enumerate(kept)]
    return list(_gradients(MacCounter(graph).count(masks, 1).executed.mean(), kept))


def _gradients(value: Tensor, by: list[Tensor]) -> tuple[Tensor, ...]:
    """Of `value` by each of `by`; zero where it does not depend on it."""
    return torch.autograd.grad(value, by, allow_unused=True, materialize_grads=True)


# ---- least squares ----


class _Unmasked(fx.Interpreter):
    """Runs the network as if nothing were pruned."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.fetch_attr(target), Prune):
            return args[0]
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def refit(graph: fx.GraphModule, clips: Tensor, *, seed: int = 0) -> None:
    """Fits the weights of `graph`'s convolutions to its masks, one after the other in the order they are computed.

    Each convolution's weights (and bias) become those whose outputs on the pruned network's inputs are nearest, in the
    mean square over drawn positions of `clips` (N, …), to the outputs it has in the dense network; what came before it
    is already fitted. Batch norms' running means move by what the mean of their inputs still differs. Grouped
    convolutions, and layers that are called more than once, stay as they are. All clips are held in memory at once.
    """
    training = graph.training
    graph.eval()
    dense, pruned = _Unmasked(graph), fx.Interpreter(graph)
    generator = torch.Generator().manual_seed(seed)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    systems: dict[tuple[Any, ...], _LeastSquares] = {}
    dense.args_iter, pruned.args_iter = iter((clips,)), iter((clips,))
    for node in graph.graph.nodes:
        if node.op == "output":
            break
        dense.env[node] = dense.run_node(node)
        module = module_of(graph, node)
        if isinstance(module, nn.Conv3d | nn.BatchNorm3d) and calls.count(node.target) == 1:
            source = node.all_input_nodes[0]
            was, now = cast(Tensor, dense.env[source]), cast(Tensor, pruned.env[source])
            if isinstance(module, nn.BatchNorm3d):
                if module.running_mean is not None:
                    module.running_mean += now.mean(dim=(0, 2, 3, 4)) - was.mean(dim=(0, 2, 3, 4))
            elif module.groups == 1 and not torch.equal(was, now):
                key = (source, module.kernel_size, module.stride, module.padding, module.dilation, module.bias is None)
                if key not in systems:
                    systems[key] = _LeastSquares(module, now, dense.env[node], generator)
                systems[key].solve(module, dense.env[node])
        pruned.env[node] = pruned.run_node(node)
        for gone in dense.user_to_last_uses.get(node, ()):
            del dense.env[gone], pruned.env[gone]
            systems = {key: system for key, system in systems.items() if key[0] is not gone}
    graph.train(training)


class _LeastSquares:
    """What the convolutions that read one activation in one geometry share: rows of inputs, and their products."""

    def __init__(self, conv: nn.Conv3d, inputs: Tensor, outputs: Tensor, generator: torch.Generator) -> None:
        """`inputs` (N, C, T, H, W) are the pruned network's; `outputs` says where windows may stand."""
        samples, _, *sides = outputs.shape
        columns = conv.weight[0].numel()
        places = samples * math.prod(sides)
        rows = torch.randperm(places, generator=generator)[: max(10_000, 20 * columns)].to(inputs.device)
        self._at = torch.unravel_index(rows, (samples, *sides))
        self._rows = _windows(conv, inputs, self._at)
        self._mean = self._rows.mean(0) if conv.bias is not None else torch.zeros_like(self._rows[0])
        centred = self._rows - self._mean
        products = centred.T @ centred
        ridge = _RIDGE * products.diagonal().mean().clamp(min=1e-12)
        self._factor = torch.linalg.cholesky(products + ridge * torch.eye(columns, device=inputs.device))
        self._centred = centred

    def solve(self, conv: nn.Conv3d, outputs: Tensor) -> None:
        """Changes `conv` so that its outputs come nearest to `outputs` (N, K, T, H, W)."""
        missing = outputs.movedim(1, -1)[self._at] - functional.linear(self._rows, conv.weight.flatten(1), conv.bias)
        offset = missing.mean(0) if conv.bias is not None else torch.zeros_like(missing[0])
        change = torch.cholesky_solve(self._centred.T @ (missing - offset), self._factor)
        conv.weight += change.T.reshape(conv.weight.shape)
        if conv.bias is not None:
            conv.bias += offset - self._mean @ change


def _windows(conv: nn.Conv3d, inputs: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    """The inputs of the windows (rows, C x taps) that stand at the outputs `at` (sample, frame, row, column)."""
    padding = conv.padding
    if isinstance(padding, str):
        widths = (dilation * (size - 1) // 2 for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True))
        padding = tuple(widths) if padding == "same" else (0, 0, 0)
    padded = functional.pad(inputs, [width for width in reversed(padding) for _ in range(2)]).movedim(1, -1)
    read = []
    for offsets in itertools.product(*map(range, conv.kernel_size)):
        steps = zip(at[1:], conv.stride, offsets, conv.dilation, strict=True)
        tap = tuple(where * stride + offset * dilation for where, stride, offset, dilation in steps)
        read.append(padded[at[:1] + tap])
    return torch.stack(read, dim=2).flatten(1)
