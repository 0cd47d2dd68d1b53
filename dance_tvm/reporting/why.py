"""Why each layer has its kernel, and the tuning records that its sizes come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dance_tvm.benchmarking.results import Device, Measured, Results
from dance_tvm.core.printing import duration, plain_number
from dance_tvm.records.places import log_folders
from dance_tvm.reporting.charts import place_of
from dance_tvm.reporting.tables import Cell, Link, Table

_RECORD = re.compile(r"record ([0-9a-f]{16})")


def tables(results: Results, tuning_logs: Sequence[Path]) -> list[Table]:
    """A table of reasons for each artifact that records them, and one of the tuning records that they name."""
    items = [(device, item) for device in results.devices for item in device.measured if _told(item)]
    named = {identity for _, item in items for layer in _told(item) for identity in _RECORD.findall(layer.tuned)}
    found = records(named, [*tuning_logs, *_logs()])
    reasons = [_reasons(device, item, set(found)) for device, item in items]
    return reasons + ([_records(found)] if found else [])


def records(identities: Iterable[str], logs: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The newest verified record of each workload in the logs, by its identity; torn lines are passed over."""
    wanted = set(identities)
    found: dict[str, dict[str, Any]] = {}
    for path in logs if wanted else ():
        for record in _lines(path):
            identity = str(record.get("workload_id"))
            newer = record.get("date", "") >= found.get(identity, {}).get("date", "")
            if identity in wanted and record.get("status") == "verified" and newer:
                found[identity] = {**record, "log": path.name}
    return found


def _logs() -> list[Path]:
    return [path for folder in log_folders() for path in sorted(folder.glob("*.jsonl"))]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _told(item: Measured) -> list[Any]:
    return [layer for layer in item.profile.layers if layer.why or layer.tuned] if item.profile else []


def _reasons(device: Device, item: Measured, known: set[str]) -> Table:
    rows, places = [], []
    for layer in _told(item):
        identity = next(iter(_RECORD.findall(layer.tuned)), "")
        tuned: Cell = layer.tuned or "default sizes"
        rows.append(
            [
                layer.name,
                layer.kernel,
                layer.why,
                Link(str(tuned), f"record-{identity}") if identity in known else tuned,
            ]
        )
        places.append(place_of(device, item, layer.name))
    text = "What the build decided, from the artifact's manifest."
    heads = ["layer", "kernel", "why", "sizes"]
    return Table(f"Why each kernel: {item.title}", text, heads, rows, words=4, places=places)


def _records(found: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for identity, record in sorted(found.items()):
        unit = str(record.get("unit"))
        times = [record.get(key) for key in ("default_seconds", "seconds")]
        sizes = ", ".join(f"{name} {value}" for name, value in record.get("decisions", {}).items())
        rows.append([
            identity, record["log"], str(record.get("date", ""))[:10], str(record.get("origin", "")), sizes,
            str(record.get("trials", "")), *(_shown(value, unit) for value in times),
        ])  # fmt: skip
    heads = ["workload", "log", "day", "measured on", "sizes", "trials", "defaults", "chosen"]
    text = "The newest verified record of each workload that a layer above follows."
    places = [f"record-{identity}" for identity in sorted(found)]
    return Table("Tuning records", text, heads, rows, words=5, places=places)


def _shown(value: float | None, unit: str) -> str:
    if not value:
        return "–"
    return duration(value) if unit == "seconds" else f"{plain_number(1e-6 * value)} million {unit}"
