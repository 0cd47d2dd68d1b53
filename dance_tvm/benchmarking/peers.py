"""Other engines beside ours: the same network from its ONNX file, measured in turns in the same process."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from dance_tvm.artifact.folder import Manifest
from dance_tvm.benchmarking.engines import onnxruntime_session, openvino_request
from dance_tvm.benchmarking.measure import Contender, Inputs
from dance_tvm.benchmarking.results import Peer
from dance_tvm.benchmarking.statistics import paired_ratio
from dance_tvm.core.agreement import difference
from dance_tvm.core.errors import DanceError
from dance_tvm.device import KernelTime, LoadedNetwork

MOST_DIFFERENCE = 0.02


def require_peers(names: Sequence[str], model: Path | None, devices: Sequence[str]) -> None:
    """Raise DanceError for engines that are unknown or not installed, and where they could not be compared."""
    for name in names:
        if name not in ENGINES:
            raise DanceError(f"--peer {name} is not known: choose of {', '.join(ENGINES)}")
        if find_spec(name) is None:
            raise DanceError(f"--peer {name} needs its package: pip install {name}, or pip install 'dance-tvm[peers]'")
    if names and model is None:
        raise DanceError("--peer needs --peer-model, the network's .onnx file: an artifact does not hold its source")
    if model is not None and not (model.is_file() and model.suffix == ".onnx"):
        raise DanceError(f"--peer-model {model} is not an .onnx file: `dance-tvm export --out net.onnx` writes one")
    if names and any(device != "local" for device in devices):
        raise DanceError("--peer measures on this machine: leave --device out")


class PeerNetwork(LoadedNetwork):
    """A network in another engine, with its inputs and outputs in the artifact's order."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @abstractmethod
    def infer(self, arrays: list[np.ndarray]) -> Sequence[np.ndarray]:
        """All outputs in order."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.infer(self._ordered(inputs))
        return {tensor.name: np.asarray(array) for tensor, array in zip(self.manifest.outputs, found, strict=True)}

    def _time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        arrays, seconds = self._ordered(inputs), []
        for _ in range(repeats):
            start = time.perf_counter()
            self.infer(arrays)
            seconds.append(time.perf_counter() - start)
        return seconds

    def _kernels(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[KernelTime]:
        raise DanceError("another engine's kernels are not looked at")

    def peak_memory(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        return None

    def _ordered(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [np.ascontiguousarray(inputs[tensor.name]) for tensor in self.manifest.inputs]


class _OnnxRuntime(PeerNetwork):
    def __init__(self, manifest: Manifest, model: Path, threads: int) -> None:
        super().__init__(manifest)
        self._session = onnxruntime_session(model, threads)
        self._names = [each.name for each in self._session.get_inputs()]

    def infer(self, arrays: list[np.ndarray]) -> Sequence[np.ndarray]:
        return self._session.run(None, dict(zip(self._names, arrays, strict=True)))


class _OpenVino(PeerNetwork):
    def __init__(self, manifest: Manifest, model: Path, threads: int) -> None:
        super().__init__(manifest)
        self._request = openvino_request(model, threads)

    def infer(self, arrays: list[np.ndarray]) -> Sequence[np.ndarray]:
        return list(self._request.infer(arrays).values())


ENGINES = {"onnxruntime": _OnnxRuntime, "openvino": _OpenVino}


def load_peers(
    names: Sequence[str], model: Path | None, manifest: Manifest, threads: int, inputs: Inputs, ours: Inputs
) -> dict[str, tuple[Contender, float]]:
    """A contender for each engine and how far its outputs are from ``ours``, as a share of the largest value.

    Raises DanceError where an engine cannot load the file, or computes something else.
    """
    found: dict[str, tuple[Contender, float]] = {}
    for name in names:
        assert model is not None
        try:
            network = ENGINES[name](manifest, model, threads)
            answer = network.run(inputs)
        except Exception as problem:
            said = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
            raise DanceError(f"{name} does not run {model} on inputs of {manifest.name}: {said}") from problem
        apart = max(difference(answer[key].reshape(array.shape), array) for key, array in ours.items())
        if apart > MOST_DIFFERENCE:
            raise DanceError(
                f"{name} computes something else from {model} than {manifest.name} does (by {apart:.2g} of the largest "
                f"value): give the .onnx of the same network with the same weights"
            )
        found[name] = Contender(network, inputs), apart
    return found


def judged(
    loaded: Mapping[str, tuple[Contender, float]], ours: Contender, device: str, artifact: str, threads: int
) -> list[Peer]:
    """What was measured of each engine, and its time over ours with the 95% interval."""
    found = []
    for name, (contender, apart) in loaded.items():
        ratio, low, high = paired_ratio(contender.rounds, ours.rounds)
        found.append(
            Peer(
                device=device,
                artifact=artifact,
                engine=name,
                version=version(name),
                threads=threads,
                latency=contender.figures(),
                speed_up=ratio,
                low=low,
                high=high,
                difference=apart,
            )
        )
    return found
