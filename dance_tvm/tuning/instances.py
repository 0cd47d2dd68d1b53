"""A static instance of a workload: a library that fills its own tensors, and how to time it on a device.

The library holds the kernel, its planners, functions that fill tensors with small integers, and a digest of the
result. Only code and lists travel to the device. Sums of small integers are exact, so every tile must give the same
digest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tvm
from tvm import tirx

from dance_tvm.core.errors import DanceError
from dance_tvm.device.remote import RemoteSession
from dance_tvm.schedules.convolution import Convolution
from dance_tvm.schedules.cpu import channel_plan, conv3d_gather, conv3d_kgs, row_plan
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.conv3d_kgs import KernelGroupConv, balanced_order
from dance_tvm.schedules.cpu.pool3d import Pool, pool3d
from dance_tvm.schedules.cpu.winograd import WinogradConv, conv3d_winograd, mask_arguments
from dance_tvm.schedules.cpu.winograd_plan import LISTS, plan_winograd
from dance_tvm.schedules.emit import FLOAT, INT, Expr, argument, flat, kernel, let, parallel, serial, store, when
from dance_tvm.schedules.gpu import channel_plan as gpu_channel_plan
from dance_tvm.schedules.gpu import conv3d_gather as gpu_conv3d_gather
from dance_tvm.schedules.gpu import conv3d_kgs as gpu_conv3d_kgs
from dance_tvm.schedules.gpu import row_plan as gpu_row_plan
from dance_tvm.schedules.gpu.conv3d_gather import BlockConv
from dance_tvm.schedules.gpu.conv3d_kgs import GroupConv
from dance_tvm.schedules.gpu.emit import each_element, read, write
from dance_tvm.schedules.plans import channel_list_shape
from dance_tvm.schedules.workload import Workload
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
#: Parts in which a digest is summed up, on the device.
PARTS = 4096

#: Counts of instructions that differ by less are the same; how often they may differ.
SAME_COUNT, MOST_COUNTS = 0.002, 8


#: Loops over the elements of a tensor, shared out over the device: a context that gives the index.
Each = Callable[[int], AbstractContextManager[Expr]]
Conv = Convolution | WinogradConv


@dataclass(frozen=True)
class Instance:
    """One workload with one kernel."""

    workload: Workload
    kernel: Conv | Pool

    @property
    def dtype(self) -> str:
        """How activations and weights are stored."""
        return self.workload.dtype

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Input: (N, T, H, W, C_in)."""
        return (self.workload.window.batch, *self.workload.window.size, self.workload.channels_in)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """Output: (N, T, H, W, C_out)."""
        return (self.workload.window.batch, *self.workload.window.out, self.workload.channels_out)

    def module(self) -> tvm.IRModule:
        """All functions of the library."""
        each = each_element if isinstance(self.kernel, BlockConv) else _each_by_threads
        functions = {
            "fill_x": _fill("fill_x", self.x_shape, self.dtype, each),
            "fill_y": _fill("fill_y", self.y_shape, self.dtype, each),
            DIGEST: _digest(self.y_shape, self.dtype, each),
        }
        if isinstance(self.kernel, Pool):
            functions[KERNEL] = pool3d(self.kernel)
        else:
            functions["fill_weights"] = _fill_weights(self.kernel, self.dtype, each)
            functions[KERNEL], functions["plan_rows"] = _convolution(self.kernel), _row_planner(self.kernel)
            functions.update(self._channel_planners(self.kernel))
        functions[KERNEL] = functions[KERNEL].with_attr("global_symbol", KERNEL)
        return tvm.IRModule(functions)

    def _channel_planners(self, conv: Conv) -> dict[str, tirx.PrimFunc]:
        """What makes the lists of live channels; kernel groups thin their columns, and test output channels."""
        if isinstance(conv, KernelGroupConv):
            return {"plan_columns": conv3d_kgs.plan_columns(conv)} if conv.live_in else {}
        if isinstance(conv, GroupConv):
            return {"plan_columns": gpu_conv3d_kgs.plan_columns(conv, "plan_columns")} if conv.live_in else {}
        planner = gpu_channel_plan if isinstance(conv, BlockConv) else channel_plan
        return {
            f"plan_{name}": planner.plan_channels(self.workload.samples, channels, f"plan_{name}")
            for name, channels in self.channel_lists()
        }

    def channel_lists(self) -> list[tuple[str, int]]:
        """Axes of channels that are thinned, and how many channels they have."""
        lists = [("in_channels", self.workload.depth), ("out_channels", self.workload.channels_out)]
        return [listed for listed in lists if listed[0] in self.workload.lists]

    def masks(self) -> dict[str, np.ndarray]:
        """A mask for each list, of the workload's density, at least one element alive; the same at every call."""
        kernel = self.kernel
        if isinstance(kernel, Pool):
            shapes = dict(kernel.masks)
        else:
            shapes = dict(kernel.plan.masks)
            shapes.update({name: (self.workload.samples, channels) for name, channels in self.channel_lists()})
        return {name: _mask(shape, self.workload.density, seed) for seed, (name, shape) in enumerate(shapes.items())}


