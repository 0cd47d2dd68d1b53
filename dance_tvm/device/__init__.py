"""Devices: this machine, an emulated aarch64 one, and what `dance_server` or TVM RPC serves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dance_tvm.core.errors import DanceError
from dance_tvm.device.session import DeviceSession, KernelTime, LoadedNetwork

if TYPE_CHECKING:
    from dance_tvm.artifact.folder import Artifact

__all__ = [
    "DeviceSession",
    "KernelTime",
    "LoadedNetwork",
    "address_of",
    "open_device",
    "open_server",
    "prepare_emulator",
    "require_reachable",
    "require_runnable",
    "require_spec",
    "why_no_emulator",
]


def open_device(
    spec: str,
    *,
    timeout: float = 60,
    call_timeout: float = 600,
    on_phase: Callable[[str], object] | None = None,
    behind_tracker: bool = False,
) -> DeviceSession:
    """Open `local`, `emulator`, `rpc://HOST:PORT` or `tracker://HOST:PORT/KEY`; close it, or use it with `with`.

    `timeout` s are given to reach the device and to wait for its turn, `call_timeout` s to each single upload step,
    load, run or measurement. `on_phase` takes a sentence for each long step (the emulator's system is fetched when it
    is first opened). `behind_tracker`: the emulator runs TVM's server, and a real tracker hands it out. Raises
    DanceError where the device is absent, busy, or the spec is none of these.
    """
    require_spec(spec)
    if spec == "local":
        from dance_tvm.device.local import LocalSession

        return LocalSession()
    if spec == "emulator":
        from dance_tvm.device.emulator import prepare

        prepare(on_phase or (lambda _sentence: None))
        if behind_tracker:
            from dance_tvm.device.emulated_tvm import open_tracked_emulator

            return open_tracked_emulator(timeout=timeout, call_timeout=call_timeout)
        from dance_tvm.device.emulated import open_emulator

        return open_emulator(timeout=timeout, call_timeout=call_timeout)
    kind, _, rest = spec.partition("://")
    if kind == "rpc":
        host, port = address_of(rest, f"device {spec!r}")
        return open_server(spec, host, port, "", timeout, call_timeout)
    from dance_tvm.device.tracker import request_device

    address, _, key = rest.partition("/")
    host, port = address_of(address, f"device {spec!r}")
    deadline = time.monotonic() + timeout
    found = request_device(host, port, key, timeout)
    return open_server(spec, *found, max(5.0, deadline - time.monotonic()), call_timeout)


def require_spec(spec: str) -> None:
    """Raise DanceError unless ``spec`` names a device as `open_device` takes it; TVM is not loaded for that."""
    kind, _, rest = spec.partition("://")
    address, _, key = rest.partition("/")
    if spec in ("local", "emulator"):
        return
    if kind not in ("rpc", "tracker"):
        raise DanceError(
            f"unknown device {spec!r}: it must be local, emulator, rpc://HOST:PORT or tracker://HOST:PORT/KEY"
        )
    if kind == "tracker" and not key:
        raise DanceError(f"device {spec!r} lacks the key: write tracker://HOST:PORT/KEY")
    address_of(rest if kind == "rpc" else address, f"device {spec!r}")


def require_reachable(spec: str, timeout: float = 5) -> None:
    """Raise DanceError where nothing listens at the device's address, or its tracker's; nothing is asked of it."""
    kind, _, rest = spec.partition("://")
    if kind == "rpc":
        import socket

        from dance_tvm.device.server_connection import not_reached

        try:
            socket.create_connection(address_of(rest, f"device {spec!r}"), timeout).close()
        except OSError as error:
            raise not_reached(spec, error) from None
    if kind == "tracker":
        from dance_tvm.device.tracker import no_tracker, tracker_summary

        host, port = address_of(rest.partition("/")[0], f"device {spec!r}")
        try:
            tracker_summary(host, port, timeout)
        except OSError as error:
            raise no_tracker(host, port, error) from None


def require_runnable(artifact: Artifact, spec: str) -> None:
    """Raise DanceError where it is known without opening it that the device does not run the artifact, or that there is
    no such device here."""
    if spec == "local":
        artifact.require_this_machine()
    if spec != "emulator":
        return
    if artifact.manifest.is_for_gpu:
        name = artifact.manifest.target.name
        raise DanceError(f"{artifact.path} is built for the GPU of {name}, and the emulated device has none")
    artifact.require_machine("aarch64")
    if reason := why_no_emulator():
        raise DanceError(f"there is no emulated device here: {reason}")


def open_server(name: str, host: str, port: int, match: str, timeout: float, call_timeout: float) -> DeviceSession:
    """A session with the server at HOST:PORT, be it `dance_server` or one of TVM's RPC; `match` is the key that a
    tracker gave for it, or empty. Raises as `open_device` does."""
    from dance_tvm.device.server_connection import connect, is_match

    # Of TVM's servers behind a tracker, each connection uses the match key up: only ours are asked there.
    if not match or is_match(match):
        deadline = time.monotonic() + timeout
        served = connect(name, host, port, match, timeout, call_timeout)
        if served is not None:
            from dance_tvm.device.served import ServedSession

            return ServedSession(served)
        timeout = max(1.0, deadline - time.monotonic())
    from dance_tvm.device.remote import Connection, RemoteSession

    return RemoteSession(Connection(name, host, port, match, timeout, call_timeout))


def why_no_emulator() -> str | None:
    """None if the emulated aarch64 device can be had here, else the reason why not and what mends it."""
    from dance_tvm.device import emulator

    return emulator.why_no_emulator()


def prepare_emulator(progress: Callable[[str], object] = print) -> None:
    """Fetch the emulated device's system once into the user's cache folder; `progress` takes sentences."""
    from dance_tvm.device.emulator import prepare

    prepare(progress)


def address_of(text: str, what: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises DanceError, which calls it `what`, for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise DanceError(f"{what} must name HOST:PORT, not {text!r}")
    return host.strip("[]"), int(port)
