"""`build --layer-errors`: each layer beside the same layer of its source, and layers in the order of their calls."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dance_tvm import build as command
from dance_tvm.compiler import layer_errors
from dance_tvm.compiler.build import build_network
from dance_tvm.core.errors import DanceError


class Watched(nn.Module):
    """Half of the second layer's frames are left out; two heads of equal kernels are read in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU())
        self.middle = nn.Conv3d(16, 24, 3, padding=1)
        self.early, self.late = nn.Conv3d(24, 5, 1), nn.Conv3d(24, 5, 1)
        self.classes = nn.Linear(24, 7)

    def forward(self, clip: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.stem(clip)
        keep = (clip.mean((1, 3, 4), keepdim=True) > 0).float()
        x = torch.relu(self.middle(x)) * keep
        early = self.early(x)
        late = self.late(torch.nn.functional.avg_pool3d(x, (1, 2, 2)))
        return torch.sigmoid(late), torch.sigmoid(early), self.classes(x.mean((2, 3, 4)))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("watched")
    clip = torch.randn(1, 3, 6, 12, 10) + torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).view(1, 1, 6, 1, 1)
    np.savez(folder / "clip.npz", clip=clip.numpy())
    found = build_network(
        Watched().eval(), folder / "net", example_inputs=(clip,), check=False, check_inputs=[folder / "clip.npz"],
        layer_errors=True,
    )  # fmt: skip
    return found, folder


def test_every_layer_is_compared_where_it_was_computed(built):
    found, _ = built
    errors = {error.layer: error for error in found.layer_errors.layers}
    convolutions = [layer.name for layer in found.artifact.manifest.layers if layer.kind != "pool3d"]
    assert set(convolutions) <= set(errors)
    assert len(convolutions) == 5
    for error in errors.values():
        assert error.signal_to_noise > 100
        assert error.worst <= error.signal_to_noise
        assert error.difference < 1e-4
    assert errors[next(name for name in convolutions if "middle" in name)].compared == pytest.approx(0.5)


def test_a_wrong_channel_is_named(built, monkeypatch):
    _, folder = built
    told = layer_errors._values

    def spoilt(kernel, tensors):
        values, alive, channels, shape = told(kernel, tensors)
        if shape[-1] == 16:
            values[:, 11] *= 1.1  # a tenth off: 20 dB
        return values, alive, channels, shape

    monkeypatch.setattr(layer_errors, "_values", spoilt)
    again = build_network(
        Watched().eval(), folder / "net", example_inputs=(torch.randn(1, 3, 6, 12, 10),), check=False,
        check_inputs=[folder / "clip.npz"], layer_errors=True,
    )  # fmt: skip
    stem = next(error for error in again.layer_errors.layers if "stem" in error.layer)
    assert stem.worst_channel == 11
    assert stem.worst == pytest.approx(20, abs=0.1)


def test_the_command_prints_them_and_refuses_what_does_not_run_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "c3d-mini", "--no-check", "--layer-errors"]
    done = CliRunner().invoke(command.app, [*words, "--json"])
    told = json.loads(done.stdout)["layer_errors"]
    assert not told["left_out"]
    assert [error["layer"] for error in told["layers"]][-1] == "fc"
    assert all(error["signal_to_noise"] > 80 for error in told["layers"])
    done = CliRunner().invoke(command.app, words)
    assert "signal to noise, dB" in done.stdout
    for target in ("snapdragon", "jetson-nano"):
        refused = CliRunner().invoke(command.app, [*words, "--target", target])
        assert isinstance(refused.exception, DanceError)
        assert "build for host" in str(refused.exception)
