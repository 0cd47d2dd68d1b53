"""Instructions of our aarch64 kernels per multiply-add, by layer, counted under emulation: the same at every run.

Executed multiply-adds leave out taps on padding; nominal ones do not, and are those that Winograd's few are held
against. Needs the emulated device (`dance-tvm doctor`).

    python -m benchmarks.emulated --layers conv3a,conv4b --json docs/benchmarks/emulated.json
    python -m benchmarks.emulated --layers conv4a --peers onnxruntime,mnn,mnn-exact     the same layer in their wheels
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.device import prepare_emulator
from dance_tvm.device.emulator import prepare

from .emulated_peers import PEERS, EmulatedPeers
from .engines import export_case
from .instructions import instructions
from .kernels import C3D, R2PLUS1D, Layer

Dtype = Literal["float32", "float16"]
CONV: tuple[Literal["direct", "auto"], ...] = ("direct", "auto")


def main(
    layers: Annotated[str, typer.Option(help="comma-separated names of layers of C3D and R(2+1)D")] = "conv4a,conv4b",
    target: Annotated[str, typer.Option(help="what to build for; aarch64")] = "snapdragon",
    dtype: Annotated[Dtype, typer.Option(help="how activations and weights are stored")] = "float32",
    peers: Annotated[str, typer.Option(help=f"comma-separated engines beside ours: {', '.join(PEERS)}")] = "",
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print instructions per multiply-add by layer, direct and as the build chooses."""
    prepare_emulator()
    others = [peer for peer in peers.split(",") if peer]
    if unknown := [peer for peer in others if peer not in PEERS]:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(PEERS)}")
    wanted = [layer for layer in [*C3D, *R2PLUS1D] if layer.name in layers.split(",")]
    jobs = [(layer, conv) for layer in wanted for conv in CONV]
    console = Console(stderr=True)
    rows = [measure(layer, conv, target, dtype) for layer, conv in track(jobs, "counting", console=console)]
    if others:
        engines = EmulatedPeers(prepare(console.print))
        pairs = [(layer, peer) for layer in wanted for peer in others]
        rows += [measure_peer(layer, peer, engines) for layer, peer in track(pairs, "peers", console=console)]
    table = Table("layer", "kernel", "M instructions", "per executed MAC", "per nominal MAC")
    for row in rows:
        figures = f"{row['instructions'] / 1e6:.1f}", f"{row['per_executed']:.3f}", f"{row['per_nominal']:.3f}"
        table.add_row(row["layer"], row["kernel"], *figures)
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"target": target, "threads": 1, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def measure(layer: Layer, conv: Literal["direct", "auto"], target: str, dtype: Dtype) -> dict:
    """Build one layer and count one call of it."""
    module, clip = _module(layer)
    with tempfile.TemporaryDirectory() as folder:
        built = build_network(
            nn.Sequential(module, nn.ReLU()).eval(),
            Path(folder) / "layer",
            target=target,
            example_inputs=(clip,),
            options=Options(threads=1, conv=conv, dtype=dtype),
            check=False,
        )
        (count,) = instructions(built.artifact)
        return _row(layer, built.artifact.manifest.layers[0].kernel, count)


def measure_peer(layer: Layer, peer: str, engines: EmulatedPeers) -> dict:
    """Count one call of the layer, without its ReLU, in another engine."""
    with tempfile.TemporaryDirectory() as folder:
        case = export_case(layer.name, *_module(layer), Path(folder))
        return _row(layer, peer, engines.instructions(peer, case))


def _module(layer: Layer) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Conv3d(layer.channels_in, layer.channels_out, layer.kernel, layer.stride, layer.window.padding)
    return module.eval(), torch.randn(1, layer.channels_in, *layer.size)


def _row(layer: Layer, kernel: str, count: int) -> dict:
    channels, window = layer.channels_in * layer.channels_out, layer.window
    return {
        "layer": layer.name,
        "kernel": kernel,
        "instructions": count,
        "per_executed": count / (window.tap_positions * channels),
        "per_nominal": count / (window.positions_out * window.taps * channels),
    }


if __name__ == "__main__":
    typer.run(main)
