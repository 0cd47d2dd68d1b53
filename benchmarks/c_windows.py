"""TransNetV2 from C, with no TVM where it runs: the example program over the published clip, here or emulated.

    python -m benchmarks.c_windows host ARTIFACT                    all windows: boundaries, largest difference
    python -m benchmarks.c_windows emulated ARTIFACT FILE           first, last, and around ten boundaries
    … --pytorch ANSWERS.npy                                         PyTorch's answers, computed where not there yet

`examples/c/run_clip.c` is compiled by the system's compiler, or cross-compiled by zig and run under qemu. Its answers
are compared with PyTorch's. An emulated window takes minutes: each is written to FILE when it is there, and a further
run takes those that are missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import typer

from dance_tvm import DanceError
from dance_tvm.artifact.c_interface import INTERFACE
from dance_tvm.device import emulator
from dance_tvm.models import pretrained
from dance_tvm.models.transnetv2 import STEP, WINDOW, boundaries, clip_path, predict, read_frames, windows

EXAMPLE = Path(__file__).parent.parent / "examples/c/run_clip.c"
LIBRARIES = ["-ldl", "-lm", "-lpthread"]
CROSS = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17", "-D_DEFAULT_SOURCE"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def host(artifact: Path, threads: int = 2, pytorch: Path | None = None) -> None:
    """Run every window of the clip here."""
    frames = read_frames(clip_path())
    expected = of_pytorch(frames, pytorch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = compiled(["cc"], folder)
        needs = subprocess.run(["ldd", command[0]], capture_output=True, text=True).stdout.split()
        found = answers(command, artifact, list(windows(frames)), folder, threads)
    ours, theirs = (boundaries(over_clip(each, frames)[0]) for each in (found, expected))
    print(f"{len(found)} windows, {len(ours)} boundaries, {len(theirs)} of PyTorch's, the same: {ours == theirs}")
    print(f"largest difference {np.abs(found - expected).max():.1e}; needs {[each for each in needs if '.so' in each]}")


@app.command()
def emulated(
    artifact: Path, out: Path, around: int = 10, threads: int = 1, pytorch: Path | None = None, most: int = 1000
) -> None:
    """Run the first and last window and those that hold ``around`` boundaries on the emulated device, at most ``most``
    of those that are missing."""
    frames = read_frames(clip_path())
    clip, theirs = list(windows(frames)), of_pytorch(frames, pytorch)
    kept = json.loads(out.read_text()) if out.exists() else {}
    cuts = boundaries(over_clip(theirs, frames)[0])
    near = [cuts[at] // STEP for at in np.linspace(0, len(cuts) - 1, around).astype(int)]
    wanted = list(dict.fromkeys([0, len(clip) - 1, *near]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        *qemu, _python = emulator.python_command(emulator.prepare())
        command = [*qemu, *compiled(CROSS, folder)]
        for index in [each for each in wanted if str(each) not in kept][:most]:
            begun = time.perf_counter()
            (found,) = answers(command, artifact, [clip[index]], folder, threads)
            expected = theirs[index]
            counts = slice((WINDOW - STEP) // 2, (WINDOW + STEP) // 2)
            agree = bool(np.array_equal(found[0, counts] > 0.5, expected[0, counts] > 0.5))
            kept[str(index)] = {"difference": float(np.abs(found - expected).max()), "same_boundaries": agree}
            out.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"window {index}: {kept[str(index)]}, {time.perf_counter() - begun:.0f} s", flush=True)
    done = [kept[str(each)] for each in wanted if str(each) in kept]
    worst = max(each["difference"] for each in done)
    same = all(each["same_boundaries"] for each in done)
    print(f"{len(done)} of {len(wanted)} windows, all with PyTorch's boundaries: {same}")
    print(f"largest difference {worst:.1e}")


def compiled(compiler: list[str], folder: Path) -> list[str]:
    """The command that starts the example program."""
    program = str(folder / "run_clip")
    subprocess.run(
        [*compiler, "-std=c11", "-O2", f"-I{INTERFACE}", str(EXAMPLE), "-o", program, *LIBRARIES], check=True
    )
    return [program]


def answers(command: list[str], artifact: Path, clip: list[np.ndarray], folder: Path, threads: int) -> np.ndarray:
    """What the program answers: (windows, 2, frames)."""
    given, told = folder / "in.bin", folder / "out.bin"
    given.write_bytes(b"".join(window.tobytes() for window in clip))
    done = subprocess.run([*command, artifact, given, told, str(threads)], capture_output=True, text=True)
    if done.returncode:
        raise DanceError(f"{artifact}: {done.stdout}{done.stderr}")
    return np.fromfile(told, "float32").reshape(len(clip), 2, WINDOW)


def of_pytorch(frames: np.ndarray, kept: Path | None) -> np.ndarray:
    """PyTorch's answers to every window: (windows, 2, frames)."""
    if kept is not None and kept.exists():
        return np.load(kept, allow_pickle=False)
    network = pretrained("transnetv2")
    with torch.inference_mode():
        outputs = [network(torch.from_numpy(np.ascontiguousarray(window))) for window in windows(frames)]
    found = np.stack([np.concatenate([each.numpy() for each in pair]) for pair in outputs])
    if kept is not None:
        np.save(kept, found)
    return found


def over_clip(found: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The probabilities (2, T) of the frames that count in each window."""
    each = iter(found)
    return predict(lambda _window: next(each)[:, None], frames)


if __name__ == "__main__":
    app()
