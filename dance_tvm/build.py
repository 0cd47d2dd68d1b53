"""``dance-tvm build``: compile a trained network into a verified artifact."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dance_tvm.artifact.preprocess import read_preprocess
from dance_tvm.compiler import requests
from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.options import AsJson, Model, TargetName, Threads
from dance_tvm.core.printing import print_table
from dance_tvm.core.progress import JsonLines, Progress
from dance_tvm.machines.gpu import detect_cuda

if TYPE_CHECKING:
    from dance_tvm.compiler.build import Built
    from dance_tvm.compiler.layer_errors import LayerErrors
    from dance_tvm.machines.target import Target

# Built when no --model is given: it needs no network and no file.
DEFAULT_MODEL = "dance-c3d-mini"

_SHOWN_LAYERS = 12

app = application()


@app.command(
    epilog=examples(
        "dance-tvm build --model c3d-mini",
        "dance-tvm build --model net.pt2 --target snapdragon --out artifacts/net-phone",
        "dance-tvm build --model net.onnx --shape clip=1x3x16x112x112 --logs lab-logs --json-lines",
    )
)
def build(
    target: TargetName = "host",
    model: Model = DEFAULT_MODEL,
    weights: Annotated[Path | None, typer.Option(help="Trained weights: .safetensors, or a state dict.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="artifacts/MODEL-TARGET")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="An open input's shape, clip=1x3x16x112x112; repeatable.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Clips per call, for a network of the zoo or one with an open batch.")
    ] = None,
    threads: Threads = None,
    check: Annotated[
        bool | None,
        typer.Option(help="Run the result against its source.", show_default="unless it would take long"),
    ] = None,
    check_inputs: Annotated[
        list[Path] | None, typer.Option(help="Real inputs (.npz) for the check, in addition to its own; repeatable.")
    ] = None,
    numerics: Annotated[
        Literal["fast", "exact"], typer.Option(help="exact keeps the source's order of summation.")
    ] = "fast",
    conv: Annotated[Literal["auto", "direct", "winograd"], typer.Option(help="Convolution algorithm.")] = "auto",
    sparsity: Annotated[Literal["auto", "off"], typer.Option(help="off computes what masks would skip.")] = "auto",
    logs: Annotated[
        Path | None, typer.Option(help="Use only the tuning logs of this folder, as written by `tune --logs`.")
    ] = None,
    logs_from: Annotated[str | None, typer.Option(help="Use the tuning logs of this target instead.")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "auto"],
        typer.Option(
            help="How activations and weights are stored; Arm processors multiply in it (docs/kernels.md). "
            "auto: float16 if the check passes in it."
        ),
    ] = "float32",
    io: Annotated[
        Literal["source", "float16"],
        typer.Option(help="Type of inputs and outputs that are float32 in the source."),
    ] = "source",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="Real inputs (.npz) that show which layers exceed the range of --dtype float16; repeatable."),
    ] = None,
    memory: Annotated[
        Literal["small", "balanced", "fast"],
        typer.Option(help="How far a processor's weights may grow when kernels prepare them (docs/c-interface.md)."),
    ] = "balanced",
    weights_dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="How a processor's weights are stored; arithmetic stays in float32."),
    ] = "float32",
    prepared: Annotated[bool, typer.Option(help="Store weights as kernels read them.")] = False,
    static: Annotated[bool, typer.Option(help="Also write libmodel.a, for static linking.")] = False,
    preprocess: Annotated[
        Path | None,
        typer.Option(help="How frames of videos become the input (.toml, docs/run.md).", show_default="the zoo's own"),
    ] = None,
    reuse: Annotated[
        bool, typer.Option(help="Keep the artifact in --out if the same network, target, options and versions made it.")
    ] = True,
    cache: Annotated[
        bool, typer.Option(help="Take compiled kernels from the user's cache, and keep new ones there.")
    ] = True,
    layer_errors: Annotated[
        bool,
        typer.Option("--layer-errors", help="Compare each layer with the source's, on --check-inputs if given."),
    ] = False,
    debug_dump: Annotated[Path | None, typer.Option(help="Write the IR after every phase to this folder.")] = None,
    as_json: AsJson = False,
    json_lines: JsonLines = False,
) -> None:
    """Compile a trained network into a verified artifact: one folder that a device can run."""
    from dance_tvm.machines.target import load_target

    # All that can be refused before the seconds that loading the compiler takes.
    shapes = _shapes(shape or [])
    machine = load_target(target)
    place = out or requests.default_out(model, machine)
    prepare = read_preprocess(preprocess) if preprocess else None
    if logs_from:
        load_target(logs_from)
    asked = requests.Request(
        model=model, target=machine, out=place, weights=weights, shapes=shapes, batch=batch, dtype=dtype,
        numerics=numerics, conv=conv, memory=memory, weights_dtype=weights_dtype, prepared=prepared, static=static,
        io=io, check=check, check_inputs=check_inputs or [], calibrate=calibrate or [], layer_errors=layer_errors,
        logs=logs, debug_dump=debug_dump,
    )  # fmt: skip
    requests.require(asked)
    _warn(machine, model, weights, threads)
    with Progress(as_json, json_lines) as progress:
        progress.phase("load the compiler")
        from dance_tvm.compiler.build import build_network
        from dance_tvm.compiler.pipeline import Options

        options = Options(
            threads=threads or machine.threads,
            numerics=numerics,
            conv=conv,
            sparsity=sparsity,
            dtype=dtype,
            memory=memory,
            io=io,
            weights_dtype=weights_dtype,
            prepared=prepared,
            static=static,
            logs=logs,
            cache=cache,
        )
        built = build_network(
            model,
            place,
            target=machine,
            weights=weights,
            shapes=shapes or None,
            batch=batch,
            check=check,
            check_inputs=check_inputs or (),
            calibrate=calibrate or (),
            options=options,
            debug_dump=debug_dump,
            logs_from=logs_from,
            preprocess=prepare,
            reuse=reuse and debug_dump is None,
            layer_errors=layer_errors,
            on_phase=progress.phase,
        )
    progress.result(_facts(built))
    if as_json:
        typer.echo(json.dumps(_facts(built), indent=2))
    elif not json_lines:
        _print(built)


def _warn(machine: Target, model: str, weights: Path | None, threads: int | None) -> None:
    """Warn of a processor that was never measured, of more threads than it has, and of untrained weights."""
    cores = sum(cluster.cores for cluster in machine.clusters)
    if threads is not None and threads > cores:
        said = f"--threads {threads} is more than the {cores} cores of {machine.name}: they will wait for one another"
        warnings.warn(said, DanceWarning, stacklevel=3)
    if machine.tuning_log == "host-x86-64-sse":
        said = "this processor has no AVX2: kernels for it use SSE, which was never measured; --target names others"
        warnings.warn(said, DanceWarning, stacklevel=3)
    if machine.name == "cuda" and detect_cuda() is None:
        said = "no NVIDIA GPU was found here: the build is for one like a Tesla T4, and a check runs only its kernels"
        warnings.warn(f"{said}, on a processor", DanceWarning, stacklevel=3)
    if requests.is_untrained(model, weights):
        said = f"{model} is built with random weights: give trained ones with --weights, or train it first"
        warnings.warn(said, DanceWarning, stacklevel=3)


def _shapes(given: list[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each input by its name."""
    shapes = dict(map(_shape, given))
    if len(shapes) < len(given):
        raise DanceError("--shape is given twice for one input: give each input's once")
    return shapes


