"""Who of this machine holds which device server: a tracker knows that one is busy, and not with what.

Each session is a small file in a folder of the user, gone when the session closes; those of processes that were killed
are passed over and removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from dance_tvm.core.places import cache_folder

FOLDER = "held"
_MOST_WORDS = 60


@dataclass(frozen=True)
class Held:
    """One server in use: the process, what it was called as, and since when (seconds since 1970)."""

    process: int
    command: str
    since: float


def hold(host: str, port: int) -> Path | None:
    """Note that this process uses the server. None where the folder cannot be written to: no reason to stop."""
    folder = cache_folder() / FOLDER
    about = {"server": f"{host}:{port}", "process": os.getpid(), "command": _command(), "since": time.time()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".json")
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump(about, stream)
    except OSError:
        return None
    return Path(name)


def release(note: Path | None) -> None:
    """The server is used no longer."""
    if note is not None:
        with contextlib.suppress(OSError):
            note.unlink()


def held() -> dict[str, Held]:
    """By HOST:PORT, what processes of this user on this machine use."""
    found = {}
    for path in sorted((cache_folder() / FOLDER).glob("*.json")):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            running = Held(int(about["process"]), str(about["command"]), float(about["since"]))
        except (OSError, ValueError, KeyError, TypeError):  # being written, or going
            continue
        if _lives(running):
            found[str(about["server"])] = running
        else:
            release(path)
    return found


def _lives(running: Held) -> bool:
    """Whether the process is still the one that noted it: numbers are given again."""
    try:
        return psutil.Process(running.process).create_time() <= running.since + 1
    except psutil.Error:
        return False


def _command() -> str:
    """How this process was called, as one types it, cut to a cell's width."""
    program, *words = sys.argv or [""]
    path = Path(program)
    name = path.parent.name if path.name == "__main__.py" else path.stem
    said = " ".join([name, *words])
    return said if len(said) <= _MOST_WORDS else f"{said[: _MOST_WORDS - 1]}…"
