"""The comparison with other engines: figures from turns, engines that fail, and one real short run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

peers = importlib.import_module("peers")


def _engine(peer, seconds, failed=""):
    return SimpleNamespace(peer=peer, seconds=seconds, error=1e-7, failed=failed)


def test_ratios_are_taken_within_a_round():
    # The machine slowed down tenfold in the second round: medians over all rounds would hide that ours is faster.
    engines = [_engine("ours", [1.0, 10.0, 1.0]), _engine("pytorch", [2.0, 20.0, 2.0])]
    run = peers._summary(peers.Case("c", 2_000_000_000, Path()), 1, engines)
    assert run["peers"]["pytorch"]["ours_over_it"] == 0.5
    assert run["peers"]["ours"]["ms"] == 1000
    assert run["peers"]["ours"]["gmacs_per_s"] == 2
    assert "2.00 x fastest" in peers.table([run])


def test_a_failed_engine_is_told_and_stops_nobody():
    engines = [_engine("pytorch", [1.0]), _engine("openvino", [], "ImportError: No module named 'openvino'")]
    run = peers._summary(peers.Case("c", 1, Path()), 2, engines)
    assert run["peers"]["openvino"] == {"failed": "ImportError: No module named 'openvino'"}
    assert "No module named 'openvino'" in peers.table([run])
    assert "1.00 x fastest" in peers.table([run])


@pytest.mark.timeout(300)
def test_a_short_run_measures_and_compares(tmp_path):
    pytest.importorskip("onnxscript")
    command = [sys.executable, ROOT / "benchmarks" / "peers.py", "--quick", "--only", "c3d-mini", "--threads", "1"]
    command += ["--rounds", "2", "--peers", "pytorch", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    (run,) = json.loads((tmp_path / "peers-quick.json").read_text())["runs"]
    figures = run["peers"]["pytorch"]
    assert (run["case"], run["threads"], len(figures["rounds_ms"])) == ("c3d-mini", 1, 2)
    assert 0 < figures["error"] < 1e-5
    assert figures["ms"] > 0


def test_an_unknown_peer_is_named():
    command = [sys.executable, ROOT / "benchmarks" / "peers.py", "--peers", "tensorflow"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tensorflow" in done.stderr
