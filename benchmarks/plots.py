"""Pictures of the figures that docs/benchmarks keeps as JSON.

    python -m benchmarks.plots

Peers: how many times our time each engine takes, whole networks and layers. Efficiency: speed-up ÷ reduction of
multiply-adds by density of the axis, layer by layer. README's picture is ``benchmarks.speed``'s. Needs matplotlib
(``pip install 'dance-tvm[report]'``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from .engines import PEERS

DOCS = Path(__file__).parent.parent / "docs"
FIGURES, PICTURES = DOCS / "benchmarks", DOCS / "images"


def main() -> None:
    """Draw every picture anew."""
    networks, layers = (_figures(name)["runs"] for name in ("peers", "peers-layers"))
    figure, axes = pyplot.subplots(3, 1, figsize=(11, 12))
    peers(axes[0], networks, "whole networks")
    peers(axes[1], [run for run in layers if run["case"].startswith("c3d/")], "C3D's convolutions singly")
    many = [run for run in layers if run["case"].startswith("r2plus1d-18/") and run["threads"] == 2]
    peers(axes[2], many, "R(2+1)D-18's convolutions singly, 2 threads")
    axes[2].tick_params(axis="x", rotation=90)
    _save(figure, "benchmarks-peers.png")

    rows = _figures("efficiency")["rows"]
    rows = [row for row in rows if row["layer"] in _many_densities(rows)]
    names = sorted({row["layer"] for row in rows})
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.5 * len(names), 4.5), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        efficiency(axis, [row for row in rows if row["layer"] == name], name)
    axes[0][-1].legend(fontsize="small", loc="lower right")
    _save(figure, "benchmarks-efficiency.png")


def peers(axis: Axes, runs: Sequence[dict[str, Any]], title: str) -> None:
    """Bars of each engine's time over ours, 1 and 2 threads beside one another; engines that did not run have none."""
    runs = sorted(runs, key=lambda run: (run["case"], run["threads"]))
    there = {name for run in runs for name, result in run["peers"].items() if "ours_over_it" in result}
    shown = [name for name in PEERS if name in there - {"ours"}]
    width = 0.8 / len(shown)
    for place, name in enumerate(shown):
        ratios = [1 / run["peers"].get(name, {}).get("ours_over_it", float("inf")) for run in runs]
        axis.bar([at + place * width for at in range(len(runs))], ratios, width, label=name)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks([at + 0.4 for at in range(len(runs))])
    axis.set_xticklabels([f"{run['case'].split('/')[-1]}\n{run['threads']} thr" for run in runs], fontsize="small")
    axis.set_ylabel("times our time")
    axis.set_title(f"{title}, fp32, batch 1")
    axis.margins(y=0.2)
    axis.legend(fontsize="small", ncols=len(shown), loc="upper left")


def efficiency(axis: Axes, rows: Sequence[dict[str, Any]], name: str) -> None:
    """A line for each masked axis of one layer, over the density."""
    for masked in dict.fromkeys(row["axis"] for row in rows):
        points = sorted((row["density"], row["efficiency"]) for row in rows if row["axis"] == masked)
        axis.plot(*zip(*points, strict=True), marker="o", label=masked)
    axis.axhline(0.9, color="black", linewidth=1, linestyle="--")
    axis.set(xlabel="density of the axis", ylabel="speed-up ÷ reduction", title=name, ylim=(0, 1.3))


def _figures(name: str) -> dict[str, Any]:
    return json.loads((FIGURES / f"{name}.json").read_text())


def _many_densities(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Layers that were measured at enough densities for a line."""
    return {row["layer"] for row in rows if row["density"] not in (0.5, 1.0)}


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(PICTURES / name, dpi=100)
    print(f"wrote {PICTURES / name}")


if __name__ == "__main__":
    main()
