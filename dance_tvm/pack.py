"""``dance-tvm pack``: an artifact as a C folder, an Android library module, or a wheel."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
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

#: What is done with what was written.
_NEXT: dict[Format, str] = {
    "c": "in your CMakeLists.txt, add_subdirectory({written}) and target_link_libraries(app PRIVATE dance_model); "
    "{written}/include/dance_model.h has the calls",
    "android": 'in settings.gradle.kts, include(":dance") and project(":dance").projectDir = file("{written}"); in the '
    'app, implementation(project(":dance")) and org.dance.DanceModel',
    "wheel": "pip install {written}, then import {module} and {module}.load().run({{name: array}})",
}


@app.command(epilog=EXAMPLES)
def pack(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact for a processor.")],
    form: Annotated[Format, typer.Option("--format", help="Format of the package.")] = "c",
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="ARTIFACT-FORMAT")] = None,
    version: Annotated[str | None, typer.Option(help="Version of the wheel.", show_default="1.0.0")] = None,
    as_json: AsJson = False,
) -> None:
    """Package an artifact for other build systems: its library, weights, header and build files."""
    if version is not None and form != "wheel":
        raise DanceError(f"--version is a wheel's, and --format {form} has none: leave it out")
    from dance_tvm.artifact.folder import load_artifact
    from dance_tvm.artifact.pack_formats import pack as packed

    folder = out or artifact.with_name(f"{artifact.name}-{form}")
    written = packed(load_artifact(artifact), folder, form, version or "1.0.0")
    if as_json:
        typer.echo(json.dumps({"written": str(written)}))
        return
    typer.echo(written)
    place = str(written.absolute())
    shown = quote(place) if form == "wheel" else place  # of which alone a shell is told
    typer.echo(f"next: {_NEXT[form].format(written=shown, module=written.name.partition('-')[0])}")


if __name__ == "__main__":
    start(app, "python -m dance_tvm.pack")
