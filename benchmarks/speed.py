"""README's picture and table of speed, drawn from measurements of one machine.

    python -m benchmarks.rt3d build      the networks, dense and pruned
    python -m benchmarks.rt3d table2     those and their dense peers in turns, two threads
    python -m benchmarks.networks --only "C3D|R2plus1D-18|S3D|TransNetV2|ResNet18-TSN"
    python -m benchmarks.speed           docs/images/speed.png and README's section

Needs matplotlib (``pip install 'dance-tvm[report]'``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from .rt3d import write_section

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PICTURE = ROOT / "docs" / "images" / "speed.png"

#: The picture's bars: key in RT3D's table 2, name, colour.
SHOWN = (
    ("pytorch", "PyTorch", "#9aa0a6"),
    ("onnxruntime", "ONNX Runtime", "#9aa0a6"),
    ("openvino", "OpenVINO", "#9aa0a6"),
    ("mnn", "MNN", "#9aa0a6"),
    ("dense", "dance_tvm, dense", "#0072b2"),
    ("kgs", "dance_tvm, kernel groups pruned", "#d55e00"),
    ("filter", "dance_tvm, whole filters pruned", "#e69f00"),
)
PRUNED = {"c3d": "C3D", "r2plus1d-18": "R(2+1)D-18", "s3d": "S3D"}
#: The table's networks: name in networks.json, name to be read.
DENSE = {
    "C3D": "C3D",
    "R2plus1D-18": "R(2+1)D-18",
    "S3D": "S3D",
    "TransNetV2": "TransNetV2",
    "ResNet18-TSN": "ResNet-18, TSN",
}
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "mnn": "MNN", "pytorch": "PyTorch"}


def main() -> None:
    """Draw the picture and write README's section anew."""
    pruned = json.loads((RESULTS / "rt3d.json").read_text())["table2"]
    runs = json.loads((RESULTS / "networks.json").read_text())["runs"]
    figure, grid = pyplot.subplots(1, len(PRUNED), figsize=(11, 3.4), sharey=True)
    for axis, (key, name) in zip(grid, PRUNED.items(), strict=True):
        draw(axis, name, pruned[key])
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)
    found = [run for run in runs if run["case"] in DENSE]
    write_section("speed", _about(pruned, found), HEAD, table(found), page=ROOT / "README.md")


HEAD = ("network", "1 thread", "2 threads", "fastest other engine")


def draw(axis: Axes, name: str, found: Mapping[str, Any]) -> None:
    """One network's milliseconds a clip: other engines in grey, ours in colour, the multiply-adds saved in words."""
    dense = found["facts"]["dense"]["macs"]
    for place, (key, _, colour) in enumerate(SHOWN):
        took = 1e3 * found["seconds"][key]
        axis.barh(place, took, color=colour)
        work = found["facts"].get(key, {}).get("macs", dense)
        less = f" ({dense / work:.1f}× fewer MACs)" if work < 0.95 * dense else ""
        axis.text(took, place, f" {took:.0f}{less}", va="center", fontsize=8)
    axis.set_yticks(range(len(SHOWN)), [label for _, label, _ in SHOWN], fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.35)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{name}, ms a clip of 16 frames", fontsize=10)


def table(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each network: our time ÷ the fastest other's within the same rounds, on one thread and on two."""
    rows = []
    for case, name in DENSE.items():
        ratios, fastest = [], []
        for threads in (1, 2):
            run = next((run for run in runs if (run["case"], run["threads"]) == (case, threads)), None)
            others = {peer: one for peer, one in (run or {"peers": {}})["peers"].items() if "ours_over_it" in one}
            others.pop("ours", None)
            if not others:
                ratios.append("–")
                continue
            best = max(others, key=lambda peer: others[peer]["ours_over_it"])
            ratios.append(f"{others[best]['ours_over_it']:.2f}")
            fastest.append(ENGINES[best])
        rows.append([name, *ratios, ", ".join(dict.fromkeys(fastest))])
    return rows


def _about(pruned: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """What the picture and the table are of: machine, day, how measured."""
    machines = {_told(pruned[key]["machine"]) for key in PRUNED}
    days = {pruned[key]["date"] for key in PRUNED} | {run["date"] for run in runs}
    if len(machines) > 1:
        raise SystemExit(f"error: the picture's networks were measured on several machines: {', '.join(machines)}")
    told = " and ".join(f"{day:%-d %B %Y}" for day in sorted(map(date.fromisoformat, days)))
    return (
        f"Every network ran on all engines in turns, float32, one clip, on an {machines.pop()}, {told}; the "
        "picture's on two threads, pruned as in [docs/rt3d.md](docs/rt3d.md#table-2-latency-against-peers). Dense "
        "against dense, our time ÷ that of the fastest of ONNX Runtime, OpenVINO and MNN:"
    )


def _told(machine: Mapping[str, Any]) -> str:
    return f"{machine['processor']} ({machine['vectors']}, {machine['cores']} virtual cores)"


if __name__ == "__main__":
    main()
