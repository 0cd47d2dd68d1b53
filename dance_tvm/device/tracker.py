"""TVM's RPC tracker spoken with timeouts: ask for a device, list the devices.

TVM's own client waits for ever where no device is free. The messages are a length and JSON, as in `tvm.rpc.tracker`.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

from dance_tvm.core.errors import DanceError

_RETRY_S = 0.5
#: For how long nothing may listen at a tracker's address before it counts as absent.
_RESTART_S = 2.0
#: Of TVM's protocol (tvm.rpc.base), written down here because loading TVM takes seconds.
_MAGIC = 0x2F271
_SUCCESS, _REQUEST, _SUMMARY = 0, 4, 6


def tracker_summary(host: str, port: int, timeout: float = 10) -> dict[str, Any]:
    """TVM's summary: `server_info` with the servers' keys and addresses, `queue_info` with free and pending by key."""
    return _ask(host, port, [_SUMMARY], timeout)


def request_device(host: str, port: int, key: str, timeout: float) -> tuple[str, int, str]:
    """Address, port and match key of a free device of the kind `key`, waiting up to `timeout` s for one.

    A tracker that goes away while it is asked, as one that is restarted, is tried again for some moments.
    """
    deadline = time.monotonic() + timeout
    gone: float | None = None  # since when
    while True:
        try:
            address, device_port, match = _ask(host, port, [_REQUEST, key, "", 1], deadline - time.monotonic())
            return address, int(device_port), match
        except TimeoutError:
            raise DanceError(_nothing_free(host, port, key, timeout)) from None
        except ConnectionError as error:
            now = time.monotonic()
            if not isinstance(error, ConnectionRefusedError):
                gone = None  # it was there
            gone = now if gone is None else gone
            if now + _RETRY_S > min(deadline, gone + _RESTART_S):
                raise no_tracker(host, port, error) from None
            time.sleep(_RETRY_S)
        except OSError as error:
            raise DanceError(
                f"the tracker at {host}:{port} cannot be reached: {error.strerror or error}; start it there "
                "(`dance-tvm device tracker`), or check the address"
            ) from None


def no_tracker(host: str, port: int, error: OSError) -> DanceError:
    """What is said where nothing that is a tracker answers."""
    return DanceError(
        f"no tracker answers at {host}:{port} ({error.strerror or error}): check the address, or start one with "
        f"`dance-tvm device tracker --port {port}`"
    )


def _nothing_free(host: str, port: int, key: str, timeout: float) -> str:
    """Why a request was not answered, in one sentence."""
    try:
        summary = tracker_summary(host, port, timeout=5)
    except (OSError, DanceError):
        return f"the tracker at {host}:{port} did not answer within {timeout:.0f} s"
    keys = [info["key"].removeprefix("server:") for info in summary["server_info"]]
    if key in keys:
        return f"no device {key!r} became free within {timeout:.0f} s: all {keys.count(key)} are busy"
    known = f"it has {', '.join(sorted(set(keys)))}" if keys else "it has no devices at all"
    return f"the tracker at {host}:{port} has no device {key!r}: {known}"


def _ask(host: str, port: int, message: list[Any], timeout: float) -> Any:
    deadline = time.monotonic() + timeout
    with socket.create_connection((host, port), timeout=max(0.01, timeout)) as connection:
        connection.sendall(struct.pack("<i", _MAGIC))
        (magic,) = struct.unpack("<i", _receive(connection, 4, deadline))
        if magic != _MAGIC:
            raise DanceError(f"what listens at {host}:{port} is not a TVM RPC tracker")
        data = json.dumps(message).encode()
        connection.sendall(struct.pack("<i", len(data)) + data)
        (size,) = struct.unpack("<i", _receive(connection, 4, deadline))
        code, value = json.loads(_receive(connection, size, deadline))
    if code != _SUCCESS:
        raise DanceError(f"the tracker at {host}:{port} refused the request")
    return value


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise ConnectionResetError("it closed the connection")
        data += chunk
    return data