def _shape(given: str) -> tuple[str, tuple[int, ...]]:
    """``("clip", (1, 3, 16))`` for ``clip=1x3x16``."""
    name, _, extents = given.rpartition("=")
    parts = extents.replace(",", "x").split("x")
    if not name or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise DanceError(f"--shape {given} is not the name of an input and its extents, as in clip=1x3x16x112x112")
    return name, tuple(int(part) for part in parts)


def _facts(built: Built) -> dict[str, Any]:
    manifest = built.artifact.manifest
    return {
        "artifact": str(built.artifact.path),
        "seconds": {phase: round(seconds, 3) for phase, seconds in built.seconds.items()},
        "build_peak_memory_bytes": built.peak_memory_bytes,
        "manifest": manifest.model_dump(),
        **({"layer_errors": _for_json(built.layer_errors)} if built.layer_errors else {}),
    }


def _for_json(found: LayerErrors) -> dict[str, Any]:
    """JSON has no infinity: a ratio that is exact, or all noise, is null, and the difference says which."""
    facts = asdict(found)
    for layer in facts["layers"]:
        layer |= {key: None for key in ("signal_to_noise", "worst") if not math.isfinite(layer[key])}
    return facts


def _print(built: Built) -> None:
    manifest = built.artifact.manifest
    heavy = sorted(manifest.layers, key=lambda layer: -layer.macs)[:_SHOWN_LAYERS]
    rows = [
        [layer.name, layer.kernel, f"{layer.macs:,}", ", ".join(layer.skips), layer.reason]
        for layer in manifest.layers
        if layer in heavy
    ]
    if rows:
        heads = ["layer", "kernel", "dense MACs", "can skip", "why"]
        print_table(heads, rows, title=f"{manifest.name} for {manifest.target.name}")
        if len(manifest.layers) > len(heavy):
            typer.echo(f"The {len(heavy)} heaviest of {len(manifest.layers)} layers; `dance-tvm show` lists all.")
    if built.layer_errors:
        _print_errors(built.layer_errors)
    size = sum(file.bytes for file in manifest.files.values())
    for head, line in zip_longest(["check"], manifest.check.lines(), fillvalue=""):
        typer.echo(f"{head:<11}{line}")
    typer.echo(f"memory     {manifest.memory_peak_bytes / 2**20:.1f} MiB in a call")
    typer.echo(f"build      {sum(built.seconds.values()):.1f} s, {built.peak_memory_bytes / 2**30:.2f} GiB")
    kept = "" if "compile" in built.seconds else ", kept: nothing that it is made of has changed"
    typer.echo(f"artifact   {built.artifact.path} ({size / 2**20:.1f} MiB){kept}")
    typer.echo(f"next: {_next(built)}")


