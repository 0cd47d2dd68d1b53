"""Winograd against direct convolution, one layer at a time: time beside the machine's peak, error beside float64.

Run `python benchmarks/winograd.py --layer conv3b --size 4x4x4:49 --size 1x6x6:25` to try tiles and columns per chunk,
or with no size to take what the cost model chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tvm
import typer
from kernels import C3D, R2PLUS1D, Layer, Peak, Runner, build, calls_of, tensor
from tvm import tirx

from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import Target, load_target
from dance_tvm.schedules.cpu import winograd
from dance_tvm.schedules.cpu.tiles import default_tile
from dance_tvm.schedules.cpu.winograd import WinogradConv
from dance_tvm.schedules.cpu.winograd_choice import choose
from dance_tvm.schedules.cpu.winograd_plan import WinogradPlan
from dance_tvm.schedules.kernel import Weights


@dataclass
class Data:
    """Inputs like those of a trained network (rectified, unit variance) and the exact output."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    exact: np.ndarray

    @staticmethod
    def of(layer: Layer) -> Data:
        """Draw the data of ``layer`` and convolve in float64."""
        rng = np.random.default_rng(0)
        fan_in = layer.channels_in * layer.window.taps
        x = np.maximum(rng.standard_normal((1, *layer.size, layer.channels_in)), 0).astype("float32")
        weight = rng.standard_normal((layer.channels_out, layer.channels_in, *layer.kernel)) * (2 / fan_in) ** 0.5
        bias = rng.standard_normal(layer.channels_out) * 0.1
        weight, bias = weight.astype("float32"), bias.astype("float32")
        exact = torch.nn.functional.conv3d(
            torch.from_numpy(x).double().permute(0, 4, 1, 2, 3),
            torch.from_numpy(weight).double(),
            torch.from_numpy(bias).double(),
            layer.stride,
            layer.window.padding,
        )
        return Data(x, weight, bias, exact.permute(0, 2, 3, 4, 1).numpy())

    def error(self, y: np.ndarray) -> float:
        """Largest error, of the largest output."""
        return float(np.abs(y - self.exact).max() / np.abs(self.exact).max())


class Timed:
    """A compiled kernel with its arguments."""

    def __init__(self, func: tirx.PrimFunc, target: tvm.target.Target, args: list[tvm.runtime.Tensor]) -> None:
        self.name = str(func.attrs["global_symbol"])
        self.library, self.args = build(func, target), args

    def seconds(self, repeat: int) -> float:
        """Shortest time of one call: what the machine does when nothing else runs on it."""
        timer = self.library.mod.time_evaluator(self.name, tvm.cpu(), number=1, repeat=repeat)
        return float(min(timer(*self.args).results))


def prepare(conv: WinogradConv, data: Data, target: tvm.target.Target) -> dict[str, tvm.runtime.Tensor]:
    """Plan the lists of a dense layer and pack its weights."""
    (plan, lists), (_, args) = calls_of(conv, tensor, data.x, Weights(data.weight, data.bias), {})
    build(plan.primfunc(), target)[plan.name](*lists.values())
    return args


def executed_macs(conv: WinogradConv, args: dict[str, tvm.runtime.Tensor]) -> int:
    """Multiply-adds of the second phase, register tiles that are not full included."""
    runs, counts = args["runs"].numpy(), args["counts"].numpy()
    rows = 0
    for chunk in range(counts[-1, 0]):
        for first, last, low, high in runs[chunk, : counts[chunk, 2]]:
            rows += (last - first) * (high - low) * conv.tile.mr
    return int(rows) * conv.plan.xi * conv.channels_in * conv.panels * conv.tile.nr


PHASES = {"inputs": "_transform_inputs", "multiply": "_multiply_panel", "outputs": "_transform_output"}


