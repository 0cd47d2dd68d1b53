"""Tuning logs: JSON lines, one file a target and kernel family, appended under a lock and read past any damage.

A line begins with what a reader looks for (kind, version, fingerprint, workload, status, seconds), so that a log is
indexed without parsing it: a million lines in seconds. What is not a whole line of ours is reported with its number.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import mmap
import os
import re
import statistics
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from dance_tvm.core.errors import DanceError
from dance_tvm.core.faults import place_of, said_of
from dance_tvm.records.places import own_logs
from dance_tvm.schedules.workload import GATHER, Decisions, Workload

VERSION = 1
LOCK_TIMEOUT_S = 60.0
#: Spread beyond which the times of a record say nothing: something else was running.
MOST_SPREAD = 0.25
#: The last byte of a whole line.
_CLOSING = ord("}")
_VERSIONS = ("dance-tvm", "apache-tvm", "apache-tvm-ffi")
_HEADER = re.compile(
    rb'\{"kind": "tile", "version": 1, "fingerprint": "([0-9a-f]{16})", "workload_id": "([0-9a-f]{16})", '
    rb'"status": "(trial|verified|failed)", "seconds": ([0-9.e+-]+), '
)


class Record(BaseModel):
    """One line. ``seconds`` is the median of ``times`` (0 where the trial failed; ``error`` says why).

    ``status``: a ``trial`` was measured once; a ``verified`` record won against the defaults (``default_seconds``)
    in an interleaved run, or is the defaults where nothing did; the newest is what builds use. ``trials`` counts
    those made for this workload so far. ``origin`` is the device; ``unit`` what was counted in place of seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["tile"] = "tile"
    version: Literal[1] = 1
    fingerprint: str
    workload_id: str
    status: Literal["trial", "verified", "failed"]
    seconds: float
    workload: dict[str, Any]
    decisions: Decisions
    times: list[float] = []
    default_seconds: float | None = None
    trials: int = 0
    error: str = ""
    origin: str
    unit: Literal["seconds", "emulated instructions"] = "seconds"
    target: str
    versions: dict[str, str]
    date: str

    @property
    def shape(self) -> Workload:
        """The workload as the spaces know it."""
        return Workload.of(self.workload)

    @property
    def spread(self) -> float:
        """Half of the range of the middle half of the times, relative to their median: a single run that something
        else disturbed does not count."""
        if len(self.times) < 2 or not self.seconds:
            return 0.0
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return (high - low) / 2 / self.seconds

    @property
    def steady(self) -> bool:
        """Whether the times agree well enough to be followed."""
        return self.spread <= MOST_SPREAD

    @property
    def speed_up(self) -> float | None:
        """How much faster than the defaults, in the run that verified it."""
        return self.default_seconds / self.seconds if self.default_seconds and self.seconds else None

    def line(self) -> bytes:
        """The record as its log holds it."""
        return json.dumps(self.model_dump()).encode() + b"\n"


