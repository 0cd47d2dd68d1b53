"""``dance-tvm export-dstep``: a trained D-STEP network as a .pt2 file, whole clips or one frame per call."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_apart, require_suffix, require_writable
from dance_tvm.sparsity.trained import require_trained

app = application()

WEIGHTS = "model.safetensors"
SHIPPED = Path(__file__).parent / "models" / "weights" / "resnet-mini-dstep.safetensors"


@app.command(
    epilog=examples(
        "dance-tvm export-dstep runs/dstep/model.safetensors --stream --out stream.pt2",
        "dance-tvm export-dstep --out clip.pt2 && dance-tvm build --model clip.pt2",
    )
)
def export_dstep(
    weights: Annotated[
        Path, typer.Argument(help="model.safetensors of a run with --method dstep.", show_default="the one shipped")
    ] = SHIPPED,
    stream: Annotated[bool, typer.Option("--stream", help="One frame per call, state as inputs and outputs.")] = False,
    out: Annotated[Path | None, typer.Option(help="The .pt2 file.", show_default="beside weights of yours")] = None,
) -> None:
    """Export a trained D-STEP network for `dance-tvm build --model`."""
    name = "stream.pt2" if stream else "clip.pt2"
    path = out or (Path(name) if weights == SHIPPED else weights.with_name(name))
    require_suffix(path, "--out", (".pt2",))
    if not weights.is_file():
        raise DanceError(f"there is no file of weights {weights}: a run of `train --method dstep` leaves {WEIGHTS}")
    require_apart(path, "--out", {"--weights": weights})
    require_writable(path, "--out")
    require_trained(weights)
    from dance_tvm.sparsity.dstep.export import export_network
    from dance_tvm.sparsity.dstep.method import load_trained

    network, card = load_trained(weights)
    export_network(network, tuple(card["clip_shape"]), path, stream=stream)
    typer.echo(f"next: dance-tvm build --model {quote(str(path))}")


if __name__ == "__main__":
    start(app, "python -m dance_tvm.export_dstep")
