"""The comparison with other engines: figures from turns, engines that fail, and one real short run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.engines import ENGINES, Case, Turn, export_case, summary
from benchmarks.networks import MEASURED
from benchmarks.published.networks import NETWORKS
from benchmarks.runs import table
from dance_tvm import models

ROOT = Path(__file__).parent.parent


def _engine(peer, seconds, failed=""):
    turns = [Turn(wall, wall / 2, wall / 4) for wall in seconds]
    return SimpleNamespace(peer=peer, turns=turns, error=1e-7, failed=failed)


def test_ratios_are_taken_within_a_round():
    # The machine slowed down tenfold in the second round: medians over all rounds would hide that ours is faster.
    engines = [_engine("ours", [1.0, 10.0, 1.0]), _engine("pytorch", [2.0, 20.0, 2.0])]
    run = summary(Case("c", 2_000_000_000, Path()), 1, engines)
    assert run["peers"]["pytorch"]["ours_over_it"] == 0.5
    assert run["peers"]["ours"]["ms"] == 1000
    assert run["peers"]["ours"]["gmacs_per_s"] == 2
    assert run["peers"]["ours"]["least_processor_ms"] == 250
    assert run["peers"]["pytorch"]["least_processor_ratio"] == 0.5
    assert "2.00 x fastest" in table([run])


def test_a_failed_engine_is_told_and_stops_nobody():
    engines = [_engine("pytorch", [1.0]), _engine("openvino", [], "ImportError: No module named 'openvino'")]
    run = summary(Case("c", 1, Path()), 2, engines)
    assert run["peers"]["openvino"] == {"failed": "ImportError: No module named 'openvino'"}
    assert "No module named 'openvino'" in table([run])
    assert "1.00 x fastest" in table([run])


@pytest.mark.timeout(300)
def test_a_short_run_measures_and_compares(tmp_path):
    pytest.importorskip("onnxscript")
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--only", "c3d-mini", "--threads", "1"]
    command += ["--rounds", "2", "--peers", "pytorch", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=280, cwd=ROOT)
    (run,) = json.loads((tmp_path / "peers-quick.json").read_text())["runs"]
    figures = run["peers"]["pytorch"]
    assert (run["case"], run["threads"], len(figures["rounds_ms"])) == ("c3d-mini", 1, 2)
    assert 0 < figures["error"] < 1e-5
    assert figures["ms"] > 0


def test_an_unknown_peer_is_named():
    command = [sys.executable, "-m", "benchmarks.peers", "--peers", "tensorflow"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tensorflow" in done.stderr


def test_every_measured_network_is_one_that_can_be_made():
    published = {entry.name for entry in NETWORKS}
    assert {entry.published for entry in MEASURED if entry.published} <= published
    assert {entry.name.lower() for entry in MEASURED if not entry.published} <= set(models.names())
    assert len({entry.name for entry in MEASURED}) == len(MEASURED)


def test_a_case_keeps_every_input_and_output_in_its_order(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Two(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return a + b, (a - b).sum(1)

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    case = export_case("two inputs", Two(), (a, b), tmp_path)
    for kept, given in zip(case.inputs(), (a, b), strict=True):
        np.testing.assert_array_equal(kept, given.numpy())
    run = ENGINES["onnxruntime"](case, 1)
    np.testing.assert_allclose(run()[1], (a - b).sum(1), rtol=1e-6)
