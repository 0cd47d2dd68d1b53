"""GPU kernels on a device, beside PyTorch (cuDNN) and beside themselves with less work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dance_tvm.core.errors import DanceError
from dance_tvm.device.launches import device_code
from dance_tvm.machines.target import Target, load_target
from dance_tvm.schedules.kernel import Weights

from .kernels import C3D, R2PLUS1D, Layer, Masks, calls_of

DENSITIES = (1.0, 0.75, 0.5, 0.25)


def block_conv(layer: Layer, target: Target, masks: Masks) -> Any:
    """The kernel of a layer with the default tile of ``target`` and the lists that ``masks`` ask for."""
    from dance_tvm.lowering.machine import gpu_of
    from dance_tvm.schedules.gpu.conv3d_gather import BlockConv
    from dance_tvm.schedules.gpu.row_plan import block_plan
    from dance_tvm.schedules.gpu.tiles import default_tile

    gpu = gpu_of(target)
    if gpu is None:
        raise DanceError(f"{target.name} has no GPU: give the name of a GPU target")
    tile = default_tile(gpu, layer.window, layer.channels_out)
    positions = None if masks.positions is None else (1, masks.positions.shape[0])
    plan = block_plan(
        layer.window, tile.mr, 1, masks.in_frames is not None, masks.out_frames is not None, positions
    )  # fmt: skip
    lists = {"live_in": masks.live_in is not None, "live_out": masks.live_out is not None}
    thinned = any(mask is not None for mask in (masks.out_frames, masks.positions, masks.live_out))
    return BlockConv(
        layer.window, layer.channels_in, layer.channels_out, 1, tile, plan, **lists,
        activation="relu", zero_dead="rows" if thinned else "",
    )  # fmt: skip


#: Runs one PrimFunc on the device: buffers in order, outputs last. Gives a function that launches and waits.
Prepare = Callable[[Any, list[Any]], Callable[[], None]]


@dataclass
class Device:
    """What a measurement needs of a device: to bring arrays there, to launch, to read seconds."""

    upload: Callable[[np.ndarray], Any]
    prepare: Prepare
    seconds: Callable[[Callable[[], None]], float]


def cuda_device(target: Target) -> Device:
    """This machine's GPU through TVM; raises DanceError where there is none."""
    import tvm

    device = tvm.device("cuda", 0)
    if not device.exist:
        raise DanceError(
            "no NVIDIA GPU here, or TVM's runtime has no CUDA: use --static, or run this where there is one"
        )

    def prepare(func: Any, buffers: list[Any]) -> Callable[[], None]:
        built = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target.tvm_target())
        return lambda: built["main"](*buffers)

    return Device(lambda array: tvm.runtime.tensor(array, device), prepare, _wall_clock(device.sync))


def opencl_device() -> Device:
    """An OpenCL device of this machine through pyopencl."""
    import tvm

    from dance_tvm.device.launches import opencl_target
    from dance_tvm.device.opencl import OpenCLSession

    session = OpenCLSession()

    def prepare(func: Any, buffers: list[Any]) -> Callable[[], None]:
        code = device_code(tvm.IRModule({"main": func}), opencl_target())
        program = session.compile(code)
        return lambda: session.run(program, code.plans["main"], buffers)

    return Device(session.upload, prepare, _wall_clock(session.queue.finish))


def _wall_clock(sync: Callable[[], None]) -> Callable[[Callable[[], None]], float]:
    def seconds(call: Callable[[], None]) -> float:
        sync()
        start = time.perf_counter()
        call()
        sync()
        return time.perf_counter() - start

    return seconds


class LayerOnGpu:
    """A layer's kernels on a device: its planners, and the convolution on random data."""

    def __init__(self, layer: Layer, target: Target, device: Device, masks: Masks | None = None) -> None:
        masks = masks or Masks()
        conv = self.conv = block_conv(layer, target, masks)
        window, self._device = conv.window, device
        rng = np.random.default_rng(0)
        x = rng.standard_normal((1, *window.size, conv.channels_in), dtype="float32")
        weight = rng.standard_normal((conv.channels_out, conv.depth, *window.kernel), dtype="float32") * 0.01
        given = {"in_frames": masks.in_frames, "out_frames": masks.out_frames, "positions": masks.positions}
        given |= {"in_channels": masks.live_in, "out_channels": masks.live_out}
        weights = Weights(weight, np.zeros(conv.channels_out, "float32"))
        calls = calls_of(conv, device.upload, x, weights, given)
        self._calls = [device.prepare(kernel.primfunc(), [*args.values()]) for kernel, args in calls]

    def seconds(self) -> float:
        """One planning and one run."""

        def both() -> None:
            for call in self._calls:
                call()

        return self._device.seconds(both)


