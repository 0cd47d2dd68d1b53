"""Text files that a user names, and what is said of one that is none."""

from __future__ import annotations

from pathlib import Path

from dance_tvm.core.errors import DanceError


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises DanceError, which begins with ``what`` the file is, where it holds none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DanceError(f"{what} is not a text file in UTF-8: check the path, or save it as one") from None
    except OSError as error:
        raise DanceError(f"{what} cannot be read ({error.strerror or error}): check the path") from None
