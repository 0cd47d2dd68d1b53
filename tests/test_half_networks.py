"""Networks that an Arm processor computes in half precision, on the emulated device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.agreement import HALF_ON_PROCESSOR


class EveryKind(nn.Module):
    """Convolutions direct, pruned, depthwise and under masks, norms, pools, a gate and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv3d(3, 24, (1, 3, 3), padding=(0, 1, 1)), nn.InstanceNorm3d(24, affine=True)
        self.depthwise, self.point = nn.Conv3d(24, 24, 3, padding=1, groups=24), nn.Conv3d(24, 24, 1)
        self.squeeze, self.excite = nn.Conv3d(24, 8, 1), nn.Conv3d(8, 24, 1)
        self.pruned, self.masked = nn.Conv3d(24, 16, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)
        keep = torch.rand(16 // 8, 24 // 8, 3, 3, 3) < 0.4
        self.pruned.weight.data *= keep.repeat_interleave(8, 0).repeat_interleave(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = self.point(nn.functional.silu(self.norm(self.depthwise(x)) + x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3, 4), keepdim=True)))))
        y = nn.functional.max_pool3d(y * gate, (1, 2, 2))
        y = torch.relu(self.pruned(y))
        frames = (y.mean((1, 3, 4), keepdim=True) > y.mean((1, 2, 3, 4), keepdim=True)).float()
        channels = (y.mean((2, 3, 4), keepdim=True) > y.mean((1, 2, 3, 4), keepdim=True)).float()
        y = self.masked(y * frames * channels) * channels
        return self.head(y.mean((2, 3, 4)))


@pytest.mark.device
def test_a_network_of_every_kind_of_layer_agrees_with_its_source(tmp_path):
    from dance_tvm.device import emulator_available

    if reason := emulator_available():
        pytest.skip(f"no emulated device: {reason}")
    torch.manual_seed(0)
    network, clip = EveryKind().eval(), torch.rand(1, 3, 4, 8, 8)
    options = Options(threads=1, dtype="float16", conv="direct")
    manifest = build_network(
        network, tmp_path / "half", target="snapdragon", example_inputs=(clip,), options=options, check=True
    ).artifact.manifest
    assert (manifest.check.status, manifest.tolerance) == ("passed", HALF_ON_PROCESSOR)
    kernels = {layer.kernel.split("_f16")[0] for layer in manifest.layers}
    assert {"conv3d_gather", "depthwise3d", "pool3d_max", "conv3d_kgs"} <= kernels, kernels
