"""C3D with half of its multiply-adds masked out: speed-up over our own dense builds ÷ reduction of multiply-adds.

The masks are inputs of the network, one of each axis after every convolution but the first, as DANCE places them; one
artifact serves every mask. It is built with direct kernels and as the build chooses by itself (Winograd), and takes
turns with the dense build of the same kind in one process. Reductions are of the multiply-adds of the direct kernels,
counted from the index lists.

    python -m benchmarks.end_to_end --threads 2 --json docs/benchmarks/end_to_end.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from dance_tvm import models
from dance_tvm.artifact.folder import load_artifact
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.device import open_device
from dance_tvm.device.session import LoadedNetwork
from dance_tvm.machines.host import _cpuinfo

from .efficiency import keep

AXES = ("frames", "positions", "channels")
#: Densities of each axis, so that about half of the multiply-adds are left; dead outputs of one layer are dead inputs
#: of the next, so that channels count twice. ``half``: a contiguous half of the positions, ``groups``: channels in
#: runs of 16.
CASES: dict[str, dict[str, float]] = {
    "all-ones masks": {},
    "frames": {"frames": 0.6},
    "positions, scattered": {"positions": 0.5},
    "positions, contiguous": {"contiguous": 0.5},
    "channels, single": {"channels": 0.7},
    "channels, groups": {"groups": 0.7},
    "all axes": {"frames": 0.8, "contiguous": 0.8, "groups": 0.85},
}
GROUP = 16


def masked(network: nn.Module) -> tuple[fx.GraphModule, list[str]]:
    """``network`` with a mask of each axis after every convolution but the first, and the names of those."""
    traced = fx.symbolic_trace(network)
    graph, names = traced.graph, []
    parameter = next(node for node in graph.nodes if node.op == "placeholder")
    convolutions = [n for n in graph.nodes if n.op == "call_module" and str(n.target).startswith("conv")]
    for convolution in convolutions[1:]:
        names.append(str(convolution.target))
        (activation,) = convolution.users
        readers, value = list(activation.users), activation
        for axis in AXES:
            with graph.inserting_after(parameter):
                parameter = graph.placeholder(f"{names[-1]}_{axis}")
            with graph.inserting_before(readers[0]):
                alive = graph.call_method("float", (graph.call_function(torch.gt, (parameter, 0.5)),))
                value = graph.call_function(torch.mul, (value, alive))
        for reader in readers:
            reader.replace_input_with(activation, value)
    traced.recompile()
    return traced, names


def ones(network: nn.Module, names: list[str], clip: torch.Tensor) -> list[torch.Tensor]:
    """Masks of each axis that leave everything, for the outputs of the layers ``names``."""
    shapes: dict[str, tuple[int, ...]] = {}
    modules = dict(network.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _m, _x, y, at=name: shapes.__setitem__(at, tuple(y.shape)))
        for name in names
    ]
    with torch.inference_mode():
        network(clip)
    for hook in hooks:
        hook.remove()
    result = []
    for name in names:
        batch, channels, frames, height, width = shapes[name]
        extents = ((batch, 1, frames, 1, 1), (batch, 1, 1, height, width), (batch, channels, 1, 1, 1))
        result += [torch.ones(extent) for extent in extents]
    return result


def thinned(full: list[np.ndarray], densities: dict[str, float]) -> list[np.ndarray]:
    """The masks ``full`` with that share of each axis left."""
    rng, result = np.random.default_rng(0), []
    for index, mask in enumerate(full):
        axis, size = AXES[index % 3], mask.size
        alive = np.ones(size, bool)
        if axis == "frames" and "frames" in densities:
            alive = keep(rng, size, densities["frames"])
        elif axis == "positions" and "positions" in densities:
            alive = keep(rng, size, densities["positions"])
        elif axis == "positions" and "contiguous" in densities:
            alive = np.arange(size) < round(densities["contiguous"] * size)
        elif axis == "channels" and "channels" in densities:
            alive = keep(rng, size, densities["channels"])
        elif axis == "channels" and "groups" in densities:
            alive = keep(rng, size, densities["groups"], GROUP)
        result.append(alive.reshape(mask.shape).astype("float32"))
    return result


def artifacts(name: str, folder: Path, threads: int) -> None:
    """Build what is missing in ``folder``: dense and masked, direct and as the build chooses."""
    network, (clip,) = models.create(name), models.example_inputs(name)
    graph, names = masked(network)
    full = ones(network, names, clip)
    kernels: tuple[Literal["direct", "auto"], ...] = ("direct", "auto")
    for conv in kernels:
        for kind, module, inputs in (("dense", network, (clip,)), ("masked", graph, (clip, *full))):
            out = folder / f"{name}-{kind}-{conv}-{threads}"
            if not out.exists():
                print(f"building {out.name}", file=sys.stderr, flush=True)
                options = Options(threads=threads, conv=conv)
                build_network(module, out, target="host", example_inputs=inputs, options=options, check=False)


def main(
    network: Annotated[str, typer.Option(help="a network of the zoo without branches: c3d or c3d-mini")] = "c3d",
    threads: Annotated[int, typer.Option(help="threads of both sides")] = 2,
    rounds: Annotated[int, typer.Option(help="times that dense and masked take turns")] = 9,
    folder: Annotated[Path, typer.Option(help="where artifacts are kept")] = Path("benchmarks/results"),
    build_only: Annotated[bool, typer.Option("--build-only", help="build and do not measure")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print speed-up ÷ reduction of whole networks by what is thinned."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    artifacts(network, folder, threads)
    if build_only:
        return
    rows = []
    with open_device("local") as device:
        loaded = {
            (kind, conv): device.load(load_artifact(folder / f"{network}-{kind}-{conv}-{threads}"))
            for kind in ("dense", "masked")
            for conv in ("direct", "auto")
        }
        names = [tensor.name for tensor in loaded["masked", "auto"].manifest.inputs]
        shapes = [tuple(tensor.shape) for tensor in loaded["masked", "auto"].manifest.inputs]
        clip = np.random.default_rng(1).standard_normal(shapes[0], dtype="float32")
        for case, densities in CASES.items():
            masks = thinned([np.ones(shape, "float32") for shape in shapes[1:]], densities)
            inputs = dict(zip(names, [clip, *masks], strict=True))
            rows += measure(case, loaded, inputs, rounds)
            print(case, file=sys.stderr, flush=True)
    table = Table("masks", "kernels", "reduction", "speed-up", "÷", "ms", "dense ms")
    for row in rows:
        figures = (row["reduction"], row["speedup"], row["efficiency"], row["milliseconds"], row["dense_milliseconds"])
        table.add_row(row["case"], row["conv"], *(f"{figure:.3f}" for figure in figures))
    Console().print(table)
    if out is not None:
        facts = {"machine": _cpuinfo("model name"), "system": platform.platform(), "threads": threads, "rounds": rounds}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**facts, "network": network, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def measure(
    case: str, loaded: dict[tuple[str, str], LoadedNetwork], inputs: dict[str, np.ndarray], rounds: int
) -> list[dict]:
    """Dense and masked in turns, with direct kernels and with those chosen."""
    clip = {name: inputs[name] for name in list(inputs)[:1]}
    dense_macs, left = (
        sum(call.work["macs"] for call in loaded[kind, "direct"].kernels(given, repeats=0) if call.work)
        for kind, given in (("dense", clip), ("masked", inputs))
    )
    rows = []
    for conv in ("direct", "auto"):
        dense, sparse = loaded["dense", conv], loaded["masked", conv]
        dense.time(clip, 1), sparse.time(inputs, 1)
        pairs = [(dense.time(clip, 1)[0], sparse.time(inputs, 1)[0]) for _ in range(rounds)]
        speedup = median(before / after for before, after in pairs)
        rows.append(
            {
                "case": case,
                "conv": conv,
                "reduction": dense_macs / left,
                "speedup": speedup,
                "efficiency": speedup * left / dense_macs,
                "milliseconds": 1e3 * median(after for _, after in pairs),
                "dense_milliseconds": 1e3 * median(before for before, _ in pairs),
            }
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
