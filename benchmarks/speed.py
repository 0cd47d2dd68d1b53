"""README's picture and table of speed: dense and pruned networks in turns with other engines, on one machine.

    python -m benchmarks.rt3d build --only dense,kgs,slices,filter     what is measured
    python -m benchmarks.speed measure                                 benchmarks/results/speed.json
    python -m benchmarks.speed draw                                    docs/images/speed.png and README's section

Needs matplotlib (``pip install 'dance-tvm[report]'``) and the engines that `benchmarks.engines` names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    ("slices", "dance_tvm, slices pruned", "#cc79a7"),
    ("filter", "dance_tvm, whole filters pruned", "#e69f00"),
)
NAMES = {"c3d": "C3D", "r2plus1d-18": "R(2+1)D-18", "s3d": "S3D"}
ENGINES = ("pytorch", "onnxruntime", "openvino", "mnn")
OURS = ("dense", "kgs", "slices", "filter")


HEAD = (
    "network", "fastest other engine", "dense here", "kernel groups pruned", "slices pruned", "filters pruned",
    "of the dense MACs",
)  # fmt: skip


@app.command("measure")
def measure_command(
    artifacts: Annotated[Path, typer.Option(help="where `benchmarks.rt3d build` left them")] = Path(
        "build/rt3d/artifacts"
    ),
    network: Annotated[list[str] | None, typer.Option(help=", ".join(NAMES))] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    runs: Annotated[int, typer.Option(min=2, help="turns of each, at least")] = 10,
) -> None:
    """Time the picture's networks, dense and pruned, in turns with their dense peers."""
    from dance_tvm import models
    from dance_tvm.artifact.folder import load_artifact

    from .engines import Case
    from .rt3d import latencies

    found = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    for name in network or list(NAMES):
        base = artifacts / f"{name}-{threads}"
        built = {key: load_artifact(base / key) for key in OURS if (base / key / "pruned.json").exists()}
        facts = {key: json.loads((base / key / "pruned.json").read_text()) for key in built}
        case = Case(name, 0, artifacts / "peers" / name)
        seconds = latencies(built, models.example_inputs(name), case, ENGINES, threads, runs)
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

    measured = json.loads(MEASURED.read_text())
    # One below the other, narrow: the words are still read where a phone shows it 360 pixels wide.
    figure, grid = pyplot.subplots(len(measured), 1, figsize=(6, 2.6 * len(measured)), squeeze=False)
    for axis, (key, found) in zip(grid[:, 0], measured.items(), strict=True):
        bars(axis, NAMES[key], found)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)
    write_section("speed", _about(measured), HEAD, table(measured), page=ROOT / "README.md")


def bars(axis: Any, name: str, found: Mapping[str, Any]) -> None:
    """One network's milliseconds a clip: other engines in grey, ours in colour, the multiply-adds saved in words."""
    dense = found["facts"]["dense"]["macs"]
    for place, (key, _, colour) in enumerate(SHOWN):
        if key not in found["seconds"]:
            continue
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


def table(measured: Mapping[str, Any]) -> list[list[str]]:
    """A row for each network: our times, dense and pruned, as shares of the fastest other engine's."""
    rows = []
    for key, found in measured.items():
        seconds, facts = found["seconds"], found["facts"]
        fastest = min((peer for peer in ENGINES if peer in seconds), key=lambda peer: seconds[peer])
        label = next(label for peer, label, _ in SHOWN if peer == fastest)
        shares = [f"{seconds[ours] / seconds[fastest]:.2f}" if ours in seconds else "–" for ours in OURS]
        rows.append([NAMES[key], label, *shares, f"{facts['kgs']['macs'] / facts['kgs']['dense_macs']:.2f}"])
    return rows


def _about(measured: Mapping[str, Any]) -> str:
    """What the picture and the table are of: machine, day, how measured."""
    machines = {_told(found["machine"]) for found in measured.values()}
    if len(machines) > 1:
        raise SystemExit(f"error: the networks were measured on several machines: {', '.join(machines)}")
    days = sorted({date.fromisoformat(found["date"]) for found in measured.values()})
    threads = " and ".join(sorted({str(found["threads"]) for found in measured.values()}))
    return (
        f"Every network ran on all engines in turns, {threads} threads, float32, one clip, "
        f"{' and '.join(f'{day.day} {day:%B %Y}' for day in days)}, on an {machines.pop()}. Networks were pruned "
        "by magnitude to the rates of RT3D's paper: time depends on the rates alone (for the accuracy of trained "
        "ones see [docs/rt3d.md](docs/rt3d.md)). As shares of the fastest other engine's time:"
    )


def _told(machine: Mapping[str, Any]) -> str:
    return f"{machine['processor']} ({machine['vectors']}, {machine['cores']} virtual cores)"


if __name__ == "__main__":
    app()
