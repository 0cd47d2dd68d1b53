"""Devices for trials: one session per trial, a deadline on each; a device that fails too often is dropped.

A session asks its server to end it after the trial's time, so that a trial that hangs is ended on the device as well.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dance_tvm.core.errors import DanceError
from dance_tvm.device import address_of, processes
from dance_tvm.device.instruction_counter import InstructionCounter
from dance_tvm.device.remote import Connection, RemoteSession
from dance_tvm.device.served import ServedSession
from dance_tvm.device.server_connection import ServerConnection, connect, is_match
from dance_tvm.device.session import DeviceSession
from dance_tvm.device.tracker import no_tracker, request_device, tracker_summary

#: Failures in a row after which a device is dropped.
STRIKES = 3
CONNECT_TIMEOUT_S = 20.0
#: How many times the time of a trial an emulated device gets.
EMULATED_PATIENCE = 10
#: With more, TVM's runtime would start worker threads, and what they execute while they wait for work would be counted.
ONE_THREAD = {"TVM_NUM_THREADS": "1"}


@dataclass
class Health:
    """What became of the trials of one device."""

    name: str
    done: int = 0
    failed: int = 0
    strikes: int = 0
    said: str = ""

    @property
    def dropped(self) -> bool:
        """Whether it has been dropped."""
        return self.strikes >= STRIKES


#: What serves a device: TVM's RPC, which runs any library, or `dance_server`, which runs sealed artifacts.
Server = Literal["tvm", "dance_server"]


def server_of(session: DeviceSession) -> Server:
    """What serves the device of a session."""
    return "tvm" if isinstance(session, RemoteSession) else "dance_server"


class DeviceLostError(DanceError):
    """The device failed, not the trial: another device may try it."""


class CountedSession(RemoteSession):
    """A session on an emulated device, where time says nothing and instructions are counted."""

    def __init__(self, connection: Connection, counter: InstructionCounter) -> None:
        super().__init__(connection)
        self.counter = counter


@dataclass
class _Place:
    """Where sessions come from: an address, or a tracker's key."""

    spec: str
    host: str
    port: int
    key: str = ""
    server: processes.PortProcess | None = None
    counter: InstructionCounter | None = None

    @property
    def is_ours(self) -> bool:
        """Whether its server was started here, which TVM's are."""
        return self.server is not None or self.counter is not None

    def stop(self) -> None:
        """End the server, where it is ours."""
        if self.server is not None:
            self.server.stop()


