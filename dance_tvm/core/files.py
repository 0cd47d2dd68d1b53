"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dance_tvm.core.errors import DanceError


def require_suffix(path: Path, option: str, known: Sequence[str]) -> None:
    """Raise DanceError unless the file's name ends as what is written into it, before any work is done."""
    if path.suffix.lower() not in known:
        raise DanceError(f"{option} {path} must end in {' or '.join(known)}: that is what is written")


@contextmanager
def written_whole(path: Path, option: str) -> Iterator[Path]:
    """A path beside ``path`` to write to; the file there takes its place when the block ends well.

    Raises DanceError, which names the command's ``option`` to change, where the disk refuses.
    """
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise DanceError(f"{path} cannot be written ({error.strerror}): choose another {option}") from None
    finally:
        beside.unlink(missing_ok=True)
