"""Masks in the units that kernels can skip: speed over our own fastest dense build, beside the multiply-adds left.

The masks are inputs of the network, drawn anew for each clip, after every convolution but the first (which a controller
would read whole); one artifact serves every mask. ``units``: masks keep or leave whole units, as `dance-tvm units`
tells them; ``scattered``: single frames, positions or channels. The masked and the dense build, each as the build
chooses its kernels, take turns in one process, clip by clip; processor time is compared, and the clock told beside it.
Multiply-adds left are those of single positions and channels, as training counts them; beside them stands what the
kernels did, whose tiles and units are whole. A reduction that no speed-up follows is a kernel that did what it need not
have done.

    python -m benchmarks.units --network c3d --json docs/benchmarks/units-c3d.json
    python -m benchmarks.units --network c3d-mini --profile all
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Annotated, cast

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from dance_tvm import models
from dance_tvm.artifact.folder import load_artifact
from dance_tvm.benchmarking.layers import profile as by_layer
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.device import open_device
from dance_tvm.device.session import LoadedNetwork
from dance_tvm.machines.host import _cpuinfo
from dance_tvm.sparsity.dance.controller import Masks
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dance.method import prune
from dance_tvm.sparsity.dance.options import AXES
from dance_tvm.sparsity.dance.sites import node_named, trace
from dance_tvm.sparsity.units import SiteUnits, read_units
from dance_tvm.units import units as units_command

from .efficiency import keep

#: Seconds of calls whose processor time is taken together: setting the inputs is a small part of it.
BURST = 0.05


@dataclass(frozen=True)
class Case:
    """What is thinned, to which share of the dense multiply-adds, and whether in whole units.

    Where ``density`` is given, it is the share of each axis that is left, whatever that makes of the multiply-adds.
    """

    name: str
    axes: tuple[str, ...]
    share: float = 1.0
    whole: bool = True
    density: float | None = None


CASES = [
    Case("ones", ()),
    Case("frames", ("frames",), 0.5),
    Case("positions", ("positions",), 0.5),
    Case("channels", ("channels",), 0.5),
    Case("all", AXES, 0.25),
    *(
        Case(f"{axis}, scattered {density:g}", (axis,), whole=False, density=density)
        for axis in AXES
        for density in (0.9, 0.7, 0.5, 0.3, 0.1)
    ),
]


def masked(network: nn.Module, clip_shape: tuple[int, ...]) -> tuple[fx.GraphModule, int]:
    """``network`` with a mask of each axis at every site but the first as further inputs, and the number of sites."""
    traced, sites = trace(network, clip_shape)
    graph = traced.graph
    parameter = next(node for node in graph.nodes if node.op == "placeholder")
    for site in sites[1:]:
        activation = node_named(traced, site.node)
        readers, value = list(activation.users), activation
        with graph.inserting_after(parameter):
            parameters = [graph.placeholder(f"{site.node}_{axis}") for axis in AXES][::-1]
        for parameter in parameters:
            with graph.inserting_after(value):
                compared = graph.call_function(torch.gt, (parameter, 0.5))
            with graph.inserting_after(compared):
                alive = graph.call_method("float", (compared,))
            with graph.inserting_after(alive):
                value = graph.call_function(torch.mul, (value, alive))
        for reader in readers:
            reader.replace_input_with(activation, value)
    graph.lint()
    traced.recompile()
    return traced, len(sites)


@dataclass(frozen=True)
class Drawer:
    """Draws masks for the sites of a network, whose multiply-adds ``counter`` counts."""

    counter: MacCounter
    units: Sequence[SiteUnits]

    def draw(self, case: Case, density: float, seed: int) -> list[Masks]:
        """Masks that keep ``density`` of the units of each of the case's axes, at every site but the first."""
        rng = np.random.default_rng(seed)
        return [Masks(None, None, None), *(self._site(case, density, rng, unit) for unit in self.units[1:])]

    def _site(self, case: Case, density: float, rng: np.random.Generator, unit: SiteUnits) -> Masks:
        channels, frames, height, width = unit.shape
        if not case.whole:
            unit = unit.model_copy(update={"frames": 1, "channels": 1, "positions": (1, 1)})
        counts = unit.counts

        def kept(axis: str, count: int) -> np.ndarray:
            if axis not in case.axes or count == 1:
                return np.ones(count, bool)
            # A share of a few units is met on average: of two, half of the draws keep both where 0.75 are wanted.
            return keep(rng, count, math.floor(density * count + rng.random()) / count)

        of_frames = kept("frames", counts[0]).repeat(unit.frames)[:frames]
        of_channels = kept("channels", counts[1]).repeat(unit.channels)[:channels]
        grid = kept("positions", counts[2][0] * counts[2][1]).reshape(counts[2])
        tiles = grid.repeat(unit.positions[0], 0).repeat(unit.positions[1], 1)[:height, :width]
        arrays = (of_frames[None, None, :, None, None], of_channels[None, :, None, None, None], tiles[None, None, None])
        return Masks(*(torch.from_numpy(array.astype("float32")) for array in arrays))

    def share(self, masks: list[Masks]) -> float:
        """Share of the dense multiply-adds that the masks leave, the linear layers left out."""
        count = self.counter.count(masks, 1)
        return sum(float(layer.executed[0]) for layer in count.layers) / sum(layer.dense for layer in count.layers)

    def density(self, case: Case) -> float:
        """Of each of the case's axes, to leave about its share of the multiply-adds."""
        if case.density is not None:
            return case.density
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            found = np.mean([self.share(self.draw(case, middle, seed)) for seed in range(4)])
            low, high = (low, middle) if found > case.share else (middle, high)
        return high


