"""``dance-tvm run``: run an artifact on a device, arrays or a video in, scores or arrays out."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from dance_tvm.artifact.folder import load_artifact
from dance_tvm.artifact.preprocess import Preprocess, read_preprocess
from dance_tvm.artifact.video_windows import VIDEOS, pictures_in, require_video_input, windows_of
from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.files import require_apart, require_suffix, require_writable
from dance_tvm.core.input_files import read_inputs
from dance_tvm.core.options import PLACES, AsJson
from dance_tvm.core.output_files import write_outputs
from dance_tvm.core.printing import Table, print_table, print_tables
from dance_tvm.core.progress import JsonLines, Progress
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.core.text_files import read_text
from dance_tvm.device import open_device, require_runnable, require_spec

if TYPE_CHECKING:
    from dance_tvm.artifact.folder import Manifest, Tensor

app = application()

#: Highest scores that are printed unless told.
TOP = 5

#: A run by name: what went in.
Windows = list[tuple[str, dict[str, np.ndarray]]]


@app.command(
    epilog=examples(
        "dance-tvm run artifacts/c3d-host --inputs clip.npz --outputs scores.npz",
        "dance-tvm run artifacts/c3d-host --video basketball.mp4 --labels sports1m.txt --top 3",
        "dance-tvm run artifacts/c3d-phone --device emulator --json",
    )
)
def run(
    artifact: Annotated[Path, typer.Argument(help="Folder written by `dance-tvm build`.")],
    device: Annotated[str, typer.Option(help=f"{PLACES}.")] = "local",
    inputs: Annotated[Path | None, typer.Option(help="Arrays by input name.", show_default="random")] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video, window after window, or a folder of videos; repeatable.")
    ] = None,
    frames: Annotated[Path | None, typer.Option(help="A folder of pictures, a video's frames in order.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Frames from window to window.", show_default="the window's length")
    ] = None,
    preprocess: Annotated[
        Path | None, typer.Option(help="How frames become the input (.toml); docs/run.md lists its fields.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Names of the classes, one per line; to score clips of known classes: `bench --truth`."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many of the highest scores to print.",
            show_default=f"{TOP}; none of a network of yours without --labels",
        ),
    ] = None,
    outputs: Annotated[Path | None, typer.Option(help="Where to write the outputs (.npz).")] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for the device.")] = 60.0,
    as_json: AsJson = False,
    json_lines: JsonLines = False,
) -> None:
    """Run an artifact on a device: arrays of an .npz file, or a video, in; the network's outputs and top scores out."""
    if sum(bool(given) for given in (inputs, video, frames)) > 1:
        raise DanceError("give one of --inputs, --video and --frames")
    require_spec(device)
    if stride is not None and not (video or frames):
        raise DanceError("--stride is that of a video's windows: give --video or --frames too")
    if outputs is not None:
        require_suffix(outputs, "--outputs", (".npz",))
        require_apart(outputs, "--outputs", {"--inputs": inputs, "--video": video, "--labels": labels})
        require_writable(outputs, "--outputs")
    names, shown = read_labels(labels) if labels else [], top or TOP
    prepare = _preprocess(preprocess, video or frames)
    sources = _sources(inputs, video or [], frames)
    # All that can be refused before the seconds that opening a device takes.
    verified = load_artifact(artifact)
    require_runnable(verified, device)
    _require_scores(verified.manifest, names, top)
    given = read_inputs(inputs, verified.manifest.inputs, verified.manifest.name) if inputs else None
    if video or frames:
        require_video_input(verified.manifest, prepare)
    with Progress(as_json, json_lines) as progress:
        progress.phase(f"opening {device}")
        found = []
        with open_device(device, timeout=timeout, on_phase=progress.phase) as session:
            network = session.load(verified)
            for place, source in enumerate(sources, 1):
                windows = _windows(verified.manifest, source, given, stride, prepare)
                of = f", {place} of {len(sources)}" if len(sources) > 1 else ""
                for index, (name, arrays) in enumerate(windows, 1):
                    many = f" ({index} of {len(windows)}{of})" if len(windows) > 1 or of else ""
                    progress.phase(f"running on {name}{many}")
                    begun = time.perf_counter()
                    results = network.run(arrays)
                    seconds = time.perf_counter() - begun
                    found.append((name, results, seconds))
                    progress.tell("run", name=name, seconds=seconds, top=_top(results, verified.manifest, names, shown))
        facts = _facts(device, found, verified.manifest, names, shown)
        warn_of_nan(found)
        progress.result(facts)
    if outputs is not None:
        write_outputs(outputs, _joined([results for _, results, _ in found]))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif not json_lines:
        _print(found, verified.manifest, device, names, shown)


