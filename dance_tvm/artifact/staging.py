"""A folder that appears whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil

from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import DISK_FULL, again, require_folder, unwritable

#: What makes a folder an artifact.
MANIFEST = "manifest.json"
#: What the commands that write artifacts call their place.
OPTION = "--out"
_PARTIAL = ".partial-"

_LITTLE_SPACE = 64 * 1024

_Result = TypeVar("_Result")


@contextmanager
def staged(out: str | Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place when the block ends well, and vanishes when it does not."""
    target = _place(out)
    made = [parent for parent in target.parents if not parent.exists()]
    folder = _writing(target, lambda: _prepare(target))
    try:
        yield folder
        folder.chmod(0o755)
        _writing(target, lambda: _take_place(folder, target))
    except DanceError:
        if shutil.disk_usage(folder).free < _LITTLE_SPACE:  # lld dies of a signal when the disk fills up
            raise unwritable(target, OPTION, OSError(errno.ENOSPC, "")) from None
        raise
    except OSError as error:
        raise (unwritable(target, OPTION, error) if error.errno in DISK_FULL else error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds the artifact, or what another build writes
                parent.rmdir()


def require_writable(out: str | Path) -> None:
    """Raise DanceError unless an artifact can be written at ``out``; leaves nothing there."""
    target = _place(out)
    _require_free(target)
    require_folder(target.parent, OPTION)


def _place(out: str | Path) -> Path:
    """Where the folder itself stands or will stand: a link to it, as to another disk, stays a link."""
    return Path(os.path.realpath(out))


def _prefix(target: Path) -> str:
    """How the names of this process's unfinished folders for ``target`` begin."""
    return f".{target.name}{_PARTIAL}{os.getpid()}-"


def _require_free(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise DanceError(f"{target} is a file, and an artifact is a folder: choose another --out")
    if not (target / MANIFEST).is_file():
        if any(target.iterdir()):
            raise DanceError(f"{target} is there and is not an artifact: choose another --out, or remove it")
        return
    if others := _not_of_an_artifact(target):
        named = f"{', '.join(others[:3])}{' …' if others[3:] else ''}"
        raise DanceError(
            f"{target} has {named} beside its artifact, which a new one there would take away: move what is yours, or "
            "choose another --out"
        )


def _not_of_an_artifact(folder: Path) -> list[str]:
    """What stands in ``folder`` that its manifest does not list; empty where the manifest cannot be read."""
    try:
        own = {str(name).partition("/")[0] for name in json.loads((folder / MANIFEST).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sorted(path.name for path in folder.iterdir() if path.name not in own | {MANIFEST})


def _prepare(target: Path) -> Path:
    """A new folder beside ``target``, after what killed builds left there is gone."""
    _require_free(target)
    prefix = f".{target.name}{_PARTIAL}"
    for leftover in again(lambda: list(target.parent.glob(f"{prefix}*"))):
        owner = leftover.name.removeprefix(prefix).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)  # of a build that was killed

    def make() -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))

    return again(make)


def _take_place(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``; what stood there is moved into ``folder``'s parent first, then removed."""
    old = folder.with_name(f"{folder.name}-old")
    try:
        if target.exists():
            target.rename(old)
        folder.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _writing(target: Path, action: Callable[[], _Result]) -> _Result:
    try:
        return action()
    except OSError as error:
        raise unwritable(target, OPTION, error) from None
