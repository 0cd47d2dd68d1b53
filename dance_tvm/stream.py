"""``dance-tvm stream``: run a network in its streaming form, one frame per call."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_apart, require_suffix, require_writable
from dance_tvm.core.options import PLACES, AsJson
from dance_tvm.core.printing import counted
from dance_tvm.core.progress import JsonLines, Progress
from dance_tvm.device import open_device, require_runnable, require_spec
from dance_tvm.device.stream import require_stream

if TYPE_CHECKING:
    import numpy as np

    from dance_tvm.artifact.folder import Artifact, Tensor

app = application()


@app.command(
    epilog=examples(
        "dance-tvm stream artifacts/resnet18-stream --frames frames.npz",
        "dance-tvm stream artifacts/resnet18-stream --random 100 --device emulator --outputs scores.npz",
    )
)
def stream(
    artifact: Annotated[Path, typer.Argument(help="Folder of a network built in its streaming form.")],
    frames: Annotated[Path | None, typer.Option(help="Frames in order: an .npz or .npy of one array.")] = None,
    random: Annotated[int | None, typer.Option(min=1, help="Run this many random frames.")] = None,
    device: Annotated[str, typer.Option(help=f"{PLACES}.")] = "local",
    outputs: Annotated[Path | None, typer.Option(help="Write the first output after each frame here (.npz).")] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for the device.")] = 60.0,
    as_json: AsJson = False,
    json_lines: JsonLines = False,
) -> None:
    """Run a streaming artifact frame by frame, its state kept on the device, and show how long a frame takes."""
    if (frames is None) == (random is None):
        raise DanceError("give --frames FILE or --random COUNT")
    if outputs is not None:
        require_suffix(outputs, "--outputs", (".npz",))
        require_apart(outputs, "--outputs", {"--frames": frames})
        require_writable(outputs, "--outputs")
    require_spec(device)
    import numpy as np

    from dance_tvm.artifact.folder import load_artifact
    from dance_tvm.core.output_files import write_outputs

    verified = load_artifact(artifact)
    require_runnable(verified, device)
    require_stream(verified.manifest)
    given = _frames(verified, frames, random)
    scores, seconds = [], []
    with Progress(as_json, json_lines) as progress, open_device(device, timeout=timeout) as opened:
        session = opened.load(verified).stream()
        progress.phase(f"{counted(len(given), 'frame')} on {device}")
        for index, frame in enumerate(given):
            begun = time.perf_counter()
            scores.append(session.step(frame))
            seconds.append(time.perf_counter() - begun)
            progress.tell("frame", index=index, seconds=seconds[-1])
        facts = _facts(device, seconds, scores[-1])
        progress.result(facts)
    if outputs is not None:
        write_outputs(outputs, {verified.manifest.outputs[0].name: np.stack(scores)})
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif not json_lines:
        typer.echo(
            f"{counted(facts['frames'], 'frame')} on {device}: {facts['p50_ms']:.3f} ms a frame in the median, "
            f"{facts['p90_ms']:.3f} at the 90th percentile"
        )


def _frames(verified: Artifact, path: Path | None, count: int | None) -> list[np.ndarray]:
    """The frames, each of the shape of the network's first input."""
    import numpy as np

    tensor: Tensor = verified.manifest.inputs[0]
    if path is None:
        generator = np.random.default_rng(0)
        return [
            generator.standard_normal(tensor.shape, dtype="float32").astype(tensor.dtype) for _ in range(count or 0)
        ]
    from dance_tvm.core.input_files import read_archive

    arrays = read_archive(path)
    if len(arrays) != 1:
        raise DanceError(f"{path} holds {len(arrays)} arrays: give one, its first axis the frames in order")
    (array,) = arrays.values()
    shape = tuple(tensor.shape)
    if array.shape[1:] == shape[1:] and shape[0] == 1:
        array = array[:, None]
    if array.shape[1:] != shape:
        raise DanceError(f"{path} holds frames of shape {array.shape[1:]}, and {tensor.name} takes {shape}")
    return list(array.astype(tensor.dtype))


def _facts(device: str, seconds: list[float], last: np.ndarray) -> dict[str, Any]:
    """What is shown of a run; the first frame, which allocates, is left out of the times where there are others."""
    import numpy as np

    p50, p90 = np.percentile(seconds[1:] or seconds, [50, 90])
    return {
        "device": device,
        "frames": len(seconds),
        "p50_ms": float(1e3 * p50),
        "p90_ms": float(1e3 * p90),
        "shape": list(last.shape),
    }


if __name__ == "__main__":
    start(app, "python -m dance_tvm.stream")
