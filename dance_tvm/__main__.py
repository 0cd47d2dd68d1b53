"""``dance-tvm``, and ``python -m dance_tvm``, which is the same."""

from __future__ import annotations

import signal
from typing import NoReturn

from dance_tvm.core.interrupts import end_at_once, is_unhandled


def main() -> NoReturn:
    """Run the command line, which takes a moment to load: Ctrl-C is heard from here on."""
    if is_unhandled():
        signal.signal(signal.SIGINT, end_at_once)
    from dance_tvm.core import cli

    cli.main()


if __name__ == "__main__":
    main()
