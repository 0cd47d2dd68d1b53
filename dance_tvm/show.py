"""``dance-tvm show``: what an artifact is, read from its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.options import AsJson
from dance_tvm.core.printing import Table, print_tables

if TYPE_CHECKING:
    from dance_tvm.artifact.folder import Artifact

app = application()


@app.command(epilog=examples("dance-tvm show artifacts/c3d-host", "dance-tvm show artifacts/c3d-host --json"))
def show(
    artifact: Annotated[Path, typer.Argument(help="Folder written by `dance-tvm build`.")],
    as_json: AsJson = False,
) -> None:
    """Show an artifact: inputs and outputs, layers and why each has its kernel, sizes, check, versions, seal.

    Every byte of the folder is verified first; nothing of it is run.
    """
    from dance_tvm.artifact.folder import load_artifact

    found = load_artifact(artifact)
    if as_json:
        facts = {"path": str(found.path), **found.manifest.model_dump(), "macs": found.manifest.macs}
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(found)


def _print(found: Artifact) -> None:
    manifest = found.manifest
    typer.echo(f"{manifest.name} for {manifest.target.name}, in {found.path}")
    tensors = [("input", each) for each in manifest.inputs] + [("output", each) for each in manifest.outputs]
    rows = [
        [side, each.name, "x".join(map(str, each.shape)) or "scalar", each.dtype, each.meaning]
        for side, each in tensors
    ]
    tables = [Table(["", "name", "shape", "dtype", "meaning"], rows)]
    if manifest.layers:
        heads = ["layer", "kernel", "dense MACs", "can skip", "tuned", "why"]
        tables.append(Table(heads, [_layer(layer) for layer in manifest.layers]))
    print_tables([*tables, Table(["", ""], facts_of(found))])


def _layer(layer: Any) -> list[str]:
    return [layer.name, layer.kernel, f"{layer.macs:,}", ", ".join(layer.skips), layer.tuned, layer.reason]


def facts_of(found: Artifact) -> list[list[str]]:
    """What is shown of an artifact beside its tensors and layers."""
    manifest, target = found.manifest, found.manifest.target
    rows = [["dense MACs", f"{manifest.macs:,} in a call"], ["threads", str(target.threads)]]
    rows += [[f"file {name}", f"{file.bytes / 2**20:.2f} MiB"] for name, file in manifest.files.items()]
    rows.append(["memory", f"{manifest.memory_peak_bytes / 2**20:.1f} MiB in a call"])
    if manifest.preprocess is not None:
        given = manifest.preprocess.model_dump(exclude_none=True)
        rows.append(["videos", ", ".join(f"{key} {value}" for key, value in given.items())])
    rows += [["" if place else "check", line] for place, line in enumerate(manifest.check.lines())]
    if manifest.device_code is not None:
        code = manifest.device_code
        rows.append(["device code", f"{code.format} {code.version} for {code.architecture}: {code.note}"])
    rows.append(["processor", f"{target.machine}, {' '.join(target.cpu_features) or 'no special instructions'}"])
    rows.append(["options", ", ".join(f"{name} {value}" for name, value in manifest.options.items())])
    rows.append(["versions", ", ".join(f"{name} {number}" for name, number in manifest.versions.items())])
    rows += [["source", manifest.source_sha256], ["seal", f"{manifest.seal}, fits"]]
    return rows


if __name__ == "__main__":
    start(app, "python -m dance_tvm.show")
