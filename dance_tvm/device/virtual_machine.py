"""Networks for a GPU, here and behind RPC: TVM's virtual machine runs them, since GPUs have no C interface yet."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tvm
from tvm import relax

from dance_tvm.artifact.folder import WEIGHTS, Artifact
from dance_tvm.device import serve
from dance_tvm.device.placement import compute_device, gpu_failures_explained
from dance_tvm.device.remote_program import Server
from dance_tvm.device.session import KernelTime, LoadedNetwork, arrange, kernel_table, merge_kernels

_Result = TypeVar("_Result")


class LocalGpuNetwork(LoadedNetwork):
    """A network for a GPU of this machine."""

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


class RemoteGpuNetwork(LoadedNetwork):
    """A network for a GPU behind RPC."""

    def __init__(self, session: Server, artifact: Artifact, library: str) -> None:
        self.manifest = artifact.manifest
        self._session = session
        self._connection = session.connection
        self._library = library
        self._device = self._connection.call(
            "telling its devices", lambda: compute_device(self.manifest, self._connection.session.device, session.name)
        )
        with gpu_failures_explained(self.manifest, session.name):
            self._machine = self._new_machine()
            self._inputs = [self._empty(tensor.shape, tensor.dtype) for tensor in self.manifest.inputs]
            self._weights = self._load_weights(artifact)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = self._invoke(inputs, lambda outputs: [output.numpy() for output in outputs])
        return {tensor.name: array for tensor, array in zip(self.manifest.outputs, arrays, strict=True)}

    def step(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, list[Any]]:
        return self._invoke(inputs, lambda outputs: (outputs[0].numpy(), outputs[1:]))

    def _invoke(self, inputs: Mapping[str, Any], fetch: Callable[[list[Any]], _Result]) -> _Result:
        """What `fetch` makes of the outputs on the device, while the connection's deadline runs."""
        self._set_input(self._machine, inputs)

        def invoke() -> _Result:
            self._machine.invoke_stateful("main")
            # TVM's get_outputs makes a reference cycle, which would keep the session until Python collects garbage.
            count = self._machine._get_output_arity("main")
            places: list[tuple[int, ...]] = [()] if count < 0 else [(index,) for index in range(count)]
            return fetch([self._machine._get_output("main", *place) for place in places])

        with gpu_failures_explained(self.manifest, self._session.name):
            return self._connection.call("running", invoke)

    def time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        self._set_input(self._machine, inputs)

        def measure() -> list[float]:
            # TVM runs once more before it measures, to warm up.
            clock = self._machine.time_evaluator("invoke_stateful", self._device, number=1, repeat=repeats)
            return list(clock("main").results)

        return self._connection.call("being timed", measure)

    def kernels(self, inputs: Mapping[str, np.ndarray], repeats: int = 3) -> list[KernelTime]:
        self._session.describe_kernels(self.manifest)
        read = self._session.function("clock.read")
        assert read is not None

        def once() -> list[dict[str, Any]]:
            machine.invoke_stateful("main")
            return json.loads(read())

        def set_instrument(look: int) -> None:
            machine.module["set_instrument"]("dance.clock.instrument", look)

        # A virtual machine keeps its instrument for good, so this one is another.
        machine = self._new_machine()
        call = self._connection.call
        self._set_input(machine, inputs)
        if repeats:
            call("setting its clock", partial(set_instrument, 0))
            call("timing kernels", once)  # the first run allocates
        timed = [call("timing kernels", once) for _ in range(repeats)]
        call("setting its clock", partial(set_instrument, 1))
        return merge_kernels(timed, call("looking at kernels", once))

    def peak_memory(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        reset, peak = self._session.function("reset_peak_memory"), self._session.function("peak_memory")
        if reset is None or peak is None or not self._connection.call("resetting its peak memory", reset):
            return None
        self._set_input(self._machine, inputs)
        self._connection.call("running", lambda: self._machine.invoke_stateful("main"))
        found = self._connection.call("telling its peak memory", peak)
        return None if found < 0 else found

    def _new_machine(self) -> relax.VirtualMachine:
        def load() -> relax.VirtualMachine:
            module = self._connection.session.load_module(self._library)
            return relax.VirtualMachine(module, self._device)

        return self._connection.call(f"loading {self.manifest.name}", load)

    def _empty(self, shape: list[int], dtype: str) -> Any:
        return self._connection.call(
            "making room for tensors", lambda: tvm.runtime.empty(tuple(shape), dtype, self._device)
        )

    def _load_weights(self, artifact: Artifact) -> list[Any]:
        """Tensors on the device: read there from the uploaded file, or sent one by one to TVM's own server."""
        if not self.manifest.parameters:
            return []
        get = self._session.function("weights.get")
        if get is None:
            arrays = artifact.weights()
            return [
                self._connection.call("taking weights", partial(tvm.runtime.tensor, array, self._device))
                for array in arrays
            ]
        self._session.upload(artifact.path / WEIGHTS)
        sha256 = self.manifest.files[WEIGHTS].sha256
        return [
            self._connection.call("reading weights", partial(get, sha256, name)) for name in self.manifest.parameters
        ]

    def _set_input(self, machine: relax.VirtualMachine, inputs: Mapping[str, Any]) -> None:
        values = arrange(self.manifest, inputs)

        def send() -> None:
            given = [
                place.copyfrom(value) if isinstance(value, np.ndarray) else value
                for place, value in zip(self._inputs, values, strict=True)
            ]
            machine.set_input("main", *given, *self._weights)

        self._connection.call("taking its inputs", send)
