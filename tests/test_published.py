"""The benchmark of published networks: its own definitions, its reference in float64, and its page."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import runs
from benchmarks.published import page
from benchmarks.published.export import reference
from benchmarks.published.mobile import MoViNet
from benchmarks.published.networks import NETWORKS, randomise
from benchmarks.published.video import shifted, shifted_in_place


def test_names_are_each_networks_own_and_own_definitions_exist():
    assert len({network.name for network in NETWORKS}) == len(NETWORKS)
    own = [network for network in NETWORKS if network.module.startswith("benchmarks.published.")]
    for network in own:
        module = __import__(network.module, fromlist=["_"])
        assert callable(getattr(module, network.call.partition("(")[0])), network.name


def test_a_stream_frame_by_frame_gives_the_scores_of_all_frames_at_once():
    torch.manual_seed(0)
    network = MoViNet(classes=5, causal=True).eval()
    randomise(network)
    frames = torch.randn(1, 3, 3, 40, 40)
    with torch.no_grad():
        at_once, *_ = network(frames, *network.first_states(40))
        states = network.first_states(40)
        for frame in frames.split(1, 2):
            scores, *states = network(frame, *states)
    assert scores.shape == (1, 5)
    torch.testing.assert_close(scores, at_once, rtol=1e-4, atol=1e-6)


def test_a_shift_in_place_is_the_shift():
    x = torch.randn(6, 16, 2, 3)
    torch.testing.assert_close(shifted_in_place(x.clone(), 3), shifted(x, 3), rtol=0, atol=0)


class Narrowing(nn.Module):
    """Turns its input into float32 inside, twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() / 3).to(torch.float32) + torch.ones(2, dtype=torch.float32) / 7


def test_the_reference_is_float64_all_through():
    (found,), own = reference(Narrowing(), [torch.tensor([1.0, 2.0])])
    assert found == pytest.approx([1 / 3 + 1 / 7, 2 / 3 + 1 / 7], rel=1e-15)
    assert 0 < own < 1e-6


def test_the_page_counts_what_is_right_and_names_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "networks.md")
    right = {"status": "right", "message": "", "error": 2e-6, "cpu_s": 20.0, "peak_mb": 700, "artifact_mb": 3.0}
    refused = {"status": "refused", "message": "The operator Foo\nis not known."}
    page.write_page({"I3D": {"parameters": 12_700_000, "float32_error": 3e-7, "pt2": right, "onnx": refused}})
    text = (tmp_path / "networks.md").read_text()
    assert "From .pt2: 1 of the 1" in text
    assert "From ONNX: 0 of the 1" in text
    assert "| 12.7 | 3e-07 | 2e-06 | refused | 20 | 700 | 3 |" in text
    assert "- I3D from onnx: refused: The operator Foo is not known." in text


def test_the_page_tells_processor_time_and_the_ratio_to_the_fastest():
    def figures(ms: float, ratio: float) -> dict[str, object]:
        turns = {"ours_over_it": ratio, "ratio_interval": [ratio - 0.1, ratio + 0.1]}
        return {"ms": 2 * ms, "least_processor_ms": ms, "least_processor_ratio": ratio, "error": 2e-7, **turns}

    peers = {"ours": figures(6, 1), "one": figures(5, 1.2), "other": figures(12, 0.5), "third": {"failed": "absent"}}
    run = {"case": "MobileNet 3D", "threads": 1, "gmacs": 0.234, "peers": peers}
    machine = {"processor": "Some processor", "cores": 2, "versions": {"torch": "1"}}
    text = "\n".join(page.times({"machine": machine, "runs": [run]}))
    assert "Some processor (2 cores), torch 1." in text
    assert (
        "| MobileNet 3D | 1x3x16x112x112 | 1 | 0.23 | 6.0 | 5.0 | 12.0 | – | 1.20 (one) | 1.20 (1.10 to 1.30) |" in text
    )
    assert "Geometric mean of the ratios, 1 thread: 1.20." in text


def test_rows_of_other_processors_are_kept_and_have_a_table_of_their_own(tmp_path, monkeypatch):
    def measure(processor: str, ms: float) -> None:
        monkeypatch.setattr(runs, "machine", lambda: {"processor": processor, "cores": 2, "versions": {"torch": "1"}})
        ours = {"ms": ms, "least_processor_ms": ms, "error": 0.0}
        each = {"case": "I3D", "threads": 1, "gmacs": 1.0, "peers": {"ours": ours}}
        runs.write_runs([each], tmp_path / "networks.json")

    for processor, ms in (("One", 10.0), ("Other", 20.0), ("One", 30.0)):
        measure(processor, ms)
    text = "\n".join(page.times(json.loads((tmp_path / "networks.json").read_text())))
    assert text.index("Other (2 cores)") < text.index("| 20.0 |") < text.index("One (2 cores)") < text.index("| 30.0 |")
    assert "| 10.0 |" not in text
