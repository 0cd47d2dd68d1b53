"""An artifact's C interface from Python, with only numpy: one file that can be copied to a server.

    model = Model("artifacts/mine")
    scores = model.run({"clip": clip})["scores"]

`dance_model.h` says what each function promises. A model runs one call at a time: calls from several threads wait for
one another. Several models may run at once in several threads, and share their weights (`Model(..., share=other)`).
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1
_SEAL = b"dance:1\n"  # a library ends with this mark and a checksum
_SEAL_BYTES = 16
_OK = 0
_ERROR_BYTES = 512
_ALIGNMENT = 64
_NAMES = {0: "int", 1: "uint", 2: "float"}
_BFLOAT, _BOOL = 4, 6


class ModelError(Exception):
    """What the library said, in its words."""


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("bytes", ctypes.c_size_t),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("threads", ctypes.c_int32),
        ("weights_path", ctypes.c_char_p),
        ("weights_fd", ctypes.c_int),
        ("weights_offset", ctypes.c_int64),
        ("weights_length", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("weights_bytes", ctypes.c_size_t),
        ("share", ctypes.c_void_p),
        ("cpus", ctypes.POINTER(ctypes.c_int32)),
        ("cpu_count", ctypes.c_int32),
        ("verified", ctypes.c_int32),
        ("driver", ctypes.c_char_p),
        ("device", ctypes.c_char_p),
    ]


class _LayerTime(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_char_p), ("calls", ctypes.c_int64), ("nanoseconds", ctypes.c_int64)]


class _View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
    ]


_LIST = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(ctypes.POINTER(_Tensor)))
_POINTERS = ctypes.POINTER(ctypes.c_void_p)
_WATCHER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_View), ctypes.c_int32)


class _Api(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("describe", ctypes.CFUNCTYPE(ctypes.c_char_p)),
        ("inputs", _LIST),
        ("outputs", _LIST),
        ("create", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Options), ctypes.c_char_p, ctypes.c_size_t)),
        ("run", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, _POINTERS, _POINTERS)),
        ("step", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)),
        ("reset", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)),
        ("profile", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)),
        ("layers", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.POINTER(_LayerTime)))),
        ("cancel", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("error", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)),
        ("memory", ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)),
        ("destroy", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("watch", ctypes.CFUNCTYPE(None, ctypes.c_void_p, _WATCHER, ctypes.c_void_p)),
        (
            "time",
            ctypes.CFUNCTYPE(
                ctypes.c_int, ctypes.c_void_p, _POINTERS, _POINTERS, ctypes.c_int32, ctypes.POINTER(ctypes.c_int64)
            ),
        ),
        (
            "work",
            ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64))),
        ),
    ]


class Model:
    """A model of the artifact in `folder`, ready to run on `threads` (None: as it was built for).

    `cpus`: the processors its threads stay on. `share`: another model of the same artifact, whose weights it uses.
    Of a network for a GPU, `driver` is the path of the driver's library and `device` a part of the GPU's name, where
    not the system's driver and its first GPU are meant. The library is verified before it is loaded, and the weights
    are, unless the caller has done so (`verified`). Raises ModelError where the folder has no library with a C
    interface, it or its weights are damaged or do not belong together, or there is no GPU that it runs on.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        threads: int | None = None,
        *,
        cpus: list[int] | None = None,
        share: Model | None = None,
        verified: bool = False,
        driver: str | None = None,
        device: str | None = None,
    ) -> None:
        self._model: int | None = None
        #: Held by each call; hold it over several that belong together.
        self.lock = threading.RLock()
        self._guard = threading.Lock()  # of the handle, which `cancel` and `share` use while a call is under way
        self._showing = False  # whether `watch` is in its caller's function, by the thread that holds `lock`
        self._api = _api_of(Path(folder, "model.so"))
        self.inputs = _listed(self._api.inputs)
        self.outputs = _listed(self._api.outputs)
        weights = Path(folder, "weights.safetensors")
        options = _Options(
            size=ctypes.sizeof(_Options),
            threads=threads or 0,
            weights_path=os.fsencode(weights) if weights.exists() else None,
            cpus=(ctypes.c_int32 * len(cpus))(*cpus) if cpus else None,
            cpu_count=len(cpus or ()),
            verified=int(verified),
            driver=os.fsencode(driver) if driver else None,
            device=device.encode() if device else None,
        )
        said = ctypes.create_string_buffer(_ERROR_BYTES)
        if share:
            with share._guard:
                options.share = share._opened()
                self._model = self._api.create(ctypes.byref(options), said, _ERROR_BYTES)
        else:
            self._model = self._api.create(ctypes.byref(options), said, _ERROR_BYTES)
        if not self._model:
            raise ModelError(said.value.decode(errors="replace"))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name. Raises ModelError for a missing, unexpected or misshapen input."""
        given, results = self._given(inputs), self._room()
        with self._calling() as model:
            self._require(self._api.run(model, _addresses(given), _addresses(list(results.values()))))
        return results

    def time(self, inputs: Mapping[str, np.ndarray], runs: int) -> list[float]:
        """Seconds of each of this many runs. Raises ModelError for a number below 0."""
        if runs < 0:
            raise ModelError(f"runs must be 0 or more, not {runs}")
        given, results, found = self._given(inputs), list(self._room().values()), (ctypes.c_int64 * runs)()
        with self._calling() as model:
            self._require(self._api.time(model, _addresses(given), _addresses(results), runs, found))
        return [1e-9 * nanoseconds for nanoseconds in found]

    def watch(
        self, inputs: Mapping[str, np.ndarray], seen: Callable[[str, list[np.ndarray]], None]
    ) -> dict[str, np.ndarray]:
        """`run`, and after each kernel `seen` with its name and tensors, inputs first, which later ones overwrite.

        What `seen` raises ends the run and is raised here. Of this model it may only call `cancel`.
        """
        raised: list[BaseException] = []

        def each(_context: object, kernel: bytes, views: Any, count: int) -> None:
            self._showing = True
            try:
                seen(kernel.decode(), [_array(views[index]) for index in range(count)])
            except BaseException as error:  # which C could not pass on
                raised.append(error)
                self.cancel()
            finally:
                self._showing = False

        watcher = _WATCHER(each)
        with self._calling() as model:
            self._api.watch(model, watcher, None)
            try:
                results = self.run(inputs)
            except ModelError:
                if not raised:
                    raise
            finally:
                self._api.watch(model, _WATCHER(), None)
        if raised:
            raise raised[0]
        return results

    def _given(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if not isinstance(inputs, Mapping):
            raise ModelError(f"run takes a dict of arrays by input name, not a {type(inputs).__name__}")
        if set(inputs) != set(self.inputs):
            raise ModelError(f"the inputs are {', '.join(self.inputs)}, not {', '.join(inputs) or 'none'}")
        return [_fitting(name, inputs[name], kind) for name, kind in self.inputs.items()]

    def _room(self) -> dict[str, np.ndarray]:
        return {name: _room(*kind) for name, kind in self.outputs.items()}

    def step(self, frame: np.ndarray) -> np.ndarray:
        """One frame of a stream, the network's first input: its first output; the state stays in the model."""
        name, kind = next(iter(self.inputs.items()))
        given, result = _fitting(name, frame, kind), _room(*next(iter(self.outputs.values())))
        with self._calling() as model:
            self._require(self._api.step(model, given.ctypes.data, result.ctypes.data))
        return result

    def reset(self) -> None:
        """Forget every frame seen."""
        with self._calling() as model:
            self._require(self._api.reset(model))

    def profile(self, on: bool = True) -> None:
        """Forget times and work of kernels, and take them from here on."""
        with self._calling() as model:
            self._require(self._api.profile(model, int(on)))

    def layers(self) -> list[tuple[str, int, int]]:
        """Kernel, calls and nanoseconds of each step, in the order of their calls."""
        times = ctypes.POINTER(_LayerTime)()
        with self._calling() as model:
            count = self._api.layers(model, ctypes.byref(times))
            return [(times[each].kernel.decode(), times[each].calls, times[each].nanoseconds) for each in range(count)]

    def work(self) -> list[int | None]:
        """Multiply-accumulates that each step executed, in the order of `layers`; None where it is no convolution.

        Raises ModelError for a library that was built before it counted them.
        """
        if self._api.size <= _Api.work.offset:
            raise ModelError("the library does not count work: build it anew")
        macs = ctypes.POINTER(ctypes.c_int64)()
        with self._calling() as model:
            count = self._api.work(model, ctypes.byref(macs))
            return [None if macs[each] < 0 else macs[each] for each in range(count)]

    def cancel(self) -> None:
        """End the call under way in another thread, which raises ModelError there."""
        with self._guard:
            self._api.cancel(self._opened())

    def memory(self) -> int:
        """Bytes that the model holds; weights that it shares are left out."""
        with self._calling() as model:
            return int(self._api.memory(model))

    def describe(self) -> str:
        """The network, its target and versions, in one line."""
        return self._api.describe().decode()

    def close(self) -> None:
        """Give memory and threads back, once a call under way in another thread has ended; may be called twice."""
        with self.lock, self._guard:
            if self._model:
                self._require_idle()
                self._api.destroy(self._model)
                self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @contextmanager
    def _calling(self) -> Iterator[int]:
        """The handle, for one thread alone. Raises ModelError where the model is closed."""
        with self.lock:
            self._require_idle()
            yield self._opened()

    def _require_idle(self) -> None:
        if self._showing:
            raise ModelError("the model is under way and shows a kernel: call or close it once watch has ended")

    def _opened(self) -> int:
        if not self._model:
            raise ModelError("the model is closed: make a new one")
        return self._model

    def _require(self, code: int) -> None:
        if code != _OK:
            raise ModelError(self._api.error(self._model).decode(errors="replace"))


