"""What half precision costs a trained network: its accuracy on clips, float32 beside float16, by the same kernels.

    python -m benchmarks.half_accuracy --clips 500        dance-c3d-mini on motion digits that no training has seen
    python -m benchmarks.half_accuracy --device emulator  the same by the kernels of a phone, on the emulated device

Else it runs on this machine, whose processor must multiply halves (AVX-512's FP16, Armv8.2's FP16; `dance-tvm targets
host`). Of TransNetV2, build for host with ``--dtype float16`` and let ``python -m benchmarks.c_windows host`` compare
windows.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.device import open_device
from dance_tvm.sparsity.motion_digits import MotionDigits

DTYPES: tuple[Literal["float32", "float16"], ...] = ("float32", "float16")


def scores(model: str, dtype: Literal["float32", "float16"], clips: MotionDigits, place: str = "local") -> np.ndarray:
    """What ``model`` of the zoo, built as ``dtype``, answers to each clip on the device ``place``."""
    target = "host" if place == "local" else "snapdragon"
    with tempfile.TemporaryDirectory() as folder, open_device(place) as device:
        options = Options(threads=1, dtype=dtype)
        built = build_network(model, Path(folder) / "network", target=target, options=options, check=False)
        network = device.load(built.artifact)
        (given,) = built.artifact.manifest.inputs
        found = []
        for index in range(len(clips)):
            answer = network.run({given.name: clips[index][0].numpy()[None]})
            found.append(np.asarray(next(iter(answer.values()))).ravel())
    return np.stack(found)


def main(
    model: Annotated[str, typer.Option(help="a trained network of the zoo that tells motions")] = "dance-c3d-mini",
    clips: Annotated[int, typer.Option(help="how many clips")] = 500,
    device: Annotated[str, typer.Option(help="where: local or emulator")] = "local",
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print accuracies, how many clips are told differently, and the largest difference."""
    data = MotionDigits(clips, held_out=True)
    labels = np.array([data.label(index) for index in range(clips)])
    found = {dtype: scores(model, dtype, data, device) for dtype in DTYPES}
    accuracy = {dtype: float((told.argmax(1) == labels).mean()) for dtype, told in found.items()}
    whole, half = (found[dtype] for dtype in DTYPES)
    changed = int((whole.argmax(1) != half.argmax(1)).sum())
    difference = float((np.abs(whole - half).max(1) / np.abs(whole).max(1)).max())
    for dtype in DTYPES:
        print(f"{dtype}: {100 * accuracy[dtype]:.2f} % of {clips} clips")
    print(f"{changed} told differently; largest difference {difference:.2e} of a clip's largest score")
    if out is not None:
        told = {
            "model": model,
            "device": device,
            "clips": clips,
            "accuracy": accuracy,
            "changed": changed,
            "difference": difference,
        }
        out.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
