"""A session on an emulated device that is started for it: `dance_server` under qemu, without TVM there."""

from __future__ import annotations

import contextlib

from dance_tvm.core.errors import DanceError
from dance_tvm.device.emulator import START_TIMEOUT_S, start_program
from dance_tvm.device.served import ServedSession
from dance_tvm.device.server_connection import connect


def open_emulator(timeout: float, call_timeout: float) -> ServedSession:
    """Start the server, and open a session on it; closing the session ends it."""
    with contextlib.ExitStack() as stack:
        port = start_program(stack)
        connection = connect("emulator", "127.0.0.1", port, "", max(timeout, START_TIMEOUT_S), call_timeout)
        if connection is None:
            raise DanceError("emulator: its server closed the connection before a session began: start it again")
        stack.callback(connection.close)
        session = ServedSession(connection)
        session.running = stack.pop_all()
        return session
    raise AssertionError("unreachable")