def _next(built: Built) -> str:
    """The commands that run the artifact and measure it, where it was checked or where it belongs."""
    from dance_tvm.compiler.check import is_of_this_machine
    from dance_tvm.device.stream import is_stream

    manifest, artifact = built.artifact.manifest, quote(str(built.artifact.path))
    device = " --device tracker://HOST:PORT/KEY"
    if manifest.check.device == "emulator":
        device = " --device emulator"
    if is_of_this_machine(manifest.target):
        device = ""
    run = f"stream {artifact} --random 100" if is_stream(manifest) else f"run {artifact}"
    return f"dance-tvm {run}{device} && dance-tvm bench {artifact}{device}"


def _print_errors(found: LayerErrors) -> None:
    """The layers' errors, in order; a layer that leaves values out says how many it was compared on."""
    rows = [
        [
            error.layer,
            _decibels(error.signal_to_noise),
            str(error.worst_channel),
            _decibels(error.worst),
            f"{error.difference:.2g}",
            f"{error.compared:.0%}",
        ]
        if error.compared
        else [error.layer, "-", "-", "-", "-", "0%"]
        for error in found.layers
    ]
    heads = ["layer", "signal to noise, dB", "worst channel", "its dB", "largest difference", "compared"]
    print_table(heads, rows, title="layers against their source in float64, with the errors of those before them")
    if found.left_out:
        typer.echo(f"not compared: {', '.join(found.left_out)}")


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}" if math.isfinite(value) else "all noise"


if __name__ == "__main__":
    start(app, "python -m dance_tvm.build")