class LayerInTorch:
    """The same layer by PyTorch (cuDNN on a GPU), the better of both memory formats."""

    def __init__(self, layer: Layer, where: str, seconds: Callable[[Callable[[], None]], float]) -> None:
        import torch

        self._seconds = seconds
        window = layer.window
        self._calls = []
        for form in (torch.contiguous_format, torch.channels_last_3d):
            x = torch.randn(1, layer.channels_in, *layer.size, device=where).to(memory_format=form)
            conv = torch.nn.Conv3d(layer.channels_in, layer.channels_out, layer.kernel, layer.stride, window.padding)
            conv = conv.to(where).to(memory_format=form).eval()
            self._calls.append(lambda conv=conv, x=x: torch.relu_(conv(x)))

    def seconds(self) -> float:
        """The better format's, in whole float32, with cuDNN's own choice of algorithm by trial."""
        import torch

        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            return min(self._seconds(call) for call in self._calls)


def compare(ours: LayerOnGpu, theirs: Any, rounds: int) -> dict[str, float]:
    """Medians of both sides, which take turns."""
    ours.seconds(), theirs.seconds()
    pairs = [(ours.seconds(), theirs.seconds()) for _ in range(rounds)]
    mine, other = (median(side) for side in zip(*pairs, strict=True))
    return {"ours": mine, "theirs": other, "share": other / mine}


def by_axis(layer: Layer, target: Target, device: Device, rounds: int) -> list[dict[str, Any]]:
    """Speed-up ÷ reduction of multiply-adds for each axis and density; planning counts."""
    dense = LayerOnGpu(layer, target, device)
    rng, rows = np.random.default_rng(0), []
    for axis in ("positions", "live_in", "live_out"):
        for density in DENSITIES:
            shape = {"positions": (1, *layer.window.out[1:]), "live_in": (layer.channels_in,)}
            mask = rng.permutation(_share(shape.get(axis, (layer.channels_out,)), density))
            thin = LayerOnGpu(layer, target, device, Masks(**{axis: mask}))
            found = compare(thin, dense, rounds)
            rows.append({"axis": axis, "density": density, **found, "efficiency": found["share"] * mask.mean()})
    return rows


def _share(shape: tuple[int, ...], density: float) -> np.ndarray:
    """A mask of which exactly the share ``density`` is alive."""
    mask = np.zeros(int(np.prod(shape)), bool)
    mask[: round(density * mask.size)] = True
    return np.random.default_rng(1).permutation(mask).reshape(shape)


def launch_overhead(device: Device) -> float:
    """Seconds of a launch that does next to nothing."""
    from dance_tvm.schedules.gpu.channel_plan import ChannelPlan

    planner = ChannelPlan(1, 1)
    call = device.prepare(planner.primfunc(), [device.upload(np.ones(o.shape, o.dtype)) for o in planner.operands()])
    call()
    return median(device.seconds(call) for _ in range(50))


def on_gpu(rounds: int) -> dict[str, Any]:
    """Every layer beside cuDNN, a layer thinned along each axis, and what a launch takes."""
    target = load_target("cuda")
    device = cuda_device(target)
    assert target.gpu is not None
    rows = []
    table = Table("layer", "kernel", "ms", "cuDNN ms", "of cuDNN", "of peak")
    for layer in [*C3D, *R2PLUS1D]:
        ours = LayerOnGpu(layer, target, device)
        found = compare(ours, LayerInTorch(layer, "cuda", device.seconds), rounds)
        window = layer.window
        work = 2 * window.tap_positions * layer.channels_in * layer.channels_out
        peak = work / found["ours"] / 1e9 / target.gpu.peak_gflops
        rows.append({"layer": layer.name, "kernel": ours.conv.name, **found, "peak": peak})
        times = [f"{1e3 * found['ours']:.3f}", f"{1e3 * found['theirs']:.3f}"]
        table.add_row(layer.name, ours.conv.name, *times, f"{found['share']:.2f}", f"{peak:.2f}")
    Console(width=150).print(table)
    axes = by_axis(C3D[3], target, device, rounds)
    table = Table("axis", "density", "speed-up", "÷ reduction")
    for row in axes:
        table.add_row(row["axis"], f"{row['density']}", f"{row['share']:.2f}", f"{row['efficiency']:.2f}")
    Console().print(table)
    overhead = launch_overhead(device)
    print(f"launch overhead {overhead * 1e6:.1f} us")
    return {"gpu": target.gpu.model_dump(), "layers": rows, "axes": axes, "launch_seconds": overhead}
