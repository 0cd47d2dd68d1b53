"""A trial's library on a device: in the TVM runtime there, or, where that has no OpenCL, through pyopencl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm

from dance_tvm.core.errors import DanceError
from dance_tvm.device.remote import RemoteSession
from dance_tvm.machines.host import needed_flags
from dance_tvm.machines.target import Target
from dance_tvm.tuning.farm import DeviceLostError, Farm

#: Seconds below which a clock tells nothing.
SHORTEST = 1e-7


def device_code_of(library: Path) -> Path:
    """Where the device code of a library for OpenCL stands: beside it, for devices whose TVM runtime has no OpenCL."""
    return library.with_suffix(".opencl.json")


class Library(Protocol):
    """Functions on a device, and the tensors there that they take."""

    @property
    def origin(self) -> str:
        """On which device."""

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor that was never written."""

    def send(self, array: np.ndarray) -> Any:
        """A tensor that holds ``array``."""

    def read(self, tensor: Any) -> np.ndarray:
        """What a tensor holds."""

    def call(self, function: str, *tensors: Any) -> None:
        """Run a function."""

    def times(self, function: str, tensors: Sequence[Any], repeats: int, least: float = 0.0) -> list[float]:
        """Seconds of each of ``repeats`` runs, after one that warms up; of a function that takes less than ``least``
        seconds, the mean of as many calls as take so long."""


def open_library(session: RemoteSession, library: Path, kind: str) -> Library:
    """The library on the session's device of TVM's ``kind`` (llvm: its processor).

    Raises DeviceLostError where it has none.
    """
    if kind == "llvm":
        return TvmLibrary(session, library, session.cpu)
    device = gpu_of(session, kind)
    return OpenCLLibrary(session, library) if device is None else TvmLibrary(session, library, device)


def gpu_of(session: RemoteSession, kind: str) -> Any | None:
    """TVM's device of ``kind`` in a session; None for an OpenCL device that only pyopencl reaches.

    Raises DeviceLostError where the session has neither.
    """
    call = session.connection.call
    device = session.connection.session.device(kind, 0)
    if call("telling its devices", lambda: device.exist, timeout=60):
        return device
    offered = session.function("opencl") if kind == "opencl" else None
    why = f"its TVM runtime has no {kind}, or there is no such device"
    if offered is not None:
        try:
            call("opening OpenCL", lambda: offered("name"))
        except DanceError as error:
            why = str(error)
        else:
            return None
    raise DeviceLostError(f"{session.name} has no {kind} device to tune on ({why}): see docs/jetson.md")


def require_gpu(farm: Farm, kind: str) -> None:
    """Raise DanceError where a device of the farm has no GPU of TVM's ``kind``, before anything is built."""
    if kind != "llvm":
        with farm.session(1) as session:
            if not isinstance(session, RemoteSession):
                raise DanceError(
                    f"{session.name} is a dance_server, on which only processors' kernels are tuned: "
                    f"start serve.py there (docs/devices.md)"
                )
            gpu_of(session, kind)


def require_processor(farm: Farm, target: Target) -> None:
    """Raise DanceError where a device that is reached over RPC is no machine of the target's architecture, or lacks its
    instructions: every trial would fail, and be kept as a failure of its tile. What runs here is known to fit."""
    if all(spec in ("local", "emulator") for spec in farm.specs):
        return
    with farm.session(1) as session:
        facts = session.facts()
        machine = facts.get("machine", target.link.machine)
        if machine != target.link.machine:
            raise DanceError(
                f"{session.name} is an {machine} machine and {target.name} is {target.link.machine}: "
                f"give a --device that is the target"
            )
        missing = sorted(set(needed_flags(target.tvm_target(1))) - set(facts.get("cpu_features", [])))
        if missing and facts.get("cpu_features"):
            raise DanceError(f"{session.name} lacks instructions of {target.name} ({', '.join(missing)})")


class TvmLibrary:
    """A library in the TVM runtime of a session."""

    def __init__(self, session: RemoteSession, library: Path, device: Any) -> None:
        self.origin = session.name
        self._call, self._device = session.connection.call, device
        path = session.upload(library)
        self._module = self._call("loading a trial", lambda: session.connection.session.load_module(path))

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return self._call("making room for tensors", lambda: tvm.runtime.empty(tuple(shape), dtype, self._device))

    def send(self, array: np.ndarray) -> Any:
        return self._call("taking tensors", lambda: tvm.runtime.tensor(np.ascontiguousarray(array), self._device))

    def read(self, tensor: Any) -> np.ndarray:
        return self._call("giving a tensor", tensor.numpy)

    def call(self, function: str, *tensors: Any) -> None:
        self._call(f"running {function}", lambda: self._module[function](*tensors))

    def times(self, function: str, tensors: Sequence[Any], repeats: int, least: float = 0.0) -> list[float]:
        def timed(number: int, repeat: int) -> list[float]:
            evaluator = self._module.time_evaluator(function, self._device, number=number, repeat=repeat)
            return self._call("timing a trial", lambda: list(evaluator(*tensors).results))

        once = min(timed(1, 2)) if least else math.inf
        return timed(1 if once >= least else math.ceil(least / max(once, SHORTEST)), repeats)


@dataclass(frozen=True)
class _Buffer:
    """A buffer of the device server, by its number."""

    number: int
    shape: tuple[int, ...]
    dtype: str


class OpenCLLibrary:
    """The device code of a library, run by the device server through pyopencl."""

    def __init__(self, session: RemoteSession, library: Path) -> None:
        served = session.function("opencl")
        assert served is not None, "gpu_of found it"
        self._session, self._served = session, served
        self.origin = f"{session.name}: {self._ask('opening OpenCL', 'name')}"
        path = session.upload(device_code_of(library))
        self._program = self._ask("compiling a trial", "load", path)

    def empty(self, shape: Sequence[int], dtype: str) -> _Buffer:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return _Buffer(self._ask("making room for tensors", "empty", size), tuple(shape), dtype)

    def send(self, array: np.ndarray) -> _Buffer:
        number = self._ask("taking tensors", "send", tvm.runtime.tensor(np.ascontiguousarray(array), self._session.cpu))
        return _Buffer(number, array.shape, str(array.dtype))

    def read(self, tensor: _Buffer) -> np.ndarray:
        target = tvm.runtime.empty(tensor.shape, tensor.dtype, self._session.cpu)
        self._ask("giving a tensor", "read", tensor.number, target)
        return target.numpy()

    def call(self, function: str, *tensors: _Buffer) -> None:
        self.times(function, tensors, 0)

    def times(self, function: str, tensors: Sequence[_Buffer], repeats: int, least: float = 0.0) -> list[float]:
        numbers = json.dumps([tensor.number for tensor in tensors])
        return json.loads(self._ask(f"running {function}", "times", self._program, function, numbers, repeats))

    def _ask(self, what: str, name: str, *arguments: Any) -> Any:
        return self._session.connection.call(what, partial(self._served, name, *arguments))
