"""The benchmark of layer families: every network takes its input, and the faster peer is the one that counts."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

import benchmarks.families
from benchmarks.families import families, over_the_faster


def test_every_family_takes_its_input():
    for name, (make, shape) in families().items():
        with torch.inference_mode():
            assert torch.isfinite(make().eval()(torch.randn(shape))).all(), name


def test_the_faster_peer_counts():
    run = {"peers": {"ours": {"ms": 2.0}, "one": {"ms": 4.0, "ours_over_it": 0.5}, "other": {"failed": "absent"}}}
    assert over_the_faster(run) == 0.5
    run["peers"]["other"] = {"ms": 1.0, "ours_over_it": 2.0}
    assert over_the_faster(run) == 2.0
    assert over_the_faster({"peers": {"ours": {"ms": 2.0}}}) is None


def test_a_family_is_chosen_by_its_whole_name(monkeypatch):
    found = []
    monkeypatch.setattr(benchmarks.families, "export_case", lambda name, *_: found.append(name))
    monkeypatch.setattr(benchmarks.families, "measure", lambda *_: {"peers": {}})
    for name in ("table", "write_runs"):
        monkeypatch.setattr(benchmarks.families, name, lambda *_: "")
    words = ["--only", "max pool 3x3x3, stride 1", "--only", "shuffle"]
    done = CliRunner().invoke(benchmarks.families.app, words, catch_exceptions=False)
    assert (done.exit_code, sorted(found)) == (0, ["channel shuffle", "max pool 3x3x3, stride 1"])
