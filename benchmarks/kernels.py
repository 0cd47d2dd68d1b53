"""Single convolution layers run outside a network: shared by the benchmarks of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import Target
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.row_plan import RowPlan
from dance_tvm.schedules.cpu.tiles import Tile, default_tile
from dance_tvm.schedules.elementary import written_out
from dance_tvm.schedules.emit import argument, kernel, lanes, let, number, parallel, scratch, serial, splat, store
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.kernel import Kernel, Weights


@dataclass(frozen=True)
class Layer:
    """One convolution of a network: (channels in, channels out, (T, H, W) of the input, kernel, stride)."""

    name: str
    channels_in: int
    channels_out: int
    size: tuple[int, int, int]
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)

    @property
    def window(self) -> Window:
        """Geometry with padding that keeps the size at stride 1."""
        padding = tuple(extent // 2 for extent in self.kernel)
        axes = zip(self.size, self.kernel, self.stride, padding, strict=True)
        out = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in axes)
        return Window(1, self.size, out, self.kernel, self.stride, padding)


C3D = [
    Layer("conv1", 3, 64, (16, 112, 112)),
    Layer("conv2", 64, 128, (16, 56, 56)),
    Layer("conv3a", 128, 256, (8, 28, 28)),
    Layer("conv3b", 256, 256, (8, 28, 28)),
    Layer("conv4a", 256, 512, (4, 14, 14)),
    Layer("conv4b", 512, 512, (4, 14, 14)),
    Layer("conv5a", 512, 512, (2, 7, 7)),
]
R2PLUS1D = [
    Layer("stem.0", 3, 45, (16, 112, 112), (1, 7, 7), (1, 2, 2)),
    Layer("stem.3", 45, 64, (16, 56, 56), (3, 1, 1)),
    Layer("layer1.spatial", 64, 144, (16, 56, 56), (1, 3, 3)),
    Layer("layer1.temporal", 144, 64, (16, 56, 56), (3, 1, 1)),
    Layer("layer2.spatial", 128, 288, (8, 28, 28), (1, 3, 3)),
    Layer("layer2.temporal", 288, 128, (8, 28, 28), (3, 1, 1)),
    Layer("layer3.spatial", 256, 576, (4, 14, 14), (1, 3, 3)),
    Layer("layer4.spatial", 512, 1152, (2, 7, 7), (1, 3, 3)),
]


@dataclass
class Masks:
    """Boolean masks of one clip; None where an axis is not thinned."""

    in_frames: np.ndarray | None = None  # (T,)
    out_frames: np.ndarray | None = None  # (T',)
    positions: np.ndarray | None = None  # (1 or T', H', W')
    live_in: np.ndarray | None = None  # (C_in,)
    live_out: np.ndarray | None = None  # (C_out,)


class Timed:
    """A compiled kernel with its arguments."""

    def __init__(self, kernel: Kernel, target: tvm.target.Target, args: Mapping[str, tvm.runtime.Tensor]) -> None:
        self.name, self.args = kernel.name, [*args.values()]
        self.library = build(written_out(kernel.primfunc()), target)

    def __call__(self) -> None:
        """Run it."""
        self.library[self.name](*self.args)

    def seconds(self, repeat: int, min_repeat_ms: int) -> float:
        """Median time of one call."""
        timer = self.library.mod.time_evaluator(self.name, tvm.cpu(), 1, repeat, min_repeat_ms)
        return float(np.median(timer(*self.args).results))


class Runner:
    """A compiled layer with its lists planned, ready to be timed; weights and input are random."""

    def __init__(
        self, layer: Layer, target: Target, threads: int, masks: Masks | None = None, tile: Tile | None = None
    ) -> None:
        masks = masks or Masks()
        window = layer.window
        self.layer = layer
        machine = machine_of(target)
        gathers = masks.live_in is not None or masks.live_out is not None
        tile = tile or default_tile(machine, window, layer.channels_in, layer.channels_out, gathers=gathers)
        plan = RowPlan(
            window,
            tile.mr,
            tile.block_tiles,
            tile.segment_taps,
            in_frames=masks.in_frames is not None,
            out_frames=masks.out_frames is not None,
            positions=None if masks.positions is None else (1, masks.positions.shape[0]),
        )
        thinned = any(mask is not None for mask in (masks.out_frames, masks.positions, masks.live_out))
        self.conv = GatherConv(
            window,
            layer.channels_in,
            layer.channels_out,
            1,
            tile,
            plan,
            live_in=masks.live_in is not None,
            live_out=masks.live_out is not None,
            activation="relu",
            zero_dead="rows" if thinned else "",
        )
        self.tvm_target = target.tvm_target(threads)
        self._prepare(masks)

    def _prepare(self, masks: Masks) -> None:
        conv, window = self.conv, self.conv.window
        rng = np.random.default_rng(0)
        x = rng.standard_normal((window.batch, *window.size, conv.channels_in), dtype="float32")
        weight = rng.standard_normal((conv.channels_out, conv.depth, *window.kernel), dtype="float32") * 0.01
        given = {"in_frames": masks.in_frames, "out_frames": masks.out_frames, "positions": masks.positions}
        given |= {"in_channels": masks.live_in, "out_channels": masks.live_out}
        weights = Weights(weight, np.zeros(conv.channels_out, "float32"))
        *planners, (_, args) = calls_of(conv, tensor, x, weights, given)
        self.planners = [Timed(planner, self.tvm_target, named) for planner, named in planners]
        for planner in self.planners:
            planner()
        self.kernel = Timed(conv, self.tvm_target, args)
        pairs = int(args["counts"].numpy()[0, 3])
        channels = conv.depth if masks.live_in is None else int(masks.live_in.sum())
        outputs = conv.channels_out if masks.live_out is None else int(masks.live_out.sum())
        self.macs = pairs * channels * outputs

    def seconds(self, repeat: int = 3) -> float:
        """Median time of one call."""
        return self.kernel.seconds(repeat, min_repeat_ms=20)

    def plan_seconds(self) -> float:
        """Median time of planning the lists and compacting the input, once each."""
        return sum(planner.seconds(3, min_repeat_ms=5) for planner in self.planners)

    def with_tile(self, target: Target, threads: int, **changes: int) -> Runner:
        """The dense layer again with another tile."""
        return Runner(self.layer, target, threads, tile=replace(self.conv.tile, **changes))


def tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    """A tensor on the CPU, aligned as kernels expect."""
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def calls_of(
    kernel: Kernel,
    upload: Callable[[np.ndarray], Any],
    data: np.ndarray,
    weights: Weights,
    masks: Mapping[str, np.ndarray | None],
) -> list[tuple[Kernel, dict[str, Any]]]:
    """The planners of a kernel and the kernel, in order, each with what it takes by name; ``masks`` by axis."""
    lists: dict[str, Any] = {}

    def arguments(each: Kernel) -> dict[str, Any]:
        constants = {name: upload(array) for name, array in each.prepare(weights).items()}
        found = {}
        for operand in each.operands():
            if operand.role == "mask":
                mask = np.broadcast_to(masks[operand.axis], operand.shape)
                found[operand.name] = upload(np.ascontiguousarray(mask, "float32"))
            elif operand.role == "data":
                found[operand.name] = upload(data)
            elif operand.role in ("output", "residual"):
                found[operand.name] = upload(np.zeros(operand.shape, operand.dtype))
            else:
                found[operand.name] = {**lists, **constants}[operand.name]
        return found

    calls = []
    for plan in kernel.lists():
        calls.append((plan.planner, arguments(plan.planner)))
        made = [*calls[-1][1].values()][len(plan.planner.inputs()) :]
        lists.update(zip(plan.names, made, strict=True))
    return [*calls, (kernel, arguments(kernel))]


def build(func: tirx.PrimFunc, target: tvm.target.Target) -> tvm.runtime.Executable:
    """Compile one kernel."""
    return tvm.compile(tvm.IRModule({str(func.attrs["global_symbol"]): func}), target=target)


class Peak:
    """The machine's multiply-add rate, measured by a kernel that reads no memory."""

    CHAINS, TASKS = 12, 8

    def __init__(self, target: Target, threads: int, steps: int = 200_000) -> None:
        self.steps = steps
        self.floats = target.vector.floats
        self.library = build(self._kernel(), target.tvm_target(threads))
        self.args = [tensor(np.full(64, 0.5, "float32")), tensor(np.zeros(self.TASKS * self.floats, "float32"))]

    def _kernel(self) -> tirx.PrimFunc:
        floats = self.floats
        with kernel("peak") as built:
            source, target = argument("source", (64,)), argument("target", (self.TASKS * floats,))
            with parallel(self.TASKS) as task:
                chains = [scratch((floats,)) for _ in range(self.CHAINS)]
                for chain in chains:
                    store(chain, number(0.0, floats), lanes(0, floats))
                factor, term = let(splat(source[0], floats)), let(source[lanes(8, floats)])
                with serial(self.steps):
                    for chain in chains:
                        store(chain, chain[lanes(0, floats)] * factor + term, lanes(0, floats))
                total = chains[0][lanes(0, floats)]
                for chain in chains[1:]:
                    total = total + chain[lanes(0, floats)]
                store(target, total, lanes(task * floats, floats))
        return built.func

    def gflops(self) -> float:
        """GFLOP/s over all threads, two operations per multiply-add."""
        return self._rate(float(np.median(self._seconds(3))))

    def most(self) -> float:
        """The same of the fastest of some runs."""
        return self._rate(min(self._seconds(10)))

    def _seconds(self, repeat: int) -> list[float]:
        return list(self.library.mod.time_evaluator("peak", tvm.cpu(), 1, repeat)(*self.args).results)

    def _rate(self, seconds: float) -> float:
        return 2e-9 * self.TASKS * self.CHAINS * self.floats * self.steps / seconds
