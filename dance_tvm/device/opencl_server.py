"""What a device server offers of OpenCL where its TVM runtime has none: kernels by pyopencl, in the session's process.

`serve.py` imports this when a session first asks, so that a device without OpenCL needs neither it nor this package.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from dance_tvm.artifact.gpu_launches import DeviceCode
from dance_tvm.device.opencl import OpenCLSession


class Served:
    """Programs and buffers of one session, which names them by number."""

    def __init__(self) -> None:
        self.session = OpenCLSession()
        self.programs: list[tuple[Any, DeviceCode]] = []
        self.buffers: list[Any] = []

    def name(self) -> str:
        """The device's name."""
        return self.session.name

    def load(self, path: str) -> int:
        """Compile the device code of an uploaded file."""
        code = DeviceCode.from_json(Path(path).read_text(encoding="utf-8"))
        self.programs.append((self.session.compile(code), code))
        return len(self.programs) - 1

    def empty(self, size: int) -> int:
        """A buffer of ``size`` bytes."""
        return self._kept(self.session.empty(size))

    def send(self, tensor: Any) -> int:
        """A buffer that holds what ``tensor`` does."""
        return self._kept(self.session.upload(tensor.numpy()))

    def read(self, buffer: int, tensor: Any) -> None:
        """Copy a buffer into ``tensor``."""
        shape = tuple(int(extent) for extent in tensor.shape)
        tensor.copyfrom(self.session.download(self.buffers[buffer], shape, str(tensor.dtype)))

    def times(self, program: int, function: str, buffers: str, repeats: int) -> str:
        """Run a function on buffers (a JSON list of numbers), once and ``repeats`` times more, and give the seconds."""
        compiled, code = self.programs[program]
        given = [self.buffers[number] for number in json.loads(buffers)]
        return json.dumps(self.session.times(compiled, code.plans[function], given, repeats))

    def _kept(self, buffer: Any) -> int:
        self.buffers.append(buffer)
        return len(self.buffers) - 1


@lru_cache(maxsize=1)
def served() -> Served:
    """What this process's session has; each session is a process of its own."""
    return Served()
