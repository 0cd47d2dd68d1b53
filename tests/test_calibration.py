"""Layers are tuned at the densities that a network's clips show, and builds follow those records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_tuning import record
from torch import nn

from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.target import load_target
from dance_tvm.records.kernel_log import append, log_path
from dance_tvm.schedules.workload import GATHER, LINE, POOL
from dance_tvm.tuning.calibration import kept_shares
from dance_tvm.tuning.workloads import layers_of

HOST = load_target("host")
CLIP = (torch.ones(1, 3, 8, 6, 6),)


class Skipping(nn.Module):
    """Frames of the second convolution's input that are dark in the clip are masked out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1))
        self.pool = nn.MaxPool3d((1, 2, 2))

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        bright = (clip.mean((1, 3, 4), keepdim=True) > 0.5).float()
        return self.pool(self.second(torch.relu(self.first(clip)) * bright))


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "skipping.pt2"
    torch.export.save(torch.export.export(Skipping().eval(), CLIP), path)
    return path


def clips(folder: Path, *bright: int) -> str:
    """An archive with a clip for each number of bright frames."""
    stacked = np.zeros((len(bright), *CLIP[0].shape[1:]), "float32")
    for clip, count in zip(stacked, bright, strict=True):
        clip[:, :count] = 1
    np.savez(folder / "clips.npz", *stacked[:, None])
    return str(folder / "clips.npz")


def densities(network: Path, shown: str, **options) -> dict[tuple[str, str], set[float]]:
    found: dict[tuple[str, str], set[float]] = {}
    for layer in layers_of(str(network), HOST, threads=1, conv="direct", clips=shown, **options):
        for name in layer.names:
            found.setdefault((name, layer.workload.family), set()).add(layer.workload.density)
    return found


def test_densities_are_those_that_the_clips_show(network, tmp_path):
    shown = clips(tmp_path, 5, 6, 7)
    shares = kept_shares(str(network), shown)
    # What is dark need not be computed before either; of the second layer's taps 16 of 18 a line are not padding.
    assert shares == pytest.approx({"first": 0.75, "second": 0.75 * (16 / 18) ** 2})
    assert densities(network, shown) == {("first", LINE): {0.75}, ("second", GATHER): {0.75}, ("pool", POOL): {1.0}}


def test_densities_of_clips_join_those_that_were_asked_for(network, tmp_path):
    found = densities(network, clips(tmp_path, 6), densities=[0.5])
    assert found["second", GATHER] == {0.5, 0.75}


def test_builds_follow_a_record_of_the_clips_density(network, tmp_path, own_logs):
    layers = layers_of(str(network), HOST, threads=1, conv="direct", clips=clips(tmp_path, 6))
    thin = [layer.workload for layer in layers if layer.workload.lists and layer.workload.family == GATHER]
    assert {work.density for work in thin} == {0.75}
    append(log_path(HOST), [record(work) for work in thin])
    built = build_network(str(network), tmp_path / "made", options=Options(threads=1, conv="direct"), check=True)
    tuned = {layer.name: layer.tuned for layer in built.artifact.manifest.layers}
    assert "at density 0.75, 2.00x the defaults" in tuned["second"]


@pytest.mark.parametrize("shown", ["nowhere.npz", "motion-digits,size=wrong"])
def test_clips_that_are_none_are_named(network, tmp_path, shown):
    with pytest.raises(DanceError):
        densities(network, shown if "," in shown else str(tmp_path / shown))
