"""How long a build takes, phase by phase, and how much memory: each build in a process of its own.

Each is made twice, with different seeds for Python's hashes: the artifacts must be the same to the byte.

python -m benchmarks.build --json docs/benchmarks/build.json
python -m benchmarks.build c3d:host transnetv2:host transnetv2:snapdragon
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.core.hashing import file_sha256
from dance_tvm.machines.host import _cpuinfo

SECONDS, GIBIBYTES = 60, 4  # what the largest network of the zoo may take for a phone
TIMEOUT_S = 900
SEEDS = (1, 2)
_SAMPLE_S = 0.05


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="MODEL:TARGET", show_default="c3d:snapdragon")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print seconds by phase and the largest memory of each build.

    Exit code 1 where C3D for a phone misses its bar, or where two builds of one network differ.
    """
    chosen = cases or ["c3d:snapdragon"]
    rows = [measure(*case.split(":"), seed) for case in chosen for seed in SEEDS]
    phases = list(dict.fromkeys(phase for row in rows for phase in row["phases"]))
    table = Table("phase", *(row["case"].replace(":", "\nfor ") for row in rows))
    for phase in phases:
        table.add_row(phase, *(f"{row['phases'].get(phase, 0):.2f} s" for row in rows))
    table.add_row("whole command", *(f"{row['seconds']:.1f} s" for row in rows), style="bold")
    table.add_row("memory of all its processes", *(f"{row['memory_gib']:.2f} GiB" for row in rows), style="bold")
    table.add_row("artifact, SHA-256 of its manifest", *(row["files"][:12] for row in rows))
    Console().print(table)
    if out is not None:
        facts = {"machine": _cpuinfo("model name"), "system": platform.platform(), "cores": psutil.cpu_count()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**facts, "builds": rows}, indent=1) + "\n", encoding="utf-8")
    differ = {case for case in chosen if len({row["files"] for row in rows if row["case"] == case}) > 1}
    if differ:
        print(f"two builds of one network differ: {', '.join(sorted(differ))}", file=sys.stderr)
        raise typer.Exit(1)
    judged = [row for row in rows if row["case"] == "c3d:snapdragon"]
    if any(row["seconds"] >= SECONDS or row["memory_gib"] >= GIBIBYTES for row in judged):
        print(f"c3d for snapdragon misses its bar of {SECONDS} s and {GIBIBYTES} GiB", file=sys.stderr)
        raise typer.Exit(1)


def measure(model: str, target: str, seed: int) -> dict:
    """One build by the command itself, start of Python included; the manifest tells the hashes of all files."""
    with tempfile.TemporaryDirectory(prefix="dance_tvm_build_") as folder:
        command = [
            sys.executable,
            "-m",
            "dance_tvm.build",
            "--model",
            model,
            "--target",
            target,
            "--json",
            "--no-cache",
        ]
        begin = time.perf_counter()
        with open(f"{folder}/told", "w") as told:
            environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
            process = subprocess.Popen([*command, "--out", f"{folder}/out"], stdout=told, env=environment)
        largest = 0
        try:
            while process.poll() is None:
                largest = max(largest, _resident(process.pid))
                if time.perf_counter() - begin > TIMEOUT_S:
                    raise TimeoutError(f"building {model} for {target} took over {TIMEOUT_S} s")
                time.sleep(_SAMPLE_S)
        finally:
            process.kill()
        seconds = time.perf_counter() - begin
        if process.wait():
            raise typer.Exit(process.returncode)
        phases = json.loads(Path(folder, "told").read_text())["seconds"]
        files = file_sha256(Path(folder, "out", "manifest.json"))
    return {
        "case": f"{model}:{target}",
        "files": files,
        "phases": {"start": round(seconds - sum(phases.values()), 3), **phases},
        "seconds": seconds,
        "memory_gib": largest / 2**30,
    }


def _resident(pid: int) -> int:
    """Bytes of a process and of all that it started."""
    try:
        family = [psutil.Process(pid)]
        family += family[0].children(recursive=True)
    except psutil.Error:
        return 0
    total = 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


if __name__ == "__main__":
    typer.run(main)
