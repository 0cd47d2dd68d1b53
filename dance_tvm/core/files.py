"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dance_tvm.core.errors import DanceError

#: How the names of folders begin that are made, and taken away at once, to see whether it can be done.
PROBE = ".dance_tvm-"


def require_suffix(path: Path, option: str, known: Sequence[str]) -> None:
    """Raise DanceError unless the file's name ends as what is written into it, before any work is done."""
    if path.suffix.lower() not in known:
        raise DanceError(f"{option} {path} must end in {' or '.join(known)}: that is what is written")


def require_writable(path: Path, option: str) -> None:
    """Raise DanceError where no file can be written at ``path``, as `written_whole` does; nothing is left there."""
    if path.is_dir():
        raise _unwritable(path, option, OSError(errno.EISDIR, os.strerror(errno.EISDIR)))
    beside = _beside(path)
    try:
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise _unwritable(path, option, error) from None


def require_folder(path: Path, option: str) -> None:
    """Raise DanceError where no folder can be made, or written into, at ``path``; nothing is left there."""
    standing = next(place for place in [path, *path.absolute().parents] if place.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=PROBE, dir=standing))
    except OSError as error:
        raise _unwritable(path, option, error) from None


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
        raise _unwritable(path, option, error) from None
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _unwritable(path: Path, option: str, error: OSError) -> DanceError:
    return DanceError(f"{path} cannot be written ({error.strerror}): choose another {option}")
