"""The page in a real browser, its Markdown twin, and the papers' figures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from devices import video_artifact
from typer.testing import CliRunner

from dance_tvm import report
from dance_tvm.benchmarking.campaign import Plan, run
from dance_tvm.benchmarking.results import read_results, write_results
from dance_tvm.core.errors import DanceError
from dance_tvm.reporting import liveness, page
from dance_tvm.reporting.papers import PAPERS, beside

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Real measurements of a dynamic network and its dense twin on three clips."""
    folder = tmp_path_factory.mktemp("report")
    values = np.abs(np.random.default_rng(0).integers(1, 4, (3, 3, 8, 16, 16))).astype("float32")
    for index, alive in enumerate((2, 4, 6)):
        values[index, :, alive:] *= -1
    np.savez(folder / "clips.npz", bright=values)
    sparse = video_artifact(folder / "sparse")
    dense = video_artifact(folder / "dense", dynamic=False)
    plan = Plan(
        [sparse.path], dense.path, runs=10, seconds=0.05, clips=str(folder / "clips.npz"), command="dance-tvm <x>"
    )
    return run(plan)


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    """The page that the command writes, with a tuning log and a paper."""
    folder = tmp_path_factory.mktemp("page")
    write_results(folder / "r.json", results)
    log = folder / "host.conv3d_gather.jsonl"
    trials = [{"workload_id": "0" * 16, "status": "trial", "seconds": s} for s in (0.4, 0.5, 0.2, 0.1)]
    log.write_text("\n".join(map(json.dumps, trials)) + '\n{"torn')
    arguments = [str(folder / "r.json"), "--paper", "dance", "--paper", "rt3d", "--tuning", str(log)]
    result = CliRunner().invoke(report.app, arguments)
    assert result.exit_code == 0, result.output
    return folder / "r.html"


def browse(path: Path, folder: Path, *flags: str) -> tuple[str, str, list[str]]:
    """The page's DOM after its scripts ran, what the console said, and every address that was asked for."""
    net = folder / "net.json"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", f"--log-net-log={net}", "--virtual-time-budget=10000", "--dump-dom", *flags]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=180)
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    asked = re.findall(r'"url":"(https?://[^"]+)"', net.read_text(errors="replace"))
    # A browser phones home on its own; what the page asks for names the page as its initiator.
    return done.stdout, said, [address for address in asked if "google" not in address and "gvt1" not in address]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_in_a_real_browser(written, tmp_path):
    dom, console, asked = browse(written, tmp_path, "--window-size=500,3000")
    assert console == ""
    assert asked == []
    headings = re.findall(r"<h2>([^<]+)</h2>", dom)
    wanted = {"Latency", "Where the time goes", "Latency by clip", "Work left and time", "Work saved and time saved"}
    assert wanted | {"Tuning: host.conv3d_gather.jsonl", "What was looked at", "Repeat it"} <= set(headings)
    charts = dom.count('class="plotly-graph-div')
    assert charts == 6
    assert dom.count('class="main-svg"') >= charts  # drawn, not only announced
    assert dom.count("<img alt=") == 3
    assert "dance-tvm &lt;x&gt;" in dom  # nothing of the results is markup


def test_a_page_that_would_fail_is_seen_to_fail(written, tmp_path):
    """The browser's test sees a script's error and an outside request."""
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    broken = tmp_path / "broken.html"
    extra = "<script>throw new Error('chart broke')</script><img src='http://outside.example/x.png'>"
    broken.write_text(f"<!doctype html><title>x</title>{extra}")
    _, console, asked = browse(broken, tmp_path)
    assert "chart broke" in console
    assert any("outside.example" in address for address in asked)


def test_the_page_is_whole_and_small_enough(written):
    text = written.read_text()
    assert "<script src" not in text
    assert '<link rel="stylesheet"' not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert len(text) < 8_000_000


def test_markdown_holds_the_same_tables(results, tmp_path):
    write_results(tmp_path / "r.json", results)
    out = tmp_path / "r.md"
    assert CliRunner().invoke(report.app, [str(tmp_path / "r.json"), "--out", str(out)]).exit_code == 0
    text = out.read_text()
    for table in page.tables(results, []):
        assert f"## {table.title}" in text
        assert all(len(row) == len(table.heads) for row in table.rows)
    again = tmp_path / "again.json"
    CliRunner().invoke(report.app, [str(tmp_path / "r.json"), "--out", str(again)])
    assert read_results(again) == results


def test_liveness_is_what_the_layer_computed(results):
    (measured,) = [item for item in results.devices[0].measured if item.role == "sparse"]
    for picture, frames in zip(measured.pictures, (2, 4, 6), strict=True):
        alive = liveness.alive_of(picture.layers[0])
        assert alive.shape == (8, 16, 16)
        assert alive[:frames].all()
        assert not alive[frames:].any()


def test_papers_name_their_devices_and_never_ours(results):
    for paper in PAPERS:
        _, rows = beside(paper, results)
        assert rows
        for row in rows:
            assert row.published.device
            assert row.published.place
            assert row.ours == "not measured"  # none of their networks is among ours
    named = results.devices[0].measured[0].model_copy(update={"name": "c3d-dance"})
    device = results.devices[0].model_copy(update={"measured": [named], "spec": "emulator"})
    _, rows = beside("dance", results.model_copy(update={"devices": [device]}))
    ours = [row for row in rows if row.ours != "not measured"]
    assert {row.our_device.split()[0] for row in ours} == {"emulated"}
    assert any(row.published.what == "C3D pruned, fastest clip shown" for row in ours)
    with pytest.raises(DanceError, match="choose one of dance, rt3d, dstep"):
        beside("nature", results)


def test_bad_input(results, tmp_path):
    empty = tmp_path / "log.jsonl"
    empty.write_text("no trial\n")
    with pytest.raises(DanceError, match="holds no trial"):
        page.html(results, tuning_logs=[empty])
    with pytest.raises(DanceError, match="cannot be read"):
        page.html(results, tuning_logs=[tmp_path / "none.jsonl"])
    with pytest.raises(DanceError, match="cannot be written"):
        page.write_text(tmp_path / "no" / "folder.html", "")
