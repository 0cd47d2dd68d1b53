"""Spatial slices beside kernel groups (KGS): what they cost in accuracy, and what they bring over the dense build.

    python -m benchmarks.slices accuracy [--model c3d-mini] [--runs DIR]
    python -m benchmarks.slices speed [--network c3d] [--artifacts DIR]

Both write their table into docs/rt3d.md.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from benchmarks.rt3d import (
    ALGORITHMS,
    GROUP,
    NETWORKS,
    SUBJECTS,
    Case,
    built_as,
    keep_result,
    results,
    train_case,
    train_dense,
    write_section,
)
from dance_tvm import models
from dance_tvm.artifact.folder import load_artifact
from dance_tvm.device import open_device

SCHEMES: tuple[Literal["kgs", "slices"], ...] = ("kgs", "slices")

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command()
def accuracy(
    runs: Annotated[Path, typer.Option(help="where training runs are kept")] = Path("build/rt3d"),
    model: Annotated[str, typer.Option(help="c3d-mini, r2plus1d-mini")] = "c3d-mini",
) -> None:
    """Prune by both schemes with each of RT3D's algorithms, at the higher rate of Table 1."""
    subject = SUBJECTS[model]
    assert subject.high_rate is not None
    dense = train_dense(runs, model)["metrics"]["accuracy"]
    rows = []
    for algorithm in ALGORITHMS:
        for scheme in SCHEMES:
            card = train_case(runs, Case(model, algorithm, scheme, subject.high_rate))
            print(algorithm, scheme, card["metrics"], flush=True)
            rate, found = card["pruning"]["rate"], card["metrics"]["accuracy"]
            rows.append([model, algorithm, card["pruning"]["scheme"], f"{rate:.2f}x", f"{dense:.1%}", f"{found:.1%}"])
    about = f"{subject.data}, {subject.dense_epochs} epochs dense, then {subject.epochs} pruning and retraining."
    write_section(
        "slices accuracy", about, ["model", "algorithm", "scheme", "rate", "dense accuracy", "accuracy"], rows
    )


@app.command()
def speed(
    artifacts: Annotated[Path, typer.Option(help="where built networks are kept")] = Path("build/slices"),
    network: Annotated[list[str] | None, typer.Option(help="c3d, r2plus1d-18, s3d; default: all of them")] = None,
    runs: Annotated[int, typer.Option(min=2, help="runs of each build")] = 12,
) -> None:
    """Time the dense build and those pruned by magnitude in turns: least processor time of one thread."""
    found: dict[str, Any] = results().get("slices", {})
    for name in network or list(NETWORKS):
        found[name] = _timed(name, artifacts / name, runs)
        print(name, found[name], flush=True)
        keep_result("slices", found)
    rows = []
    for name, facts in found.items():
        dense = facts["dense"]["seconds"]
        for key, one in facts.items():
            kernels = ", ".join(f"{count} {kernel}" for kernel, count in one["kernels"].items())
            rate, faster = one["dense_macs"] / one["macs"], dense / one["seconds"]
            rows.append([name, key, f"{rate:.2f}x", f"{1e3 * one['seconds']:.0f}", f"{faster:.2f}x", kernels])
    about = (
        f"Least processor milliseconds of {runs} calls in turns, one thread; pruned by magnitude in groups of "
        f"{GROUP[0]}x{GROUP[1]}; *dense* is our fastest build of the same network."
    )
    write_section("slices speed", about, ["network", "build", "rate", "ms", "over dense", "kernels"], rows)


def _timed(name: str, folder: Path, runs: int) -> dict[str, Any]:
    """Facts and least seconds of a network's builds, which are made unless they are there."""
    inputs = models.example_inputs(name)
    facts = {key: built_as(key, name, folder / key, threads=1) for key in ("dense", *SCHEMES)}
    with open_device("local") as session:
        loaded = {key: session.load(load_artifact(folder / key)) for key in facts}
        names = [tensor.name for tensor in loaded["dense"].manifest.inputs]
        feed = {each: value.numpy() for each, value in zip(names, inputs, strict=True)}
        seconds: dict[str, list[float]] = {key: [] for key in loaded}
        for _ in range(runs):
            for key, one in loaded.items():
                started = time.process_time()
                one.run(feed)
                seconds[key].append(time.process_time() - started)
    return {key: {**facts[key], "seconds": float(np.min(seconds[key]))} for key in facts}


if __name__ == "__main__":
    app()
