"""How near each layer comes to the machine's multiply-add rate, on the multiply-adds really executed.

Taps that fall on padding are not executed and do not count. The peak is measured beside every layer in the same
process, so a slow moment of the machine slows both.

    python -m benchmarks.roofline --threads 2 --json docs/benchmarks/roofline.json
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.machines.host import _cpuinfo
from dance_tvm.machines.target import load_target

from .kernels import C3D, R2PLUS1D, Layer, Peak, Runner


def main(
    threads: Annotated[int, typer.Option(help="threads of both the layers and the peak")] = 2,
    rounds: Annotated[int, typer.Option(help="times that layer and peak take turns")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="C3D's middle layers alone")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print share of peak by layer."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    layers = C3D[1:5] if quick else [*C3D, *R2PLUS1D]
    target = load_target("host")
    peak = Peak(target, threads)
    rows = [measure(layer, Runner(layer, target, threads), peak, rounds) for layer in layers]
    table = Table("layer", "kernel", "ms", "GFLOP/s executed", "share of peak", "spread", "planning ms")
    for row in rows:
        low, high = row["spread"]
        numbers = [f"{row['milliseconds']:.2f}", f"{row['gflops']:.1f}", f"{row['share']:.3f}"]
        table.add_row(row["layer"], row["kernel"], *numbers, f"{low:.3f}-{high:.3f}", f"{row['planning']:.3f}")
    Console().print(table)
    if out is not None:
        facts = {"machine": _cpuinfo("model name"), "system": platform.platform(), "threads": threads, "rounds": rounds}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**facts, "layers": rows}, indent=1) + "\n", encoding="utf-8")


def measure(layer: Layer, runner: Runner, peak: Peak, rounds: int) -> dict:
    """Layer and peak in turns; the share of each round is against the mean of the peaks around it."""
    runner.seconds(1)
    shares, seconds = [], []
    before = peak.gflops()
    for _ in range(rounds):
        took = runner.seconds(1)
        after = peak.gflops()
        seconds.append(took)
        shares.append(2e-9 * runner.macs / took / ((before + after) / 2))
        before = after
    return {
        "layer": layer.name,
        "kernel": runner.conv.name,
        "milliseconds": median(seconds) * 1e3,
        "gflops": 2e-9 * runner.macs / median(seconds),
        "share": median(shares),
        "spread": [min(shares), max(shares)],
        "planning": runner.plan_seconds() * 1e3,
    }


if __name__ == "__main__":
    typer.run(main)
