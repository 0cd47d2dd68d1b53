"""This machine as a device: TVM's virtual machine in our own process."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from dance_tvm.artifact.folder import Artifact
from dance_tvm.core.errors import DanceError
from dance_tvm.device import serve
from dance_tvm.device.placement import compute_device, gpu_failures_explained
from dance_tvm.device.processes import THREADS_BY_ENVIRONMENT
from dance_tvm.device.program import ProgramNetwork
from dance_tvm.device.session import DeviceSession, KernelTime, LoadedNetwork, arrange, kernel_table, merge_kernels


class LocalNetwork(LoadedNetwork):
    """A network loaded into this process."""

    def __init__(self, artifact: Artifact) -> None:
        self.manifest = artifact.manifest
        self._device = compute_device(artifact.manifest, tvm.device, "this machine")
        with gpu_failures_explained(self.manifest, "this machine"):
            self._module = _load(artifact.library)
            self._machine = relax.VirtualMachine(self._module, self._device)
            self._weights = [tvm.runtime.tensor(array, self._device) for array in artifact.weights()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._results(inputs)
        return {tensor.name: result.numpy() for tensor, result in zip(self.manifest.outputs, results, strict=True)}

    def step(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, list[Any]]:
        first, *others = self._results(inputs)
        return first.numpy(), others

    def time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        arguments, main, seconds = self._arguments(inputs), self._machine["main"], []
        for _ in range(repeats):
            start = time.perf_counter()
            main(*arguments)
            self._device.sync()  # GPUs run on while the call has returned
            seconds.append(time.perf_counter() - start)
        return seconds

    def kernels(self, inputs: Mapping[str, np.ndarray], repeats: int = 3) -> list[KernelTime]:
        # A virtual machine keeps its instrument for good, so it gets one of its own.
        clock = serve.KernelClock(kernel_table(self.manifest))
        machine = relax.VirtualMachine(self._module, self._device)
        arguments = self._arguments(inputs)

        def once() -> list[dict[str, Any]]:
            machine["main"](*arguments)
            return json.loads(clock.read())

        if repeats:
            machine.set_instrument(clock.instrument(0))
            once()  # the first run allocates
        timed = [once() for _ in range(repeats)]
        machine.set_instrument(clock.instrument(1))
        return merge_kernels(timed, once())

    def peak_memory(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        arguments = self._arguments(inputs)
        if not serve.reset_peak_memory():
            return None
        self._machine["main"](*arguments)
        peak = serve.peak_memory()
        return None if peak < 0 else peak

    def _results(self, inputs: Mapping[str, Any]) -> list[tvm.runtime.Tensor]:
        with gpu_failures_explained(self.manifest, "this machine"):
            results = self._machine["main"](*self._arguments(inputs))
        return [results] if isinstance(results, tvm.runtime.Tensor) else list(results)

    def _arguments(self, inputs: Mapping[str, Any]) -> list[Any]:
        values = arrange(self.manifest, inputs)
        sent = [tvm.runtime.tensor(value, self._device) if isinstance(value, np.ndarray) else value for value in values]
        return sent + self._weights


def _load(library: Path) -> tvm.runtime.Module:
    """The library that lies at this path now, also where another one was loaded from it before.

    The dynamic loader takes a path that it knows for the library of then, so each is loaded by a path of its own.
    """
    with tempfile.TemporaryDirectory(prefix="dance_tvm_load_") as folder:
        copied = Path(folder) / library.name
        shutil.copyfile(library, copied)
        return tvm.runtime.load_module(str(copied))


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
        return LocalNetwork(artifact)

    def close(self) -> None:
        pass
