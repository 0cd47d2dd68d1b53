"""What bench itself adds to a network's time on this machine.

    python -m benchmarks.overhead ARTIFACT [ARTIFACT ...]

Bursts as ``dance-tvm bench`` times them take turns with bare calls under one clock. Printed
are the median of the reported times over the bare ones, and how much longer the measuring took than what it reports.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dance_tvm.artifact.folder import load_artifact
from dance_tvm.benchmarking.measure import Contender
from dance_tvm.benchmarking.statistics import paired_ratio
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import open_device

ROUNDS = 60


def overhead(path: Path, rounds: int = ROUNDS) -> tuple[tuple[float, float, float], float]:
    """Reported over bare time (median, low and high of its 95% interval), and measuring over reported time."""
    artifact = load_artifact(path)
    with open_device("local") as session:
        session.pin(None, artifact.manifest.target.threads)
        network = session.load(artifact)
        contender = Contender(network, random_inputs(artifact.manifest.inputs))
        contender.warm_up()
        reported: list[float] = []
        bare: list[float] = []
        whole = 0.0

        def bench() -> None:
            nonlocal whole
            begin = time.perf_counter()
            seconds = network.time(contender.inputs, contender.burst)
            whole += time.perf_counter() - begin
            contender.seconds += seconds
            reported.append(float(np.median(seconds)))

        def call() -> None:
            begin = time.perf_counter()
            for _ in range(contender.burst):
                network.run(contender.inputs)
            bare.append((time.perf_counter() - begin) / contender.burst)

        shuffle = random.Random(0)
        for _ in range(rounds):
            turns = [bench, call]
            shuffle.shuffle(turns)
            for turn in turns:
                turn()
    return paired_ratio(reported, bare), whole / sum(contender.seconds)


def main(artifacts: Annotated[list[Path], typer.Argument()], rounds: int = ROUNDS) -> None:
    """Print both ratios for each artifact."""
    for path in artifacts:
        (ratio, low, high), whole = overhead(path, rounds)
        print(f"{path}: reported / bare {ratio:.4f} (95% in {low:.4f} to {high:.4f}), measuring / reported {whole:.4f}")


if __name__ == "__main__":
    typer.run(main)
