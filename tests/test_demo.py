"""The demo's own network: through ONNX as well, its answers kept between runs, and no phone where there is no qemu."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dance_tvm import DanceError, build_network, import_model, models, open_device
from examples import demo


@pytest.mark.network
@pytest.mark.slow
def test_the_published_network_agrees_with_pytorch_through_onnx(tmp_path):
    """Windows with shot boundaries, so that the probabilities to compare are near 1 as well as near 0."""
    try:
        network = models.pretrained("transnetv2")
        video = models.published_video(models.entry("transnetv2"))()
    except DanceError as error:
        pytest.skip(str(error))
    torch.onnx.export(network, models.example_inputs("transnetv2"), tmp_path / "net.onnx", dynamo=True, verbose=False)
    imported = import_model(tmp_path / "net.onnx", check=False)
    built = build_network(imported, tmp_path / "out", check=False)  # its answers are compared below
    with open_device("local") as device:
        loaded = device.load(built.artifact)
        (name,) = [tensor.name for tensor in imported.inputs]
        clip = [inputs[name] for inputs in loaded.windows(video, stride=demo.STEP)][:4]
        found = demo.run_windows("onnx", demo.run_of(loaded), clip)
    with torch.inference_mode():
        answers = [network(torch.from_numpy(window)) for window in clip]
    expected = np.stack([np.concatenate([each.numpy() for each in answer]) for answer in answers])
    assert expected.max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=demo.ALLOWED)


class Asked:
    """A network whose answer to a window is the window's mean, and how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, window):
        self.calls += 1
        mean = window.astype("float32").mean((2, 3, 4))
        return mean, mean + 1


def windows_of_zeros(count):
    return [np.full((1, demo.WINDOW, 2, 3, 3), index, np.uint8) for index in range(count)]


def test_pytorchs_answers_are_kept_for_the_same_network_and_frames(tmp_path):
    asked, clip = Asked(), windows_of_zeros(3)
    first = demo.pytorch_answers("a" * 64, asked, clip, tmp_path)
    assert first.shape == (3, 2, demo.WINDOW)
    assert asked.calls == 3
    np.testing.assert_array_equal(demo.pytorch_answers("a" * 64, asked, clip, tmp_path), first)
    assert asked.calls == 3
    for network, windows in (("b" * 64, clip), ("a" * 64, [window + 1 for window in clip])):
        before = asked.calls
        demo.pytorch_answers(network, asked, windows, tmp_path)
        assert asked.calls == before + 3


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY torn", b"words"])
def test_torn_answers_are_computed_again(tmp_path, damage):
    asked, clip = Asked(), windows_of_zeros(2)
    first = demo.pytorch_answers("a" * 64, asked, clip, tmp_path)
    (kept,) = tmp_path.rglob("*.npy")
    kept.write_bytes(damage)
    np.testing.assert_array_equal(demo.pytorch_answers("a" * 64, asked, clip, tmp_path), first)
    assert asked.calls == 4


def artifact(sha256):
    return SimpleNamespace(manifest=SimpleNamespace(files={"model.so": SimpleNamespace(sha256=sha256)}))


def test_a_device_that_does_not_start_is_not_an_error_and_answers_are_kept_by_artifact(monkeypatch, capsys, tmp_path):
    """A device that starts is asked once for each artifact; one that does not is named."""
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

    def silent(*_arguments, **_options):
        raise DanceError("the server did not answer")

    window = np.zeros((1, 3, 100, 2, 2), np.uint8)
    expected = np.stack([np.ones(100, np.float32), np.zeros(100, np.float32)])[None]
    monkeypatch.setattr(demo, "open_device", silent)
    demo.on_emulated_device(artifact("a"), [window], expected, tmp_path)
    assert "not run, the server did not answer" in capsys.readouterr().out
    monkeypatch.setattr(demo, "open_device", lambda *_arguments, **_options: Device())
    for sha256 in ("a", "a", "b"):
        demo.on_emulated_device(artifact(sha256), [window], expected, tmp_path)
    assert asked == ["a", "b"]
    with pytest.raises(DanceError, match="in probability"):
        demo.on_emulated_device(artifact("b"), [window], 1 - expected, tmp_path)


def test_the_emulated_device_says_what_it_needs(monkeypatch, tmp_path, capsys):
    """What `open_device` refuses is what the demo prints."""
    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(Path(tmp_path)))
    demo.on_emulated_device(artifact("a"), [np.zeros((1, 100, 2, 2, 3), np.uint8)], np.zeros((1, 2, 100)), tmp_path)
    assert "not run, there is no emulated device here: qemu-user" in capsys.readouterr().out


def test_every_frame_of_a_clip_counts_once():
    frames = np.arange(300, dtype=np.float32)
    answers = np.stack([np.stack([frames[start : start + 100]] * 2) for start in range(0, 201, demo.STEP)])
    np.testing.assert_array_equal(demo.over_clip(answers), np.stack([frames] * 2))


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
