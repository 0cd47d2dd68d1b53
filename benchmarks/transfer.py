"""How good layers are without a trial of their own, by the records of similar ones.

    python -m benchmarks.transfer [--logs FOLDER]

Each layer with a verified record is measured in turns with the default tile, with the tile of the most similar other
layer, and with its own. Figures are times over the default's.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dance_tvm.lowering.machine import machine_of
from dance_tvm.lowering.registry import kernel_of
from dance_tvm.machines.target import load_target
from dance_tvm.records.advice import tuned_tiles
from dance_tvm.tuning.farm import Farm
from dance_tvm.tuning.instances import Instance, build_instance, interleaved
from dance_tvm.tuning.trials import open_trial


def main(
    logs: Annotated[Path | None, typer.Option(help="Folder of the logs.")] = None,
    within: Annotated[float, typer.Option(help="How unlike the other layer may be; builds go to 1.")] = 3.0,
    rounds: int = 9,
) -> None:
    """Print a row a layer, then the geometric means."""
    target = load_target("host")
    machine, tiles = machine_of(target), tuned_tiles(target, logs)
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, Farm(["local"], trial_timeout=60) as farm:
        for workload, record in tiles.records:
            kernel = kernel_of(workload, machine)
            space = kernel.space(machine, workload)
            assert space is not None
            near = [item for item in tiles.ranked(workload) if item[1].identity != workload.identity]
            if not near or near[0][0] > within:
                continue
            choices = [space.default(), space.normal(near[0][2].decisions), record.decisions]
            if choices[0] == choices[1] == choices[2]:
                found.append((1.0, 1.0))
                continue
            instances = [Instance(workload, kernel.sized(decisions)) for decisions in choices]
            paths = [Path(folder) / f"{workload.identity}-{number}.so" for number in range(3)]
            for instance, path in zip(instances, paths, strict=True):
                build_instance(instance, target, path)
            with farm.session(workload.threads) as session:
                loaded = [open_trial(session, each, path, "llvm") for each, path in zip(instances, paths, strict=True)]
                default, transferred, own = (statistics.median(times) for times in interleaved(loaded, rounds))
            found.append((transferred / default, own / default))
            kernel = "x".join(map(str, workload.window.kernel))
            about = f"{workload.family} {workload.channels_in}>{workload.channels_out} {kernel}"
            print(
                f"{about}: {found[-1][0]:.3f} by a layer {near[0][0]:.1f} away, {found[-1][1]:.3f} by its own",
                flush=True,
            )
    means = [statistics.geometric_mean(column) for column in zip(*found, strict=True)]
    print(f"{len(found)} layers with a similar one: {means[0]:.3f} without trials, {means[1]:.3f} tuned")


if __name__ == "__main__":
    typer.run(main)
