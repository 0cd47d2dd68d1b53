"""Live streams: a network built in its streaming form, one frame per call, its state kept between calls.

Such a network takes a frame and state tensors and gives scores and the next state, in the same order and of the same
shapes (`dance_tvm.sparsity.dstep.network.Stream` is one). The state lives in the session, not in the loaded network,
so several sessions may share one; its tensors stay on the device from frame to frame.

    with open_device("local") as device:
        session = device.load(load_artifact("artifacts/resnet18-stream")).stream()
        for frame in frames:
            scores = session.step(frame)      # of the frames so far
        session.reset()                       # the next frame is a first one again
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any, Protocol

import numpy as np

from dance_tvm.artifact.folder import Manifest
from dance_tvm.artifact.interface.dance_model import array_fault
from dance_tvm.core.errors import DanceError


class Steps(Protocol):
    """What a stream asks of a loaded network (`dance_tvm.device.session.LoadedNetwork`)."""

    manifest: Manifest

    def step(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, list[Any]]:
        """The first output, and the others as `inputs` of later calls may hold them."""


def is_stream(manifest: Manifest) -> bool:
    """Whether the network's outputs after the first are its next inputs after the first."""
    inputs, outputs = manifest.inputs, manifest.outputs
    kinds = [[(tensor.shape, tensor.dtype) for tensor in side[1:]] for side in (inputs, outputs)]
    return len(inputs) > 1 and kinds[0] == kinds[1]


def require_stream(manifest: Manifest) -> None:
    """Raise DanceError unless the network is of the streaming form."""
    if not is_stream(manifest):
        raise DanceError(
            f"{manifest.name} is not a streaming network: its outputs after the first are not its next state; build "
            "the form that `dance-tvm export-dstep --stream` writes"
        )


class StreamSession:
    """One stream through `network`; before the first frame its state is zero.

    Raises DanceError where the network is not of the streaming form: its outputs after the first must have the shapes
    and types of its inputs after the first.
    """

    def __init__(self, network: Steps) -> None:
        self._network = network
        self._lock = Lock()  # the state that one thread's frame leaves is the next one's
        require_stream(network.manifest)
        self._frame, *self._state_in = network.manifest.inputs
        self.reset()

    def reset(self) -> None:
        """Forget every frame seen."""
        with self._lock:
            self._state: list[Any] = [np.zeros(tensor.shape, tensor.dtype) for tensor in self._state_in]

    def step(self, frame: np.ndarray) -> np.ndarray:
        """The network's first output after one more frame, which has the shape of the network's first input.

        Raises DanceError for another shape; the state is then as it was.
        """
        if fault := array_fault(self._frame.name, frame):
            raise DanceError(fault)
        if list(frame.shape) != list(self._frame.shape):
            raise DanceError(f"a frame of this stream has shape {tuple(self._frame.shape)}, not {frame.shape}")
        with self._lock:
            state = {tensor.name: value for tensor, value in zip(self._state_in, self._state, strict=True)}
            scores, self._state = self._network.step({self._frame.name: frame, **state})
        return scores
