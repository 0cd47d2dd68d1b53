"""The one exception that means: the user can mend this; and the one warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class DanceError(Exception):
    """Bad input or a missing prerequisite, in one sentence that names what is wrong and what to do.

    Commands print only the message and end with exit code 2.
    """


@contextmanager
def unexpected_told(what: Callable[[], str]) -> Iterator[None]:
    """Turn what TVM, PyTorch or our own code raises by mistake into a DanceError: ``what()`` says what was being done.

    A disk or memory that is full is no mistake, and passes through; a package that is not installed is named.
    """
    try:
        yield
    except (DanceError, OSError, MemoryError):
        raise
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        raise DanceError(f"{what()} needs the Python package {package}: pip install {package}") from missing
    except Exception as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else type(problem).__name__
        raise DanceError(
            f"{what()} failed: {reason}; please report the network, with the traceback that -vv prints"
        ) from problem


class DanceWarning(UserWarning):
    """The figures may mislead: one sentence that says why and what to do; commands print it on standard error."""
