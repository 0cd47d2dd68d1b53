"""This machine as a device: networks run in our own process."""

from __future__ import annotations

import json
import os
from typing import Any
from weakref import WeakSet

from dance_tvm.artifact.folder import Artifact
from dance_tvm.core.errors import DanceError
from dance_tvm.device import serve
from dance_tvm.device.processes import THREADS_BY_ENVIRONMENT
from dance_tvm.device.program import CLOSED, ProgramNetwork
from dance_tvm.device.session import DeviceSession, LoadedNetwork


def _asked_threads() -> int | None:
    """How many threads the environment asks for."""
    values = [os.environ.get(name, "") for name in sorted(THREADS_BY_ENVIRONMENT)]
    return next((int(value) for value in values if value.isdigit() and int(value)), None)


class LocalSession(DeviceSession):
    """This machine. A network runs on as many threads as it was built for, unless `pin` or the environment says."""

    name = "local"

    def __init__(self) -> None:
        self._threads = _asked_threads()
        self._networks: WeakSet[ProgramNetwork] = WeakSet()
        self._closed = False

    def facts(self) -> dict[str, Any]:
        return serve.describe()

    def sensors(self) -> dict[str, Any]:
        return json.loads(serve.sensors())

    def pin(self, cpus: list[int] | None, threads: int | None) -> None:
        try:
            os.sched_setaffinity(0, cpus or os.sched_getaffinity(0))
        except (OSError, ValueError):
            raise DanceError(f"this machine has no CPUs {cpus}: it has {sorted(os.sched_getaffinity(0))}") from None
        self._threads = threads or (len(cpus) if cpus else _asked_threads())

    def _load(self, artifact: Artifact) -> LoadedNetwork:
        if self._closed:
            raise DanceError(CLOSED)
        artifact.require_this_machine()
        network = ProgramNetwork(artifact, self._threads or artifact.manifest.target.threads)
        self._networks.add(network)
        return network

    def close(self) -> None:
        self._closed = True
        for network in list(self._networks):
            network.close()
