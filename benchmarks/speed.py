"""README's picture and table of speed: dense and pruned networks in turns with other engines, on one machine.

    python -m benchmarks.rt3d build --only dense,kgs,filter     what is measured
    python -m benchmarks.speed measure                          the picture's networks
    python -m benchmarks.networks --only "C3D|R2plus1D-18|S3D|TransNetV2|ResNet18-TSN"      the table's
    python -m benchmarks.speed draw                             docs/images/speed.png and README's section

Needs matplotlib (``pip install 'dance-tvm[report]'``) and the engines that `benchmarks.engines` names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from .runs import machine

app = typer.Typer(add_completion=False, rich_markup_mode=None)
ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "speed.json"
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


HEAD = ("network", "1 thread", "2 threads", "fastest other engine")


@app.command("measure")
def measure_command(
    artifacts: Annotated[Path, typer.Option(help="where `benchmarks.rt3d build` left them")] = Path(
        "build/rt3d/artifacts"
    ),
    network: Annotated[list[str] | None, typer.Option(help=", ".join(PRUNED))] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    runs: Annotated[int, typer.Option(min=2, help="turns of each, at least")] = 10,
) -> None:
    """Time the picture's networks, dense and pruned, in turns with their dense peers."""
    from dance_tvm import models
    from dance_tvm.artifact.folder import load_artifact

    from .engines import Case
    from .rt3d import latencies

    found = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    for name in network or list(PRUNED):
        base = artifacts / f"{name}-{threads}"
        built = {key: load_artifact(base / key) for key in ("dense", "kgs", "filter")}
        facts = {key: json.loads((base / key / "pruned.json").read_text()) for key in built}
        case, peers = Case(name, 0, artifacts / "peers" / name), [key for key in ENGINES if key not in built]
        seconds = latencies(built, models.example_inputs(name), case, peers, threads, runs)
        today = datetime.now(timezone.utc).date().isoformat()
        found[name] = {"threads": threads, "seconds": seconds, "facts": facts, "machine": machine(), "date": today}
        MEASURED.write_text(json.dumps(found, indent=1) + "\n")
        print(name, {key: round(1e3 * took, 1) for key, took in seconds.items()}, flush=True)


@app.command()
def draw() -> None:
    """Draw the picture and write README's section anew."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from .rt3d import write_section

    pruned = json.loads(MEASURED.read_text())
    runs = json.loads((RESULTS / "networks.json").read_text())["runs"]
    figure, grid = pyplot.subplots(1, len(PRUNED), figsize=(11, 3.4), sharey=True)
    for axis, (key, name) in zip(grid, PRUNED.items(), strict=True):
        bars(axis, name, pruned[key])
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)
    found = [run for run in runs if run["case"] in DENSE]
    write_section("speed", _about(pruned, found), HEAD, table(found), page=ROOT / "README.md")


def bars(axis: Any, name: str, found: Mapping[str, Any]) -> None:
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
    app()
