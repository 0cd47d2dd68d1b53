"""TVM's RPC server with what a measurement needs beside it: run it on a board, `python serve.py --help`.

One file that needs TVM's runtime, numpy and nothing of this package, so that it can be copied to a device. Over TVM's
own server it adds an upload store keyed by content hash, the look at each kernel's tensors, peak memory and sensors.
RPC executes whatever it is sent: it binds to 127.0.0.1 unless told otherwise. TVM is imported where it is used: this
machine's programs are measured by the same functions without it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

if __name__ == "__main__":  # a device needs no compiler, and starts twice as fast without
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")

import numpy as np

PROTOCOL = 4
READY = "dance-tvm device ready on port "
_PR_SET_PDEATHSIG = 1
CONVOLUTION = "convolution"  # the kind of kernel whose executed work is counted
_SHARE_ALL_CORES = -3  # TVM's affinity mode: the pool's threads may move among the given cores
log = logging.getLogger("dance_tvm.serve")


class Store:
    """Uploaded files by SHA-256; a file cut off stays as `<sha>.part` and is continued by the next upload."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(folder)

    def path(self, sha256: str) -> str:
        """Where the whole file stands (whether or not it is there)."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ValueError(f"not a SHA-256: {sha256}")
        return str(self.folder / f"{sha256}.so")

    def have(self, sha256: str, total: int) -> int:
        """How many of the `total` bytes are here; -1 if the whole file is."""
        whole, part = Path(self.path(sha256)), Path(self.path(sha256) + ".part")
        if whole.exists() and whole.stat().st_size == total:
            os.utime(whole)
            return -1
        return part.stat().st_size if part.exists() else 0

    def append(self, sha256: str, offset: int, data: bytes) -> int:
        """Write `data` at `offset` and give the new size; an error of the disk leaves the part as it was."""
        part = Path(self.path(sha256) + ".part")
        with open(part, "r+b" if part.exists() else "wb") as stream:
            stream.seek(offset)
            try:
                stream.write(data)
                stream.flush()
                stream.truncate()
            except OSError:
                stream.truncate(offset)
                raise
        return offset + len(data)

    def finish(self, sha256: str) -> None:
        """Verify the part and give it its name; a wrong one is removed."""
        part = Path(self.path(sha256) + ".part")
        with open(part, "rb") as stream:
            found = _sha256(stream)
        if found != sha256:
            part.unlink()
            raise ValueError("the uploaded file arrived damaged")
        part.rename(self.path(sha256))
        self._forget_oldest(keep=sha256)

    def _forget_oldest(self, keep: str) -> None:
        files = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
        excess = sum(path.stat().st_size for path in files) - self.limit_bytes
        for path in files:
            if excess <= 0:
                return
            if not path.name.startswith(keep):
                excess -= path.stat().st_size
                path.unlink()


def require_own(folder: Path) -> None:
    """Raise PermissionError unless the folder, and the link to it, are ours and only we may write: what lies in it is
    loaded as a program."""
    if {folder.lstat().st_uid, folder.stat().st_uid} != {os.geteuid()}:
        raise PermissionError(f"the store {folder} belongs to another user: give --store another folder")
    if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to the store {folder}: `chmod go-w {folder}`, or give another --store")


def default_store() -> Path:
    """A folder in the user's cache, else, where there is no home, one in the folder for temporary files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dance_tvm" / "store"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / f"dance_tvm_store_{os.getuid()}"
    return cache


class Seen(np.ndarray):
    """An array that is read as TVM's tensors are."""

    @classmethod
    def of(cls, array: np.ndarray) -> Seen:
        """The same memory."""
        return array.view(cls)

    def numpy(self) -> np.ndarray:
        """The array itself."""
        return self.view(np.ndarray)


