"""A static instance of a workload: a library that fills its own tensors, and how to time it on a device.

The library holds the kernel, its planners, functions that fill tensors with small integers, and a digest of the
result. Only code and lists travel to the device. Sums of small integers are exact, so every tile must give the same
digest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import tvm
from tvm import tirx

from dance_tvm.core.errors import DanceError
from dance_tvm.device.remote import RemoteSession
from dance_tvm.schedules.elementary import written_out
from dance_tvm.schedules.emit import (
    FLOAT,
    Expr,
    argument,
    flat,
    kernel,
    let,
    parallel,
    read,
    serial,
    store,
    when,
    write,
)
from dance_tvm.schedules.gpu.emit import each_element
from dance_tvm.schedules.kernel import Kernel, Operand, Weights
from dance_tvm.schedules.workload import KERNEL_GROUPS, Workload
from dance_tvm.tuning.farm import CountedSession
from dance_tvm.tuning.libraries import Library, device_code_of, open_library

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target

KERNEL, DIGEST = "conv", "digest"
#: Activations under which small integers stay exact.
EXACT = ("", "relu", "relu6")
#: A candidate that takes this much longer than the best so far is not timed again.
HOPELESS = 1.3
#: Seconds of measurement and number of runs at which a time is taken for good.
ENOUGH_SECONDS, ENOUGH_RUNS = 0.4, 9
#: Seconds of a run at the least: a call of a few microseconds differs by a tenth from the next. More of them would be
#: interrupted by other work.
LEAST_SECONDS = 2e-4
#: Parts in which a digest is summed up, on the device.
PARTS = 4096

#: Counts of instructions that differ by less are the same; how often they may differ.
SAME_COUNT, MOST_COUNTS = 0.002, 8


#: Loops over the elements of a tensor, shared out over the device: a context that gives the index.
Each = Callable[[int], AbstractContextManager[Expr]]


@dataclass(frozen=True)
class Instance:
    """One workload with one kernel."""

    workload: Workload
    kernel: Kernel

    @property
    def dtype(self) -> str:
        """How activations and weights are stored."""
        return self.workload.dtype

    @property
    def exact(self) -> bool:
        """Whether all tiles give the same result to the bit."""
        return self.workload.activation in EXACT and self.kernel.exact

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Of the input, which a planner may read in the kernel's place."""
        return next(operand.shape for operand in self._given() if operand.role == "data")

    @property
    def y_shape(self) -> tuple[int, ...]:
        """Of the output."""
        return self.kernel.outputs()[0].shape

    def module(self, gpu: bool = False) -> tvm.IRModule:
        """All functions of the library, for a GPU or a processor."""
        each: Each = each_element if gpu else _each_by_threads
        functions = {
            "fill_x": _fill("fill_x", self.x_shape, self.dtype, each),
            "fill_y": _fill("fill_y", self.y_shape, self.dtype, each),
            DIGEST: _digest(self.y_shape, self.dtype, each),
            KERNEL: self.kernel.primfunc(KERNEL) if gpu else written_out(self.kernel.primfunc(KERNEL)),
        }
        for operand in self.left_open():
            functions["fill_weights"] = _fill_weights(self.kernel, operand, each)
        for index, each_list in enumerate(self.kernel.lists()):
            functions[f"plan{index}"] = each_list.planner.primfunc(f"plan{index}")
        return tvm.IRModule(functions)

    @property
    def weights(self) -> Weights:
        """What the kernel prepares its constants from: weights themselves are filled in on the device."""
        columns = self.workload.columns() if self.workload.family == KERNEL_GROUPS else None
        return Weights(None, (np.arange(self.workload.channels_out) % 5 - 2.0).astype(FLOAT), columns)

    def left_open(self) -> list[Operand]:
        """The constants that ``weights`` do not settle."""
        settled = self.kernel.prepare(self.weights)
        return [each for each in self.kernel.inputs() if each.role == "constant" and each.name not in settled]

    def _given(self) -> list[Operand]:
        """What the planners are given, then the kernel."""
        return [
            each
            for kernel in (*(made.planner for made in self.kernel.lists()), self.kernel)
            for each in kernel.inputs()
        ]

    def masks(self) -> dict[str, np.ndarray]:
        """A mask for each axis that lists thin, of the workload's density, at least one element alive; the same at
        every call."""
        shapes = {operand.axis: operand.shape for operand in self._given() if operand.role == "mask"}
        return {axis: _mask(shape, self.workload.density, seed) for seed, (axis, shape) in enumerate(shapes.items())}


