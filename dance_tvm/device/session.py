"""What every device offers: load an artifact, run it, time it, look at its kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dance_tvm.artifact.folder import Artifact, Manifest, load_artifact
from dance_tvm.artifact.interface.dance_model import array_fault
from dance_tvm.artifact.preprocess import Preprocess
from dance_tvm.core.errors import DanceError
from dance_tvm.device.stream import StreamSession


@dataclass(frozen=True)
class KernelTime:
    """One call of a compiled kernel in a run.

    `bytes` are those of the tensors it was given. Of a convolution that walks index lists, `work` says what they kept
    (see `dance_tvm.device.serve`), `mean` and `mean_size` are those of the values it wrote.
    """

    symbol: str
    seconds: float
    bytes: int = 0
    mean: float | None = None
    mean_size: float | None = None
    work: dict[str, Any] | None = None


def kernel_table(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What `serve.py` needs to know of each kernel, by its symbol, ready for JSON."""
    return {symbol: kernel.model_dump() for symbol, kernel in manifest.kernels.items()}


def merge_kernels(timed: list[list[dict[str, Any]]], seen: list[dict[str, Any]]) -> list[KernelTime]:
    """The median time of each call over several runs, with what was seen of it in another run."""
    calls = []
    for index, looked in enumerate(seen):
        seconds = sorted(run[index]["seconds"] for run in timed) or [looked["seconds"]]
        calls.append(KernelTime(**{**looked, "seconds": seconds[len(seconds) // 2]}))
    return calls


def require_fit(artifact: Artifact, device: str, facts: Mapping[str, Any]) -> None:
    """Raise DanceError unless the device, of which these facts are known, has the artifact's architecture and the
    instructions that its code uses."""
    artifact.require_machine(facts["machine"])
    missing = set(artifact.manifest.target.cpu_features) - set(facts["cpu_features"])
    if missing and facts["cpu_features"]:
        raise DanceError(
            f"{artifact.path} uses instructions that {device} lacks ({', '.join(sorted(missing))}): "
            f"rebuild it for a target without them"
        )


class LoadedNetwork(ABC):
    """A network that is on a device and ready to run."""

    manifest: Manifest

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by the manifest's names for inputs by the manifest's names."""

    def run_choosing(self, inputs: Mapping[str, np.ndarray], which: int) -> dict[str, np.ndarray] | None:
        """The same by kernel ``which``, 0 or 1, of every layer that has two; None where the device cannot choose."""
        return None

    def step(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, list[Any]]:
        """The first output, and the others as `inputs` of later calls may hold them: tensors that stay on the device.

        Here they are arrays, which any device takes.
        """
        first, *others = self.run(inputs).values()
        return first, others

    def stream(self) -> StreamSession:
        """One stream through a network in its streaming form: a frame per call, its state kept on the device.

        Raises DanceError where the network is of another form.
        """
        return StreamSession(self)

    def windows(
        self, video: str | Path, stride: int | None = None, preprocess: Preprocess | None = None
    ) -> list[dict[str, np.ndarray]]:
        """The windows of a video, or of a folder of pictures, each as inputs for `run`.

        `stride` is how many frames lie from window to window (a window's length unless given); `preprocess` says how
        frames become the input, in place of what the artifact says. Raises DanceError where the video cannot be read
        or the network takes none.
        """
        from dance_tvm.artifact.video_windows import windows_of

        return [arrays for _, arrays in windows_of(Path(video), self.manifest, stride, preprocess)]

    def time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        """Seconds of each of `repeats` runs, measured on the device, without the transfer of inputs and outputs.

        Raises DanceError for fewer than one.
        """
        if repeats < 1:
            raise DanceError(f"repeats must be 1 or more, not {repeats}")
        return self._time(inputs, repeats)

    def kernels(self, inputs: Mapping[str, np.ndarray], repeats: int = 3) -> list[KernelTime]:
        """The kernels of a run in the order of their calls, with the median time of `repeats` runs (0: only looked at).

        Raises DanceError for fewer than none, and where the device cannot report it.
        """
        if repeats < 0:
            raise DanceError(f"repeats must be 0 or more, not {repeats}")
        return self._kernels(inputs, repeats)

    @abstractmethod
    def _time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        """`time`, of at least one run."""

    @abstractmethod
    def _kernels(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[KernelTime]:
        """`kernels`, of no fewer than none."""

    @abstractmethod
    def peak_memory(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        """Largest resident memory of the process in bytes during one run; None where the device cannot report it."""


class DeviceSession(ABC):
    """A device that is ours until closed; also a context manager."""

    name: str

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What is known of the device: machine, system, cpus, TVM's version; empty where it does not report them."""

    @abstractmethod
    def sensors(self) -> dict[str, Any]:
        """Clocks, governors, temperatures and energy counters by name; empty where the device does not report them."""

    @abstractmethod
    def pin(self, cpus: list[int] | None, threads: int | None) -> None:
        """From here on, run on these CPUs with this many threads. Raises DanceError where the device lacks them."""

    def load(self, artifact: Artifact | str | Path) -> LoadedNetwork:
        """Bring an artifact, or that of a folder, onto the device. Raises DanceError where it does not fit it, or its
        files were changed after they were verified."""
        if isinstance(artifact, str | Path):
            artifact = load_artifact(artifact)
        if not isinstance(artifact, Artifact):
            raise DanceError(f"load takes an artifact or its folder, not a {type(artifact).__name__}")
        artifact.require_unchanged()
        return self._load(artifact)

    @abstractmethod
    def _load(self, artifact: Artifact) -> LoadedNetwork: ...

    @abstractmethod
    def close(self) -> None:
        """Give the device back. May be called twice."""

    def __enter__(self) -> DeviceSession:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def arrange(manifest: Manifest, inputs: Mapping[str, Any]) -> list[Any]:
    """The inputs, arrays or tensors of the device, in the order of the manifest.

    Raises DanceError for a missing, unexpected or misshapen one.
    """
    names = [tensor.name for tensor in manifest.inputs]
    if not isinstance(inputs, Mapping):
        raise DanceError(f"{manifest.name} takes a dict of arrays by input name, not a {type(inputs).__name__}")
    if set(names) != set(inputs):
        raise DanceError(f"{manifest.name} takes the inputs {', '.join(names)}, not {', '.join(inputs) or 'none'}")
    for tensor in manifest.inputs:
        array = inputs[tensor.name]
        if fault := array_fault(tensor.name, array):
            raise DanceError(fault)
        if list(array.shape) != tensor.shape or str(array.dtype) != tensor.dtype:
            raise DanceError(
                f"input {tensor.name} must be {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"not {array.dtype} of shape {array.shape}"
            )
    values = [inputs[name] for name in names]
    # np.ascontiguousarray would give a scalar an axis.
    return [np.asarray(value, order="C") if isinstance(value, np.ndarray) else value for value in values]
