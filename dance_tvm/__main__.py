"""``dance-tvm``, and ``python -m dance_tvm``, which is the same."""

from __future__ import annotations

import atexit
import signal
from typing import NoReturn

from dance_tvm.core.interrupts import end_at_once, is_unhandled, leave


def main() -> NoReturn:
    """Run the command line, which takes a moment to load: Ctrl-C is heard from here on."""
    ended = SystemExit(1)  # as after an error that nobody catches
    atexit.register(lambda: leave(ended))  # registered first, called last
    if is_unhandled():
        signal.signal(signal.SIGINT, end_at_once)
    from dance_tvm.core import cli

    try:
        cli.main()
    except SystemExit as raised:
        ended = raised
        raise


if __name__ == "__main__":
    main()