class _View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
    )

    def array(self) -> Seen:
        """The tensor's memory."""
        shape = tuple(self.shape[: self.rank])
        size = int(np.prod(shape, dtype="int64")) * ((self.bits + 7) // 8)
        memory = (ctypes.c_char * size).from_address(self.data) if size else b""
        return seen(self.kind, self.bits, shape, memoryview(memory))


def seen(kind: int, bits: int, shape: tuple[int, ...], memory: memoryview | None) -> Seen:
    """A tensor of a `dance_kind` as it lies in memory; bfloat16, which numpy does not have, as float32; where no memory
    is given, something of its shape and type."""
    name = {0: "int", 1: "uint", 2: "float", 4: "uint", 6: "bool"}[kind]
    dtype = np.dtype(name if name == "bool" else f"{name}{bits}")
    array = (
        np.broadcast_to(np.zeros((), dtype), shape) if memory is None else np.frombuffer(memory, dtype).reshape(shape)
    )
    return Seen.of((array.astype("uint32") << 16).view("float32") if kind == 4 else array)


Kernels = dict[str, dict[str, Any]]  # what an artifact's manifest says of its kernels, by symbol


class Watcher:
    """What each kernel of a program read and wrote (`dance_model.h`, watch)."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.calls: list[dict[str, Any]] = []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_View), ctypes.c_int32)
        self.function = kind(self._each_call)

    def address(self) -> int:
        """Of the function that a program is to call."""
        return ctypes.cast(self.function, ctypes.c_void_p).value or 0

    def _each_call(self, _context: object, kernel: bytes, views: Any, count: int) -> None:
        symbol = kernel.decode()
        tensors = [views[index].array() for index in range(count)]
        self.calls.append({"symbol": symbol, "seconds": 0.0, **looked_at(self.kernels.get(symbol), tensors)})

    def read(self) -> str:
        """The calls since the last reading, in order, as JSON."""
        calls, self.calls = self.calls, []
        return json.dumps(calls)


def looked_at(kernel: dict[str, Any] | None, tensors: list[Any]) -> dict[str, Any]:
    """Bytes of a call's tensors; of a convolution what its index lists kept, and means of what it wrote.

    `kernel` is what the manifest says of it: its `kind`, its `operands` in order, of Winograd's the `tile` and
    whether its lists are `by_frame`, and of one without lists its `macs`, or its `taps` where masks leave outputs out.
    """
    size = sum(int(np.prod(tensor.shape, dtype="int64")) * np.dtype(str(tensor.dtype)).itemsize for tensor in tensors)
    if kernel is None or kernel["kind"] != CONVOLUTION:
        return {"bytes": size}
    named = dict(zip(kernel["operands"], tensors, strict=True))
    if (found := executed(kernel, named)) is None:
        return {"bytes": size}
    work, alive, channels = found
    written = result_of(kernel, named)[alive]  # (positions, C): elsewhere nothing was written that is read
    values = written if channels is None else written[:, channels]
    means = {}
    if values.size:
        means = {"mean": float(values.mean(dtype="float64")), "mean_size": float(np.abs(values).mean(dtype="float64"))}
    return {"bytes": size, "work": work, **means}


def result_of(kernel: dict[str, Any], named: dict[str, Any]) -> np.ndarray:
    """What a layer wrote (N, T, H, W, C); a kernel's of `planar` tensors has channels first."""
    written: np.ndarray = named["y"].numpy()
    return np.moveaxis(written, 1, -1) if kernel.get("planar") else written


def executed(kernel: dict[str, Any], named: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, Any] | None:
    """What a convolution, whose tensors are `named` by its operands, executed (see `_work`), and which of what it wrote
    it computed; None where that cannot be told."""
    found, pool = _executed(kernel, named), kernel.get("pool")
    if found is None or not pool:
        return found
    work, alive, channels = found
    for axis, size in enumerate(pool, 1):
        alive = np.maximum.reduce(alive.reshape(*alive.shape[:axis], -1, size, *alive.shape[axis + 1 :]), axis + 1)
    return work, alive, channels


def _executed(kernel: dict[str, Any], named: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, Any] | None:
    """The same of the convolution's own outputs, whatever is behind it."""
    if kernel.get("second") and int(named["decision"].numpy()[0]):
        return _work({own: named[name] for own, name in kernel["second"].items()}, {"pool": kernel.get("pool")})
    if "counts" in named:
        return _work(named, kernel)
    if kernel.get("taps"):
        return _masked_work(named, kernel)
    macs = kernel.get("macs")
    if macs is None:
        return None
    sizes = _computed(kernel, named["y"])
    return _without_lists(macs, 1.0, np.ones([sizes[0], *sizes[2:]] if kernel.get("planar") else sizes[:4], bool))


def _computed(kernel: dict[str, Any], y: Any) -> list[int]:
    """Shape of a convolution's result (N, T, H, W, C) before the `pool` behind it, if there is one."""
    pool = [1, *(kernel.get("pool") or [1, 1, 1]), 1]
    return [int(extent) * size for extent, size in zip(y.shape, pool, strict=True)]


def _work(named: dict[str, Any], kernel: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
    """What a convolution executed, and which frames, positions and channels its lists kept.

    `share` is what was left of the dense layer's multiply-accumulates before padding is taken off. `named` are the
    tensors by the operands' names (docs/kernels.md): x (N, T, H, W, C), weights (..., depth, channels), lists,
    y (N, T, H, W, C); only Winograd's `kernel` has a `tile`.
    Also gives which positions (N, T, H, W) were computed, and which channels of them where a list says.
    """
    shape, tile = _computed(kernel, named["y"]), kernel.get("tile")
    rows_by_tap, alive = _winograd_rows(named, kernel, shape) if tile else _gathered_rows(named, shape)
    channels_in, channels_out = float(named["x"].shape[-1]), float(shape[-1])
    if "column_starts" in named:
        columns = named["column_places" if tile else "columns"]
        macs = _kernel_group_macs(rows_by_tap, named["weights"], named["column_starts"], columns, shape[-1])
        kept_in = kept_out = channels = None
    else:
        depth = int(named["weights"].shape[-2])
        live_in, _ = _listed(named, "in_channels", len(rows_by_tap), depth)
        live_out, channels = _listed(named, "out_channels", len(rows_by_tap), shape[-1])
        macs = int((rows_by_tap.sum(1) * live_in * live_out).sum())
        kept_in, kept_out = float(np.mean(live_in)) / depth, float(np.mean(live_out)) / channels_out
        channels_in = depth
    taps = rows_by_tap.shape[1]
    rows = _rows_of_tiles(tile, shape) * int(_planes(named).max()) if tile else int(np.prod(shape[:4]))
    kept = {
        "macs": None if tile else macs,
        "share": macs / (rows * taps * channels_in * channels_out),
        "positions": float(alive.mean()),
        "frames": float(alive.reshape(shape[0] * shape[1], -1).any(1).mean()),
        "channels_in": kept_in,
        "channels_out": kept_out,
        "shape": shape[1:4],
        "alive": base64.b64encode(zlib.compress(np.packbits(alive[0]).tobytes())).decode(),
    }
    return kept, alive, channels


def _masked_work(named: dict[str, Any], kernel: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, None]:
    """The same of a convolution that asks the masks of its outputs itself: out_frames (N, T) and positions
    (N or 1, T or 1, H, W). Its `taps`: how many each output along an axis reads inside the clip."""
    shape = _computed(kernel, named["y"])
    alive = np.ones(shape[:4], bool)
    if "out_frames" in named:
        alive &= (named["out_frames"].numpy() != 0)[:, :, None, None]
    if "positions" in named:
        alive &= named["positions"].numpy() != 0
    pairs = int(np.einsum("ntyx,t,y,x->", alive.astype("int64"), *kernel["taps"]))
    every_tap = int(np.prod(shape[:4])) * int(named["weights"].shape[1])
    channels = int(named["x"].shape[-1]) * shape[-1]
    return _without_lists(pairs * channels, pairs / every_tap, alive)


def _without_lists(macs: int, share: float, alive: np.ndarray) -> tuple[dict[str, Any], np.ndarray, None]:
    """The same of a convolution that walks no lists and computed the positions `alive` with all channels."""
    kept = {
        "macs": macs,
        "share": share,
        "positions": float(alive.mean()),
        "frames": float(alive.any((2, 3)).mean()),
        "channels_in": 1.0,
        "channels_out": 1.0,
        "shape": list(alive.shape[1:]),
        "alive": base64.b64encode(zlib.compress(np.packbits(alive[0]).tobytes())).decode(),
    }
    return kept, alive, None


def _listed(named: dict[str, Any], name: str, samples: int, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """How many channels of each sample a list names, and which of the first sample; all where there is no list."""
    if name not in named:
        return np.full(samples, channels), None
    listed = named[name].numpy()
    return listed[:, 0], listed[0, 1 : 1 + listed[0, 0]]


def _gathered_rows(named: dict[str, Any], shape: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows that read each tap by sample, and the positions that were computed.

    Lists: rows_out (samples, tiles, mr), segments (samples, segments, 4), blocks and counts (samples, 4). The last tile
    of a class repeats its last row.
    """
    names = ("tap_entries", "rows_out", "segments", "blocks", "counts")
    taps, rows_out, segments, blocks, counts = (named[name].numpy() for name in names)
    by_tap = np.zeros((len(counts), int(taps[:, 0].max()) + 1), "int64")
    alive = np.zeros(int(np.prod(shape[:4])), bool)
    for sample, (count, tiles) in enumerate(counts[:, :2]):
        used = np.sort(rows_out[sample, :tiles], axis=1)
        alive[used.ravel()] = True
        before = np.concatenate([[0], np.cumsum(1 + (np.diff(used, axis=1) != 0).sum(1))])
        for first, last, begin, end in segments[sample, : blocks[sample, count]]:
            np.add.at(by_tap[sample], taps[first:last, 0], before[end] - before[begin])
    return by_tap, alive.reshape(shape[:4])


def _winograd_rows(named: dict[str, Any], kernel: dict[str, Any], shape: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same for Winograd's tiles: columns (chunks, columns), rows_out, runs (chunks, runs, 5) with their sample,
    counts (chunks + 1, 3) of inputs, tiles and runs; the last row counts the chunks. Each frame is a clip of its own
    where `kernel` says so. A row counts once for each of its planes (see `_planes`)."""
    names = ("tap_entries", "columns", "rows_out", "runs", "counts")
    taps, columns, rows_out, runs, counts = (named[name].numpy() for name in names)
    deep, tall, wide = kernel["tile"]
    batch, frames, height, width = shape[:4]
    places = -(-height // tall), -(-width // wide)
    clips = (batch * frames, 1) if kernel["by_frame"] else (batch, -(-frames // deep))
    alive = np.zeros((*clips, *places), bool)
    chunks = counts[: counts[-1, 0]]
    listed = [int(named[name].shape[0]) for name in ("in_channels", "out_channels") if name in named]
    seen = [1 + int(runs[chunk, :count, 4].max(initial=0)) for chunk, (_, _, count) in enumerate(chunks)]
    samples = max([1, *listed, *seen])  # one that nobody reads has no runs
    planes = _planes(named)
    by_tap = np.zeros((samples, int(taps[:, 0].max()) + 1), "int64")
    for chunk, (_, tiles, count) in enumerate(chunks):
        used = rows_out[chunk, :tiles]
        before = np.concatenate([[0], np.cumsum((used >= 0).sum(1))])
        for first, last, begin, end, sample in runs[chunk, :count]:
            np.add.at(by_tap[sample], taps[first:last, 0], (before[end] - before[begin]) * planes[first:last])
        frame, index = np.divmod(used[used >= 0], columns.shape[1])
        clip, place = np.divmod(columns[chunk, index], places[0] * places[1])
        alive[clip, frame, place // places[1], place % places[1]] = True
    alive = alive.reshape(batch, -1, *places)
    enlarged = alive.repeat(deep, axis=1).repeat(tall, axis=2).repeat(wide, axis=3)[:, :frames, :height, :width]
    return by_tap, enlarged


def _planes(named: dict[str, Any]) -> np.ndarray:
    """How many planes of a row each entry of a Winograd kernel's taps computes, those of `tap_planes`, bit by bit; 1
    where none are told apart."""
    if "tap_planes" not in named:
        return np.ones(len(named["tap_entries"].numpy()), "int64")
    return np.array([bin(bits).count("1") for bits in named["tap_planes"].numpy()], "int64")


def _kernel_group_macs(rows_by_tap: np.ndarray, weights: Any, starts: Any, columns: Any, filters: int) -> int:
    """column_starts (samples or 1, groups, taps + 1): a group's entries of a tap, each for a run of columns, and each
    column for as many filters as one group has, the last one what is left of them."""
    entries = np.diff(starts.numpy().astype("int64"), axis=2)[..., : rows_by_tap.shape[1]]
    run, wide = int(weights.shape[-2]) // int(columns.shape[-1]), int(weights.shape[-1])
    of_group = np.clip(filters - wide * np.arange(entries.shape[1]), 0, wide)
    by_tap = (entries * of_group[:, None]).sum(1)  # (samples or 1, taps)
    return run * int((rows_by_tap * by_tap).sum())


def _rows_of_tiles(tile: list[int], shape: list[int]) -> int:
    tiles = [-(-extent // size) for extent, size in zip(shape[1:4], tile, strict=True)]
    return shape[0] * tiles[0] * tiles[1] * tiles[2]


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def describe() -> dict[str, Any]:
    """What this device is."""
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "cpu_features": _cpu_features(),
        "tvm": _tvm_version(),
    }


def _tvm_version() -> str:
    """Without loading it, as this machine's programs need none; empty where there is none."""
    try:
        return version("apache-tvm")
    except PackageNotFoundError:
        return getattr(sys.modules.get("tvm"), "__version__", "")


def facts(store: Store) -> str:
    """What this device is and how much it can take, as JSON."""
    return json.dumps({**describe(), "protocol": PROTOCOL, "free_bytes": shutil.disk_usage(store.folder).free})


def _cpu_features() -> list[str]:
    name = "Features" if platform.machine() == "aarch64" else "flags"  # an emulator may show its host's file
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].split()
    return []


def peak_memory() -> int:
    """Largest resident memory in bytes since the session began or since the last call; -1 if unknown."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return -1


def reset_peak_memory() -> int:
    """Begin a new peak; 1 if the kernel lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return 1


def sensors() -> str:
    """Clocks in kHz, governors, temperatures in millidegrees and energy counters, as JSON; what cannot be read is
    missing."""
    cpus = Path("/sys/devices/system/cpu")
    state: dict[str, dict[str, Any]] = {
        "khz": {},
        "max_khz": {},
        "governor": {},
        "millidegrees": {},
        "microjoules": {},
        "most_microjoules": {},
        "milliwatts": {},
    }
    for folder in sorted(cpus.glob("cpu[0-9]*/cpufreq")):
        cpu = folder.parent.name
        for key, name in [
            ("khz", "scaling_cur_freq"),
            ("max_khz", "cpuinfo_max_freq"),
            ("governor", "scaling_governor"),
        ]:
            if text := _read(folder / name):
                state[key][cpu] = text if key == "governor" else int(text)
    for folder in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        if (text := _read(folder / "temp")).lstrip("-").isdigit():
            state["millidegrees"][_read(folder / "type") or folder.name] = int(text)
    state.update(_energy_counters(Path("/sys/class/powercap")))
    state["milliwatts"] = _rails(Path("/sys/class/hwmon"))
    return json.dumps(state)


def _energy_counters(folder: Path) -> dict[str, dict[str, int]]:
    """What each RAPL counter reads, and after how much it begins again, which differs between processors."""
    state: dict[str, dict[str, int]] = {"microjoules": {}, "most_microjoules": {}}
    for counter in sorted(folder.glob("intel-rapl:*")):
        if counter.name.count(":") != 1:  # a part of a package, counted with it
            continue
        name = _read(counter / "name") or counter.name
        for key, file in [("microjoules", "energy_uj"), ("most_microjoules", "max_energy_range_uj")]:
            if (text := _read(counter / file)).isdigit():
                state[key][name] = int(text)
    return state


def _rails(folder: Path) -> dict[str, float]:
    """Milliwatts by rail of the INA3221 monitors that a Jetson has: volts times amperes."""
    rails = {}
    for monitor in sorted(folder.glob("hwmon*")):
        for rail in (1, 2, 3) if _read(monitor / "name") == "ina3221" else ():
            volts, amperes = _read(monitor / f"in{rail}_input"), _read(monitor / f"curr{rail}_input")
            if volts.isdigit() and amperes.isdigit():
                rails[_read(monitor / f"in{rail}_label") or f"rail {rail}"] = int(volts) * int(amperes) / 1000
    return rails


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def pin(choice: str) -> None:
    """Run this session by a JSON object: `cpus` is a list of CPUs or null for all, `threads` a number or null."""
    wanted = json.loads(choice)
    cpus = wanted["cpus"] or sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus)
    import tvm

    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(_SHARE_ALL_CORES, wanted["threads"] or len(cpus), [str(cpu) for cpu in cpus])


def opencl(what: str, *arguments: Any) -> Any:
    """Kernels through OpenCL where TVM's runtime has none: the one thing here that needs the package, and pyopencl."""
    from dance_tvm.device.opencl_server import served

    return getattr(served(), what)(*arguments)


def register(store: Store) -> None:
    """Offer the functions to sessions, under names that begin with `dance.`."""
    import tvm_ffi

    kernels: Kernels = {}
    watcher = Watcher(kernels)

    def describe_kernels(table: str) -> None:
        kernels.clear()
        kernels.update(json.loads(table))

    offered: dict[str, Any] = {
        "facts": lambda: facts(store),
        "store.path": store.path,
        "store.have": store.have,
        "store.append": store.append,
        "store.finish": store.finish,
        "kernels.describe": describe_kernels,
        "watcher.address": watcher.address,
        "watcher.read": watcher.read,
        "peak_memory": peak_memory,
        "reset_peak_memory": reset_peak_memory,
        "sensors": sensors,
        "pin": pin,
        "opencl": opencl,
    }
    for name, function in offered.items():
        tvm_ffi.register_global_func(f"dance.{name}", function, override=True)


def end_with_parent_process() -> None:
    """A session's process ends with the server, also where the server is killed in the middle of a run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_pipe(descriptor: int) -> None:
    """End this process as soon as whoever started it is gone: its end of our standard input closes then.

    By a signal, not a thread: a process that qemu emulates and that forks while it has threads gives its child few.
    """

    def look(*_signal: object) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(descriptor, 4096):
                pass
            os._exit(0)

    os.set_blocking(descriptor, False)
    signal.signal(signal.SIGIO, look)
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    look()  # it may be closed by now


def serve(listening: socket.socket, key: str, tracker: tuple[str, int] | None, address: str | None) -> None:
    """Serve one session after the other, for ever: neither a crashed session nor a lost tracker ends the server."""
    from tvm.rpc import server as tvm_server

    port = listening.getsockname()[1]
    home = os.getcwd()
    while True:
        try:
            os.chdir(home)  # a session that crashed leaves us in its folder, which is gone
            tvm_server._listen_loop(listening, port, key, tracker, "", address)
        except Exception as error:  # a session's crash is reported to its client by the closed connection
            log.warning("a session ended badly: %s", error)
            time.sleep(0.1)


def load_runtime_extra() -> None:
    """MetaSchedule's remote runner needs functions of this library."""
    import tvm

    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_extra.so"
    if library.exists():
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to")
    parser.add_argument("--port", type=int, default=0, help="port to bind to; 0 takes a free one and prints it")
    parser.add_argument("--tracker", help="HOST:PORT of a TVM RPC tracker to register with")
    parser.add_argument("--key", default="", help="the device's kind, by which a tracker finds it")
    parser.add_argument("--custom-addr", help="address to tell the tracker, where it differs from the one it sees")
    parser.add_argument("--store", type=Path, help="folder for uploads (default: in the user's cache folder)")
    parser.add_argument("--store-limit", type=int, default=2 << 30, help="bytes of uploads to keep")
    parser.add_argument("--end-with-stdin", action="store_true", help="end when standard input closes")
    options = parser.parse_args()
    tracker = None
    if options.tracker:
        host, _, port = options.tracker.rpartition(":")
        if not host or not port.isdecimal():
            parser.error("--tracker is HOST:PORT")
        tracker = (host, int(port))
        if not options.key:
            parser.error("--tracker needs a --key")
    try:
        store = Store(options.store or default_store(), options.store_limit)
    except OSError as error:
        parser.error(str(error))
    os.register_at_fork(after_in_child=end_with_parent_process)
    load_runtime_extra()
    register(store)
    try:
        listening = socket.create_server((options.host, options.port), backlog=16)
    except (OSError, OverflowError) as error:
        parser.error(f"{options.host}:{options.port} is not to be had ({error}): choose another --port")
    if options.end_with_stdin:
        end_with_pipe(sys.stdin.fileno())
    print(f"{READY}{listening.getsockname()[1]}", flush=True)
    serve(listening, options.key, tracker, options.custom_addr)


if __name__ == "__main__":
    main()
