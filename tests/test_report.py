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
from dance_tvm.core.printing import duration, plain_number
from dance_tvm.reporting import compare, liveness, page
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
    charts = dom.split('<section class="chart">')[1:]
    assert len(charts) == 6
    for chart in charts:
        assert chart.count("<rect") + chart.count("<line") > 3  # drawn, with a table under it
        assert chart.index("<table>") > chart.index("<svg")
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
    assert "<script" not in text
    assert '<link rel="stylesheet"' not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert len(text) < 300_000


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_is_wider_than_the_screen(written, tmp_path, width):
    """A frame as wide as a phone tells how wide the page would be."""
    frame = tmp_path / "frame.html"
    script = """<script>
        const texts = [...document.querySelectorAll(".row svg text, .plot svg text")];
        const ends = texts.map(text => text.getBoundingClientRect().right);
        const summary = document.querySelector(".scroll");
        const hidden = innerWidth < 1000 ? 0 : summary.scrollWidth - summary.clientWidth;
        parent.postMessage(Math.ceil(hidden + Math.max(document.documentElement.scrollWidth, ...ends)), "*");
    </script></body>"""
    text = written.read_text().replace("</body>", script)
    (tmp_path / "page.html").write_text(text)
    frame.write_text(
        f"<iframe src='page.html' style='width:{width}px;height:900px;border:0'></iframe>"
        "<script>addEventListener('message', event => document.body.dataset.most = event.data)</script>"
    )
    dom, _, _ = browse(frame, tmp_path, "--allow-file-access-from-files")
    (most,) = re.findall(r'data-most="(\d+)"', dom)
    assert int(most) <= width


def test_links_of_layers_lead_to_reasons_and_records(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuning_logs").mkdir()
    record = {"workload_id": "0123456789abcdef", "status": "verified", "seconds": 0.002, "default_seconds": 0.003,
              "date": "2026-01-02T03:04:05Z", "origin": "local", "decisions": {"mr": 5}, "trials": 7}  # fmt: skip
    (tmp_path / "tuning_logs" / "here.jsonl").write_text(json.dumps({**record, "unit": "seconds"}) + "\n{torn")
    told = results.model_copy(deep=True)
    layer = told.devices[0].measured[0].profile.layers[0]
    layer.why, layer.tuned = "fewest multiplications", "tuned 2026-01-02 on local, record 0123456789abcdef"
    text = page.html(page.page_of(told))
    places = set(re.findall(r' id="([^"]+)"', text))
    asked = set(re.findall(r'href="#([^"]+)"', text))
    assert asked <= places
    assert "record-0123456789abcdef" in asked
    assert "fewest multiplications" in text
    assert "2 ms" in text


def test_two_results_side_by_side(results, tmp_path):
    slower = results.model_copy(deep=True)
    for item in slower.devices[0].measured:
        item.latency.seconds = [2 * value for value in item.latency.seconds]
        item.latency.p50 *= 2
        item.threads = 9
    for name, each in (("a", results), ("b", slower)):
        write_results(tmp_path / f"{name}.json", each)
    both = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    for form, suffix in (("html", "html"), ("markdown", "md"), ("json", "json")):
        done = CliRunner().invoke(report.app, [*both, "--format", form])
        assert done.exit_code == 0, done.output
        assert (tmp_path / f"a-b.{suffix}").exists()
    assert "| the same code |" in (tmp_path / "a-b.md").read_text()
    (first, _) = json.loads((tmp_path / "a-b.json").read_text())["compared"]
    assert first["verdict"] == "slower"
    assert first["low"] <= first["ratio"] <= first["high"]
    assert any("number of threads" in each for each in first["differs"])
    assert any("library is identical" in each for each in first["differs"])
    with pytest.raises(DanceError, match="measured no network of one name"):
        compare.comparison(results, results.model_copy(update={"devices": []}), ("a", "b"))


def test_markdown_holds_the_same_tables(results, tmp_path):
    write_results(tmp_path / "r.json", results)
    out = tmp_path / "r.md"
    assert CliRunner().invoke(report.app, [str(tmp_path / "r.json"), "--out", str(out)]).exit_code == 0
    text = out.read_text()
    for table in page.tables(results):
        assert f"## {table.title}" in text
        assert all(len(row) == len(table.heads) for row in table.rows)
    again = tmp_path / "again.json"
    CliRunner().invoke(report.app, [str(tmp_path / "r.json"), "--out", str(again)])
    assert read_results(again) == results


def test_a_network_alone_has_no_role(results, tmp_path):
    alone = results.devices[0].measured[0].model_copy(update={"role": "other"})
    device = results.devices[0].model_copy(update={"measured": [alone]})
    shown = page.html(page.page_of(results.model_copy(update={"devices": [device], "pairs": []})))
    assert "(other)" not in shown
    assert ">role<" not in shown
    assert f"Layers of {alone.name}<" in shown


def test_small_times_are_readable():
    shown = [duration(seconds) for seconds in (0, 9e-8, 5.214e-5, 0.000999, 0.0036, 0.5, 28.23, 3600)]
    assert shown == ["0 µs", "0.09 µs", "52.1 µs", "999 µs", "3.6 ms", "500 ms", "28.2 s", "3600 s"]
    assert [plain_number(value) for value in (9e-5, 0.12346, 1234567)] == ["0.00009", "0.1235", "1235000"]


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
        page.page_of(results, tuning_logs=[empty])
    with pytest.raises(DanceError, match="cannot be read"):
        page.page_of(results, tuning_logs=[tmp_path / "none.jsonl"])
    with pytest.raises(DanceError, match="cannot be written"):
        page.write_text(tmp_path / "no" / "folder.html", "")