def new_record(workload: Workload, target: Any, decisions: Decisions, times: list[float], **rest: Any) -> Record:
    """A record of today; its seconds are the median of ``times``."""
    return Record(
        fingerprint=target.fingerprint,
        workload_id=workload.identity,
        seconds=float(f"{statistics.median(times):.4g}") if times else 0.0,
        workload=workload.facts(),
        decisions=decisions,
        times=[float(f"{time:.4g}") for time in times],
        target=target.tuning_log,
        versions=_versions(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **rest,
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def log_path(target: Any, family: str = GATHER, folder: Path | None = None) -> Path:
    """The log of a target and kernel family; the user's own unless ``folder`` is given."""
    return (folder or own_logs()) / f"{target.tuning_log}.{family}.jsonl"


class _Columns:
    """What is known of the lines, a column each: a log may have a million, and as many objects take seconds to make."""

    def __init__(self) -> None:
        self.number, self.start, self.end, self.group = (array("q") for _ in range(4))
        self.header_hash = array("q")
        self.seconds = array("d")

    def keep(self, rows: np.ndarray) -> None:
        """Leave out all rows but these."""
        for name, column in vars(self).items():
            setattr(self, name, np.asarray(column)[rows])


@dataclass
class Log:
    """One file, indexed by target and workload. ``problems`` lists what was skipped: (line number, reason)."""

    path: Path
    problems: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0

    def __post_init__(self) -> None:
        self._data: bytes | mmap.mmap = b""
        self._columns = _Columns()
        self._groups: dict[tuple[bytes, bytes, bytes], int] = {}  # fingerprint, workload, status
        self._parsed: dict[int, Record | None] = {}

    @staticmethod
    def read(path: Path) -> Log:
        """Index the file; a missing one is an empty log. Raises DanceError where it cannot be opened."""
        log = Log(path)
        try:
            with path.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size:
                    log._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return log
        except OSError as error:
            raise DanceError(f"tuning log {path} cannot be read ({error.strerror}): check the path") from None
        log._scan()
        return log

    def _scan(self) -> None:
        """Index the lines that begin as ours do, and report the others and those that repeat an earlier one."""
        data, columns, groups = self._data, self._columns, self._groups
        place, number, size = 0, 0, len(data)
        while place < size:
            end = data.find(b"\n", place)
            end = size if end < 0 else end
            number += 1
            header = _HEADER.match(data, place)
            if header is None or header.end() > end or data[end - 1] != _CLOSING:
                self.problems.append((number, _reason(data[place:end])))
            else:
                key, seconds = (header[1], header[2], header[3]), header[4]
                columns.group.append(groups.setdefault(key, len(groups)))
                columns.seconds.append(_number(seconds))
                columns.number.append(number)
                columns.start.append(place)
                columns.end.append(end)
                columns.header_hash.append(hash((key, seconds)))
            place = end + 1
        self.lines = number
        columns.keep(self._whole())
        self.problems.sort()

    def _whole(self) -> np.ndarray:
        """Rows whose seconds are a number and that repeat no earlier line; the others are reported.

        Lines are compared whole only where they begin alike.
        """
        hashes, seconds = np.asarray(self._columns.header_hash), np.asarray(self._columns.seconds)
        good = ~np.isnan(seconds)
        self.problems += [(self._columns.number[row], "its seconds are not a number") for row in np.flatnonzero(~good)]
        order = np.argsort(hashes, kind="stable")
        alike = np.flatnonzero(np.diff(hashes[order]) == 0)
        seen: set[bytes] = set()
        for row in sorted({*order[alike].tolist(), *order[alike + 1].tolist()}):
            content = hashlib.sha256(self._data[self._columns.start[row] : self._columns.end[row]]).digest()
            if content in seen:
                good[row] = False
                self.problems.append((self._columns.number[row], "it repeats an earlier line"))
            seen.add(content)
        return np.flatnonzero(good)

    def records(
        self, fingerprint: str | None = None, workload: str | None = None, statuses: Iterable[str] = ()
    ) -> Iterator[Record]:
        """The whole records, in the order of the file, of one target, workload and status where given."""
        wanted = {status.encode() for status in statuses}
        chosen = [
            group
            for (of, identity, status), group in self._groups.items()
            if fingerprint in (None, of.decode()) and workload in (None, identity.decode())
            if not wanted or status in wanted
        ]
        for row in np.flatnonzero(np.isin(self._columns.group, chosen)).tolist():
            record = self._parse(row)
            if record is not None:
                yield record

    def best(self, fingerprint: str) -> dict[str, Record]:
        """For each workload the newest verified record whose times agree: it was chosen among all trials up to then.

        Times of different days do not compare; lines are parsed only until the newest whole one.
        """
        found: dict[str, Record] = {}
        by_group = np.argsort(self._columns.group, kind="stable")
        sorted_groups = np.asarray(self._columns.group)[by_group]
        for (of, identity, status), group in self._groups.items():
            if of != fingerprint.encode() or status != b"verified":
                continue
            begin, end = np.searchsorted(sorted_groups, (group, group + 1))
            whole = (self._parse(row) for row in by_group[begin:end][::-1].tolist())
            record = next((record for record in whole if record is not None and record.steady), None)
            if record is not None:
                found[identity.decode()] = record
        return found

    @property
    def fingerprints(self) -> set[str]:
        """Targets that the log has records of."""
        return {fingerprint.decode() for fingerprint, _, _ in self._groups}

    def _parse(self, row: int) -> Record | None:
        if row not in self._parsed:
            columns = self._columns
            try:
                record = Record.model_validate_json(self._data[columns.start[row] : columns.end[row]])
                if record.shape.identity != record.workload_id:
                    raise ValueError("its workload is not the one its identity names")
                self._parsed[row] = record
            except (ValidationError, ValueError, KeyError, TypeError) as error:
                self._parsed[row] = None
                self.problems.append((int(columns.number[row]), _first_words(error)))
        return self._parsed[row]


def _number(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _reason(raw: bytes) -> str:
    """Why a line is not a record."""
    if not raw.strip():
        return "it is empty"
    try:
        facts = json.loads(raw)
    except (ValueError, RecursionError):
        return "it is torn or not JSON"
    if not isinstance(facts, dict) or facts.get("kind") != "tile":
        return f"it is of another kind ({facts.get('kind', 'none') if isinstance(facts, dict) else 'no object'})"
    if facts.get("version") != VERSION:
        return f"it is of version {facts.get('version')}, this dance-tvm reads version {VERSION}"
    try:
        Record.model_validate(facts)
    except ValidationError as error:
        return _first_words(error)
    return "its fields are not in the order in which dance-tvm writes them: `dance-tvm logs merge` rewrites the log"


def _first_words(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"its {place_of(first, 'line')} is wrong: {said_of(first)}"
    return str(error) or type(error).__name__


def parse_loosely(raw: bytes) -> Record | str:
    """A record whose fields may stand in any order; of anything else, why it is none."""
    try:
        return Record.model_validate_json(raw)
    except ValidationError:
        return _reason(raw)


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records at the end of the log, whole or not at all, whoever else writes; a torn last line is closed first.

    Raises DanceError for a folder that cannot be written.
    """
    data = b"".join(record.line() for record in records)

    def write() -> None:
        with open(path, "a+b", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            if size:
                stream.seek(size - 1)
                torn = stream.read(1) != b"\n"
                stream.write(b"\n" + data if torn else data)
            else:
                stream.write(data)
            os.fsync(stream.fileno())

    locked(path, write)


def rewrite(path: Path, change: Callable[[bytes], Iterable[Record]]) -> None:
    """Replace the log by what ``change`` makes of it, while no other process writes: written beside, then renamed."""

    def write() -> None:
        records = change(path.read_bytes() if path.exists() else b"")
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(b"".join(record.line() for record in records))
        os.replace(beside, path)

    locked(path, write)


def locked(path: Path, action: Callable[[], None]) -> None:
    """Run ``action`` while no other process of ours writes to the log."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_TIMEOUT_S):
            action()
    except Timeout:
        raise DanceError(f"another process has held the lock of {path} for {LOCK_TIMEOUT_S:.0f} s: end it") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DanceError(f"tuning log {path} cannot be written ({reason}): choose another folder with --logs") from None


def require_writable(path: Path) -> None:
    """Raise DanceError unless records can be appended to the log, before any work is done."""
    locked(path, lambda: open(path, "ab").close())
