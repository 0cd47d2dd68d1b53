"""A trained network, from its published weights to this machine and to an emulated phone (`make demo`).

TransNetV2 finds the shot boundaries of a published clip of 5,301 frames, first compiled for this machine and compared
with PyTorch over the whole clip, then compiled for a phone and run on an emulated one over some windows of the clip.
PyTorch's answers, the emulated phone's to this very artifact and both artifacts are kept in the same folder: a second
run computes none of them again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dance_tvm import DanceError, build_network, import_model, open_device

WINDOW, STEP = 100, 50  # frames that a call sees, and frames from window to window: the middle ones of each count
MARGIN = (WINDOW - STEP) // 2

ALLOWED = 1e-4  # largest difference from PyTorch in probability
EMULATED_CALL_S = 1800.0  # a window may take minutes there where the machine is busy
EMULATED_WINDOWS = 2  # the clip's first and last: each takes a minute or more there

TURNS = 8  # windows that both engines run one after the other

INTRODUCTION = """TransNetV2 finds where a film is cut. This demo fetches its published weights and 5,301 frames,
builds it for this machine, compares what it finds with PyTorch over the whole clip, and times both in turns; then it
builds it for a phone and runs two windows on an emulated one, where qemu is installed. On two idle cores the first run
takes about six minutes, and the next ones, which keep what was built and computed, under a minute."""
NEXT = """
[bold]What to try next[/]
  dance-tvm show {out}/transnetv2-host               layers, and why each has its kernel
  dance-tvm bench {out}/transnetv2-host              by layer; --trace trace.json for Perfetto
  dance-tvm run {out}/transnetv2-host --video FILM   on a film of your own
  dance-tvm build                                  a network that decides by clip what to leave out
  docs/quick-start.md, then docs/pytorch-to-phone.md with a network of your own"""

console = Console(highlight=False, soft_wrap=True)
Run = Callable[[np.ndarray], Sequence[np.ndarray]]
"""A window's two outputs (1, 100), as a network or an engine computes them."""


class NoDeviceError(Exception):
    """The emulated device does not start; says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder for the artifacts")
    out = parser.parse_args().out

    console.print(INTRODUCTION)
    title("TransNetV2: published weights and clip")
    with console.status("importing from PyTorch and checking the import"):
        network = import_model("transnetv2")
    (name,) = [tensor.name for tensor in network.inputs]

    def pytorch(window: np.ndarray) -> Sequence[np.ndarray]:
        return list(network.reference({name: window}).values())

    title("Build for this machine")
    artifact = build(network, "host", out / "transnetv2-host")
    torch.set_num_threads(artifact.manifest.target.threads)
    with open_device("local") as device:
        loaded = device.load(artifact)
        clip = [inputs[name] for inputs in loaded.windows(network.video(), stride=STEP)]
        console.print(f"{network.video().name}: {len(clip)} windows of {WINDOW} frames, {STEP} apart")
        expected = pytorch_answers(network.source_sha256, pytorch, clip, out)
        begin = time.perf_counter()
        ours = run_of(loaded)
        found = run_windows("this build", ours, clip)
        console.print(f"this build: {time.perf_counter() - begin:.1f} s over the whole clip")
        in_turns(ours, pytorch, clip)
    compare(found, expected)
    compare_boundaries(over_clip(found), over_clip(expected))

    title("Build for a phone")
    artifact = build(network, "snapdragon", out / "transnetv2-snapdragon")
    some = sorted({int(at) for at in np.linspace(0, len(clip) - 1, EMULATED_WINDOWS)})
    on_emulated_device(artifact, [clip[at] for at in some], expected[some], out)
    console.print(NEXT.format(out=out))


def in_turns(ours: Run, theirs: Run, clip: Sequence[np.ndarray]) -> None:
    """Print both engines' time of a window, measured in turns on the same windows with as many threads."""
    seconds: dict[str, list[float]] = {"this build": [], "PyTorch": []}
    for window in clip[:TURNS]:
        for who, run in (("this build", ours), ("PyTorch", theirs)):
            begin = time.perf_counter()
            run(window)
            seconds[who].append(time.perf_counter() - begin)
    fastest = {who: min(found) for who, found in seconds.items()}
    said = ", ".join(f"{who} {1e3 * value:.0f} ms" for who, value in fastest.items())
    ratio = fastest["PyTorch"] / fastest["this build"]
    console.print(f"a window of {WINDOW} frames, fastest of {TURNS} in turns: {said}; {ratio:.2f} times as fast")


def build(network, target: str, out: Path):
    """The artifact, built or kept where an earlier run of the same sources left it."""
    with console.status("building") as status:
        built = build_network(network, out, target=target, check=False, reuse=True, on_phase=status.update)
    library = built.artifact.manifest.files["model.so"]
    said = f"built in {sum(built.seconds.values()):.1f} s" if "compile" in built.seconds else "built before"
    console.print(f"{said}: {out}, model.so {library.bytes / 1e6:.1f} MB, SHA-256 {library.sha256[:16]}")
    return built.artifact


