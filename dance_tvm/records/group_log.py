"""What kernel groups took on a device: lines of the target's tuning log, read by builds and by training.

Times are those of ``lowering.group_choice``; two processes that write at a time both find their lines in the log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from dance_tvm.core.errors import DanceError
from dance_tvm.core.text_files import read_text
from dance_tvm.liveness.kernel_groups import KernelGroups
from dance_tvm.records.group_choice import Dtype, GroupMeasurement, measured_cost
from dance_tvm.records.kernel_log import locked
from dance_tvm.records.places import log_folders, own_logs
from dance_tvm.schedules.cpu.tiles import Machine, excess_cycles

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target


def log_path(target: Target, folder: Path | None = None) -> Path:
    """Where kernel-group measurements of the target are kept: JSON lines."""
    return (folder or own_logs()) / f"{target.tuning_log}.kernel_groups.jsonl"


def group_cost(target: Target, threads: int, logs: Path | None, machine: Machine) -> Callable[[KernelGroups], float]:
    """What a build for ``target`` asks ``choose_kernel_groups`` to minimise: measured where the logs have it.

    ``machine`` is the target as kernels see it that multiply what a layer stores.
    ``logs`` is the one folder to look in, where given.
    """
    measured = measurements_for(target, threads, logs, "float16" if machine.element_bytes == 2 else "float32")
    return measured_cost(measured, machine.vector_floats, partial(excess_cycles, machine))


def measurements_for(
    target: Target, threads: int | None = None, logs: Path | None = None, dtype: Dtype = "float32"
) -> list[GroupMeasurement]:
    """The user's own measurements of a target in one type, and those of the package that they do not replace."""
    found: dict[str, GroupMeasurement] = {}
    for folder in log_folders(logs):
        for entry in read_log(log_path(target, folder), target.fingerprint, threads):
            if entry.dtype == dtype:
                found.setdefault(_case(entry), entry)
    return list(found.values())


def write_log(path: Path, measurements: Iterable[GroupMeasurement]) -> None:
    """Add measurements to the log, replacing older ones of the same layer, group, device and thread count.

    Lines of other kinds stay as they are. Raises DanceError for a log that cannot be read or written.
    """

    def write() -> None:
        merged = {_case(entry): entry for entry in [*read_log(path), *measurements]}
        lines = read_text(path, f"tuning log {path}").splitlines() if path.exists() else []
        others = [line for line in lines if json.loads(line).get("kind") != "kernel_group"]
        ours = [json.dumps(entry.model_dump()) for entry in merged.values()]
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text("".join(line + "\n" for line in [*others, *ours]))
        os.replace(beside, path)

    locked(path, write)


def _case(entry: GroupMeasurement) -> str:
    """What was measured, without how long it took."""
    return entry.model_dump_json(exclude={"seconds"})


def read_log(
    path: Path, fingerprint: str | None = None, threads: int | None = None, device: str | None = None
) -> list[GroupMeasurement]:
    """The kernel-group lines of a log, other kinds skipped; none where the file is missing.

    ``fingerprint``, ``threads`` and ``device`` keep only what was measured for that target, thread count or device.
    Raises DanceError for a line that is not one of ours.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(read_text(path, f"tuning log {path}").splitlines(), start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise TypeError("it is not an object")
            if entry.get("kind") == "kernel_group":
                found.append(GroupMeasurement(**entry))
        except (ValueError, TypeError, ValidationError) as error:
            raise DanceError(f"{path}, line {number} is not a measurement ({error}); delete the line") from error
    return [
        entry
        for entry in found
        if (fingerprint is None or entry.fingerprint == fingerprint)
        and (threads is None or entry.threads == threads)
        and (device is None or entry.device == device)
    ]
