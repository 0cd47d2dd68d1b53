"""Tuning logs: JSON lines, one file a target and kernel family, appended under a lock and read past any damage.

A line begins with what a reader looks for (kind, version, fingerprint, workload, status, seconds), so that a log is
indexed without parsing it: a million lines in seconds. What is not a whole line of ours is reported with its number.
"""

from __future__ import annotations

import datetime
import gc
import json
import mmap
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from dance_tvm.errors import DanceError
from dance_tvm.schedules.spaces import Decisions, Workload

VERSION = 1
LOGS = Path(__file__).parent.parent / "tuning_logs"
LOCK_TIMEOUT_S = 60.0
_VERSIONS = ("dance-tvm", "apache-tvm", "apache-tvm-ffi")
_HEADER = re.compile(
    rb'^\{"kind": "tile", "version": 1, "fingerprint": "([0-9a-f]{16})", "workload_id": "([0-9a-f]{16})", '
    rb'"status": "(trial|verified|failed)", "seconds": ([0-9.e+-]+), [^\n]*\}$',
    re.MULTILINE,
)


class Record(BaseModel):
    """One line. ``seconds`` is the median of ``times`` (0 where the trial failed, which ``error`` tells).

    ``status``: a ``trial`` was measured once; a ``verified`` record won against the defaults (``default_seconds``)
    in an interleaved run, or is the defaults where nothing did, and is what builds use. ``trials`` counts those made
    for this workload so far. ``origin`` is the device; ``unit`` what was counted in place of seconds, if anything.
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
        """Half of the range of the times, relative to their median."""
        return (max(self.times) - min(self.times)) / 2 / self.seconds if self.times and self.seconds else 0.0

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
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
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


def log_path(target: Any, family: str = "conv3d_gather", folder: Path | None = None) -> Path:
    """The log of a target and kernel family."""
    return (folder or LOGS) / f"{target.tuning_log}.{family}.jsonl"


class _Line(NamedTuple):
    number: int
    start: int
    end: int
    status: bytes
    seconds: float


@dataclass
class Log:
    """One file, indexed by target and workload. ``problems`` lists what was skipped: (line number, reason)."""

    path: Path
    problems: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0

    def __post_init__(self) -> None:
        self._data: bytes | mmap.mmap = b""
        self._index: dict[tuple[bytes, bytes], list[_Line]] = {}
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
            raise DanceError(f"tuning log {path} cannot be read: {error.strerror}") from None
        log._scan()
        return log

    def _scan(self) -> None:
        """Index the lines that begin as ours do, and report the others and those that repeat an earlier one."""
        number, place = 1, 0
        seen: set[int] = set()
        collecting = gc.isenabled()
        gc.disable()  # a million small objects that all stay: looking for garbage among them takes most of the time
        try:
            for match in _HEADER.finditer(self._data):
                start, end = match.span()
                if start > place:
                    number = self._odd_lines(place, start - 1, number)
                self._index_line(match, number, seen)
                number, place = number + 1, end + 1
        finally:
            if collecting:
                gc.enable()
        if place < len(self._data):
            number = self._odd_lines(place, len(self._data), number)
        self.lines = number - 1

    def _index_line(self, match: re.Match[bytes], number: int, seen: set[int]) -> None:
        content = hash(match.group())
        if content in seen:
            self.problems.append((number, "it repeats an earlier line"))
            return
        seen.add(content)
        fingerprint, workload, status, seconds = match.groups()
        try:
            line = _Line(number, match.start(), match.end(), status, float(seconds))
        except ValueError:
            self.problems.append((number, "its seconds are not a number"))
            return
        lines = self._index.get((fingerprint, workload))
        if lines is None:
            lines = self._index[fingerprint, workload] = []
        lines.append(line)

    def _odd_lines(self, start: int, end: int, number: int) -> int:
        """Report the lines that do not begin as ours do."""
        lines = self._data[start:end].split(b"\n")
        if lines and not lines[-1]:
            lines.pop()
        for raw in lines:
            self.problems.append((number, _reason(raw)))
            number += 1
        return number

    def records(
        self, fingerprint: str | None = None, workload: str | None = None, statuses: Iterable[str] = ()
    ) -> Iterator[Record]:
        """The whole records, in the order of the file, of one target, workload and status where given."""
        wanted = {status.encode() for status in statuses}
        chosen = [
            line
            for (of, identity), lines in self._index.items()
            if fingerprint in (None, of.decode()) and workload in (None, identity.decode())
            for line in lines
            if not wanted or line.status in wanted
        ]
        for line in sorted(chosen, key=lambda line: line.start):
            record = self._parse(line)
            if record is not None:
                yield record

    def best(self, fingerprint: str, status: str = "verified") -> dict[str, Record]:
        """For each workload the fastest record of a status; lines are parsed only until the fastest whole one."""
        found: dict[str, Record] = {}
        for (of, identity), lines in self._index.items():
            if of != fingerprint.encode():
                continue
            alike = [line for line in lines if line.status == status.encode()]
            for line in sorted(alike, key=lambda line: line.seconds):
                record = self._parse(line)
                if record is not None:
                    found[identity.decode()] = record
                    break
        return found

    @property
    def fingerprints(self) -> set[str]:
        """Targets that the log has records of."""
        return {fingerprint.decode() for fingerprint, _ in self._index}

    def _parse(self, line: _Line) -> Record | None:
        if line.number not in self._parsed:
            try:
                record = Record.model_validate_json(self._data[line.start : line.end])
                if record.shape.identity != record.workload_id:
                    raise ValueError("its workload is not the one its identity names")
                self._parsed[line.number] = record
            except (ValidationError, ValueError, KeyError, TypeError) as error:
                self._parsed[line.number] = None
                self.problems.append((line.number, _first_words(error)))
        return self._parsed[line.number]


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
        return f"its {'.'.join(map(str, first['loc'])) or 'line'} is wrong: {first['msg']}"
    return str(error) or type(error).__name__


def parse_loosely(raw: bytes) -> Record | None:
    """A record whose fields may stand in any order; None for anything else."""
    try:
        return Record.model_validate_json(raw)
    except ValidationError:
        return None


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


def rewrite(path: Path, records: Iterable[Record]) -> None:
    """Replace the log by these records: written beside, then renamed."""

    def write() -> None:
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(b"".join(record.line() for record in records))
        os.replace(beside, path)

    locked(path, write)


def locked(path: Path, action: Callable[[], None]) -> None:
    """Run ``action`` while nobody else of ours writes to the log."""
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
    """Raise DanceError unless records can be appended to the log; told before any work is done."""
    locked(path, lambda: open(path, "ab").close())
