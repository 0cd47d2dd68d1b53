"""Poisoned memory in a worker: the switch of the preloaded guard.c, and what poisons every new tensor of a run."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("guard.c")
#: Bytes that memory is filled with. As floats: no number, and near the largest one; as integers: -1, and far outside.
POISONS = (0xFF, 0x7F)


def library() -> Path:
    """guard.c as a shared library, compiled once for each of its versions."""
    folder = Path(tempfile.gettempdir()) / f"dance-tvm-fuzz-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"guard-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not path.exists():
        beside = path.with_suffix(f".{os.getpid()}")
        command = [sys.executable, "-m", "ziglang", "cc", "-O2", "-shared", "-fPIC", "-o", str(beside), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
        beside.replace(path)
    return path


class Guard:
    """The preloaded library; without it (a script run by hand) memory is as it is."""

    def __init__(self) -> None:
        own = ctypes.CDLL(None)
        self._library = own if hasattr(own, "guard_on") else None

    @contextlib.contextmanager
    def on(self, byte: int) -> Iterator[None]:
        """Allocations inside are guarded and filled with ``byte``."""
        if self._library is None:
            yield
            return
        self._library.guard_on(byte)
        try:
            yield
        finally:
            self._library.guard_off()

    def guard_workspaces(self, path: Path) -> None:
        """Give the loaded library at ``path`` guarded workspaces."""
        if self._library is None:
            return
        code = ctypes.CDLL(str(path))
        for name, ours in (
            ("__TVMBackendAllocWorkspace", self._library.guard_alloc_workspace),
            ("__TVMBackendFreeWorkspace", self._library.guard_free_workspace),
        ):
            with contextlib.suppress(ValueError):  # code without workspaces lacks the name
                ctypes.c_void_p.in_dll(code, name).value = ctypes.cast(ours, ctypes.c_void_p).value

    def damaged(self) -> int:
        """Bytes written around buffers since the last call."""
        return int(self._library.guard_damaged()) if self._library is not None else 0


def poison_new_tensors(byte: Callable[[], int]) -> Callable[..., int]:
    """An instrument of TVM's virtual machine: a tensor starts as poison, also where its storage held another before."""
    import tvm

    def each_call(_function: Any, symbol: Any, before: bool, value: Any, *_arguments: Any) -> int:
        if not before and str(symbol) == "vm.builtin.alloc_tensor" and isinstance(value, tvm.runtime.Tensor):
            address, size = _bytes_of(value)
            if size:
                ctypes.memset(address, byte(), size)
        return 0

    return each_call


def _bytes_of(tensor: Any) -> tuple[int, int]:
    """Where a tensor's data lies, and how many bytes it has."""
    import numpy as np

    view = np.from_dlpack(tensor)
    return view.ctypes.data, view.nbytes