def warn_of_nan(found: list[tuple[str, dict[str, np.ndarray], float]]) -> None:
    """Warn of outputs that hold NaN, as a network computes of inputs that hold some or are far too large."""
    for run_on, results, _ in found:
        for name, array in results.items():
            if array.dtype.kind == "f" and (count := int(np.isnan(array).sum())):
                said = f"{run_on}: {count:,} of the {array.size:,} values of {name} are NaN"
                warnings.warn(f"{said}: look at the inputs and their scale", DanceWarning, stacklevel=3)


def _sources(inputs: Path | None, videos: list[Path], frames: Path | None) -> list[Path | None]:
    """The files to run on, a folder of videos file by file; None stands for random input."""
    if frames is not None and not frames.is_dir():
        raise DanceError(f"--frames {frames} is not a folder: name one that holds a video's pictures, or give --video")
    if frames is not None:
        pictures_in(frames)
    found: list[Path | None] = [path for path in (inputs, frames) if path is not None]
    for video in videos:
        inside = (
            sorted(file for file in video.rglob("*") if file.suffix.lower() in VIDEOS) if video.is_dir() else [video]
        )
        if not inside:
            raise DanceError(f"--video {video} holds no video: --frames takes a folder of pictures")
        if not inside[0].is_file():
            raise DanceError(f"the video {video} is missing; check the path")
        found += inside
    return found or [None]


def _preprocess(path: Path | None, videos: object) -> Preprocess | None:
    """How the frames of videos are prepared, where the command line says it."""
    if path is None:
        return None
    if not videos:
        raise DanceError("--preprocess is for frames of videos: give --video or --frames too")
    return read_preprocess(path)


def _windows(
    manifest: Manifest,
    source: Path | None,
    given: dict[str, np.ndarray] | None,
    stride: int | None,
    preprocess: Preprocess | None,
) -> Windows:
    """What to run on, by name."""
    if source is None:
        return [("random input", random_inputs(manifest.inputs))]
    return [(str(source), given)] if given is not None else windows_of(source, manifest, stride, preprocess)


def read_labels(path: Path) -> list[str]:
    """Names of classes, one per line. Raises DanceError where the file cannot be read."""
    return [line.strip() for line in read_text(path, f"--labels {path}").splitlines() if line.strip()]


def _require_scores(manifest: Manifest, labels: list[str], top: int | None) -> None:
    """Raise DanceError where scores are to be named or counted and no output holds them."""
    found = next((tensor for tensor in manifest.outputs if _holds_scores(tensor, labels)), None)
    if found is None and labels:
        shapes = ", ".join(f"{tensor.name} {tuple(tensor.shape)}" for tensor in manifest.outputs)
        raise DanceError(f"--labels names {len(labels)} classes, and no output has that many scores: {shapes}")
    if found is None and top is not None:
        raise DanceError(
            f"--top is of class scores, and {manifest.name} does not say which output holds them: name its classes by "
            "--labels, or leave --top out"
        )


def _holds_scores(tensor: Tensor, labels: list[str]) -> bool:
    """Whether an output holds the scores of one clip's classes, which ``labels`` name where there are any."""
    fits = len(tensor.shape) == 2 and tensor.shape[0] == 1 and len(labels) in (0, tensor.shape[1])
    return fits and bool(labels or "class scores" in tensor.meaning)


