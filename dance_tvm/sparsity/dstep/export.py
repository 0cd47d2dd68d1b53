"""python -m dance_tvm.sparsity.dstep.export: a trained D-STEP network as a .pt2 file, whole clips or streaming.

    python -m dance_tvm.sparsity.dstep.export runs/dstep/model.safetensors --stream --out stream.pt2
    dance-tvm build --model stream.pt2 --target host

Without a file, the network that ships with the package is exported.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.checkpoint import write_atomically
from dance_tvm.sparsity.dstep.method import load_trained
from dance_tvm.sparsity.dstep.network import DStepResNet, Stream

SHIPPED = Path(__file__).parents[2] / "models" / "weights" / "resnet-mini-dstep.safetensors"

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    weights: Annotated[Path, typer.Argument(help="model.safetensors of a run with --method dstep")] = SHIPPED,
    stream: Annotated[bool, typer.Option("--stream", help="one frame a call, state as inputs and outputs")] = False,
    out: Annotated[Path | None, typer.Option(help="the .pt2 file", show_default="beside the weights")] = None,
) -> None:
    """Export a trained network for `dance-tvm build --model`."""
    path = out or weights.with_name("stream.pt2" if stream else "clip.pt2")
    try:
        network, card = load_trained(weights)
        export(network, tuple(card["clip_shape"]), path, stream=stream)
    except DanceError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    print(path)


def export(network: DStepResNet, clip_shape: tuple[int, int, int, int], path: Path, *, stream: bool = False) -> None:
    """Writes `network` for clips of shape (C, T, H, W), or its streaming form for frames (C, H, W) of them."""
    channels, frames, height, width = clip_shape
    module: torch.nn.Module = network.eval()
    inputs: tuple[torch.Tensor, ...] = (torch.zeros(1, channels, frames, height, width),)
    if stream:
        module = streaming = Stream(network, (channels, height, width)).eval()
        inputs = (torch.zeros(1, channels, height, width), *streaming.start())
    content = io.BytesIO()
    torch.export.save(torch.export.export(module, inputs), content)
    write_atomically(path, content.getvalue())


if __name__ == "__main__":
    app()
