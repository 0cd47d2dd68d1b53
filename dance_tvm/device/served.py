"""A device behind `dance_server`: artifacts run there by their own C interface, without TVM there or here."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dance_tvm.artifact.folder import LIBRARY, WEIGHTS, Artifact
from dance_tvm.artifact.staging import MANIFEST
from dance_tvm.core.errors import DanceError
from dance_tvm.core.hashing import file_sha256
from dance_tvm.device import serve
from dance_tvm.device.server_connection import Operation, ServerConnection
from dance_tvm.device.session import (
    DeviceSession,
    KernelTime,
    LoadedNetwork,
    arrange,
    kernel_table,
    merge_kernels,
    require_fit,
)

UPLOAD_CHUNK = 1 << 20
_SMALL_TIMEOUT_S = 60
_MOST_TENSORS = 64  # of a kernel, whose elements can be asked for


class ServedSession(DeviceSession):
    """A session with `dance_server`; closing it ends what is ``running`` for it."""

    def __init__(self, connection: ServerConnection) -> None:
        self.running = contextlib.ExitStack()
        self.name, self.connection = connection.name, connection
        self._threads: int | None = None
        self._abandoned: list[
            int
        ] = []  # networks that are no longer referred to; released here, between other requests
        self._facts = self._told("telling what it is", Operation.FACTS)

    def facts(self) -> dict[str, Any]:
        return dict(self._facts)

    def sensors(self) -> dict[str, Any]:
        return self._told("reading its sensors", Operation.SENSORS)

    def pin(self, cpus: list[int] | None, threads: int | None) -> None:
        chosen = cpus or []
        words = struct.pack(f"<I{len(chosen)}I", len(chosen), *chosen)
        self.connection.ask("pinning its threads", Operation.PIN, words, timeout=_SMALL_TIMEOUT_S)
        self._threads = threads or len(chosen) or None

    def _load(self, artifact: Artifact) -> LoadedNetwork:
        manifest = artifact.manifest
        require_fit(artifact, self.name, self._facts)
        while self._abandoned:
            self.connection.ask("closing a network", Operation.UNLOAD, struct.pack("<II", self._abandoned.pop(), 0))
        for name in (LIBRARY, WEIGHTS):
            if name in manifest.files:
                self._upload(artifact.path / name, manifest.files[name].sha256)
        path = artifact.path / MANIFEST
        sealed = file_sha256(path)
        self._upload(path, sealed)
        words = bytes.fromhex(sealed) + struct.pack("<II", self._threads or manifest.target.threads, 0)
        try:
            number, _ = struct.unpack("<II", self.connection.ask(f"loading {manifest.name}", Operation.LOAD, words))
        except DanceError as error:
            if "libc.so: cannot open" not in str(error):  # which only Android's loader finds
                raise
            said = "it is built for Android, and the device is none: rebuild it with --target aarch64-linux"
            raise DanceError(f"{error}; {said}") from None
        return ServedNetwork(self, artifact, number)

    def abandon(self, number: int) -> None:
        """Nobody runs the network of this number any more."""
        self._abandoned.append(number)

    def close(self) -> None:
        self.connection.close()
        self.running.close()

    def _told(self, what: str, operation: Operation) -> dict[str, Any]:
        return json.loads(self.connection.ask(what, operation, timeout=_SMALL_TIMEOUT_S))

    def _upload(self, path: Path, sha256: str) -> None:
        """Upload a file, unless it is there already; an interrupted upload resumes where it stopped."""
        size, digest = path.stat().st_size, bytes.fromhex(sha256)
        what = f"taking {path.name} ({size / 1e6:.1f} MB)"
        ask = self.connection.ask
        (offset,) = struct.unpack("<q", ask(what, Operation.HAVE, digest, struct.pack("<Q", size)))
        if offset < 0:
            return
        if self._told("telling its space", Operation.FACTS)["free_bytes"] < size - offset:
            raise DanceError(f"{self.name} has no space left for {path.name} ({size / 1e6:.1f} MB)")
        with path.open("rb") as stream:
            stream.seek(offset)
            while chunk := stream.read(UPLOAD_CHUNK):
                ask(what, Operation.APPEND, digest, struct.pack("<Q", offset), chunk)
                offset += len(chunk)
        ask(what, Operation.FINISH, digest)


class ServedNetwork(LoadedNetwork):
    """A network that `dance_server` holds under a number."""

    def __init__(self, session: ServedSession, artifact: Artifact, number: int) -> None:
        self.manifest = artifact.manifest
        self._session, self._connection, self._number = session, session.connection, number
        self._wants = False

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        data = self._with_inputs("running", Operation.RUN, 0, inputs)[-1]
        results, at = {}, 0
        for tensor in self.manifest.outputs:
            dtype = _dtype(tensor.dtype)
            count = math.prod(tensor.shape)
            results[tensor.name] = np.frombuffer(data, dtype, count, at).reshape(tensor.shape).copy()
            at += count * dtype.itemsize
        return results

    def _time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        self._with_inputs("warming up", Operation.TIME, 1, inputs)
        spent = self._with_inputs("being timed", Operation.TIME, repeats, inputs)[-1]
        return [1e-9 * float(each) for each in np.frombuffer(spent, "<i8")]

    def step_names(self) -> list[str]:
        """The symbols of a call's kernels in their order."""
        return self._ask("telling its kernels", Operation.NAMES).decode().splitlines()

    def step_seconds(self, inputs: Mapping[str, np.ndarray], repeats: int) -> np.ndarray:
        """Seconds of each kernel of each call, (repeats, kernels)."""
        spent = self._with_inputs("being timed", Operation.PROFILE, repeats, inputs)[-1]
        return 1e-9 * np.frombuffer(spent, "<i8").reshape(repeats, -1)

    def _kernels(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[KernelTime]:
        names = self.step_names()
        timed: list[list[dict[str, Any]]] = []
        if repeats:
            self._with_inputs("warming up", Operation.TIME, 1, inputs)
            timed = [
                [{"symbol": name, "seconds": float(each)} for name, each in zip(names, row, strict=True)]
                for row in self.step_seconds(inputs, repeats)
            ]
        table = kernel_table(self.manifest)
        if not self._wants:
            masks = struct.pack(f"<{len(names)}Q", *(_wanted(table.get(name)) for name in names))
            self._ask("taking the table of kernels", Operation.WANT, masks)
            self._wants = True
        *parts, _ = self._with_inputs("looking at kernels", Operation.LOOK, 0, inputs)
        return merge_kernels(timed, [_looked_at(part, table) for part in parts])

    def peak_memory(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        (may,) = struct.unpack("<q", self._connection.ask("resetting its peak memory", Operation.RESET_PEAK))
        if not may:
            return None
        self.run(inputs)
        (found,) = struct.unpack("<q", self._connection.ask("telling its peak memory", Operation.PEAK))
        return None if found < 0 else int(found)

    def __del__(self) -> None:
        self._session.abandon(self._number)

    def _ask(self, what: str, operation: Operation, data: bytes = b"") -> bytes:
        return self._connection.ask(what, operation, struct.pack("<II", self._number, 0), data)

    def _with_inputs(self, what: str, operation: Operation, runs: int, inputs: Mapping[str, np.ndarray]) -> list[bytes]:
        values = arrange(self.manifest, inputs)
        arrays = [np.ascontiguousarray(each).reshape(-1).view("uint8").data for each in values]
        head = struct.pack("<II", self._number, runs)
        return self._connection.ask_parts(what, operation, head, *arrays)


def _wanted(kernel: Mapping[str, Any] | None) -> int:
    """Of which of a kernel's tensors `serve.looked_at` reads the elements, as a mask: of inputs and weights it needs
    the shapes alone, and of kernels other than convolutions nothing."""
    if kernel is None or kernel["kind"] != serve.CONVOLUTION:
        return 0
    shapes_alone = {"x", "weights", kernel.get("second", {}).get("weights")}
    operands = kernel["operands"][:_MOST_TENSORS]
    return sum(1 << at for at, name in enumerate(operands) if name not in shapes_alone)


def _looked_at(part: bytes, table: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What one kernel of a run read and wrote, from a part of the reply (`look_at_kernel` in `server/session.c`)."""
    count, length = struct.unpack_from("<II", part)
    at = 8 + length
    symbol = part[8:at].decode()
    tensors = []
    for _ in range(count):
        kind, bits, rank, has_data = struct.unpack_from("<4i", part, at)
        shape = struct.unpack_from(f"<{rank}q", part, at + 16)
        at += 16 + 8 * rank
        size = math.prod(shape) * ((bits + 7) // 8) if has_data else 0
        tensors.append(serve.seen(kind, bits, shape, memoryview(part)[at : at + size] if has_data else None))
        at += size
    return {"symbol": symbol, "seconds": 0.0, **serve.looked_at(table.get(symbol), tensors)}


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
