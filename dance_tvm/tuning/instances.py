"""A static instance of a workload: a library that fills its own tensors, and how to time it on a device.

The library holds the kernel, its planners, functions that fill tensors with small integers, and a digest of the
result. Only code travels to the device. Sums of small integers are exact, so every tile must give the same digest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tvm
from tvm import tirx

from dance_tvm.device.remote import RemoteSession
from dance_tvm.errors import DanceError
from dance_tvm.schedules.channel_plan import channel_list_shape, plan_channels
from dance_tvm.schedules.conv3d_gather import GatherConv, conv3d_gather
from dance_tvm.schedules.emit import FLOAT, INT, Expr, argument, flat, kernel, let, parallel, scratch, serial, store
from dance_tvm.schedules.row_plan import RowPlan, plan_rows
from dance_tvm.schedules.spaces import Workload
from dance_tvm.schedules.winograd import WinogradConv, conv3d_winograd, mask_arguments
from dance_tvm.schedules.winograd_plan import LISTS, WinogradPlan, plan_winograd
from dance_tvm.tuning.farm import CountedSession

if TYPE_CHECKING:
    from dance_tvm.target import Target

KERNEL, DIGEST = "conv", "digest"
#: Activations under which small integers stay exact.
EXACT = ("", "relu", "relu6")
#: A candidate that takes this much longer than the best so far is not timed again.
HOPELESS = 1.3
#: Seconds of measurement and number of runs at which a time is taken for good.
ENOUGH_SECONDS, ENOUGH_RUNS = 0.4, 9


#: Counts of instructions that differ by less are the same; how often they may differ.
SAME_COUNT, MOST_COUNTS = 0.002, 8


@dataclass(frozen=True)
class Instance:
    """One workload with one kernel."""

    workload: Workload
    conv: GatherConv | WinogradConv

    @property
    def plan(self) -> RowPlan | WinogradPlan:
        """How the kernel's rows are listed."""
        return self.conv.plan

    def module(self) -> tvm.IRModule:
        """All functions of the library."""
        conv, plan, work = self.conv, self.plan, self.workload
        out = (work.window.batch, *work.window.out, work.channels_out)
        main = conv3d_winograd(conv) if isinstance(conv, WinogradConv) else conv3d_gather(conv)
        functions = {
            KERNEL: main.with_attr("global_symbol", KERNEL),
            "plan_rows": plan_winograd(plan, "plan_rows") if isinstance(plan, WinogradPlan) else plan_rows(plan),
            "fill_weights": _fill_weights(conv),
            "fill_x": _fill("fill_x", (work.window.batch, *work.window.size, work.channels_in)),
            "fill_y": _fill("fill_y", out),
            DIGEST: _digest(out),
        }
        for name, channels in self._channel_lists():
            functions[f"plan_{name}"] = plan_channels(work.samples, channels, f"plan_{name}")
        return tvm.IRModule(functions)

    def _channel_lists(self) -> list[tuple[str, int]]:
        lists = [("in_channels", self.workload.depth), ("out_channels", self.workload.channels_out)]
        return [listed for listed in lists if listed[0] in self.workload.lists]

    def masks(self) -> dict[str, np.ndarray]:
        """A mask for each list, of the workload's density, at least one element alive; the same at every call."""
        shapes = dict(self.plan.masks)
        shapes.update({name: (self.workload.samples, channels) for name, channels in self._channel_lists()})
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


def build_instance(instance: Instance, target: Target, path: Path) -> None:
    """Compile and link the library of ``instance`` for ``target``."""
    from dance_tvm.linker import shared_library_linker

    with target.tvm_target(instance.workload.threads):
        built = tvm.compile(instance.module(), target=target.tvm_target(instance.workload.threads))
    built.export_library(str(path), fcompile=shared_library_linker(target))