def _api_of(library: Path) -> _Api:
    try:
        written = library.stat()
        get = _loaded(library, written.st_ino, written.st_mtime_ns).dance_model_api
    except OSError as error:
        raise ModelError(f"{library} cannot be loaded: {error}") from None
    except AttributeError:
        raise ModelError(f"{library} has no C interface: build it anew") from None
    get.restype, get.argtypes = ctypes.POINTER(_Api), [ctypes.c_uint32]
    found = get(VERSION)
    if not found:
        raise ModelError(f"{library} has no C interface of version {VERSION}: build it anew")
    return found.contents


@cache
def _loaded(library: Path, *_written: int) -> ctypes.CDLL:
    """The library as it was written then. It is loaded by a path of its own: the dynamic loader takes a path that it
    knows for what lay there first."""
    with tempfile.TemporaryDirectory(prefix="dance_model_") as folder:
        copied = Path(folder, library.name)
        copied.write_bytes(_sealed(library))
        return ctypes.CDLL(str(copied))


def _sealed(library: Path) -> bytes:
    """The library's bytes, which are those that were built."""
    data = library.read_bytes()
    body, end = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if end == seal_of(body):
        return data
    if end.startswith(_SEAL):
        said = "is damaged: its bytes are not those that were built"
    else:
        said = "has no seal at its end: it is cut off, stripped or of an earlier version"
    raise ModelError(f"{library} {said}; fetch or build it again")


