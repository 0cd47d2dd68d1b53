"""Compile one exported network, run it, and print what came of it as one line of JSON.

    python -m benchmarks.published.attempt FOLDER pt2|onnx [--import-only]

A process of its own: its peak memory is the build's.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conformance.pool import ended
from dance_tvm import build_network, import_model, open_device
from dance_tvm.compiler.build import Built
from dance_tvm.core.agreement import difference


def attempt(folder: Path, source: str, build: bool) -> dict[str, Any]:
    """Import, build, run and compare; how it ended is among the facts, as ``pool.ended`` tells it."""
    facts: dict[str, Any] = {}
    since, before = time.monotonic(), sum(_processor_seconds())

    def work() -> None:
        imported = import_model(folder / f"network.{source}")
        facts["import_s"] = round(time.monotonic() - since, 1)
        if not build:
            return
        with tempfile.TemporaryDirectory() as made:
            compared(build_network(imported, Path(made) / "artifact", target="host", threads=1))

    def compared(built: Built) -> None:
        facts["build_s"] = round(time.monotonic() - since, 1)
        facts["cpu_s"] = round(sum(_processor_seconds()) - before, 1)
        facts["phases_s"] = {phase: round(seconds, 1) for phase, seconds in built.seconds.items() if seconds >= 0.1}
        facts["artifact_mb"] = round(sum(file.stat().st_size for file in built.artifact.path.iterdir()) / 1e6, 1)
        facts["error"] = _error(folder, built)
        assert facts["error"] <= 1e-4, f"off by {facts['error']:.1e} of the largest output"

    facts["status"], facts["message"] = ended(work)
    facts.setdefault("import_s", round(time.monotonic() - since, 1))
    facts["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return facts


def _processor_seconds() -> Iterator[float]:
    """Of this process and those that it started, which a busy machine changes little."""
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        yield used.ru_utime + used.ru_stime


def _error(folder: Path, built: Built) -> float:
    with np.load(folder / "answers.npz") as stored:
        arrays = dict(stored)
    inputs = [arrays[f"input_{at}"] for at in range(len(arrays)) if f"input_{at}" in arrays]
    wanted = [arrays[f"output_{at}"] for at in range(len(arrays)) if f"output_{at}" in arrays]
    names = [spec.name for spec in built.artifact.manifest.inputs]
    with open_device("local") as device:
        found = device.load(built.artifact).run(dict(zip(names, inputs, strict=True)))
    return max(difference(a, b) for a, b in zip(found.values(), wanted, strict=True))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(attempt(Path(sys.argv[1]), sys.argv[2], "--import-only" not in sys.argv)))
