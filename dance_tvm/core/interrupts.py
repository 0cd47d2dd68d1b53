"""The ends of a command: Ctrl-C before it has begun, when there is nothing to clean up, and after its last line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

#: Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130


def end_at_once(_number: int, _frame: Any) -> NoReturn:
    """A handler of SIGINT: one sentence in place of a traceback."""
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


def is_unhandled() -> bool:
    """Whether Ctrl-C is nobody's yet; a command started in the background may be told to ignore it."""
    return signal.getsignal(signal.SIGINT) in (signal.default_int_handler, end_at_once)


def leave(ended: SystemExit) -> NoReturn:
    """End this process with the exit code of ``ended``, without taking apart what libraries hold.

    That takes half a second with TVM or PyTorch loaded, and the system does it anyway.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it, or it was closed
            stream.flush()
    os._exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
