"""How many vectors of channels a pool should reduce at once.

    python -m benchmarks.pools [--threads 1]

Pools of C3D and S3D and one over whole clips, each with every count of its tuning space, in turns. Figures are times
over that of one vector.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import typer

from dance_tvm.lowering.machine import machine_of
from dance_tvm.lowering.registry import kernel_of
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.pool_space import PoolSpace
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.workload import POOL, Workload
from dance_tvm.tuning.farm import Farm
from dance_tvm.tuning.instances import Instance, build_instance, interleaved
from dance_tvm.tuning.trials import open_trial

POOLS = {
    "C3D pool1": (64, Window(1, (16, 112, 112), (16, 56, 56), (1, 2, 2), (1, 2, 2))),
    "C3D pool2": (128, Window(1, (16, 56, 56), (8, 28, 28), (2, 2, 2), (2, 2, 2))),
    "C3D pool3": (256, Window(1, (8, 28, 28), (4, 14, 14), (2, 2, 2), (2, 2, 2))),
    "C3D pool4": (512, Window(1, (4, 14, 14), (2, 7, 7), (2, 2, 2), (2, 2, 2))),
    "S3D 3x3x3, stride 1": (480, Window(1, (8, 14, 14), (8, 14, 14), (3, 3, 3), padding=(1, 1, 1))),
    "whole clip": (512, Window(1, (4, 7, 7), (1, 1, 1), (4, 7, 7))),
}


def main(threads: int = 1, rounds: int = 25) -> None:
    """Print a row a pool."""
    target = load_target("host")
    with tempfile.TemporaryDirectory() as folder, Farm(["local"], trial_timeout=60) as farm:
        for name, (channels, window) in POOLS.items():
            work = Workload(window, channels, channels, channels, threads=threads, family=POOL, pooling="max")
            kernel = kernel_of(work, machine_of(target))
            counts = PoolSpace(machine_of(target), work).parts()[0]["vectors"]
            instances = [Instance(work, kernel.sized({"vectors": count})) for count in counts]
            paths = [Path(folder) / f"{name.replace(' ', '-')}-{count}.so" for count in counts]
            for instance, path in zip(instances, paths, strict=True):
                build_instance(instance, target, path)
            with farm.session(threads) as session:
                loaded = [open_trial(session, each, path, "llvm") for each, path in zip(instances, paths, strict=True)]
                times = [statistics.median(measured) for measured in interleaved(loaded, rounds)]
            shown = ", ".join(f"{count}: {time / times[0]:.2f}" for count, time in zip(counts, times, strict=True))
            print(f"{name}: one vector {1e3 * times[0]:.3f} ms; {shown}", flush=True)


if __name__ == "__main__":
    typer.run(main)