def pytorch_answers(network_sha256: str, run: Run, clip: Sequence[np.ndarray], out: Path) -> np.ndarray:
    """PyTorch's outputs (windows, 2, 100), of an earlier run where the network, clip and PyTorch are the same."""
    who = f"PyTorch {torch.__version__}"

    def compute() -> np.ndarray:
        begin = time.perf_counter()
        answers = run_windows("PyTorch", run, clip)
        console.print(f"{who}: {time.perf_counter() - begin:.1f} s over the whole clip")
        return answers

    return kept(who, out, f"pytorch-{digest(network_sha256 + torch.__version__, clip)}.npy", len(clip), compute)


def digest(what: str, clip: Sequence[np.ndarray]) -> str:
    """Names answers to these windows."""
    key = hashlib.sha256(what.encode())
    for window in clip:
        key.update(window.data)
    return key.hexdigest()[:16]


def kept(who: str, out: Path, name: str, windows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Outputs (windows, 2, 100) that an earlier run left under this name; where none are sound, computed and left."""
    path = out / "transnetv2-answers" / name
    try:
        found = np.load(path, allow_pickle=False)
        if found.shape == (windows, 2, WINDOW) and found.dtype == np.float32 and np.isfinite(found).all():
            console.print(f"{who}: its answers of an earlier run ({path}; delete it to compute them again)")
            return found
    except (OSError, ValueError, EOFError):
        pass  # none yet, or torn: computed now
    answers = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with beside.open("wb") as file:
        np.save(file, answers)
    beside.replace(path)
    return answers


def on_emulated_device(artifact, clip: Sequence[np.ndarray], expected: np.ndarray, out: Path) -> None:
    """Some windows over TVM RPC; says so and goes on where there is no device. Raises DanceError where they differ.

    An artifact's answers to the same windows are kept: each takes the emulated device minutes.
    """

    def compute() -> np.ndarray:
        begin = time.perf_counter()
        try:
            with console.status("starting the emulated device") as status:
                device = open_device(
                    "emulator", call_timeout=EMULATED_CALL_S, on_phase=status.update, behind_tracker=True
                )
        except DanceError as error:
            raise NoDeviceError(str(error)) from error
        with device:
            machine = device.facts().get("machine", "aarch64")
            console.print(
                f"emulated {machine} device behind a TVM RPC tracker and server: "
                f"started in {time.perf_counter() - begin:.1f} s"
            )
            return run_windows("emulated device", run_of(device.load(artifact)), clip)

    name = f"emulated-{digest(artifact.manifest.files['model.so'].sha256, clip)}.npy"
    try:
        found = kept("emulated device", out, name, len(clip), compute)
    except NoDeviceError as error:
        console.print(f"emulated aarch64 device: not run, {error}")
        return
    console.print(f"{len(clip)} windows of {WINDOW} frames, from the clip's beginning to its end")
    compare(found, expected)


def run_of(loaded) -> Run:
    """A network on a device as a function of one window."""
    (name,) = [tensor.name for tensor in loaded.manifest.inputs]
    return lambda window: list(loaded.run({name: window}).values())


def run_windows(who: str, run: Run, clip: Sequence[np.ndarray]) -> np.ndarray:
    """Outputs (windows, 2, 100) of ``run``, with a bar while it lasts."""
    with bar(who, len(clip)) as advance:
        outputs = []
        for window in clip:
            outputs.append(np.concatenate(run(window)))
            advance()
    return np.stack(outputs)


@contextmanager
def bar(who: str, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn(who), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(who, total=total)
        yield lambda: progress.advance(task)


def over_clip(answers: np.ndarray) -> np.ndarray:
    """Probabilities (2, T): of each window (windows, 2, 100) its middle frames, and the clip's two ends."""
    middle = np.concatenate(answers[:, :, MARGIN:-MARGIN], axis=1)
    return np.concatenate([answers[0, :, :MARGIN], middle, answers[-1, :, -MARGIN:]], axis=1)


def boundaries(probabilities: np.ndarray) -> list[int]:
    """Frames at which a shot ends: the first frame of each run of ``probabilities`` (T,) above a half."""
    above = probabilities > 0.5
    return np.flatnonzero(above & ~np.concatenate([[False], above[:-1]])).tolist()


def compare(found: np.ndarray, expected: np.ndarray) -> None:
    """Print the largest difference. Raises DanceError where it is too large."""
    difference = float(np.abs(found - expected).max())
    console.print(f"largest difference from PyTorch: {difference:.2g} in probability (allowed {ALLOWED:g})")
    if not difference <= ALLOWED:
        raise DanceError(f"the compiled network differs from PyTorch by {difference:.2g} in probability")


def compare_boundaries(found: np.ndarray, expected: np.ndarray) -> None:
    """Print both shot boundaries. Raises DanceError where they are not the same."""
    ours, theirs = boundaries(found[0]), boundaries(expected[0])
    console.print(f"shot boundaries, this build: {ours}")
    console.print(f"shot boundaries, PyTorch:    {theirs}")
    if ours != theirs:
        raise DanceError("the compiled network finds other shot boundaries than PyTorch")
    console.print(f"the same {len(ours)} boundaries")


def title(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


if __name__ == "__main__":
    try:
        main()
    except DanceError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
