"""The heuristic's scores: how much each unit's weights carry to the network's response, propagated backwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dance_tvm.sparsity.rt3d.pruning import Prunable
from dance_tvm.sparsity.rt3d.schemes import Scheme


def importance(network: nn.Module, prunable: Prunable, scheme: Scheme, clips: Tensor) -> dict[str, Tensor]:
    """Scores of each layer's units on ``clips`` (N, C, T, H, W), relative to the layer's mean.

    Section 4, heuristic algorithm: a neuron is as important as what the layers after it make of it. The response
    layer's outputs count by their magnitude; one backward pass hands that importance down to the output neurons of
    every layer (g, mean absolute gradient of filter m), and a weight counts for what it carries there from its input:
    |W[m, n, tap]| * a[n] * g[m] with a the mean absolute activation of channel n. A unit's score is its weights' mean.
    Clips go through the network one at a time: the backward pass keeps every activation.
    """
    was_training = network.training
    parameters = [p for p in network.parameters() if p.requires_grad]
    with _recording(prunable, network.eval()) as (activations, gradients):
        for clip in clips.split(1):
            response = torch.stack([output.float().abs().sum() for output in _tensors(network(clip))]).sum()
            torch.autograd.grad(response, parameters, allow_unused=True)
    network.train(was_training)
    scores = {}
    for layer in prunable.layers:
        weight = layer.weight.detach()
        dims = [1] * (weight.dim() - 2)
        carried = weight.abs() * activations[layer.name].reshape(1, -1, *dims)
        carried = carried * gradients[layer.name].reshape(-1, 1, *dims)
        units = scheme.sums(carried) / scheme.sizes(weight)
        scores[layer.name] = units / units.mean().clamp_min(1e-30)
    return scores


@contextmanager
def _recording(prunable: Prunable, network: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Mean absolute input of each channel and mean absolute gradient of each filter's output, by layer, summed over
    calls of ``network``."""
    activations: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            _add(activations, name, inputs[0].detach())
            if output.requires_grad:
                output.register_hook(lambda gradient: _add(gradients, name, gradient))

        return hook

    handles = [
        module.register_forward_hook(record(layer.name)) for layer in prunable.layers for module in layer.modules
    ]
    try:
        with torch.enable_grad():
            yield activations, gradients
    finally:
        for handle in handles:
            handle.remove()


def _add(means: dict[str, Tensor], name: str, values: Tensor) -> None:
    # A layer that runs several times in one call (shared weights) counts each time.
    means[name] = means.get(name, 0) + values.abs().transpose(0, 1).flatten(1).mean(1)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        parts: Sequence[Any] = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
        for part in parts:
            yield from _tensors(part)
