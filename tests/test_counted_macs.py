"""Training counts what the built network executes, layer by layer."""

from __future__ import annotations

import torch
from test_dance import SHAPE, Three, controller_of, pruned_at_random
from test_transform import compile_network, executed

from dance_tvm.sparsity.dance.macs import MacCounter


def test_dance_counts_each_layer_as_the_built_network_does() -> None:
    graph = pruned_at_random(Three(), SHAPE, seed=1).eval()
    clip = torch.rand(1, *SHAPE)
    lowered, machine = compile_network(graph, clip)
    with torch.no_grad():
        graph(clip)
    count = MacCounter(graph).count(controller_of(graph).decisions, 1)
    layers = [layer for layer in lowered.layers if layer.kind in ("conv3d", "linear")]
    found = [(layer.macs, macs) for layer, macs in zip(layers, executed(machine, clip).values(), strict=True)]
    counted = [(int(layer.nominal), int(layer.executed[0])) for layer in count.layers]
    assert [pair for pair in found if pair[0] in {nominal for nominal, _ in counted}] == counted
    assert sum(int(layer.executed[0]) for layer in count.layers) < sum(layer.dense for layer in count.layers)
