"""Ctrl-C before a command has begun, and after it has ended, when there is nothing to clean up."""

from __future__ import annotations

import os
import signal
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
