"""A network behind TVM RPC whose library holds its program: its functions are called, no virtual machine is there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, Protocol, TypeVar

import numpy as np
import tvm

from dance_tvm.artifact.folder import WEIGHTS, Artifact, Manifest
from dance_tvm.device.session import KernelTime, LoadedNetwork, arrange, merge_kernels

_NAME_BYTES = 1024
_Result = TypeVar("_Result")


class Caller(Protocol):
    """A connection whose calls have deadlines."""

    session: Any
    turn: RLock  # of calls that belong together: one thread's at a time

    def call(self, what: str, function: Callable[[], _Result], timeout: float | None = None) -> _Result:
        """`function()`, which talks to the device."""


class Server(Protocol):
    """What a program needs of the session that loads it."""

    name: str
    cpu: Any

    @property
    def connection(self) -> Caller:
        """To the device."""

    def upload(self, path: Path) -> str:
        """Bring a file onto the device and give its path there."""

    def place(self, uploaded: str) -> str:
        """Where the device itself finds it."""

    def function(self, name: str) -> Any | None:
        """A function of `serve.py`, or None."""

    def describe_kernels(self, manifest: Manifest) -> None:
        """Give `serve.py` the manifest's table of kernels; raises DanceError where the device cannot take it."""


class RemoteProgram(LoadedNetwork):
    """A network loaded on a device behind RPC (`interface/tvm.c` has the functions)."""

    def __init__(self, session: Server, artifact: Artifact, library: str, threads: int) -> None:
        self.manifest = artifact.manifest
        self._session, self._connection = session, session.connection
        weights = session.upload(artifact.path / WEIGHTS) if self.manifest.parameters else ""
        call, name = self._connection.call, self.manifest.name
        path = "" if not weights else session.place(weights)
        self._module = call(f"loading {name}", lambda: self._connection.session.load_module(library))
        create, self._destroy = self._function("dance_create"), self._function("dance_destroy")
        self._model = int(call(f"loading {name}", lambda: create(path, threads, 1)))
        self._inputs = [self._empty(tensor.shape, tensor.dtype) for tensor in self.manifest.inputs]
        self._outputs = self._new_outputs()

    def __del__(self) -> None:
        # Not through `call`, which would set a deadline in the middle of another call's. A session that is closed or
        # whose device is gone has no process any more.
        with contextlib.suppress(Exception):
            if self._connection.session is not None:
                self._destroy(self._model)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = self._run(inputs, self._outputs, lambda outputs: [each.numpy() for each in outputs])
        return {tensor.name: array for tensor, array in zip(self.manifest.outputs, arrays, strict=True)}

    def step(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, list[Any]]:
        outputs = self._new_outputs()  # they stay on the device as the next step's state
        return self._run(inputs, outputs, lambda found: (found[0].numpy(), found[1:]))

    def _time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        self._warm_up(inputs)
        return [1e-9 * float(each) for each in self._measured("dance_time", inputs, repeats, (repeats,))]

    def _kernels(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[KernelTime]:
        self._session.describe_kernels(self.manifest)
        timed: list[list[dict[str, Any]]] = []
        if repeats:
            names = self._step_names()
            self._warm_up(inputs)
            rows = self._measured("dance_profile", inputs, repeats, (repeats, len(names)))
            timed = [
                [{"symbol": name, "seconds": 1e-9 * float(spent)} for name, spent in zip(names, row, strict=True)]
                for row in rows
            ]
        address, read = self._session.function("watcher.address"), self._session.function("watcher.read")
        watch = self._function("dance_watch")
        assert address is not None
        assert read is not None
        call = self._connection.call
        place = call("setting its watcher", address)
        call("setting its watcher", lambda: watch(self._model, place))
        try:
            self._run(inputs, self._outputs, lambda _outputs: None)
        finally:
            call("setting its watcher", lambda: watch(self._model, 0))
        return merge_kernels(timed, json.loads(call("looking at kernels", read)))

    def peak_memory(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        reset, peak = self._session.function("reset_peak_memory"), self._session.function("peak_memory")
        if reset is None or peak is None or not self._connection.call("resetting its peak memory", reset):
            return None
        self._run(inputs, self._outputs, lambda _outputs: None)
        found = self._connection.call("telling its peak memory", peak)
        return None if found < 0 else found

    def _function(self, name: str) -> Any:
        return self._connection.call("answering a question", lambda: self._module[name], timeout=60)

    def _run(self, inputs: Mapping[str, Any], outputs: list[Any], fetch: Callable[[list[Any]], Any]) -> Any:
        """What `fetch` makes of the outputs on the device, while the connection's deadline runs."""

        def invoke() -> Any:
            run(self._model, *given, *outputs)
            return fetch(outputs)

        with self._connection.turn:
            given, run = self._given(inputs), self._function("dance_run")
            return self._connection.call("running", invoke)

    def _warm_up(self, inputs: Mapping[str, np.ndarray]) -> None:
        self._run(inputs, self._outputs, lambda _outputs: None)

    def _measured(
        self, function: str, inputs: Mapping[str, np.ndarray], repeats: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        """The nanoseconds that `function` writes into an array of `shape`."""
        measure, found = self._function(function), self._empty(shape, "int64")

        def invoke() -> np.ndarray:
            measure(self._model, repeats, found, *given, *self._outputs)
            return found.numpy()

        with self._connection.turn:
            given = self._given(inputs)
            return self._connection.call("being timed", invoke)

    def _step_names(self) -> list[str]:
        steps, name = self._function("dance_steps"), self._function("dance_step_name")
        room = self._empty((_NAME_BYTES,), "uint8")

        def read() -> list[str]:
            names = []
            for step in range(int(steps())):
                length = int(name(step, room))
                names.append(room.numpy()[:length].tobytes().decode())
            return names

        return self._connection.call("telling its kernels", read)

    def _new_outputs(self) -> list[Any]:
        return [self._empty(tensor.shape, tensor.dtype) for tensor in self.manifest.outputs]

    def _empty(self, shape: Sequence[int], dtype: str) -> Any:
        make = partial(tvm.runtime.empty, tuple(shape), dtype, self._session.cpu)
        return self._connection.call("making room for tensors", make)

    def _given(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The inputs on the device; those that are there already as they are."""
        values = arrange(self.manifest, inputs)

        def send() -> list[Any]:
            return [
                place.copyfrom(value) if isinstance(value, np.ndarray) else value
                for place, value in zip(self._inputs, values, strict=True)
            ]

        return self._connection.call("taking its inputs", send)
