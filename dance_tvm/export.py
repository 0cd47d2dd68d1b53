"""``dance-tvm export``: write a PyTorch network as a file that builds take."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dance_tvm.artifact.preprocess import preprocess_of
from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_apart, require_suffix, require_writable
from dance_tvm.core.options import AsJson
from dance_tvm.core.progress import Progress
from dance_tvm.models.network_files import HUBS, require_python, require_weights, weights_file
from dance_tvm.models.registry import entry, names

app = application()


@app.command(
    epilog=examples(
        "dance-tvm export torchvision:r3d_18 --weights DEFAULT --shape 1x3x16x112x112 --out r3d.pt2",
        "dance-tvm export pytorchvideo:x3d_s --weights pretrained --shape 1x3x13x182x182 --out x3d.pt2",
        "dance-tvm export mynet:build --weights trained.pt --shape 1x3x16x112x112 --open-batch --out mynet.onnx",
    )
)
def export(
    source: Annotated[
        str,
        typer.Argument(help="torchvision:NAME, pytorchvideo:NAME, your own MODULE:FUNCTION, or a name of the zoo."),
    ],
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="An input's shape, N x C x T x H x W; one for each input, in order.", show_default="the zoo's"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write: .pt2 or .onnx.")] = Path("model.pt2"),
    weights: Annotated[
        str | None,
        typer.Option(help="A state dict's file, torchvision's name (DEFAULT), or `pretrained` (pytorchvideo)."),
    ] = None,
    open_batch: Annotated[
        bool, typer.Option("--open-batch", help="Leave the batch open: `build --batch` fixes it.")
    ] = False,
    mean: Annotated[
        str | None, typer.Option(help="Mean subtracted from frames of 0 to 1, e.g. 0.45,0.45,0.45.")
    ] = None,
    deviation: Annotated[
        str | None, typer.Option(help="Deviation that frames less their mean are divided by, e.g. 0.225,0.225,0.225.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a PyTorch network as a file that `dance-tvm build` takes: in evaluation mode, compared with its module.

    Where the scale of its frames is known or given, a .toml beside it gives it to `build --preprocess`.
    """
    require_suffix(out, "--out", (".pt2", ".onnx"))
    require_apart(out, "--out", {"--weights": Path(weights) if weights else None})
    require_writable(out, "--out")
    shapes = [_shape(each) for each in shape or []]
    scale = {name: _numbers(name, text) for name, text in (("mean", mean), ("deviation", deviation)) if text}
    given = preprocess_of(scale, "--") if scale else None
    if ":" in source and not shapes:
        raise DanceError("--shape is missing: give the shape of each input, as 1x3x16x112x112")
    _require_source(source, weights)
    if out.suffix == ".onnx" and find_spec("onnxscript") is None:
        raise DanceError("writing ONNX needs the onnxscript package: pip install 'dance-tvm[onnx]'")
    with Progress(quiet=as_json) as progress:
        progress.phase("load PyTorch")
        from dance_tvm import models
        from dance_tvm.frontend.export import export as written
        from dance_tvm.frontend.export import load_source, write_preprocess

        progress.phase(f"make {source}")
        found = load_source(source, weights)
        if not shapes:
            shapes = [list(each.shape) for each in models.example_inputs(source)]
        progress.phase(f"export to {out}")
        apart = written(found.module, shapes, out, open_batch=open_batch)
        prepared = given or found.preprocess
        beside = write_preprocess(prepared, out) if prepared else None
    facts = {"file": str(out), "preprocess": str(beside) if beside else None, "difference": apart, "shapes": shapes}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    said = f"differs from its module by {apart:.1g} of the largest value" if apart else "answers as its module does"
    typer.echo(f"{out}: {said}")
    more = f" --preprocess {quote(str(beside))}" if beside else ""
    typer.echo(f"next: dance-tvm build --model {quote(str(out))}{more}{' --batch 1' if open_batch else ''}")


def _require_source(source: str, weights: str | None) -> None:
    """Raise DanceError for a network that cannot be there, and for weights that it does not take."""
    place, _, name = source.partition(":")
    if not name:
        _require_name(source)
    elif place in HUBS:
        if find_spec(place) is None:
            raise DanceError(f"{place} is not installed: pip install {place}")
    else:
        require_python(place, name)
    if not weights:
        return
    if (file := weights_file(weights, place)) is not None:
        require_weights(file)
    elif place not in HUBS:
        raise DanceError(f"--weights {weights} is not a file: {source} takes a state dict (.pt, .pth, .safetensors)")
    elif place == "pytorchvideo" and weights != "pretrained":
        raise DanceError(f"--weights {weights} is not a file: {source} takes `pretrained`, or a state dict's file")


def _require_name(source: str) -> None:
    """Raise DanceError unless ``source`` is a name of the zoo; a file of Python that it may mean is hinted at."""
    module = source.removesuffix(".py")
    if Path(f"{module}.py").is_file() and source not in names():
        module = module.replace("/", ".")
        raise DanceError(f"{source} is your own Python code: name a function in it too, as {module}:FUNCTION")
    entry(source)


def _shape(given: str) -> list[int]:
    parts = given.rpartition("=")[2].replace(",", "x").split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise DanceError(f"--shape {given} is not a shape: write it as 1x3x16x112x112")
    return [int(part) for part in parts]


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise DanceError(f"--{name} {text} is not a list of finite numbers: write it as 0.45,0.45,0.45")
    return numbers


if __name__ == "__main__":
    start(app, "python -m dance_tvm.export")
