"""Networks over sequences (N, C, T): heads of action recognition, whose operators run along time alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dance_tvm import Options, build_network, open_device


class Temporal(nn.Module):
    """Convolutions, pools, norms and joins as temporal networks have them, and a mask of moments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.group = nn.Conv1d(12, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.depthwise, self.layer = nn.Conv1d(32, 32, 5, padding=4, dilation=2, groups=32), nn.LayerNorm(32)
        self.pool, self.strided = nn.MaxPool1d(2), nn.Conv1d(32, 24, 3, stride=2, padding=1)
        self.instance, self.up = nn.InstanceNorm1d(24, affine=True), nn.ConvTranspose1d(24, 16, 4, 2, 1)
        self.edge = nn.Conv1d(16, 16, 3, padding=1, padding_mode="replicate")
        self.batch, self.last = nn.BatchNorm1d(16), nn.Conv1d(48, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.gelu(self.group(self.first(x)))
        x = self.layer(self.depthwise(x).transpose(1, 2)).transpose(1, 2)
        y = self.up(torch.relu(self.instance(self.strided(self.pool(x)))))
        y = torch.relu(self.batch(self.edge(functional.avg_pool1d(y, 3, 1, 1))))
        y = functional.interpolate(y, scale_factor=2, mode="nearest")[:, :, : x.shape[2]]
        x = x * torch.sigmoid(x.mean(2, keepdim=True)) * (y.amax(1, keepdim=True) > 0.2)
        return self.last(torch.cat([y, x], 1)), y.sum(2)


@pytest.mark.parametrize("target", ["host", "opencl"])
def test_a_temporal_network_has_kernels_for_its_layers(target: str, tmp_path: Path) -> None:
    network, x = Temporal().eval(), torch.rand(2, 12, 64, generator=torch.Generator().manual_seed(1))
    built = build_network(network, tmp_path / "built", target=target, example_inputs=(x,), options=Options(threads=1))
    layers = {layer.name for layer in built.artifact.manifest.layers if layer.macs}
    assert layers >= {"first", "depthwise", "strided", "up", "edge", "last"}
    with open_device("local") as device:
        found = device.load(built.artifact).run({"x": x.numpy()}).values()
    with torch.no_grad():
        for ours, theirs in zip(found, network.double()(x.double()), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=3e-6 * float(theirs.abs().max()))
