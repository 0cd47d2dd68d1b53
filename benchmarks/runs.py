"""What a measurement of several engines leaves: the machine it was taken on, a table, a file of JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    def found(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    said = Path("/proc/cpuinfo").read_text()
    names = [line for line in said.splitlines() if line.startswith("model name")]
    packages = ("apache-tvm", "torch", "onnxruntime", "openvino", "MNN")
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "vectors": "AVX-512" if "avx512f" in said else "AVX2" if "avx2" in said else "",
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {package: found(package) for package in packages},
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Medians in ms with their intervals, least processor time, errors: one line for each case and engine."""
    lines = []
    for run in runs:
        lines.append(f"{run['case']}, {run['threads']} threads, {run['gmacs']:.2f} GMAC")
        timed = [result["ms"] for result in run["peers"].values() if "ms" in result]
        for peer, result in run["peers"].items():
            if "ms" not in result:
                lines.append(f"    {peer:<12} {result['failed']}")
                continue
            low, high = result["interval_ms"]
            spread = f"{result['ms']:9.2f} ms ({low:.2f} to {high:.2f})  processor {result['least_processor_ms']:8.2f}"
            speed = f"{result['gmacs_per_s']:6.1f} GMAC/s  {result['ms'] / min(timed):5.2f} x fastest"
            against = ""
            if "ours_over_it" in result:
                least = result["least_processor_ratio"]
                against = f"  ours takes {result['ours_over_it']:.2f} of it, of processor time {least:.2f}"
            lines.append(f"    {peer:<12} {spread}  {speed}  error {result['error']:.1e}{against}")
    return "\n".join(lines)


def _key(run: dict[str, Any]) -> tuple[str, int, str]:
    return run["case"], run["threads"], run["machine"]["processor"]


def write_runs(runs: list[dict[str, Any]], path: Path) -> None:
    """Write what has been measured so far, with today's date and the machine; other cases that the file holds are kept,
    and those of other processors."""
    today, here = datetime.now(timezone.utc).date().isoformat(), machine()
    runs = [{"date": today, "machine": here, **run} for run in runs]
    held = json.loads(path.read_text()) if path.exists() else {"runs": []}
    before = [{"machine": held["machine"], **run} for run in held["runs"]]
    done = {_key(run) for run in runs}
    every = [run for run in before if _key(run) not in done] + runs
    result = {"machine": here, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "runs": every}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, path)
