"""``dance-tvm pack``: an artifact as a C folder, an Android library module, or a wheel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.options import AsJson

app = application()

EXAMPLES = examples(
    "dance-tvm pack artifacts/c3d-mini --format c --out c3d-mini-c",
    "dance-tvm pack artifacts/c3d-mini-phone --format android --out app/dance",
    "dance-tvm pack artifacts/c3d-mini --format wheel --out dist --version 1.2.0",
)
Format = Literal["c", "android", "wheel"]


@app.command(epilog=EXAMPLES)
def pack(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact for a processor.")],
    form: Annotated[Format, typer.Option("--format", help="What to lay it out as.")] = "c",
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="ARTIFACT-FORMAT")] = None,
    version: Annotated[str | None, typer.Option(help="Of the wheel.", show_default="1.0.0")] = None,
    as_json: AsJson = False,
) -> None:
    """Lay an artifact out for those who build with it: its library, weights, header and build files."""
    if version is not None and form != "wheel":
        raise DanceError(f"--version is a wheel's, and --format {form} has none: leave it out")
    from dance_tvm.artifact.folder import load_artifact
    from dance_tvm.artifact.packing import pack as packed

    folder = out or artifact.with_name(f"{artifact.name}-{form}")
    written = packed(load_artifact(artifact), folder, form, version or "1.0.0")
    typer.echo(json.dumps({"written": str(written)}) if as_json else written)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.pack")
