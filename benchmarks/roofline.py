"""How near each layer comes to the machine's multiply-add rate, on the multiply-adds really executed.

Taps that fall on padding are not executed and do not count. The peak is measured beside every layer in the same
process, so a slow moment of the machine slows both.

    python -m benchmarks.roofline --threads 2 --json docs/benchmarks/roofline.json
    python -m benchmarks.roofline --network x3d.pt2 --threads 1 [--logs FOLDER] [--layers depthwise3d]

The second form takes the distinct layers of a network against the longest of three bounds (``bounds.py``), by default
tiles and by those of tuning logs: least times of all rounds, of layer and bounds alike.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.host import _cpuinfo
from dance_tvm.machines.target import Target, load_target
from dance_tvm.records.advice import tuned_tiles
from dance_tvm.schedules.cpu.choice import kernel_of, settled
from dance_tvm.schedules.kernel import Kernel, Weights
from dance_tvm.schedules.workload import Workload
from dance_tvm.tuning.workloads import layers_of

from .bounds import Bounds, Loads, least
from .kernels import C3D, R2PLUS1D, Layer, Peak, Runner, Timed, calls_of, tensor

#: Steps of the multiply-add peak beside a network's layers: short, so that other work disturbs few of them.
PEAK_STEPS = 4000


def main(
    threads: Annotated[int, typer.Option(help="threads of both the layers and the peak")] = 2,
    rounds: Annotated[int, typer.Option(help="times that layer and peak take turns")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="C3D's middle layers alone")] = False,
    network: Annotated[str, typer.Option(help="the layers of this network, against their bounds")] = "",
    logs: Annotated[
        Path | None, typer.Option(help="folder of tuning logs, whose tiles run beside the defaults")
    ] = None,
    families: Annotated[str, typer.Option("--layers", help="of the network, those of this kernel family")] = "",
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print share of peak by layer."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    if network:
        found = [*of_network(network, families, threads, rounds, logs)]
        if out is not None:
            _write(out, threads, rounds, found)
        return
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
        _write(out, threads, rounds, rows)


def _write(out: Path, threads: int, rounds: int, rows: list[dict]) -> None:
    facts = {"machine": _cpuinfo("model name"), "system": platform.platform(), "threads": threads, "rounds": rounds}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**facts, "layers": rows}, indent=1) + "\n", encoding="utf-8")


def of_network(network: str, family: str, threads: int, rounds: int, logs: Path | None) -> Iterator[dict]:
    """The distinct layers of a network, each beside its bounds; prints each when it is measured, then the whole."""
    target = load_target("host")
    machine = machine_of(target)
    peak, loads = Peak(target, threads, PEAK_STEPS), Loads(target, threads)
    log = tuned_tiles(target, logs) if logs is not None else None
    whole = {"bound": 0.0, "default": 0.0, "tuned": 0.0}
    for layer in layers_of(network, target, threads=threads):
        workload = layer.workload
        if family and workload.family != family:
            continue
        bounds = Bounds(workload, machine, target, peak, loads)
        kernels = {"default": settled(kernel_of(workload, machine), machine, workload, None)}
        if log is not None:
            kernels["tuned"] = settled(kernel_of(workload, machine), machine, workload, log)
        distinct = {choice.kernel: prepared(choice.kernel, workload, target) for choice in kernels.values()}
        timed = {name: distinct[choice.kernel] for name, choice in kernels.items()}
        seconds = dict.fromkeys(timed, math.inf)
        for _ in range(rounds):
            for each in distinct.values():
                took = least(each.library, each.name, each.args)
                seconds.update({name: min(seconds[name], took) for name, other in timed.items() if other is each})
            bounds.measure()
        kind, bound = bounds.longest
        for name, value in {"bound": bound, "tuned": seconds["default"], **seconds}.items():
            whole[name] += layer.count * value
        tile = "" if log is None else f", tuned {1e6 * seconds['tuned']:.1f} ({bound / seconds['tuned']:.2f})"
        share = f"{1e6 * seconds['default']:.1f} us ({bound / seconds['default']:.2f} of its {kind}{tile})"
        print(f"{layer.count} x {layer.title} {_sizes(workload)}: {share}, {timed['default'].name}", flush=True)
        names = {name: choice.kernel.name for name, choice in kernels.items()}
        yield {
            "layer": layer.title,
            "count": layer.count,
            "bounds": bounds.seconds,
            "seconds": seconds,
            "kernels": names,
            "sizes": _sizes(workload),
        }
    shares = [f"{name} {1e3 * value:.3f} ms ({whole['bound'] / value:.2f})" for name, value in whole.items()]
    print(f"all, each as often as it runs: {', '.join(shares)}")


def _sizes(workload: Workload) -> str:
    window = workload.window
    shape, kernel, stride = ("x".join(map(str, part)) for part in (window.size, window.kernel, window.stride))
    channels = f"{workload.channels_in} to {workload.channels_out}"
    return f"{channels} over {shape}, {kernel} of stride {stride}, {workload.activation or 'no activation'}"


def prepared(kernel: Kernel, workload: Workload, target: Target) -> Timed:
    """A kernel with random input and weights, and its lists planned."""
    rng, window = np.random.default_rng(0), workload.window
    x = rng.standard_normal((window.batch, *window.size, workload.channels_in), dtype="float32")
    weight = rng.standard_normal((workload.channels_out, workload.depth, *window.kernel), dtype="float32") * 0.01
    weights = Weights(weight, np.zeros(workload.channels_out, "float32"))
    tvm_target = target.tvm_target(workload.threads)
    *planners, (_, args) = calls_of(kernel, tensor, x, weights, {})
    for planner, named in planners:
        Timed(planner, tvm_target, named)()
    return Timed(kernel, tvm_target, args)


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