def _joined(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The outputs of several runs side by side, each with a first axis of runs; of one run as they are."""
    if len(found) == 1:
        return found[0]
    return {name: np.stack([results[name] for results in found]) for name in found[0]}


def _scores(results: Mapping[str, np.ndarray], manifest: Manifest, labels: list[str]) -> np.ndarray | None:
    """Probabilities of one clip's classes, where an output holds such: (classes,)."""
    tensor = next((tensor for tensor in manifest.outputs if _holds_scores(tensor, labels)), None)
    if tensor is None:
        return None
    scores = results[tensor.name][0].astype("float64")
    if np.isnan(scores).any():
        return None  # of which none is the highest
    return _softmax(scores) if "before softmax" in tensor.meaning else scores


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def _top(results: Mapping[str, np.ndarray], manifest: Manifest, labels: list[str], top: int) -> list[dict[str, Any]]:
    """The highest scores, the highest first."""
    scores = _scores(results, manifest, labels)
    if scores is None:
        return []
    best = np.argsort(-scores, kind="stable")[:top]
    return [
        {"class": int(index), "label": labels[index] if labels else "", "score": float(scores[index])} for index in best
    ]


def _facts(
    device: str,
    found: list[tuple[str, dict[str, np.ndarray], float]],
    manifest: Manifest,
    labels: list[str],
    top: int,
) -> dict[str, Any]:
    runs = [
        {
            "name": name,
            "seconds": seconds,
            "top": _top(results, manifest, labels, top),
            "outputs": {key: {**_figures(array), "meaning": _meaning(manifest, key)} for key, array in results.items()},
        }
        for name, results, seconds in found
    ]
    return {"device": device, **runs[0]} if len(runs) == 1 else {"device": device, "runs": runs}


def _figures(array: np.ndarray) -> dict[str, object]:
    """What is shown of an output; NaN and infinities, which JSON has not, are counted and otherwise left out."""
    finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    figures = {"shape": list(array.shape), "dtype": str(array.dtype), "least": low, "greatest": high}
    return figures | ({"not_finite": array.size - finite.size} if finite.size < array.size else {})


def _meaning(manifest: Manifest, name: str) -> str:
    return next(tensor.meaning for tensor in manifest.outputs if tensor.name == name)


def _print(
    found: list[tuple[str, dict[str, np.ndarray], float]], manifest: Manifest, device: str, labels: list[str], top: int
) -> None:
    name, results, seconds = found[0]
    if len(found) == 1:
        rows = []
        for key, array in results.items():
            figures = _figures(array)
            numbers = [f"{figures['least']:.6g}", f"{figures['greatest']:.6g}"]
            rows.append([key, str(array.shape), str(array.dtype), *numbers, _meaning(manifest, key)])
        heads = ["output", "shape", "dtype", "least", "greatest", "meaning"]
        tables = [Table(heads, rows, f"{manifest.name} on {name}")]
        heads = ["score", "class", *(["label"] if labels else [])]
        rows = [
            [f"{each['score']:.4f}", str(each["class"]), each["label"]][: len(heads)]
            for each in _top(results, manifest, labels, top)
        ]
        if rows:
            tables.append(Table(heads, rows))
        print_tables(tables)
        typer.echo(f"{1e3 * seconds:.1f} ms on {device}, the first run; `dance-tvm bench` measures")
        return
    rows = []
    for name, results, seconds in found:
        best = _top(results, manifest, labels, top)
        classes = ", ".join(f"{each['label'] or each['class']} {each['score']:.3f}" for each in best)
        rows.append([name, f"{1e3 * seconds:.1f}", classes])
    if any(row[-1] for row in rows):
        print_table(["window", "ms", "highest scores"], rows, f"{manifest.name} on {device}")
        return
    print_table(["window", "ms"], [row[:2] for row in rows], f"{manifest.name} on {device}")
    typer.echo(
        "no output is said to hold class scores: name its classes by --labels, or keep what it gives by --outputs"
    )


if __name__ == "__main__":
    start(app, "python -m dance_tvm.run")
