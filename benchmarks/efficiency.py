"""Saved work turned into saved time: speed-up over our own dense kernel ÷ reduction of multiply-adds, by axis.

Dense and thinned kernels take turns in one process. A position mask comes scattered or in 8×8 tiles; channels come
singly or in groups of the vector width. Planning the lists is part of the thinned time.

    python -m benchmarks.efficiency --threads 2 --json docs/benchmarks/efficiency.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.machines.host import _cpuinfo
from dance_tvm.machines.target import Target, load_target

from .kernels import C3D, Layer, Masks, Runner

DENSITIES = (1.0, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1)


def keep(rng: np.random.Generator, count: int, density: float, group: int = 1) -> np.ndarray:
    """A mask that keeps that share of ``count`` items (at least one), in runs of ``group``."""
    groups = -(-count // group)
    mask = np.zeros(groups, bool)
    mask[rng.permutation(groups)[: max(1, round(groups * density))]] = True
    return np.repeat(mask, group)[:count]


def axes(target: Target) -> dict[str, Callable[[Layer, float, np.random.Generator], Masks]]:
    """How each axis is thinned; "all" thins frames, positions and both channels to the same density each."""
    lanes = 2 * target.vector.floats

    def frames(layer: Layer, density: float, rng: np.random.Generator) -> Masks:
        return Masks(out_frames=keep(rng, layer.window.out[0], density))

    def scattered(layer: Layer, density: float, rng: np.random.Generator) -> Masks:
        _, height, width = layer.window.out
        return Masks(positions=keep(rng, height * width, density).reshape(1, height, width))

    def tiles(layer: Layer, density: float, rng: np.random.Generator) -> Masks:
        _, height, width = layer.window.out
        rows, columns = -(-height // 8), -(-width // 8)
        grid = keep(rng, rows * columns, density).reshape(rows, columns)
        return Masks(positions=grid.repeat(8, 0).repeat(8, 1)[None, :height, :width])

    def read(group: int) -> Callable[[Layer, float, np.random.Generator], Masks]:
        return lambda layer, density, rng: Masks(live_in=keep(rng, layer.channels_in, density, group))

    def written(group: int) -> Callable[[Layer, float, np.random.Generator], Masks]:
        return lambda layer, density, rng: Masks(live_out=keep(rng, layer.channels_out, density, group))

    def everything(layer: Layer, density: float, rng: np.random.Generator) -> Masks:
        each = density ** (1 / 3) if density < 1 else 1.0
        spatial = scattered(layer, each, rng)
        return Masks(
            positions=spatial.positions,
            live_in=keep(rng, layer.channels_in, each, target.vector.floats),
            live_out=keep(rng, layer.channels_out, each, lanes),
        )

    return {
        "frames": frames,
        "positions, scattered": scattered,
        "positions, 8x8 tiles": tiles,
        "input channels, single": read(1),
        "input channels, groups": read(target.vector.floats),
        "output channels, single": written(1),
        "output channels, groups": written(lanes),
        "positions and channels": everything,
    }


def main(
    threads: Annotated[int, typer.Option(help="threads of both sides")] = 2,
    rounds: Annotated[int, typer.Option(help="times that dense and thinned take turns")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="one layer, two densities")] = False,
    only: Annotated[str, typer.Option(help="comma-separated names of C3D's layers")] = "",
    density: Annotated[list[float] | None, typer.Option(help="shares kept; default: seven from 1 to 0.1")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print speed-up ÷ reduction by layer, axis and density."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    target = load_target("host")
    wanted = "conv3b" if quick else only
    layers = [layer for layer in C3D[1:6] if not wanted or layer.name in wanted.split(",")]
    densities = tuple(density or ((1.0, 0.5) if quick else DENSITIES))
    rows = []
    for layer in layers:
        print(f"{layer.name}: preparing", file=sys.stderr, flush=True)
        dense = Runner(layer, target, threads)
        points = [(axis, density) for axis in axes(target) for density in densities]
        thinned = [
            Runner(layer, target, threads, axes(target)[axis](layer, density, np.random.default_rng(0)))
            for axis, density in points
        ]
        print(f"{layer.name}: measuring", file=sys.stderr, flush=True)
        for (axis, density), runner in zip(points, thinned, strict=True):
            rows.append({"layer": layer.name, "axis": axis, "density": density, **measure(dense, runner, rounds)})
    table = Table("layer", "axis", *(f"{density:g}" for density in densities))
    for layer, axis in product([layer.name for layer in layers], axes(target)):
        cells = [row for row in rows if (row["layer"], row["axis"]) == (layer, axis)]
        table.add_row(layer, axis, *(f"{row['efficiency']:.3f}" for row in cells))
    Console().print(table)
    if out is not None:
        facts = {"machine": _cpuinfo("model name"), "system": platform.platform(), "threads": threads, "rounds": rounds}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def measure(dense: Runner, thinned: Runner, rounds: int) -> dict[str, float]:
    """Dense and thinned in turns."""
    dense.seconds(1), thinned.seconds(1)
    ratios = [dense.seconds(1) / (thinned.seconds(1) + thinned.plan_seconds()) for _ in range(rounds)]
    reduction = dense.macs / max(1, thinned.macs)
    return {
        "reduction": reduction,
        "speedup": median(ratios),
        "efficiency": median(ratios) / reduction,
        "planning_share_of_dense": thinned.plan_seconds() / dense.seconds(1),
    }


if __name__ == "__main__":
    typer.run(main)
