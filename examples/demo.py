"""A trained network, from its published weights to this machine and to an emulated phone (`make demo`).

TransNetV2 finds the shot boundaries of a clip of 5,301 frames, first compiled for this machine and compared with
PyTorch over the whole clip, then compiled for a phone and run on an emulated one over some windows of the clip.
PyTorch's answers, the emulated phone's to this very artifact and both artifacts are kept: a second run computes none of
them again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dance_tvm import DanceError, build_network, import_model, open_device
from dance_tvm.artifact.folder import Artifact
from dance_tvm.core.cli import plain_errors
from dance_tvm.core.places import cache_folder
from dance_tvm.device import DeviceSession, LoadedNetwork, emulator_available, prepare_emulator
from dance_tvm.frontend import Imported
from dance_tvm.machines.host import available_cores
from dance_tvm.models import pretrained
from dance_tvm.models.transnetv2 import STEP, WINDOW, boundaries, clip_path, predict, read_frames, windows

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
Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class NoDeviceError(Exception):
    """The emulated device does not start; says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder for the artifacts")
    out = parser.parse_args().out
    torch.set_num_threads(available_cores())

    console.print(INTRODUCTION)
    title("TransNetV2: published weights and clip")
    with console.status("importing from PyTorch and checking the import"):
        network = import_model("transnetv2")
    frames = read_frames(clip_path())
    clip = [np.ascontiguousarray(window) for window in windows(frames)]
    console.print(f"{len(frames):,} frames of {clip_path().name}: {len(clip)} windows of {WINDOW}, {STEP} apart")

    title("Build for this machine")
    artifact = build(network, "host", out / "transnetv2-host")
    expected = pytorch_answers(network, frames, clip)
    begin = time.perf_counter()
    with open_device("local") as device:
        ours = run_of(device.load(artifact))
        found = run_windows("this build", ours, clip)
        console.print(f"this build: {time.perf_counter() - begin:.1f} s over the whole clip")
        in_turns(ours, torch_run(pretrained("transnetv2")), clip)
    compare(found, expected)
    compare_boundaries(over_clip(found, frames), over_clip(expected, frames))

    title("Build for a phone")
    artifact = build(network, "snapdragon", out / "transnetv2-snapdragon")
    some = sorted({int(at) for at in np.linspace(0, len(clip) - 1, EMULATED_WINDOWS)})
    on_emulated_device(artifact, [clip[at] for at in some], expected[some])
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
    told = ", ".join(f"{who} {1e3 * value:.0f} ms" for who, value in fastest.items())
    ratio = fastest["PyTorch"] / fastest["this build"]
    console.print(f"a window of {WINDOW} frames, fastest of {TURNS} in turns: {told}; {ratio:.2f} times as fast")


def build(network: Imported, target: str, out: Path) -> Artifact:
    """Build, or keep what an earlier run of the same sources left there."""
    with console.status("building") as status:
        built = build_network(network, out, target=target, check=False, reuse=True, on_phase=status.update)
    library = built.artifact.manifest.files["model.so"]
    told = f"built in {sum(built.seconds.values()):.1f} s" if "compile" in built.seconds else "built before"
    console.print(f"{told}: {out}, model.so {library.bytes / 1e6:.1f} MB, SHA-256 {library.sha256[:16]}")
    return built.artifact


def pytorch_answers(network: Imported, frames: np.ndarray, clip: Sequence[np.ndarray]) -> np.ndarray:
    """PyTorch's outputs (windows, 2, 100), of an earlier run where the network, frames and PyTorch are the same."""
    who = f"PyTorch {torch.__version__}"

    def compute() -> np.ndarray:
        model = pretrained("transnetv2")
        begin = time.perf_counter()
        answers = run_windows("PyTorch", torch_run(model), clip)
        console.print(f"{who}: {time.perf_counter() - begin:.1f} s over the whole clip")
        return answers

    key = hashlib.sha256(f"{network.source_sha256} {torch.__version__} {frames.shape}".encode())
    key.update(frames.data)
    return kept(who, f"transnetv2-answers-{key.hexdigest()[:16]}.npy", (len(clip), 2, WINDOW), compute)


def kept(who: str, name: str, shape: tuple[int, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """What an earlier run left in the cache folder under this name; where there is nothing sound, computed and left."""
    path = cache_folder() / name
    try:
        found = np.load(path, allow_pickle=False)
        if found.shape == shape and found.dtype == np.float32 and np.isfinite(found).all():
            console.print(f"{who}: its answers of an earlier run ({path}; delete it to compute them again)")
            return found
    except (OSError, ValueError, EOFError):
        pass  # none yet, or torn: computed now
    answers = compute()
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with beside.open("wb") as file:
        np.save(file, answers)
    beside.replace(path)
    return answers


def on_emulated_device(artifact: Artifact, clip: Sequence[np.ndarray], expected: np.ndarray) -> None:
    """Some windows over TVM RPC; says so and goes on where there is no device. Raises DanceError where they differ.

    An artifact's answers to the same windows are kept: each takes the emulated device minutes.
    """
    if reason := emulator_available():
        console.print(f"emulated aarch64 device: not run, {reason}")
        return

    def compute() -> np.ndarray:
        begin = time.perf_counter()
        try:
            with console.status("starting the emulated device") as status:
                prepare_emulator(status.update)
                device = open_device("emulator", call_timeout=EMULATED_CALL_S)
        except DanceError as error:
            raise NoDeviceError(str(error)) from error
        with device:
            console.print(f"{facts_of(device)}: started in {time.perf_counter() - begin:.1f} s")
            return run_windows("emulated device", run_of(device.load(artifact)), clip)

    key = hashlib.sha256(artifact.manifest.files["model.so"].sha256.encode())
    for window in clip:
        key.update(window.data)
    name = f"transnetv2-emulated-{key.hexdigest()[:16]}.npy"
    try:
        found = kept("emulated device", name, (len(clip), 2, WINDOW), compute)
    except NoDeviceError as error:
        console.print(f"emulated aarch64 device: not run, {error}")
        return
    console.print(f"{len(clip)} windows of {WINDOW} frames, from the clip's beginning to its end")
    compare(found, expected)


def facts_of(device: DeviceSession) -> str:
    facts = device.facts()
    return f"emulated {facts.get('machine', 'aarch64')} device behind a TVM RPC tracker and server"


def torch_run(network: torch.nn.Module) -> Run:
    def run(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            single, every = network(torch.from_numpy(window))
        return single.numpy(), every.numpy()

    return run


def run_of(loaded: LoadedNetwork) -> Run:
    (name,) = [tensor.name for tensor in loaded.manifest.inputs]

    def run(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        single, every = loaded.run({name: window}).values()
        return single, every

    return run


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


def over_clip(answers: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The probabilities (2, T) of the frames that count in each window."""
    each = iter(answers)
    return predict(lambda _window: next(each)[:, None], frames)


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
    with plain_errors():
        main()