@dataclass(frozen=True)
class Loaded:
    """An instance on a device, its tensors filled; ``run`` times it and tells whether its result is right."""

    instance: Instance
    session: RemoteSession
    module: Any
    arguments: list[Any]

    @staticmethod
    def on(session: RemoteSession, instance: Instance, library: Path) -> Loaded:
        """Bring the library onto the device, fill its tensors and plan its lists."""
        call = session.connection.call
        path = session.upload(library)
        module = call("loading a trial", lambda: session.connection.session.load_module(path))
        return Loaded(instance, session, module, call("filling tensors", lambda: _arguments(session, instance, module)))

    def digest(self) -> int | None:
        """A number that all tiles of the workload agree on; None where results are not exact."""
        if self.instance.workload.activation not in EXACT or isinstance(self.instance.conv, WinogradConv):
            return None
        out = tvm.runtime.empty((1,), "int64", self.session.cpu)

        def run() -> int:
            self.module["fill_y"](self.arguments[-1])
            self.module[KERNEL](*self.arguments)
            self.module[DIGEST](self.arguments[-1], out)
            return int(out.numpy()[0])

        return self.session.connection.call("computing a digest", run)

    def times(self, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` runs, after one that warms up."""
        evaluator = self.module.time_evaluator(KERNEL, self.session.cpu, number=1, repeat=repeats)
        return self.session.connection.call("timing a trial", lambda: list(evaluator(*self.arguments).results))

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


def _arguments(session: RemoteSession, instance: Instance, module: Any) -> list[Any]:
    """The kernel's arguments in its order, filled on the device."""
    conv, plan, work = instance.conv, instance.plan, instance.workload
    empty: Callable[..., Any] = partial(tvm.runtime.empty, device=session.cpu)

    def send(array: np.ndarray) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), session.cpu)

    x = empty((work.window.batch, *work.window.size, work.channels_in), FLOAT)
    weights = empty(conv.weight_shape, FLOAT)
    out_shape = (work.window.batch, *work.window.out, work.channels_out)
    module["fill_x"](x)
    module["fill_weights"](weights)
    masks = {name: send(mask) for name, mask in instance.masks().items()}
    lists = [empty(shape, INT) for shape in plan.shapes.values()]
    tables = [send(table) for table in plan.tables.values()]
    module["plan_rows"](*(masks[name] for name in plan.masks), *tables, *lists)
    bias = conv.pack_bias(np.arange(work.channels_out) % 5 - 2.0)
    taken = lists[: len(LISTS)] if isinstance(conv, WinogradConv) else lists
    arguments = [x, weights, send(bias.astype(FLOAT)), send(plan.tap_entries), *taken]
    for name, channels in instance._channel_lists():
        listed = empty(channel_list_shape(work.samples, channels), INT)
        module[f"plan_{name}"](masks[name], listed)
        arguments.append(listed)
    if isinstance(conv, WinogradConv):
        arguments += [masks[name] for name in mask_arguments(conv)]
    if work.residual:
        residual = empty(out_shape, FLOAT)
        module["fill_y"](residual)
        arguments.append(residual)
    y = empty(out_shape, FLOAT)
    module["fill_y"](y)
    return [*arguments, y]


def _small(value: Expr, period: int) -> Expr:
    """A small integer as a float."""
    return tirx.Cast(FLOAT, tirx.floormod(value, period) - period // 2)


def _fill(name: str, shape: tuple[int, ...]) -> tirx.PrimFunc:
    """Fill a tensor with a pattern of period 9."""
    size = math.prod(shape)
    with kernel(name) as built:
        values = flat(argument("values", shape))
        with parallel(-(-size // 4096)) as chunk, serial(tirx.min(4096, size - chunk * 4096)) as index:
            at = let(chunk * 4096 + index)
            store(values, _small(at, 9), at)
    return built.func


def _fill_weights(conv: GatherConv | WinogradConv) -> tirx.PrimFunc:
    """Fill packed weights so that they do not depend on how they are packed; padding is zero.

    Transformed weights depend on the tile of outputs: any small numbers do, as only time is asked of them.
    """
    if isinstance(conv, WinogradConv):
        return _fill("fill_weights", conv.weight_shape)
    taps, depth, nr = conv.window.taps, conv.depth, conv.tile.nr
    per_group = conv.panels // conv.groups
    with kernel("fill_weights") as built:
        weights = argument("weights", conv.weight_shape)
        values = flat(weights)
        with parallel(conv.panels * taps) as line, serial(depth) as channel, serial(nr) as index:
            panel, tap = let(tirx.floordiv(line, taps)), let(tirx.floormod(line, taps))
            within = let(tirx.floormod(panel, per_group) * nr + index)
            out = let(tirx.floordiv(panel, per_group) * conv.group_out + within)
            value = _small(out * 7 + tap * 5 + channel * 3, 9)
            zero = tirx.FloatImm(FLOAT, 0.0)
            value = tirx.if_then_else(within < conv.group_out, value, zero)
            store(values, value, (line * depth + channel) * nr + index)
    return built.func


def _digest(shape: tuple[int, ...]) -> tirx.PrimFunc:
    """A weighted sum of the tensor's elements as integers."""
    with kernel(DIGEST) as built:
        tensor = argument("values", shape)
        out = argument("out", (1,), "int64")
        values = flat(tensor)
        total = scratch((1,), "int64")
        store(total, tirx.IntImm("int64", 0), 0)
        with serial(math.prod(shape)) as index:
            weight = tirx.Cast("int64", tirx.floormod(index, 31) + 1)
            store(total, total[0] + tirx.Cast("int64", values[index]) * weight, 0)
        store(out, total[0], 0)
    return built.func
