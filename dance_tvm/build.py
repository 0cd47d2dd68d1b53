"""``dance-tvm build``: compile a trained network into a verified artifact."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from dance_tvm.core.cli import application, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.options import AsJson, Model, TargetName, Threads

if TYPE_CHECKING:
    from dance_tvm.compiler.build import Built

# Built when no --model is given: it needs no network and no file.
DEFAULT_MODEL = "dance-c3d-mini"

_SHOWN_LAYERS = 12

app = application()


@app.command()
def build(
    target: TargetName = "host",
    model: Model = DEFAULT_MODEL,
    weights: Annotated[Path | None, typer.Option(help="Trained weights: .safetensors, or a state dict.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="artifacts/MODEL-TARGET")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="An open input's shape, clip=1x3x16x112x112; repeatable.")
    ] = None,
    threads: Threads = None,
    check: Annotated[
        bool | None,
        typer.Option(help="Run the result against its source.", show_default="unless it would take long"),
    ] = None,
    numerics: Annotated[
        Literal["fast", "exact"], typer.Option(help="exact keeps the order of sums of the source.")
    ] = "fast",
    conv: Annotated[Literal["auto", "direct", "winograd"], typer.Option(help="Convolution algorithm.")] = "auto",
    sparsity: Annotated[Literal["auto", "off"], typer.Option(help="off computes what masks would skip.")] = "auto",
    logs_from: Annotated[str | None, typer.Option(help="Use the tuning logs of this target instead.")] = None,
    dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="How a GPU stores activations and weights; sums are float32."),
    ] = "float32",
    device_code: Annotated[
        Literal["compiled", "source"],
        typer.Option(help="Of a CUDA target: PTX, or source that the device compiles."),
    ] = "compiled",
    interface: Annotated[
        Literal["tvm", "c"],
        typer.Option(help="c adds a C interface to the library, which then runs without TVM (docs/c-interface.md)."),
    ] = "tvm",
    debug_dump: Annotated[Path | None, typer.Option(help="Write the IR after every phase to this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile a trained network into a verified artifact: one folder that a device can run."""
    from dance_tvm.machines.target import load_target

    shapes = dict(map(_shape, shape or []))
    machine = load_target(target)  # told before the second that importing the compiler takes
    with _Progress(Console(stderr=True), quiet=as_json) as progress:
        from dance_tvm.compiler.build import build_network
        from dance_tvm.compiler.pipeline import Options

        options = Options(
            threads=threads or machine.threads,
            numerics=numerics,
            conv=conv,
            sparsity=sparsity,
            device_code=device_code,
            dtype=dtype,
            interface=interface,
        )
        built = build_network(
            model,
            out or Path("artifacts") / f"{Path(model).stem}-{machine.name}",
            target=machine,
            weights=weights,
            shapes=shapes,
            check=check,
            options=options,
            debug_dump=debug_dump,
            logs_from=logs_from,
            on_phase=progress.phase,
        )
    if as_json:
        typer.echo(json.dumps(_facts(built), indent=2))
    else:
        _print(Console(), built)


def _shape(given: str) -> tuple[str, tuple[int, ...]]:
    """``("clip", (1, 3, 16))`` for ``clip=1x3x16``."""
    name, _, extents = given.rpartition("=")
    parts = extents.replace(",", "x").split("x")
    if not name or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise DanceError(f"--shape {given} is not the name of an input and its extents, as in clip=1x3x16x112x112")
    return name, tuple(int(part) for part in parts)


class _Progress:
    """One line a phase on standard error, with a spinner while it lasts where somebody watches."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._status: Status | Any = nullcontext() if quiet else console.status("start")
        self._running = ""

    def __enter__(self) -> _Progress:
        self._status.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if raised[0] is None:
            self.phase("")
        self._status.__exit__(*raised)

    def phase(self, name: str) -> None:
        if self._quiet:
            return
        if self._running:
            self._console.print(f"[green]✓[/] {self._running}")
        self._running = name
        self._status.update(name)


def _facts(built: Built) -> dict[str, Any]:
    manifest = built.artifact.manifest
    return {
        "artifact": str(built.artifact.path),
        "seconds": {phase: round(seconds, 3) for phase, seconds in built.seconds.items()},
        "build_peak_memory_bytes": built.peak_memory_bytes,
        "manifest": manifest.model_dump(),
    }


def _print(console: Console, built: Built) -> None:
    manifest = built.artifact.manifest
    table = Table("layer", "kernel", "MACs", "can skip", "why", title=f"{manifest.name} for {manifest.target.name}")
    heavy = sorted(manifest.layers, key=lambda layer: -layer.macs)[:_SHOWN_LAYERS]
    for layer in (layer for layer in manifest.layers if layer in heavy):
        table.add_row(layer.name, layer.kernel, f"{layer.macs:,}", ", ".join(layer.skips), layer.reason)
    if manifest.layers:
        console.print(table)
        if len(manifest.layers) > len(heavy):
            console.print(f"The {len(heavy)} heaviest of {len(manifest.layers)} layers; the manifest lists all.")
    check = manifest.check
    if check.status == "passed":
        said = f"passed on {check.device}: largest difference {check.difference:.2g}, allowed {check.allowed:.2g}"
    else:
        said = f"not run: {check.reason}"
    size = sum(file.bytes for file in manifest.files.values())
    console.print(f"check      {said}", highlight=False)
    console.print(f"memory     {manifest.memory_peak_bytes / 2**20:.1f} MiB in a call", highlight=False)
    console.print(
        f"build      {sum(built.seconds.values()):.1f} s, {built.peak_memory_bytes / 2**30:.2f} GiB", highlight=False
    )
    console.print(f"artifact   {built.artifact.path} ({size / 2**20:.1f} MiB)", highlight=False)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.build")
