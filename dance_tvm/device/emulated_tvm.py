"""A session on an emulated device that is started for it, with TVM's server, which a real tracker hands out."""

from __future__ import annotations

import contextlib

from dance_tvm.device.emulator import KEY, START_TIMEOUT_S, start
from dance_tvm.device.remote import Connection, RemoteSession
from dance_tvm.device.tracker import request_device


def open_tracked_emulator(timeout: float, call_timeout: float) -> RemoteSession:
    """Start tracker and server, and open a session on them; closing the session ends them."""
    with contextlib.ExitStack() as stack:
        port = start(stack)
        found = request_device("127.0.0.1", port, KEY, max(timeout, START_TIMEOUT_S))
        connection = Connection("emulator", *found, max(timeout, START_TIMEOUT_S), call_timeout)
        stack.callback(connection.close)
        session = RemoteSession(connection)
        session.running = stack.pop_all()
        return session
    raise AssertionError("unreachable")