def drawer(name: str, units: Sequence[SiteUnits]) -> Drawer:
    """The drawer of a network of the zoo."""
    shape = models.entry(name).input_shape
    return Drawer(MacCounter(prune(models.create(name), shape, units=units)), units)


def artifacts(name: str, folder: Path, threads: int, anew: bool) -> dict[str, Path]:
    """Build what is missing in ``folder``: the dense network and the masked one."""
    network, (clip,) = models.create(name).eval(), models.example_inputs(name)
    graph, _ = masked(network, models.entry(name).input_shape)
    shapes = [unit.shape for unit in trace(network, models.entry(name).input_shape)[1]]
    full = [
        torch.ones(extent)
        for channels, frames, height, width in shapes[1:]
        for extent in ((1, 1, frames, 1, 1), (1, channels, 1, 1, 1), (1, 1, 1, height, width))
    ]
    found = {}
    for kind, module, inputs in (("dense", network, (clip,)), ("masked", graph, (clip, *full))):
        out = found[kind] = folder / f"{name}-{kind}-{threads}"
        if anew or not out.exists():
            print(f"building {out.name}", file=sys.stderr, flush=True)
            build_network(
                module, out, target="host", example_inputs=cast(tuple[Tensor, ...], inputs),
                options=Options(threads=threads), check=False, reuse=False,
            )  # fmt: skip
    return found


@dataclass(frozen=True)
class Row:
    """One draw of a case: share of the multiply-adds left, what the kernels did of them (tiles and units are computed
    whole), and seconds of a call: the shortest by the clock, and the least processor time, which other processes of a
    busy machine disturb less."""

    case: str
    seed: int
    share: float
    executed: float
    dense: float
    masked: float
    dense_processor: float
    masked_processor: float

    @property
    def speedup(self) -> float:
        """By processor time."""
        return self.dense_processor / self.masked_processor

    @property
    def efficiency(self) -> float:
        """Speed-up over reduction."""
        return self.speedup * self.share


def measure(
    case: Case, seed: int, share: float, loaded: Mapping[str, LoadedNetwork], inputs: dict[str, np.ndarray], rounds: int
) -> Row:
    """Dense and masked in turns."""
    clip = {name: inputs[name] for name in list(inputs)[:1]}
    calls = [(loaded["dense"], clip), (loaded["masked"], inputs)]
    burst = max(1, round(BURST / max(1e-6, *(network.time(given, 2)[1] for network, given in calls))))
    clock, processor = [math.inf] * 2, [math.inf] * 2
    for _ in range(rounds):
        for index, (network, given) in enumerate(calls):
            before = process_time()
            seconds = min(network.time(given, burst))
            processor[index] = min(processor[index], (process_time() - before) / burst)
            clock[index] = min(clock[index], seconds)
    layers = by_layer(loaded["masked"].manifest, loaded["masked"].kernels(inputs, 0), 0.0).layers
    executed = sum(layer.executed_macs for layer in layers) / sum(layer.macs for layer in layers)
    return Row(case.name, seed, share, executed, *clock, *processor)


