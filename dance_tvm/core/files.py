"""Files that are written whole or not at all, and where commands write.

One rule for all of them: a folder that is named is made, with those above it; a file goes into a folder that is there.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from dance_tvm.core.errors import DanceError

#: How the names of folders begin that are made, and taken away at once, to see whether it can be done.
_PROBE = ".dance_tvm-"

#: How a disk says that it is full.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_ATTEMPTS = 100

_Result = TypeVar("_Result")


def require_suffix(path: Path, option: str, known: Sequence[str]) -> None:
    """Raise DanceError unless the file's name ends as what is written into it, before any work is done."""
    if path.suffix.lower() not in known:
        raise DanceError(f"{option} {path} must end in {' or '.join(known)}: that is what is written")


def require_writable(path: Path, option: str) -> None:
    """Raise DanceError where no file can be written at ``path``, as `written_whole` does; nothing is left there."""
    if path.is_dir():
        raise unwritable(path, option, OSError(errno.EISDIR, os.strerror(errno.EISDIR)))
    beside = _beside(path)
    try:
        beside.touch()
        beside.unlink()
    except FileNotFoundError:
        said = f"there is no folder {path.parent} for {path.name}: make it, or choose another {option}"
        raise DanceError(said) from None
    except OSError as error:
        raise unwritable(path, option, error) from None


def require_apart(path: Path, option: str, read: Mapping[str, Path | Sequence[Path] | None]) -> None:
    """Raise DanceError where the file to write, by whatever path, is one of those that are ``read``, by option."""
    for name, given in read.items():
        for source in [given] if isinstance(given, Path) else given or []:
            if source.exists() and path.exists() and source.samefile(path):
                raise DanceError(f"{option} {path} would be written over {name} {source}: choose another {option}")


def require_folder(path: Path, option: str) -> None:
    """Raise DanceError where no folder can be made, or written into, at ``path``; nothing is left there."""

    def probe() -> None:
        standing = next(place for place in [path, *path.absolute().parents] if place.exists())
        os.rmdir(tempfile.mkdtemp(prefix=_PROBE, dir=standing))

    try:
        again(probe)
    except OSError as error:
        raise unwritable(path, option, error) from None


def again(action: Callable[[], _Result]) -> _Result:
    """Repeat what needs a parent folder: a build that fails takes those that it made away, if they are empty."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):  # mkdir sees it stand, and a moment later it is gone
            return action()
    return action()


@contextmanager
def written_whole(path: Path, option: str) -> Iterator[Path]:
    """A path beside ``path`` to write to; the file there takes its place when the block ends well.

    Raises DanceError, which names the command's ``option`` to change, where the disk refuses.
    """
    beside = _beside(path)
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise unwritable(path, option, error) from None
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def unwritable(path: Path, option: str, error: OSError) -> DanceError:
    """What is said where the disk refuses."""
    if error.errno in DISK_FULL:
        return DanceError(f"no space left to write {path}: free some, or choose another {option}")
    return DanceError(f"{path} cannot be written ({error.strerror or error}): choose another {option}")