def _mask(shape: tuple[int, ...], density: float, seed: int) -> np.ndarray:
    """``density`` of the last axis (of the last two for positions) alive, chosen at random by ``seed``."""
    random = np.random.default_rng(seed)
    inner = math.prod(shape[2:]) if len(shape) == 4 else shape[-1]
    alive = max(1, round(density * inner))
    flat_mask = np.zeros((math.prod(shape) // inner, inner), FLOAT)
    for row in flat_mask:
        row[random.permutation(inner)[:alive]] = 1
    return flat_mask.reshape(shape)


def build_instance(instance: Instance, target: Target, path: Path) -> None:
    """Compile and link the library of ``instance`` for ``target``; for OpenCL, its device code beside it as well."""
    from dance_tvm.artifact.device_code import embed_ptx
    from dance_tvm.artifact.linker import shared_library_linker
    from dance_tvm.device.launches import device_code
    from dance_tvm.lowering.machine import UNCHECKED

    target = target.storing(instance.workload.dtype)
    module, tvm_target = instance.module(target.gpu is not None), target.tvm_target(instance.workload.threads)
    with tvm_target, tvm.transform.PassContext(config=UNCHECKED):
        built = tvm.compile(module, target=tvm_target)
    built.export_library(str(path), fcompile=shared_library_linker(target), **embed_ptx(built, target))
    if tvm_target.kind.name == "opencl":
        device_code_of(path).write_text(device_code(module, tvm_target).to_json(), encoding="utf-8")


class Trial(Protocol):
    """An instance on a device."""

    @property
    def origin(self) -> str:
        """On which device."""

    @property
    def unit(self) -> Literal["seconds", "emulated instructions"]:
        """What ``measure`` counts."""

    def digest(self) -> int | None:
        """A number that all tiles of the workload agree on; None where results are not exact."""

    def times(self, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` runs, after one that warms up."""

    def measure(self, best: float | None = None) -> list[float]:
        """Enough times to trust; only a few where the instance is hopelessly slower than ``best`` seconds."""


@dataclass(frozen=True)
class Loaded:
    """An instance on a device, its tensors filled; ``run`` times it and says whether its result is right."""

    instance: Instance
    session: RemoteSession
    library: Library
    arguments: list[Any]

    @staticmethod
    def on(session: RemoteSession, instance: Instance, path: Path, kind: str = "llvm") -> Loaded:
        """Bring the library onto the session's device of TVM's ``kind``, fill its tensors and plan its lists.

        Raises DeviceLostError where the session has no such device.
        """
        library = open_library(session, path, kind)
        return Loaded(instance, session, library, _arguments(library, instance))

    @property
    def origin(self) -> str:
        """On which device."""
        return self.library.origin

    def digest(self) -> int | None:
        """A number that all tiles of the workload agree on; None where results are not exact."""
        if not self.instance.exact:
            return None
        y, sums = self.arguments[-1], self.library.empty((PARTS,), "int64")
        self.library.call("fill_y", y)
        self.library.call(KERNEL, *self.arguments)
        self.library.call(DIGEST, y, sums)
        return int(self.library.read(sums).sum())

    def times(self, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` runs, after one that warms up; means of several calls where they are short."""
        return self.library.times(KERNEL, self.arguments, repeats, LEAST_SECONDS)

    @property
    def unit(self) -> Literal["seconds", "emulated instructions"]:
        """What ``measure`` counts."""
        return "emulated instructions" if isinstance(self.session, CountedSession) else "seconds"

    def instructions(self) -> list[float]:
        """Instructions of one call on an emulated device: the same at every call, once the session has settled.

        What the server itself does meanwhile is counted too, and on a busy machine it differs from time to time: the
        more calls are counted together, the smaller its part in each. Raises DanceError where counts go on differing.
        """
        before = self._count(1)
        for round in range(MOST_COUNTS - 1):
            found = self._count(2**round)
            if abs(found - before) <= SAME_COUNT * found:
                return [found]
            before = found
        raise DanceError(f"{self.session.name} executes another number of instructions at every call")

    def _count(self, calls: int) -> float:
        """Instructions of a call: of one and ``calls`` more less those of one, so that all around them drops out."""
        assert isinstance(self.session, CountedSession)
        counts = []
        for repeats in (1, 1 + calls):
            before = self.session.counter.read()
            self.library.times(KERNEL, self.arguments, repeats)
            counts.append(self.session.counter.read() - before)
        return (counts[1] - counts[0]) / calls

    def measure(self, best: float | None = None) -> list[float]:
        """Enough times to trust; only a few where the instance is hopelessly slower than ``best`` seconds."""
        if isinstance(self.session, CountedSession):
            return self.instructions()
        return enough(self.times, best)


def enough(times: Callable[[int], list[float]], best: float | None) -> list[float]:
    """So many of ``times`` (of so many runs) as can be trusted; few where they are hopelessly longer than ``best``."""
    found = times(2)
    while len(found) < 3 or (sum(found) < ENOUGH_SECONDS and len(found) < ENOUGH_RUNS):
        if best is not None and min(found) > HOPELESS * best:
            break
        found += times(3)
    return found


def interleaved(loaded: Sequence[Trial], rounds: int = 9) -> list[list[float]]:
    """Times of several instances in turns, so that a drift of the machine's speed meets all alike."""
    if loaded[0].unit != "seconds":
        return [each.measure() for each in loaded]
    times: list[list[float]] = [[] for _ in loaded]
    for index in range(rounds):
        order = list(enumerate(loaded))
        for place, each in order if index % 2 == 0 else order[::-1]:
            times[place].extend(each.times(1))
    return times


def _arguments(library: Library, instance: Instance) -> list[Any]:
    """The kernel's arguments in its order, filled on the device."""
    masks = {axis: library.send(mask) for axis, mask in instance.masks().items()}
    lists: dict[str, Any] = {}
    x = _filled(library, "fill_x", instance.x_shape, instance.dtype)

    def given(kernel: Kernel) -> list[Any]:
        """What a planner or the kernel takes, in its order."""
        constants = {name: library.send(array) for name, array in kernel.prepare(instance.weights).items()}

        def tensor(operand: Operand) -> Any:
            if operand.role == "output" and kernel is not instance.kernel:
                return library.empty(operand.shape, operand.dtype)
            if operand.role in ("residual", "output"):
                return _filled(library, "fill_y", operand.shape, operand.dtype)
            if operand.role == "constant" and operand.name not in constants:
                return _filled(library, "fill_weights", operand.shape, operand.dtype)
            if operand.role == "data":
                return x
            return masks[operand.axis] if operand.role == "mask" else {**constants, **lists}[operand.name]

        return [tensor(operand) for operand in kernel.operands()]

    for index, each in enumerate(instance.kernel.lists()):
        arguments = given(each.planner)
        library.call(f"plan{index}", *arguments)
        lists.update(zip(each.names, arguments[len(each.planner.inputs()) :], strict=True))
    return given(instance.kernel)


def _filled(library: Library, fill: str, shape: tuple[int, ...], dtype: str) -> Any:
    tensor = library.empty(shape, dtype)
    library.call(fill, tensor)
    return tensor


@contextmanager
def _each_by_threads(count: int) -> Iterator[Expr]:
    """All of ``count`` elements, in chunks over the threads of a CPU."""
    with parallel(-(-count // 4096)) as chunk, serial(tirx.min(4096, count - chunk * 4096)) as index:
        yield let(chunk * 4096 + index)


def _small(value: Expr, period: int) -> Expr:
    """A small integer as a float."""
    return tirx.Cast(FLOAT, tirx.floormod(value, period) - period // 2)


def _fill(name: str, shape: tuple[int, ...], dtype: str, each: Each) -> tirx.PrimFunc:
    """Fill a tensor with a pattern of period 9."""
    with kernel(name) as built:
        values = flat(argument("values", shape, dtype))
        with each(math.prod(shape)) as index:
            write(values, _small(index, 9), index)
    return built.func


def _fill_weights(layer: Kernel, weights: Operand, each: Each) -> tirx.PrimFunc:
    """Fill packed weights so that they do not depend on how they are packed; padding is zero.

    Transformed weights depend on the tile of outputs: any small numbers do, as only time is asked of them. Those of
    kernel groups are packed alike by every tile.
    """
    with kernel("fill_weights") as built:
        values = flat(argument("weights", weights.shape, weights.dtype))
        with each(math.prod(weights.shape)) as at:
            place = layer.unpacked(at)
            if place is None:
                value = _small(at, 9)
            else:
                out, tap, channel, there = place
                value = _small(out * 7 + tap * 5 + channel * 3, 9)
                value = tirx.if_then_else(there, value, tirx.FloatImm(FLOAT, 0.0))
            write(values, value, at)
    return built.func


def _digest(shape: tuple[int, ...], dtype: str, each: Each) -> tirx.PrimFunc:
    """Weighted sums of the tensor's elements as integers, int64 (PARTS,): of every PARTS-th element."""
    size = math.prod(shape)
    with kernel(DIGEST) as built:
        tensor, sums = argument("values", shape, dtype), argument("sums", (PARTS,), "int64")
        values = flat(tensor)
        with each(PARTS) as part:
            store(sums, tirx.IntImm("int64", 0), part)
            with serial(-(-size // PARTS)) as turn:
                index = let(turn * PARTS + part)
                with when(index < size):
                    weight = tirx.Cast("int64", tirx.floormod(index, 31) + 1)
                    store(sums, sums[part] + tirx.Cast("int64", read(values, index)) * weight, part)
    return built.func
