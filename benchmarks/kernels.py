"""Single convolution layers run outside a network: shared by the benchmarks of this folder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import tirx

from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import Target
from dance_tvm.schedules.cpu.channel_plan import plan_channels
from dance_tvm.schedules.cpu.compact_channels import compact_channels
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv, conv3d_gather
from dance_tvm.schedules.cpu.row_plan import plan_rows
from dance_tvm.schedules.cpu.tiles import Tile, default_tile
from dance_tvm.schedules.emit import argument, kernel, lanes, let, number, parallel, scratch, serial, splat, store
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.plans import RowPlan, channel_list_shape


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
        conv, plan = self.conv, self.conv.plan
        rng = np.random.default_rng(0)
        given = {"in_frames": masks.in_frames, "out_frames": masks.out_frames, "positions": masks.positions}
        fields = {
            key: tensor(np.broadcast_to(given[key], shape).astype("float32")) for key, shape in plan.masks.items()
        }
        lists = [tensor(np.zeros(shape, "int32")) for shape in plan.shapes.values()]
        planner = build(plan_rows(plan), self.tvm_target)
        tables = [tensor(table) for table in plan.tables.values()]
        self.plan_call = (planner, [*fields.values(), *tables, *lists])
        planner["plan_rows"](*self.plan_call[1])
        window = conv.window
        x = rng.standard_normal((window.batch, *window.size, conv.channels_in), dtype="float32")
        args = [tensor(x), tensor(rng.standard_normal(conv.weight_shape, dtype="float32") * 0.01)]
        args += [tensor(np.zeros(conv.bias_size, "float32")), tensor(plan.tap_entries), *lists]
        self.compact_call = None
        for live, count in ((masks.live_in, conv.depth), (masks.live_out, conv.channels_out)):
            if live is not None:
                listed = tensor(np.zeros(channel_list_shape(1, count), "int32"))
                build(plan_channels(1, count), self.tvm_target)["plan_channels"](
                    tensor(live[None].astype("float32")), listed
                )
                args.append(listed)
                if live is masks.live_in:
                    args[0] = self._compact(args[0], listed)
        if conv.zero_dead:
            args += [fields[key] for key in ("out_frames", "positions") if key in fields]
        self.args = [*args, tensor(np.zeros((window.batch, *window.out, conv.channels_out), "float32"))]
        self.library = build(conv3d_gather(conv), self.tvm_target)
        pairs = int(lists[-1].numpy()[0, 3])
        channels = conv.depth if masks.live_in is None else int(masks.live_in.sum())
        outputs = conv.channels_out if masks.live_out is None else int(masks.live_out.sum())
        self.macs = pairs * channels * outputs

    def _compact(self, x: tvm.runtime.Tensor, listed: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
        y = tensor(np.zeros(x.shape, "float32"))
        built = build(
            compact_channels(self.conv.window, self.conv.channels_in, 1, False, self.conv.tile.vector_floats),
            self.tvm_target,
        )
        self.compact_call = (built, [x, listed, y])
        built["compact_channels"](x, listed, y)
        return y

    def seconds(self, repeat: int = 3) -> float:
        """Median time of one call."""
        timer = self.library.mod.time_evaluator(self.conv.name, tvm.cpu(), number=1, repeat=repeat, min_repeat_ms=20)
        return float(np.median(timer(*self.args).results))

    def plan_seconds(self) -> float:
        """Median time of planning the rows and compacting the input, once each."""
        return sum(
            float(np.median(call[0].mod.time_evaluator(name, tvm.cpu(), 1, 3, 5)(*call[1]).results))
            for name, call in (("plan_rows", self.plan_call), ("compact_channels", self.compact_call))
            if call is not None
        )

    def with_tile(self, target: Target, threads: int, **changes: int) -> Runner:
        """The dense layer again with another tile."""
        return Runner(self.layer, target, threads, tile=replace(self.conv.tile, **changes))


def tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    """A tensor on the CPU, aligned as kernels expect."""
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def build(func: tirx.PrimFunc, target: tvm.target.Target) -> tvm.runtime.Executable:
    """Compile one kernel."""
    return tvm.compile(tvm.IRModule({str(func.attrs["global_symbol"]): func}), target=target)


class Peak:
    """The machine's multiply-add rate, measured by a kernel that reads no memory."""

    CHAINS, STEPS, TASKS = 12, 200_000, 8

    def __init__(self, target: Target, threads: int) -> None:
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
                with serial(self.STEPS):
                    for chain in chains:
                        store(chain, chain[lanes(0, floats)] * factor + term, lanes(0, floats))
                total = chains[0][lanes(0, floats)]
                for chain in chains[1:]:
                    total = total + chain[lanes(0, floats)]
                store(target, total, lanes(task * floats, floats))
        return built.func

    def gflops(self) -> float:
        """GFLOP/s over all threads, two operations per multiply-add."""
        timer = self.library.mod.time_evaluator("peak", tvm.cpu(), number=1, repeat=3)
        seconds = float(np.median(timer(*self.args).results))
        return 2e-9 * self.TASKS * self.CHAINS * self.floats * self.STEPS / seconds
