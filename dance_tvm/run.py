"""``dance-tvm run``: run an artifact on a device, arrays in, arrays out."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.core.cli import application, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import written_whole
from dance_tvm.core.input_files import read_inputs
from dance_tvm.core.options import PLACES, AsJson
from dance_tvm.core.random_inputs import random_inputs

if TYPE_CHECKING:
    from dance_tvm.artifact.folder import Manifest

app = application()


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="Folder written by `dance-tvm build`.")],
    device: Annotated[str, typer.Option(help=f"{PLACES}.")] = "local",
    inputs: Annotated[Path | None, typer.Option(help="Arrays by input name.", show_default="random")] = None,
    outputs: Annotated[Path | None, typer.Option(help="Where to write the outputs (.npz).")] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for the device.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Run an artifact on a device: the arrays of an .npz file in, the network's outputs out."""
    from dance_tvm.artifact.folder import load_artifact

    verified = load_artifact(artifact)
    manifest = verified.manifest
    arrays = read_inputs(inputs, manifest.inputs, manifest.name) if inputs else random_inputs(manifest.inputs)
    if outputs is not None:
        _require_file(outputs)
    from dance_tvm.device import open_device

    with open_device(device, timeout=timeout) as session:
        results = session.load(verified).run(arrays)
    if outputs is not None:
        write_outputs(outputs, results)
    if as_json:
        summary = {
            name: {**_figures(array), "meaning": _meaning(verified.manifest, name)} for name, array in results.items()
        }
        typer.echo(json.dumps({"device": device, "outputs": summary}, indent=2))
    else:
        _print(results, verified.manifest, "random input" if inputs is None else str(inputs))


def write_outputs(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name as ``.npz``, whole or not at all. Raises DanceError where that fails."""
    with written_whole(path, "--outputs") as beside, zipfile.ZipFile(beside, "w") as archive:
        for name, array in arrays.items():  # as np.savez does, which takes no output called "file"
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def _require_file(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DanceError(f"{path} cannot be written: give --outputs a file in a folder that exists")


def _figures(array: np.ndarray) -> dict[str, object]:
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    return {"shape": list(array.shape), "dtype": str(array.dtype), "least": low, "greatest": high}


def _meaning(manifest: Manifest, name: str) -> str:
    return next(tensor.meaning for tensor in manifest.outputs if tensor.name == name)


def _print(results: Mapping[str, np.ndarray], manifest: Manifest, source: str) -> None:
    table = Table("output", "shape", "dtype", "least", "greatest", "meaning", title=f"{manifest.name} on {source}")
    for name, array in results.items():
        figures = _figures(array)
        numbers = [f"{figures['least']:.6g}", f"{figures['greatest']:.6g}"]
        table.add_row(name, str(array.shape), str(array.dtype), *numbers, _meaning(manifest, name))
    Console().print(table)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.run")
