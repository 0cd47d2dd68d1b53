"""This machine as a device: networks run in our own process."""

from __future__ import annotations

import json
import os
from typing import Any

from dance_tvm.artifact.folder import Artifact
from dance_tvm.core.errors import DanceError
from dance_tvm.device import serve
from dance_tvm.device.processes import THREADS_BY_ENVIRONMENT
from dance_tvm.device.program import ProgramNetwork
from dance_tvm.device.session import DeviceSession, LoadedNetwork
from dance_tvm.device.virtual_machine import LocalGpuNetwork


def _asked_threads() -> int | None:
    """How many threads the environment asks for."""
    values = [os.environ.get(name, "") for name in sorted(THREADS_BY_ENVIRONMENT)]
    return next((int(value) for value in values if value.isdigit() and int(value)), None)


class LocalSession(DeviceSession):
    """This machine. A network runs on as many threads as it was built for, unless `pin` or the environment says."""

    name = "local"

    def __init__(self) -> None:
        # TVM's pool aborts the process when it is asked for more threads than the environment allowed at the start.
        self._is_pinned = not THREADS_BY_ENVIRONMENT.isdisjoint(os.environ)
        self._threads: int | None = None

    def facts(self) -> dict[str, Any]:
        return serve.describe()

    def sensors(self) -> dict[str, Any]:
        return json.loads(serve.sensors())

    def pin(self, cpus: list[int] | None, threads: int | None) -> None:
        try:
            serve.pin(json.dumps({"cpus": cpus, "threads": threads}))
        except (OSError, ValueError):
            raise DanceError(f"this machine has no CPUs {cpus}: it has {sorted(os.sched_getaffinity(0))}") from None
        self._is_pinned, self._threads = True, threads or (len(cpus) if cpus else None)

    def load(self, artifact: Artifact) -> LoadedNetwork:
        artifact.require_this_machine()
        if artifact.manifest.is_program:
            return ProgramNetwork(artifact, self._threads or _asked_threads() or artifact.manifest.target.threads)
        if not self._is_pinned:  # TVM by itself takes half of the hardware's threads
            serve.pin(json.dumps({"cpus": None, "threads": artifact.manifest.target.threads}))
        return LocalGpuNetwork(artifact)

    def close(self) -> None:
        pass
