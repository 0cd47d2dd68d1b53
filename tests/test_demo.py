"""The demo's own network: through ONNX as well, its answers kept between runs, and no phone where there is no qemu."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dance_tvm import models
from dance_tvm.compiler.build import build_network
from dance_tvm.core.errors import DanceError
from dance_tvm.device import open_device
from dance_tvm.models import transnetv2
from examples import demo


@pytest.mark.network
@pytest.mark.slow
def test_the_published_network_agrees_with_pytorch_through_onnx(tmp_path):
    """Windows with shot boundaries, so that the probabilities to compare are near 1 as well as near 0."""
    try:
        network = models.pretrained("transnetv2")
    except DanceError as error:
        pytest.skip(str(error))
    frames = transnetv2.read_frames(transnetv2.clip_path())
    torch.onnx.export(network, models.example_inputs("transnetv2"), tmp_path / "net.onnx", dynamo=True, verbose=False)
    built = build_network(tmp_path / "net.onnx", tmp_path / "out", check=False)  # its answers are compared below
    clip = [np.ascontiguousarray(window) for window in list(transnetv2.windows(frames))[:4]]
    expected = np.stack([np.concatenate(demo.torch_run(network)(window)) for window in clip])
    with open_device("local") as device:
        found = demo.run_windows("onnx", demo.run_of(device.load(built.artifact)), clip)
    assert expected.max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=demo.ALLOWED)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """How often PyTorch was asked; its answer to a window is the window's mean."""
    calls: list[int] = []

    def network(window):
        calls.append(1)
        mean = window.float().mean((2, 3, 4))
        return mean, mean + 1

    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "pretrained", lambda _name: network)
    return calls


def test_pytorchs_answers_are_kept_for_the_same_network_and_frames(asked, tmp_path):
    frames = np.arange(120 * 2 * 3 * 3, dtype=np.uint8).reshape(120, 2, 3, 3)
    clip = [np.ascontiguousarray(window) for window in transnetv2.windows(frames)]
    network = SimpleNamespace(source_sha256="a" * 64)
    first = demo.pytorch_answers(network, frames, clip)
    assert first.shape == (len(clip), 2, transnetv2.WINDOW)
    assert len(asked) == len(clip)
    np.testing.assert_array_equal(demo.pytorch_answers(network, frames, clip), first)
    assert len(asked) == len(clip)
    for other in (SimpleNamespace(source_sha256="b" * 64), frames + 1):
        pair = (network, other) if isinstance(other, np.ndarray) else (other, frames)
        before = len(asked)
        demo.pytorch_answers(*pair, clip)
        assert len(asked) == before + len(clip)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY torn", b"words"])
def test_torn_answers_are_computed_again(asked, tmp_path, damage):
    frames = np.zeros((60, 2, 3, 3), np.uint8)
    clip = [np.ascontiguousarray(window) for window in transnetv2.windows(frames)]
    network = SimpleNamespace(source_sha256="a" * 64)
    first = demo.pytorch_answers(network, frames, clip)
    (kept,) = tmp_path.glob("*.npy")
    kept.write_bytes(damage)
    np.testing.assert_array_equal(demo.pytorch_answers(network, frames, clip), first)
    assert len(asked) == 2 * len(clip)


def test_without_an_emulated_device_it_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(demo, "emulator_available", lambda: "qemu-user missing: run `apt-get install qemu-user`")
    demo.on_emulated_device(SimpleNamespace(), [], np.zeros((0, 2, 100)))
    assert "not run, qemu-user missing" in capsys.readouterr().out


def test_a_device_that_does_not_start_is_not_an_error_and_answers_are_kept_by_artifact(monkeypatch, capsys, tmp_path):
    """A device that starts is asked once for each artifact; one that does not is named."""
    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "emulator_available", lambda: "")
    monkeypatch.setattr(demo, "prepare_emulator", lambda _said: None)
    asked: list[str] = []

    class Device:
        def __enter__(self):
            return self

        def __exit__(self, *_problem):
            pass

        def facts(self):
            return {"machine": "aarch64"}

        def load(self, artifact):
            asked.append(artifact.manifest.files["model.so"].sha256)
            outputs = {"single": np.ones((1, 100), np.float32), "every": np.zeros((1, 100), np.float32)}
            tensor = SimpleNamespace(name="frames")
            return SimpleNamespace(manifest=SimpleNamespace(inputs=[tensor]), run=lambda _inputs: outputs)

    def artifact(sha256):
        return SimpleNamespace(manifest=SimpleNamespace(files={"model.so": SimpleNamespace(sha256=sha256)}))

    def silent(*_arguments, **_options):
        raise DanceError("the server did not answer")

    window = np.zeros((1, 3, 100, 2, 2), np.uint8)
    expected = np.stack([np.ones(100, np.float32), np.zeros(100, np.float32)])[None]
    monkeypatch.setattr(demo, "open_device", silent)
    demo.on_emulated_device(artifact("a"), [window], expected)
    assert "not run, the server did not answer" in capsys.readouterr().out
    monkeypatch.setattr(demo, "open_device", lambda *_arguments, **_options: Device())
    for sha256 in ("a", "a", "b"):
        demo.on_emulated_device(artifact(sha256), [window], expected)
    assert asked == ["a", "b"]
    with pytest.raises(DanceError, match="in probability"):
        demo.on_emulated_device(artifact("b"), [window], 1 - expected)


def test_other_boundaries_or_probabilities_are_an_error():
    expected = np.zeros((2, 100), np.float32)
    expected[0, 40] = 1
    found = expected.copy()
    demo.compare(found + np.float32(5e-5), expected)
    demo.compare_boundaries(found, expected)
    found[0, 40] = 0
    with pytest.raises(DanceError, match="in probability"):
        demo.compare(found, expected)
    with pytest.raises(DanceError, match="other shot boundaries"):
        demo.compare_boundaries(found, expected)


def test_both_engines_are_timed_in_turns_on_the_same_windows(capsys):
    asked = []
    windows = [np.zeros(1) + index for index in range(demo.TURNS + 2)]
    demo.in_turns(lambda w: asked.append(("ours", w[0])), lambda w: asked.append(("theirs", w[0])), windows)
    assert asked == [(who, index) for index in range(demo.TURNS) for who in ("ours", "theirs")]
    assert "times as fast" in capsys.readouterr().out
