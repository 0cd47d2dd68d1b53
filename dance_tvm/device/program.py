"""A network in this process by its C interface: no TVM, threads of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from dance_tvm.artifact.folder import Artifact
from dance_tvm.artifact.interface.dance_model import Model, ModelError
from dance_tvm.core.errors import DanceError
from dance_tvm.device.session import KernelTime, LoadedNetwork, arrange, kernel_table, merge_kernels
from dance_tvm.machines.gpu import opencl_library

CLOSED = "local: this session is closed, open the device again"


class ProgramNetwork(LoadedNetwork):
    """A verified artifact whose library holds its program, on `threads` threads."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.manifest = artifact.manifest
        self._closed = False
        with _refusals(artifact.manifest.name):
            driver = opencl_library() if artifact.manifest.target.tvm.get("kind") == "opencl" else None
            self._model = Model(artifact.path, threads, verified=True, driver=driver)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with _refusals(self.manifest.name):
            return self._model.run(self._named(inputs))

    def run_choosing(self, inputs: Mapping[str, np.ndarray], which: int) -> dict[str, np.ndarray]:
        free = {symbol for symbol, kernel in self.manifest.kernels.items() if kernel.is_free_choice}

        def choose(symbol: str, tensors: list[np.ndarray]) -> None:
            if symbol in free:
                tensors[0][:] = which

        with _refusals(self.manifest.name):
            return self._model.watch(self._named(inputs), choose)

    def _time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        with _refusals(self.manifest.name):
            return self._model.time(self._named(inputs), repeats)

    def _kernels(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[KernelTime]:
        named = self._named(inputs)
        with _refusals(self.manifest.name), self._model.lock:
            timed = self._timed(named, repeats)
            seen: list[dict[str, Any]] = []
            table = kernel_table(self.manifest)
            self._model.watch(
                named, lambda symbol, tensors: seen.append(_looked_at(symbol, table.get(symbol), tensors))
            )
        return merge_kernels(timed, seen)

    def peak_memory(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        from dance_tvm.device import serve

        if not serve.reset_peak_memory():
            return None
        self.run(inputs)
        peak = serve.peak_memory()
        return None if peak < 0 else peak

    def close(self) -> None:
        """Give memory and threads back, once a call under way in another thread has ended."""
        self._closed = True
        self._model.close()

    def _timed(self, named: Mapping[str, np.ndarray], repeats: int) -> list[list[dict[str, Any]]]:
        runs = []
        if repeats:
            self._model.run(named)  # the first run allocates
        for _ in range(repeats):
            self._model.profile()
            self._model.run(named)
            runs.append([{"symbol": kernel, "seconds": 1e-9 * spent} for kernel, _, spent in self._model.layers()])
        self._model.profile(False)
        return runs

    def _named(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._closed:
            raise DanceError(CLOSED)
        values = arrange(self.manifest, inputs)
        return {tensor.name: value for tensor, value in zip(self.manifest.inputs, values, strict=True)}


def _looked_at(symbol: str, kernel: dict[str, Any] | None, tensors: list[np.ndarray]) -> dict[str, Any]:
    from dance_tvm.device import serve

    return {"symbol": symbol, "seconds": 0.0, **serve.looked_at(kernel, [serve.Seen.of(each) for each in tensors])}


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What the library says, as a sentence of ours."""
    try:
        yield
    except ModelError as error:
        raise DanceError(f"{name}: {error}") from None