def phase_kernel(conv: WinogradConv, phase: str) -> tirx.PrimFunc:
    """The kernel with every phase but one left empty."""
    kept = {name: getattr(winograd._Emitter, name) for name in PHASES.values()}
    try:
        for key, name in PHASES.items():
            if key != phase:
                setattr(winograd._Emitter, name, lambda *_: None)
        return conv.primfunc()
    finally:
        for name, method in kept.items():
            setattr(winograd._Emitter, name, method)


def report(
    conv: WinogradConv, layer: Layer, data: Data, target: Target, threads: int, repeat: int, phases: bool
) -> None:
    """Print one line: time, rates, error and memory of one tile size."""
    tvm_target = target.tvm_target(threads)
    args = prepare(conv, data, tvm_target)
    whole = Timed(conv.primfunc(), tvm_target, [*args.values()])
    seconds = whole.seconds(repeat)
    error = data.error(args["y"].numpy())
    macs = executed_macs(conv, args)
    line = f"{conv.name}  columns {conv.plan.columns}  {1e3 * seconds:.1f} ms  {2e-9 * macs / seconds:.0f} GFLOP/s done"
    nominal = layer.window.positions_out * layer.window.taps * layer.channels_in * layer.channels_out
    line += f"  {2e-9 * nominal / seconds:.0f} nominal  error {error:.1e}"
    line += f"  scratch {conv.scratch_bytes / 2**20:.0f} MiB  weights {4 * np.prod(conv.weight_shape) / 2**20:.0f} MiB"
    if phases:
        parts = {key: Timed(phase_kernel(conv, key), tvm_target, [*args.values()]).seconds(repeat) for key in PHASES}
        line += "  alone: " + ", ".join(f"{key} {1e3 * value:.1f}" for key, value in parts.items())
        line += f" ({2e-9 * macs / parts['multiply']:.0f} GFLOP/s)"
    print(line, flush=True)


def parse(size: str) -> tuple[tuple[int, int, int], int]:
    """``"4x4x4:49"`` → tile of outputs, columns per chunk."""
    m, columns = size.split(":")
    return tuple(int(extent) for extent in m.split("x")), int(columns)


def main(
    layer: Annotated[list[str], typer.Option(help="Layer of C3D or R(2+1)D, as benchmarks/kernels.py names it.")],
    size: Annotated[list[str], typer.Option(help="Tile of outputs and columns per chunk, as 4x4x4:49.")] = [],  # noqa: B006 - typer reads it
    threads: int = 1,
    repeat: int = 5,
    phases: bool = False,
    direct: bool = True,
    target: str = "host",
) -> None:
    """Time and check tile sizes of layers."""
    machine = load_target(target if "/" not in target else Path(target))
    peak = Peak(machine, threads)
    for name in layer:
        one = next(each for each in [*C3D, *R2PLUS1D] if each.name == name)
        print(f"{name}: peak {peak.gflops():.0f} GFLOP/s", flush=True)
        runner = Runner(one, machine, threads)
        if direct:
            seconds = runner.seconds(repeat)
            print(f"direct  {1e3 * seconds:.1f} ms  {2e-9 * runner.macs / seconds:.0f} GFLOP/s done", flush=True)
        data = Data.of(one)
        facts = machine_of(machine)
        tile = default_tile(facts, one.window, one.channels_in, one.channels_out)
        chosen = choose(runner.conv, facts, threads, "winograd")
        print(f"{chosen.kernel.name}: {chosen.reason}", flush=True)
        if not size and isinstance(chosen.kernel, WinogradConv):
            report(replace(chosen.kernel, activation=""), one, data, machine, threads, repeat, phases)
        for m, columns in map(parse, size):
            plan = WinogradPlan(one.window, m, tile.mr, columns)
            conv = WinogradConv(one.window, one.channels_in, one.channels_out, 1, tile, plan, activation="")
            predicted = conv.predict(facts, threads)
            report(conv, one, data, machine, threads, repeat, phases)
            print(f"  predicted {1e3 * predicted:.1f} ms", flush=True)


if __name__ == "__main__":
    typer.run(main)
