"""`dance-tvm export`: from a module of the user's own to a file that builds take, and what to do where that fails."""

from __future__ import annotations

import logging
import resource
import sys
import types

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dance_tvm import export as command
from dance_tvm.artifact.preprocess import read_preprocess
from dance_tvm.core.errors import DanceError
from dance_tvm.frontend import export
from dance_tvm.frontend.importer import import_model

MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv3d(2, 3, 3, padding=1), nn.Dropout(0.5)

    def forward(self, clip):
        return self.drop(self.conv(clip)).mean((2, 3, 4))

class Deciding(Net):
    def forward(self, clip):
        return self.conv(clip) if clip.sum() > 0 else clip

class Counting(Net):
    seen = 0
    def forward(self, clip):
        Counting.seen += 1
        return self.conv(clip) * Counting.seen

class Breaking(Net):
    seen = 0
    def forward(self, clip):
        Breaking.seen += 1
        return self.conv(clip) * (float("nan") if Breaking.seen > 1 else 1.0)

class Fixed(Net):
    def forward(self, clip):
        return self.conv(clip).view(2, -1)

def no_net():
    return 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a module of the user's own, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_net.py").write_text(MINE)
    sys.modules.pop("users_net", None)
    return tmp_path


def invoke(*words: str):
    return CliRunner().invoke(command.app, list(words))


def test_a_network_in_training_mode_is_exported_as_it_evaluates(here):
    done = invoke("users_net:Net", "--shape", "1x2x3x4x5", "--out", "a net.pt2", "--mean", "0.4", "--deviation", "0.2")
    assert done.exit_code == 0, done.exception
    assert "next: dance-tvm build --model 'a net.pt2' --preprocess 'a net.toml'" in done.output
    (here / "a net.pt2").rename(here / "net.pt2")
    assert read_preprocess(here / "a net.toml").mean == (0.4,)
    assert import_model(here / "net.pt2").inputs[0].shape == (1, 2, 3, 4, 5)


def test_a_batch_stays_open_for_the_build(here):
    assert invoke("users_net:Net", "--shape", "1x2x3x4x5", "--open-batch", "--out", "net.pt2").exit_code == 0
    assert import_model(here / "net.pt2", batch=3).inputs[0].shape == (3, 2, 3, 4, 5)


def test_own_weights_are_loaded_and_told_where_they_do_not_fit(here):
    sys.path.insert(0, str(here))
    from users_net import Net

    sys.path.pop(0)
    network = Net()
    torch.save(network.state_dict(), here / "w.pt")
    loaded = export.load_source("users_net:Net", "w.pt").module
    assert torch.equal(loaded.conv.weight, network.conv.weight)
    torch.save({"conv.weight": torch.zeros(1)}, here / "w.pt")
    with pytest.raises(DanceError, match="missing: conv"):
        export.load_source("users_net:Net", "w.pt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["users_net:Deciding"], "(users_net.py, line 15): its code decides by the values of a tensor"),
        (["users_net:Deciding"], "or move the decision out of the network; PyTorch says 'Could not guard"),
        (["users_net:Counting"], "changes from call to call"),
        (["users_net:Breaking"], "changes from call to call"),
        (["users_net:Fixed", "--open-batch"], "write -1 or x.shape"),
        (["users_net:Net", "--shape", "2x2"], "give one --shape for each"),
        (["users_net:no_net"], "gives a int: it must give a torch.nn.Module"),
        (["users_net:missing"], "name a function without arguments"),
        (["nowhere_at_all:Net"], "gives no network"),
        (["users_net:Net", "--weights", "DEFAULT"], "is not a file"),
        (["users_net:Net", "--out", "net.pth"], "must end in .pt2 or .onnx"),
        (["users_net:Net", "--mean", "grey"], "not a list of finite numbers"),
        (["users_net:Net", "--mean", "0.4,0.5"], "--mean: 2 numbers for frames of three colours"),
        (["users_net:Net", "--deviation", "0"], "--deviation: is divided by"),
        (["users_net:Net", "--weights", "users_net.py"], "is not a weights file"),
        (["users_net"], "users_net is your own Python code: name a function in it too, as users_net:FUNCTION"),
        (["users_net.py"], "as users_net:FUNCTION"),
        (["no-such-network"], "no-such-network"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence_with_what_to_do(words, said, here):
    done = invoke(*words, "--shape", "1x2x3x4x5")
    assert isinstance(done.exception, DanceError), done.output
    assert said in str(done.exception)
    assert not (here / "model.pt2").exists()
    assert not done.stderr.replace("✓ load PyTorch\n", "").replace(f"✓ make {words[0]}\n", "")


def test_shapes_are_asked_for_before_anything_is_loaded(here):
    done = invoke("nowhere_at_all:Net")
    assert "--shape is missing" in str(done.exception)


def test_torchvision_tells_its_scale(here, monkeypatch):
    class Weights:
        def transforms(self):
            return types.SimpleNamespace(mean=[0.4, 0.3, 0.2], std=[0.1, 0.2, 0.3], resize_size=[128, 171])

    fake = types.SimpleNamespace(
        models=types.SimpleNamespace(
            get_model_weights=lambda name: {"DEFAULT": Weights()}, get_model=lambda name, weights: nn.Identity()
        )
    )
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    found = export.load_source("torchvision:any", "DEFAULT")
    assert found.preprocess.resize == (128, 171)
    assert found.preprocess.deviation == (0.1, 0.2, 0.3)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DanceError, match="pip install torchvision"):
        export.load_source("torchvision:any")
    # As a torchvision for CUDA says beside a torch for processors.
    monkeypatch.delitem(sys.modules, "torchvision")
    (here / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(here))
    with pytest.raises(DanceError, match="built for another PyTorch"):
        export.load_source("torchvision:any")


def test_the_exporter_talks_to_the_curious_alone(capsys, monkeypatch):
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    said = logging.StreamHandler(sys.stdout)
    logger.addHandler(said)
    try:
        with export._quiet():
            logger.warning("torchvision is not installed")
        assert not capsys.readouterr().out
        monkeypatch.setattr(export, "level", lambda: 1)
        with export._quiet():
            logger.warning("torchvision is not installed")
        assert "torchvision" in capsys.readouterr().out
    finally:
        logger.removeHandler(said)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_full_disk_is_told_and_leaves_nothing(suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    before, limits = set(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # EFBIG, as on a quota
    try:
        with pytest.raises(DanceError, match=r"no space left to write .* free some, or choose another --out"):
            export.export(nn.Linear(256, 256), [(1, 256)], tmp_path / f"net{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(tmp_path.iterdir()) == before
