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
    arrays = read_inputs(inputs, verified.manifest) if inputs else random_inputs(verified.manifest.inputs)
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


def read_inputs(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, by the manifest's input names; a single input may have any name.

    Raises DanceError where the file is no such archive or an array does not fit.
    """
    arrays = _read_archive(path)
    wanted = {tensor.name: tensor for tensor in manifest.inputs}
    if len(wanted) == 1 and len(arrays) == 1:
        arrays = dict(zip(wanted, arrays.values(), strict=True))
    missing, unexpected = sorted(set(wanted) - set(arrays)), sorted(set(arrays) - set(wanted))
    if missing or unexpected:
        problem = " and ".join(
            f"{kind} {', '.join(names)}" for kind, names in (("lacks", missing), ("has unknown", unexpected)) if names
        )
        raise DanceError(f"{path} {problem}: {manifest.name} takes {', '.join(wanted)}")
    for name, tensor in wanted.items():
        array = arrays[name]
        if list(array.shape) != tensor.shape or str(array.dtype) != tensor.dtype:
            raise DanceError(
                f"{path}: {name} must be {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"not {array.dtype} of shape {array.shape}"
            )
    return arrays


def write_outputs(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name as ``.npz``, whole or not at all. Raises DanceError where that fails."""
    with written_whole(path, "--outputs") as beside, zipfile.ZipFile(beside, "w") as archive:
        for name, array in arrays.items():  # as np.savez does, which takes no output called "file"
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {path.stem: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise DanceError(f"there is no input file {path}") from None
    except OSError as error:
        raise DanceError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DanceError(f"{path} is not an .npz or .npy file of plain arrays: {error}") from None


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