def profile(loaded: Mapping[str, LoadedNetwork], inputs: dict[str, np.ndarray], repeats: int) -> Table:
    """Milliseconds of each kernel of both builds, those under a hundredth of the whole together."""
    clip = {name: inputs[name] for name in list(inputs)[:1]}
    table = Table("build", "kernel", "ms", "work")
    for kind, given in (("dense", clip), ("masked", inputs)):
        calls = loaded[kind].kernels(given, repeats)
        total = sum(call.seconds for call in calls)
        for call in calls:
            if call.seconds > total / 100:
                table.add_row(kind, call.symbol, f"{1e3 * call.seconds:.3f}", str(call.work or ""))
        rest = sum(call.seconds for call in calls if call.seconds <= total / 100)
        table.add_row(kind, "others", f"{1e3 * rest:.3f}", "")
        table.add_row(kind, "all", f"{1e3 * total:.3f}", "")
    return table


def main(
    network: Annotated[str, typer.Option(help="a network of the zoo with sites")] = "c3d-mini",
    threads: Annotated[int, typer.Option(help="threads of both sides")] = 1,
    rounds: Annotated[int, typer.Option(help="times that dense and masked take turns for each mask")] = 7,
    draws: Annotated[int, typer.Option(help="masks drawn for each case")] = 3,
    only: Annotated[str, typer.Option(help="comma-separated beginnings of cases' names")] = "",
    whole: Annotated[bool, typer.Option("--whole", help="masks of whole units alone, no scattered ones")] = False,
    folder: Annotated[Path, typer.Option(help="where artifacts are kept")] = Path("artifacts/units"),
    anew: Annotated[bool, typer.Option("--anew", help="build even what is there")] = False,
    profiled: Annotated[str, typer.Option("--profile", help="a case whose kernels are timed")] = "",
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print speed-up, reduction, and one over the other, by what is thinned."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    folder.mkdir(parents=True, exist_ok=True)
    built = artifacts(network, folder, threads, anew)
    units = folder / f"{network}-units.json"
    if anew or not units.exists():
        units_command(network, "host", threads, 1, units, True)
    draw = drawer(network, read_units(units).sites)
    wanted = [case for case in CASES if not only or case.name.startswith(tuple(only.split(",")))]
    cases = [case for case in wanted if case.whole or not whole]
    rows = []
    with open_device("local") as device:
        loaded = {kind: device.load(load_artifact(path)) for kind, path in built.items()}
        names = [tensor.name for tensor in loaded["masked"].manifest.inputs]
        shape = tuple(loaded["masked"].manifest.inputs[0].shape)
        clip = np.random.default_rng(1).standard_normal(shape, dtype="float32")
        for case in cases:
            density = draw.density(case)
            for seed in range(1 if case.name == "ones" else draws):
                masks = draw.draw(case, density, 100 + seed)
                arrays = [mask.numpy() for site in masks[1:] for mask in site if mask is not None]
                inputs = dict(zip(names, [clip, *arrays], strict=True))
                rows.append(measure(case, seed, draw.share(masks), loaded, inputs, rounds))
                print(case.name, f"{rows[-1].speedup:.3f}", file=sys.stderr, flush=True)
            if case.name == profiled:
                Console(width=160).print(profile(loaded, inputs, rounds))
    _print(rows)
    if out is not None:
        facts = {"machine": _cpuinfo("model name"), "system": platform.platform(), "threads": threads, "rounds": rounds}
        out.parent.mkdir(parents=True, exist_ok=True)
        told = [{**asdict(row), "speedup": row.speedup, "efficiency": row.efficiency} for row in rows]
        out.write_text(json.dumps({**facts, "network": network, "rows": told}, indent=1) + "\n", encoding="utf-8")


def _print(rows: list[Row]) -> None:
    """Medians over the draws of each case."""
    table = Table("masks", "MACs left", "done", "reduction", "speed-up", "÷", "ms", "dense ms", "by the clock")
    for name in dict.fromkeys(row.case for row in rows):
        same = [row for row in rows if row.case == name]
        share, speed = median(row.share for row in same), median(row.speedup for row in same)
        efficiency = median(row.efficiency for row in same)
        times = [1e3 * median(row.masked_processor for row in same), 1e3 * median(row.dense_processor for row in same)]
        clock = median(row.dense / row.masked for row in same)
        done = median(row.executed for row in same)
        table.add_row(
            name, f"{share:.2f}", f"{done:.2f}", f"{1 / share:.2f}", f"{speed:.2f}", f"{efficiency:.2f}",
            *(f"{time:.2f}" for time in times), f"{clock:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