@dataclass
class Farm:
    """All devices of a run. Open it with ``with``; ``lanes`` is how many trials can run at once."""

    specs: list[str]
    trial_timeout: float = 30.0
    wait: float = 60.0
    health: dict[str, Health] = field(default_factory=dict)

    def hang_up(self) -> None:
        """Close every connection and make none again: whoever waits for a device's answer gets an error instead."""
        self._closed_down = True
        for connection in list(self._connections):
            connection.hang_up()

    def __enter__(self) -> Farm:
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._places: list[_Place] = []
        self._seen: set[Server] = set()
        self._turn = 0
        self._connections: set[Connection | ServerConnection] = set()
        self._closed_down = False
        self.lanes = 0
        try:
            for spec in self.specs:
                self._places.append(self._open(spec))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    @property
    def _patience(self) -> float:
        """Seconds for a device to accept a session: an emulated one forks slowly."""
        from dance_tvm.device.emulator import START_TIMEOUT_S

        return START_TIMEOUT_S if "emulator" in self.specs else CONNECT_TIMEOUT_S

    @property
    def servers(self) -> frozenset[Server]:
        """What served devices so far."""
        with self._lock:
            return frozenset(self._seen or {"tvm"})

    @property
    def is_here(self) -> bool:
        """Whether trials run on the very cores that build them."""
        return any(spec in ("local", "emulator") for spec in self.specs)

    def _open(self, spec: str) -> _Place:
        if spec == "local":
            self.lanes += 1
            server, port = processes.start_server()
            place = _Place(spec, "127.0.0.1", port, server=server)
            self._stack.callback(place.stop)
            return place
        if spec == "emulator":
            from dance_tvm.device import emulator

            self.lanes += 1
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dance_tvm_counter_")))
            counter = InstructionCounter(folder)
            port = emulator.start(self._stack, options=counter.options, environment=ONE_THREAD)
            return _Place(spec, "127.0.0.1", port, emulator.KEY, counter=counter)
        kind, _, rest = spec.partition("://")
        if kind == "rpc":
            self.lanes += 1
            return _Place(spec, *address_of(rest, f"device {spec!r}"))
        address, _, key = rest.partition("/")
        host, port = address_of(address, f"device {spec!r}")
        self.lanes += self._count(spec, host, port, key)
        return _Place(spec, host, port, key)

    def _count(self, spec: str, host: str, port: int, key: str) -> int:
        """Devices of the key that the tracker has, waiting for the first. Raises DanceError naming the keys it has."""
        deadline = time.monotonic() + min(self.wait, CONNECT_TIMEOUT_S)
        while True:
            try:
                summary = tracker_summary(host, port)
            except OSError as error:
                raise no_tracker(host, port, error) from None
            keys = [info["key"].removeprefix("server:") for info in summary["server_info"]]
            if key in keys:
                return keys.count(key)
            if time.monotonic() > deadline:
                known = f"it has {', '.join(sorted(set(keys)))}" if keys else "it has no devices at all"
                raise DanceError(f"the tracker at {host}:{port} has no device {key!r}: {known}")
            time.sleep(0.5)

    @contextlib.contextmanager
    def session(self, threads: int, seconds: float | None = None) -> Iterator[DeviceSession]:
        """A session on some device for at most ``seconds`` (the trial's timeout unless given).

        Raises DeviceLostError where no device can be had; what fails inside is counted against the device that ran it.
        """
        limit = (seconds or self.trial_timeout) * (EMULATED_PATIENCE if "emulator" in self.specs else 1)
        name, connection, counter = self._connect(limit)
        health = self.health.setdefault(name, Health(name))
        self._connections.add(connection)
        try:
            session = _session(connection, counter)
            with self._lock:
                self._seen.add(server_of(session))
            if counter is None:
                session.pin(None, threads)
            yield session
        except DanceError as error:
            if not self._closed_down:
                health.failed += 1
                health.strikes += 1
                health.said = str(error)
            raise DeviceLostError(str(error)) if _about_device(str(error)) else error from None
        else:
            health.done += 1
            health.strikes = 0
        finally:
            self._connections.discard(connection)
            connection.close()

    def _connect(self, limit: float) -> tuple[str, Connection | ServerConnection, InstructionCounter | None]:
        """A connection to the next device whose turn it is, skipping those that were dropped."""
        deadline, said = time.monotonic() + self.wait, ""
        while time.monotonic() < deadline and not self._closed_down:
            found = None
            with self._lock:
                self._turn += 1
                place = self._places[self._turn % len(self._places)]
            try:
                found = self._find(place, deadline)
                if found is not None:
                    return found[0], self._connected(place, *found, limit), place.counter
            except DanceError as error:
                said = str(error)
                if found is not None:
                    lost = self.health.setdefault(found[0], Health(found[0]))
                    lost.strikes, lost.said = lost.strikes + 1, said
            if all(health.dropped for health in self.health.values()) and self._closed():
                break
            time.sleep(0.2)
        raise DeviceLostError(said or "every device was dropped after failing too often")

    def _connected(
        self, place: _Place, name: str, host: str, port: int, match: str, limit: float
    ) -> Connection | ServerConnection:
        """A connection to a server of either kind. `dance_server` ends a call whose client has gone."""
        if not place.is_ours and (not match or is_match(match)):
            served = connect(name, host, port, match, self._patience, limit)
            if served is not None:
                return served
        return Connection(name, host, port, f"{match} -timeout={limit:.0f}", self._patience, limit)

    def _find(self, place: _Place, deadline: float) -> tuple[str, str, int, str] | None:
        """Name, address, port and key of a device at ``place``; None where the one that is offered was dropped."""
        host, port, match, name = place.host, place.port, "", place.spec
        if place.server is not None and not place.server.running:
            place.server.stop()
            place.server, place.port = processes.start_server()
            port = place.port
        if place.key:
            host, port, match = request_device(host, port, place.key, max(1.0, deadline - time.monotonic()))
            name = f"{place.key}@{host}:{port}"
        health = self.health.get(name)
        return None if health is not None and health.dropped else (name, host, port, match)

    def _closed(self) -> bool:
        """Whether no place can bring devices that have not been seen yet."""
        return all(not place.key for place in self._places)


def _session(connection: Connection | ServerConnection, counter: InstructionCounter | None) -> DeviceSession:
    if isinstance(connection, ServerConnection):
        return ServedSession(connection)
    return RemoteSession(connection) if counter is None else CountedSession(connection, counter)


def _about_device(message: str) -> bool:
    return any(words in message for words in ("closed the connection", "cannot be reached", "accepted no session"))