def seal_of(body: bytes) -> bytes:
    """What a library of these bytes ends with: the mark, and the sum of its words, each mixed with its place, as in
    `dance_model.h`."""
    words = np.frombuffer(body + bytes(-len(body) % 8), "<u8")
    mixed = words + np.arange(1, len(words) + 1, dtype="<u8") * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
    return _SEAL + ((int(mixed.sum(dtype="uint64")) + len(body)) % 2**64).to_bytes(8, "little")


def _listed(list_: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    first = ctypes.POINTER(_Tensor)()
    tensors = [first[each] for each in range(list_(ctypes.byref(first)))]
    return {each.name.decode(): (tuple(each.shape[: each.rank]), _dtype(each.kind, each.bits)) for each in tensors}


def _array(view: _View) -> np.ndarray:
    """The tensor's memory as it is, not a copy."""
    dtype, shape = _dtype(view.kind, view.bits), tuple(view.shape[: view.rank])
    size = int(np.prod(shape, dtype="int64")) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    return np.frombuffer(memoryview((ctypes.c_char * size).from_address(view.data)), dtype).reshape(shape)


def _dtype(kind: int, bits: int) -> np.dtype:
    if kind == _BOOL:
        return np.dtype(bool)
    if kind == _BFLOAT:
        return _bfloat16()
    if kind not in _NAMES:
        raise ModelError(f"this numpy interface has no type of kind {kind} and {bits} bits: use the C interface")
    return np.dtype(f"{_NAMES[kind]}{bits}")


def _bfloat16() -> np.dtype:
    try:
        import ml_dtypes  # of all types this one alone is not numpy's
    except ImportError:
        raise ModelError("numpy has no bfloat16 of its own: pip install ml_dtypes, or use the C interface") from None
    return np.dtype(ml_dtypes.bfloat16)


def array_fault(name: str, value: object) -> str | None:
    """What keeps a value from being read as a plain array, where something does."""
    if type(value) is np.ndarray:  # what follows takes a stream of many state tensors longer than it should
        return None
    if isinstance(value, np.ma.MaskedArray):
        return f"input {name} is a masked array, and a network sees no mask: fill it, as {name}.filled(0)"
    if str(getattr(value, "dtype", "")).startswith("torch."):
        return f"input {name} is a PyTorch tensor: give an array, {name}.detach().cpu().numpy()"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return f"input {name} must be a numpy array, not a {type(value).__name__}"
    return None


def _fitting(name: str, array: np.ndarray, kind: tuple[tuple[int, ...], np.dtype]) -> np.ndarray:
    if fault := array_fault(name, array):
        raise ModelError(fault)
    shape, dtype = kind
    if array.shape != shape or array.dtype != dtype:
        raise ModelError(f"input {name} must be {dtype} of shape {shape}, not {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array)


def _room(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of any content where kernels write it without a copy."""
    size = int(np.prod(shape, dtype="int64")) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _addresses(arrays: list[np.ndarray]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
