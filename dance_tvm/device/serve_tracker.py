"""TVM's RPC tracker in one process that binds to 127.0.0.1, prints its port and ends with whoever started it."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading

from tvm.rpc import base, tracker

READY = "dance-tvm tracker ready on port "


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to")
    parser.add_argument("--port", type=int, default=0, help="port to bind to; 0 takes a free one and prints it")
    parser.add_argument("--end-with-stdin", action="store_true", help="end when standard input closes")
    options = parser.parse_args()
    if options.end_with_stdin:
        threading.Thread(target=_end_with_pipe, daemon=True).start()
    try:
        serve(options.host, options.port)
    except OSError as error:
        parser.error(str(error))


def serve(host: str, port: int) -> None:
    """Serve until Ctrl-C. Raises OSError, which says what to do, where the address is not to be had."""
    try:
        listening = socket.create_server((host, port), backlog=64)
    except (OSError, OverflowError) as error:
        raise OSError(f"{host}:{port} is not to be had ({error}): choose another --port") from None
    print(f"{READY}{listening.getsockname()[1]}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        tracker._tracker_server(listening, base.random_key("tracker"))


def _end_with_pipe() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
