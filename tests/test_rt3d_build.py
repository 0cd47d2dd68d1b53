"""Pruned networks, built: their results are PyTorch's, and the build finds the sparsity in the weights alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dance_tvm.compiler.build import build_network
from dance_tvm.device import open_device
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate


class Small(nn.Module):
    """A factorised and a full convolution whose channels no group divides; sums of small integers are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 9, 3, padding=1)
        self.spatial = nn.Conv3d(9, 22, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(22, 17, (3, 1, 1), padding=(1, 0, 0))
        self.full = nn.Conv3d(17, 20, 3, padding=1, stride=(1, 2, 2))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(1, 3, parameter.shape, generator=generator))
                parameter.mul_(torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Every sixteenth keeps the integers within what float32 holds exactly.
        x = torch.relu(self.first(x))
        x = torch.relu(self.temporal(torch.relu(self.spatial(x))) / 16).floor()
        return self.full(x)


def test_a_pruned_network_computes_exactly_what_pytorch_does(tmp_path: Path) -> None:
    clip = torch.randint(-2, 3, (1, 1, 4, 10, 10), generator=torch.Generator().manual_seed(1)).float()
    with open_device("local") as session:
        for scheme, gm, gn in [("filter", 8, 4), ("vanilla", 8, 1), ("kgs", 16, 4), ("slices", 16, 4)]:
            network = Small().eval()
            report = prune_to_rate(network, (clip,), scheme, 2.5, gm, gn)
            with torch.inference_mode():
                expected = network(clip).numpy()
            built = build_network(network, tmp_path / scheme, example_inputs=(clip,), threads=1, check=False)
            loaded = session.load(built.artifact)
            (found,) = loaded.run({loaded.manifest.inputs[0].name: clip.numpy()}).values()
            np.testing.assert_array_equal(found, expected)
            told = [layer.reason for layer in loaded.manifest.layers]
            assert len(told) == 1 + len(report.layers)
            assert all("fewer MACs" in reason or "built dense" in reason for reason in told[1:]), told


@pytest.mark.device
def test_an_emulated_phone_computes_exactly_what_pytorch_does(emulator: Any, tmp_path: Path) -> None:
    clip = torch.randint(-2, 3, (1, 1, 4, 10, 10), generator=torch.Generator().manual_seed(1)).float()
    network = Small().eval()
    prune_to_rate(network, (clip,), "kgs", 2.5, 8, 4)
    built = build_network(
        network, tmp_path / "phone", target="snapdragon", example_inputs=(clip,), threads=1, check=False
    )
    assert any("weight columns" in layer.skips for layer in built.artifact.manifest.layers)
    with open_device(emulator.tracker, timeout=120) as phone:
        loaded = phone.load(built.artifact)
        (found,) = loaded.run({loaded.manifest.inputs[0].name: clip.numpy()}).values()
    with torch.inference_mode():
        np.testing.assert_array_equal(found, network(clip).numpy())
