"""``dance-tvm run``: run an artifact on a device, arrays or a video in, scores or arrays out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_suffix
from dance_tvm.core.input_files import read_inputs
from dance_tvm.core.options import PLACES, AsJson
from dance_tvm.core.output_files import write_outputs
from dance_tvm.core.printing import print_table
from dance_tvm.core.progress import JsonLines, Progress
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import require_spec

if TYPE_CHECKING:
    from dance_tvm.artifact.folder import Manifest

app = application()

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
    labels: Annotated[Path | None, typer.Option(help="Names of the classes, one per line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the highest scores to print.")] = 5,
    outputs: Annotated[Path | None, typer.Option(help="Where to write the outputs (.npz).")] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for the device.")] = 60.0,
    as_json: AsJson = False,
    json_lines: JsonLines = False,
) -> None:
    """Run an artifact on a device: arrays of an .npz file, or a video, in; the network's outputs and top scores out."""
    if sum(bool(given) for given in (inputs, video, frames)) > 1:
        raise DanceError("give one of --inputs, --video and --frames")
    if outputs is not None:
        require_suffix(outputs, "--outputs", (".npz",))
        _require_file(outputs)
    require_spec(device)
    names = read_labels(labels) if labels else []
    from dance_tvm.artifact.folder import load_artifact

    verified = load_artifact(artifact)
    if device == "local":
        verified.require_this_machine()  # fails before the seconds that opening a device takes
    with Progress(as_json, json_lines) as progress:
        sources = _sources(inputs, video or [], frames)
        from dance_tvm.device import open_device

        progress.phase(f"opening {device}")
        found = []
        with open_device(device, timeout=timeout, on_phase=progress.phase) as session:
            network = session.load(verified)
            for place, source in enumerate(sources, 1):
                windows = _windows(verified.manifest, source, source == inputs, stride, preprocess)
                of = f", {place} of {len(sources)}" if len(sources) > 1 else ""
                for index, (name, arrays) in enumerate(windows, 1):
                    many = f" ({index} of {len(windows)}{of})" if len(windows) > 1 or of else ""
                    progress.phase(f"running on {name}{many}")
                    begun = time.perf_counter()
                    results = network.run(arrays)
                    seconds = time.perf_counter() - begun
                    found.append((name, results, seconds))
                    progress.tell("run", name=name, seconds=seconds, top=_top(results, verified.manifest, names, top))
        facts = _facts(device, found, verified.manifest, names, top)
        progress.result(facts)
    if outputs is not None:
        write_outputs(outputs, _joined([results for _, results, _ in found]))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif not json_lines:
        _print(found, verified.manifest, device, names, top)


def _sources(inputs: Path | None, videos: list[Path], frames: Path | None) -> list[Path | None]:
    """The files to run on, a folder of videos file by file; None stands for random input."""
    from dance_tvm.artifact.video_windows import VIDEOS

    found: list[Path | None] = [path for path in (inputs, frames) if path is not None]
    for video in videos:
        inside = (
            sorted(file for file in video.rglob("*") if file.suffix.lower() in VIDEOS) if video.is_dir() else [video]
        )
        if not inside:
            raise DanceError(f"--video {video} holds no video: --frames takes a folder of pictures")
        found += inside
    return found or [None]


def _windows(
    manifest: Manifest, video: Path | None, is_arrays: bool, stride: int | None, preprocess: Path | None
) -> Windows:
    """What to run on, by name."""
    if video is not None and is_arrays:
        return [(str(video), read_inputs(video, manifest.inputs, manifest.name))]
    if video is None:
        return [("random input", random_inputs(manifest.inputs))]
    from dance_tvm.artifact.preprocess import read_preprocess
    from dance_tvm.artifact.video_windows import windows_of

    return windows_of(video, manifest, stride, read_preprocess(preprocess) if preprocess else None)


def read_labels(path: Path) -> list[str]:
    """Names of classes, one per line. Raises DanceError where the file cannot be read."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DanceError(f"--labels {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _require_file(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DanceError(f"{path} cannot be written: give --outputs a file in a folder that exists")


def _joined(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The outputs of several runs side by side, each with a first axis of runs; of one run as they are."""
    if len(found) == 1:
        return found[0]
    return {name: np.stack([results[name] for results in found]) for name in found[0]}


def _scores(results: Mapping[str, np.ndarray], manifest: Manifest, labels: list[str]) -> np.ndarray | None:
    """Probabilities of one clip's classes, where an output holds such: (classes,)."""
    for tensor in manifest.outputs:
        array = results[tensor.name]
        fits = array.ndim == 2 and len(array) == 1 and (len(labels) == array.shape[1] if labels else True)
        if fits and (labels or "class scores" in tensor.meaning):
            scores = array[0].astype("float64")
            return _softmax(scores) if "before softmax" in tensor.meaning else scores
    if labels:
        shapes = ", ".join(f"{tensor.name} {tuple(tensor.shape)}" for tensor in manifest.outputs)
        raise DanceError(f"--labels names {len(labels)} classes, and no output holds so many scores: {shapes}")
    return None


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
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    return {"shape": list(array.shape), "dtype": str(array.dtype), "least": low, "greatest": high}


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
        print_table(["output", "shape", "dtype", "least", "greatest", "meaning"], rows, f"{manifest.name} on {name}")
        rows = [
            [f"{each['score']:.4f}", str(each["class"]), each["label"]] for each in _top(results, manifest, labels, top)
        ]
        if rows:
            print_table(["score", "class", "label"], rows)
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
