"""What a build asks of the logs: the record of this layer, else of the most similar one, on this target only."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dance_tvm.core.errors import DanceError
from dance_tvm.records.kernel_log import Log, Record, log_path
from dance_tvm.records.places import log_folders
from dance_tvm.schedules.cpu.choice import Advice
from dance_tvm.schedules.workload import FAMILIES, Workload

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target

#: Layers further apart than this (see ``Workload.distance``) say nothing about each other's tiles: those of layers 1.5
#: to 2.9 away took 1.08 of the defaults' time, up to 2.2 (``benchmarks.transfer``). Within it lie the same channels on
#: maps of other sizes.
SIMILAR = 1.0


@dataclass
class TunedTiles:
    """The verified records of one target; a ``TuningLog`` in the sense of ``schedules.spaces``."""

    fingerprint: str
    logs: list[Log]
    similar: float = SIMILAR
    others: str = field(default="")

    @cached_property
    def records(self) -> list[tuple[Workload, Record]]:
        """Workload and newest verified record, of every workload that has one."""
        return [(found.shape, found) for log in self.logs for found in log.best(self.fingerprint).values()]

    def advise(self, workload: Workload) -> Advice | None:
        """The record nearest to the workload, the workload's own first; None where nothing is similar."""
        ranked = self.ranked(workload)
        if not ranked or ranked[0][0] > self.similar:
            return None
        distance, tuned, record = ranked[0]
        return Advice(tuned, record.decisions, _origin(record, tuned, workload, distance) + self.others, record.seconds)

    def ranked(self, workload: Workload) -> list[tuple[float, Workload, Record]]:
        """All comparable records, the nearest first: (distance, workload, record)."""
        near = [(workload.distance(tuned), tuned, record) for tuned, record in self.records]
        return sorted((item for item in near if item[0] < float("inf")), key=lambda item: item[0])


def tuned_tiles(target: Target, folder: Path | None = None, logs_from: Target | None = None) -> TunedTiles:
    """The logs of ``target`` in ``folder`` only, where given, else the user's own before those of the package.

    Records of ``logs_from`` are used in their place where it is given; each choice says so.
    """
    source = logs_from or target
    logs = [Log.read(log_path(source, family, each)) for each in log_folders(folder) for family in FAMILIES]
    tiles = TunedTiles(source.fingerprint, logs)
    if logs_from is not None and logs_from.fingerprint != target.fingerprint:
        if not tiles.records:
            raise DanceError(f"--logs-from {logs_from.name}: there is no verified record of that target")
        tiles.others = f" (made for {logs_from.name})"
    return tiles


def _origin(record: Record, tuned: Workload, workload: Workload, distance: float) -> str:
    day = record.date[:10]
    gain = f", {record.speed_up:.2f}x the defaults" if record.speed_up else ""
    name = f", record {record.workload_id}"
    if tuned.identity == workload.identity:
        return f"tuned {day} on {record.origin}{gain}{name}"
    if tuned.kernel_identity == workload.kernel_identity:
        return f"tuned {day} on {record.origin} at density {tuned.density:g}{gain}{name}"
    return f"from a similar layer ({distance:.1f} away) tuned {day} on {record.origin}{name}"
