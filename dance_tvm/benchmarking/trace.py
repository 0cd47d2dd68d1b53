"""A run's kernels on a line of time, in the form that Perfetto and chrome://tracing show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dance_tvm.artifact.folder import Manifest
from dance_tvm.benchmarking.layers import layers_run
from dance_tvm.core.files import written_whole
from dance_tvm.device import KernelTime


def events(process: int, title: str, manifest: Manifest, calls: Sequence[KernelTime]) -> list[dict[str, Any]]:
    """One event a call of a kernel, one behind the other, named after its layer where it has one.

    Times are the medians of several runs, so the line is that of a typical run without what lies between the kernels.
    """
    found: list[dict[str, Any]] = [{"ph": "M", "pid": process, "name": "process_name", "args": {"name": title}}]
    since = 0.0
    for call, layer in layers_run(manifest, calls):
        details: dict[str, Any] = {"kernel": call.symbol, "bytes": call.bytes}
        if layer is not None:
            details |= {"macs": layer.macs, "why": layer.reason}
        if call.work is not None:
            details |= {key: value for key, value in call.work.items() if key not in ("alive", "shape")}
        found.append(
            {
                "ph": "X",
                "pid": process,
                "tid": 0,
                "name": layer.name if layer is not None else call.symbol,
                "cat": layer.kind if layer is not None else "other",
                "ts": 1e6 * since,
                "dur": 1e6 * call.seconds,
                "args": details,
            }
        )
        since += call.seconds
    return found


def write_trace(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """Write the events. Raises DanceError where that fails."""
    with written_whole(path, "--trace") as beside:
        beside.write_text(json.dumps({"traceEvents": list(found), "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