def _mask(shape: tuple[int, ...], density: float, seed: int) -> np.ndarray:
    """``density`` of the last axis (of the last two for positions) alive, chosen at random by ``seed``."""
    random = np.random.default_rng(seed)
    inner = math.prod(shape[2:]) if len(shape) == 4 else shape[-1]
    alive = max(1, round(density * inner))
    flat_mask = np.zeros((math.prod(shape) // inner, inner), FLOAT)
    for row in flat_mask:
        row[random.permutation(inner)[:alive]] = 1
    return flat_mask.reshape(shape)


def _convolution(conv: Conv) -> tirx.PrimFunc:
    """The kernel of a convolution."""
    if isinstance(conv, WinogradConv):
        return conv3d_winograd(conv)
    if isinstance(conv, GroupConv):
        return gpu_conv3d_kgs.conv3d_kgs(conv)
    if isinstance(conv, BlockConv):
        return gpu_conv3d_gather.conv3d_gather(conv)
    if isinstance(conv, KernelGroupConv):
        return conv3d_kgs.conv3d_kgs(conv)
    assert isinstance(conv, GatherConv), conv
    return conv3d_gather.conv3d_gather(conv)


def _row_planner(conv: Conv) -> tirx.PrimFunc:
    """What makes the lists of its rows."""
    if isinstance(conv, WinogradConv):
        return plan_winograd(conv.plan, "plan_rows")
    if isinstance(conv, BlockConv):
        return gpu_row_plan.plan_rows(conv.plan, "plan_rows")
    return row_plan.plan_rows(conv.plan)


def build_instance(instance: Instance, target: Target, path: Path) -> None:
    """Compile and link the library of ``instance`` for ``target``; for OpenCL, its device code beside it as well."""
    from dance_tvm.artifact.device_code import embed_device_code
    from dance_tvm.artifact.linker import shared_library_linker
    from dance_tvm.device.launches import device_code
    from dance_tvm.lowering.machine import host_code_of

    module, tvm_target = instance.module(), target.tvm_target(instance.workload.threads)
    with tvm_target, tvm.transform.PassContext(config=host_code_of(target)):
        built = tvm.compile(module, target=tvm_target)
    packing, _ = embed_device_code(built, target)
    built.export_library(str(path), fcompile=shared_library_linker(target), **packing)
    if tvm_target.kind.name == "opencl":
        device_code_of(path).write_text(device_code(module, tvm_target).to_json(), encoding="utf-8")


@dataclass(frozen=True)
class Loaded:
    """An instance on a device, its tensors filled; ``run`` times it and tells whether its result is right."""

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

    def digest(self) -> int | None:
        """A number that all tiles of the workload agree on; None where results are not exact."""
        if self.instance.workload.activation not in EXACT or isinstance(self.instance.kernel, WinogradConv):
            return None
        y, sums = self.arguments[-1], self.library.empty((PARTS,), "int64")
        self.library.call("fill_y", y)
        self.library.call(KERNEL, *self.arguments)
        self.library.call(DIGEST, y, sums)
        return int(self.library.read(sums).sum())

    def times(self, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` runs, after one that warms up."""
        return self.library.times(KERNEL, self.arguments, repeats)

    @property
    def unit(self) -> Literal["seconds", "emulated instructions"]:
        """What ``measure`` counts."""
        return "emulated instructions" if isinstance(self.session, CountedSession) else "seconds"

    def instructions(self) -> list[float]:
        """Instructions of one call on an emulated device: the same at every call, once the session has settled.

        Raises DanceError where counts go on differing.
        """
        counted = [self._count()]
        while len(counted) < MOST_COUNTS:
            counted.append(self._count())
            if abs(counted[-1] - counted[-2]) <= SAME_COUNT * counted[-1]:
                return [counted[-1]]
        raise DanceError(f"{self.session.name} executes another number of instructions at every call")

    def _count(self) -> float:
        """Instructions of two calls less those of one, so that what surrounds them drops out."""
        assert isinstance(self.session, CountedSession)
        counts = []
        for repeats in (1, 2):
            before = self.session.counter.read()
            self.times(repeats)
            counts.append(self.session.counter.read() - before)
        return float(counts[1] - counts[0])

    def measure(self, best: float | None = None) -> list[float]:
        """Enough times to trust; only a few where the instance is hopelessly slower than ``best`` seconds."""
        if isinstance(self.session, CountedSession):
            return self.instructions()
        times = self.times(2)
        while len(times) < 3 or (sum(times) < ENOUGH_SECONDS and len(times) < ENOUGH_RUNS):
            if best is not None and min(times) > HOPELESS * best:
                break
            times += self.times(3)
        return times


def interleaved(loaded: Sequence[Loaded], rounds: int = 9) -> list[list[float]]:
    """Times of several instances in turns, so that a drift of the machine's speed meets all alike."""
    if loaded[0].unit != "seconds":
        return [each.instructions() for each in loaded]
    times: list[list[float]] = [[] for _ in loaded]
    for index in range(rounds):
        order = list(enumerate(loaded))
        for place, each in order if index % 2 == 0 else order[::-1]:
            times[place].extend(each.times(1))
    return times


def _arguments(library: Library, instance: Instance) -> list[Any]:
    """The kernel's arguments in its order, filled on the device."""
    kernel = instance.kernel
    x = library.empty(instance.x_shape, instance.dtype)
    library.call("fill_x", x)
    masks = {name: library.send(mask) for name, mask in instance.masks().items()}
    arguments = [x]
    arguments += masks.values() if isinstance(kernel, Pool) else _conv_arguments(library, instance, kernel, masks)
    for _ in range(2 if instance.workload.residual else 1):
        arguments.append(library.empty(instance.y_shape, instance.dtype))
        library.call("fill_y", arguments[-1])
    return arguments


def _conv_arguments(library: Library, instance: Instance, conv: Conv, masks: Mapping[str, Any]) -> list[Any]:
    """Weights, bias, taps and lists of a convolution."""
    plan = conv.plan
    weights = library.empty(conv.weight_shape, instance.dtype)
    library.call("fill_weights", weights)
    lists = [library.empty(shape, INT) for shape in plan.shapes.values()]
    tables = [library.send(table) for table in plan.tables.values()]
    library.call("plan_rows", *(masks[name] for name in plan.masks), *tables, *lists)
    bias = conv.pack_bias(np.arange(instance.workload.channels_out) % 5 - 2.0)
    arguments = [weights, library.send(bias.astype(FLOAT)), library.send(plan.tap_entries)]
    if isinstance(conv, KernelGroupConv | GroupConv):
        return [*arguments, *lists, *_column_arguments(library, instance.workload, conv, masks)]
    arguments += lists[: len(LISTS)] if isinstance(conv, WinogradConv) else lists
    for name, channels in instance.channel_lists():
        listed = library.empty(channel_list_shape(instance.workload.samples, channels), INT)
        library.call(f"plan_{name}", masks[name], listed)
        arguments.append(listed)
    if isinstance(conv, WinogradConv):
        arguments += [masks[name] for name in mask_arguments(conv)]
    return arguments


def _column_arguments(
    library: Library, workload: Workload, conv: KernelGroupConv | GroupConv, masks: Mapping[str, Any]
) -> list[Any]:
    """Lists of the columns that kernel groups keep, and the mask of output channels where there is one."""
    columns = workload.columns()
    arguments = [
        library.send(conv.static_starts(columns.ptr)),
        library.send(conv.static_columns(columns.channel, columns.ptr)),
    ]
    if conv.live_in:
        shapes = [*conv.column_shapes.values()]
        shapes += [(workload.samples, 1)] if isinstance(conv, GroupConv) else []
        thinned = [library.empty(shape, INT) for shape in shapes]
        library.call("plan_columns", masks["in_channels"], *arguments, *thinned)
        arguments = thinned[:2]
    if isinstance(conv, KernelGroupConv):
        order = balanced_order(np.diff(columns.ptr[:, [0, -1]])[:, 0], workload.threads)
        arguments += [library.send(order), library.send(conv.tap_runs)]
    return arguments + ([masks["out_channels"]] if conv.live_out else [])


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


def _fill_weights(conv: Conv, dtype: str, each: Each) -> tirx.PrimFunc:
    """Fill packed weights so that they do not depend on how they are packed; padding is zero.

    Transformed weights depend on the tile of outputs: any small numbers do, as only time is asked of them. Those of
    kernel groups are packed alike by every tile.
    """
    if isinstance(conv, WinogradConv | KernelGroupConv | GroupConv):
        return _fill("fill_weights", conv.weight_shape, dtype, each)
    taps, depth, inner = conv.window.taps, conv.depth, conv.weight_shape[-1]
    in_panels = len(conv.weight_shape) == 4
    per_group = conv.panels // conv.groups
    with kernel("fill_weights") as built:
        values = flat(argument("weights", conv.weight_shape, dtype))
        with each(math.prod(conv.weight_shape)) as at:
            line = let(tirx.floordiv(at, inner * depth))
            channel, lane = let(tirx.floormod(tirx.floordiv(at, inner), depth)), let(tirx.floormod(at, inner))
            if in_panels:
                panel, tap = let(tirx.floordiv(line, taps)), let(tirx.floormod(line, taps))
                within = let(tirx.floormod(panel, per_group) * conv.tile.nr + lane)
                out = let(tirx.floordiv(panel, per_group) * conv.group_out + within)
                there = within < conv.group_out
            else:
                out, tap, there = lane, line, tirx.const(True, "bool")
            value = _small(out * 7 + tap * 5 + channel * 3, 9)
            write(values, tirx.if_then_else(there, value, tirx.FloatImm(FLOAT, 0.0)), at)
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
