"""A connection to `dance_server` (its protocol: `server/server.h`): every wait has a deadline, every failure is one
sentence. Neither TVM nor PyTorch is loaded for it."""

from __future__ import annotations

import contextlib
import enum
import hmac
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from dance_tvm.core.errors import DanceError
from dance_tvm.device import holds

TOKEN = "DANCE_TVM_TOKEN"
_MAGIC, _PROTOCOL = 0x45434E44, 1
_HEAD = struct.Struct("<IIQ")
_DONE, _REFUSED, _PART = range(3)
_MOST_REPLY = 16 << 30  # anything longer is no reply of ours
_MATCH = re.compile(r"[\w.-]+:dance-\d+-[0-9a-f]{16}")


class Operation(enum.IntEnum):
    """What a request asks for, as `server.h` numbers and describes it."""

    FACTS = 1
    SENSORS = 2
    PIN = 3
    HAVE = 4
    APPEND = 5
    FINISH = 6
    LOAD = 7
    UNLOAD = 8
    NAMES = 9
    WANT = 10
    RUN = 11
    TIME = 12
    PROFILE = 13
    LOOK = 14
    RESET_PEAK = 15
    PEAK = 16


def is_match(key: str) -> bool:
    """Whether a tracker's match key is one that `dance_server` made."""
    return bool(_MATCH.fullmatch(key))


class ServerConnection:
    """A session with `dance_server`, from hello on. Use `connect` to have one."""

    def __init__(self, name: str, connection: socket.socket, call_timeout: float) -> None:
        self.name, self.call_timeout = name, call_timeout
        self._socket: socket.socket | None = connection
        host, port = connection.getpeername()[:2]
        self._turn = threading.Lock()  # a request and its reply are one thread's
        self._note: Path | None = holds.hold(host, port)

    def ask(self, what: str, operation: Operation, *pieces: bytes | memoryview, timeout: float | None = None) -> bytes:
        """The reply to one request. Raises DanceError where the device refuses, dies or falls silent."""
        return self.ask_parts(what, operation, *pieces, timeout=timeout)[-1]

    def ask_parts(
        self, what: str, operation: Operation, *pieces: bytes | memoryview, timeout: float | None = None
    ) -> list[bytes]:
        """The parts that came before the reply, and the reply."""
        with self._turn:
            return self._ask_alone(what, operation, pieces, timeout)

    def _ask_alone(
        self, what: str, operation: Operation, pieces: Sequence[bytes | memoryview], timeout: float | None
    ) -> list[bytes]:
        if self._socket is None:
            raise DanceError(f"{self.name}: this session is closed, open the device again")
        limit = self.call_timeout if timeout is None else timeout
        self._socket.settimeout(limit)
        try:
            with contextlib.suppress(BrokenPipeError):  # it refused in the middle of what we send: its sentence is here
                _send(self._socket, operation, pieces)
            return self._replies(what)
        except TimeoutError:
            self.close()  # an answer that comes late would be taken for that of the next call
            raise DanceError(
                f"{self.name} gave no sign for {limit:g} s while {what}: it is stopped or too slow"
            ) from None
        except OSError:
            self.close()
            raise DanceError(f"{self.name} closed the connection while {what}: its server or network died") from None

    def hang_up(self) -> None:
        """End the call in flight, of whatever thread, with an error; what called closes."""
        if (connection := self._socket) is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the device back; may be called twice."""
        holds.release(self._note)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _replies(self, what: str) -> list[bytes]:
        assert self._socket is not None
        parts = []
        while True:
            status, zero, size = _HEAD.unpack(_receive(self._socket, _HEAD.size))
            if status > _PART or zero or size > _MOST_REPLY:
                self.close()
                raise DanceError(f"{self.name} sent something other than a reply while {what}")
            data = _receive(self._socket, size)
            if status == _REFUSED:
                raise DanceError(f"{self.name} failed while {what}: {data.decode(errors='replace')}")
            parts.append(data)
            if status == _DONE:
                return parts


def not_reached(name: str, error: OSError) -> DanceError:
    """What is said of a device at whose address nothing listens."""
    return DanceError(
        f"{name} cannot be reached: {error.strerror or error}; start its server there (`dance-tvm device server`), or "
        "check the address"
    )


def connect(
    name: str, host: str, port: int, match: str, timeout: float, call_timeout: float
) -> ServerConnection | None:
    """A session with the `dance_server` at HOST:PORT; None where another server, such as TVM's, listens there.

    `match` is the key that a tracker gave, or empty. TVM's servers close a connection that does not begin as theirs do,
    and wait for the next. Raises DanceError where nothing listens, the server is busy for `timeout` s, or refuses.
    """
    deadline = time.monotonic() + timeout
    busy = DanceError(f"{name} accepted no session within {timeout:g} s: it is busy with another session, or stopped")
    try:
        connection = socket.create_connection((host, port), timeout=max(0.01, timeout))
    except TimeoutError:
        raise busy from None
    except OSError as error:
        raise not_reached(name, error) from None
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = match.encode()
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        connection.sendall(struct.pack("<III", _MAGIC, _PROTOCOL, len(key)) + key)
        magic, _, wants_token = struct.unpack("<III", _receive(connection, 12))
        challenge = _receive(connection, 32) if magic == _MAGIC else b""
    except TimeoutError:
        connection.close()
        raise busy from None
    except OSError:
        connection.close()
        return None
    if magic != _MAGIC:
        connection.close()
        return None
    opened = ServerConnection(name, connection, call_timeout)
    try:
        _prove(opened, connection, challenge, bool(wants_token))
    except BaseException:
        opened.close()
        raise
    return opened


def _prove(opened: ServerConnection, connection: socket.socket, challenge: bytes, wants_token: bool) -> None:
    """Show that we have the token, and hear whether we may stay."""
    token = os.environ.get(TOKEN, "")
    if wants_token and not token:
        raise DanceError(f"{opened.name} demands a token: set {TOKEN} to the one that its server was started with")
    try:
        connection.settimeout(60)
        connection.sendall(hmac.digest(token.encode(), challenge, "sha256"))
        status, _, size = _HEAD.unpack(_receive(connection, _HEAD.size))
        said = _receive(connection, min(size, 4096)).decode(errors="replace")
    except OSError:
        raise DanceError(f"{opened.name} closed the connection before greeting: its server died") from None
    if status != _DONE:
        raise DanceError(f"{opened.name} refused: {said}")


def _send(connection: socket.socket, operation: Operation, pieces: Sequence[bytes | memoryview]) -> None:
    views = [memoryview(piece).cast("B") for piece in pieces]
    connection.sendall(_HEAD.pack(operation, 0, sum(view.nbytes for view in views)))
    for view in views:
        connection.sendall(view)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionResetError("it closed the connection")
        view = view[got:]
    return bytes(data)
