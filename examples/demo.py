"""A trained network, from its published weights to this machine and to an emulated phone (`make demo`).

TransNetV2 finds the shot boundaries of a clip of 5,301 frames, first compiled for this machine and compared with
PyTorch over the whole clip, then compiled for a phone and run on an emulated one over some windows of the clip.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from dance_tvm.artifact import Artifact
from dance_tvm.cli import plain_errors
from dance_tvm.compiler import build_network
from dance_tvm.device import LoadedNetwork, emulator_available, open_device, prepare_emulator
from dance_tvm.errors import DanceError
from dance_tvm.host import available_cores
from dance_tvm.models import create, example_inputs, load_state
from dance_tvm.models.transnetv2 import boundaries, clip_path, predict, published_state, read_frames, windows

ALLOWED = 1e-4  # largest difference from PyTorch in probability
EMULATED_WINDOWS = 2

console = Console(highlight=False, soft_wrap=True)
Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder for the artifacts")
    out = parser.parse_args().out
    torch.set_num_threads(available_cores())

    title("TransNetV2: published weights and clip")
    network = create("transnetv2")
    load_state(network, published_state())
    frames = read_frames(clip_path())
    console.print(f"{len(frames):,} frames of {clip_path().name}")

    title("Build for this machine")
    artifact = build(network, "host", out / "transnetv2-host")
    expected, seconds = timed(lambda: predict(torch_run(network), frames))
    with open_device("local") as device:
        found, our_seconds = timed(lambda: predict(our_run(device.load(artifact)), frames))
    console.print(f"PyTorch {seconds:.1f} s, this build {our_seconds:.1f} s over the whole clip")
    compare(found, expected, show=True)

    title("Build for a phone")
    artifact = build(network, "snapdragon", out / "transnetv2-snapdragon")
    on_emulated_device(artifact, network, frames)


def build(network: torch.nn.Module, target: str, out: Path) -> Artifact:
    with console.status("building") as status:
        built = build_network(
            network,
            out,
            target=target,
            example_inputs=example_inputs("transnetv2"),
            check=False,
            on_phase=status.update,
        )
    library = built.artifact.manifest.files["model.so"]
    console.print(f"built in {sum(built.seconds.values()):.1f} s: {out}, model.so {library.sha256[:16]}")
    return built.artifact


def on_emulated_device(artifact: Artifact, network: torch.nn.Module, frames: np.ndarray) -> None:
    """Some windows around the middle of the clip, over TVM RPC; says so and goes on where there is no device."""
    if reason := emulator_available():
        console.print(f"run on the emulated device: not run, {reason}")
        return
    chosen = list(windows(frames))[len(frames) // 100 :][:EMULATED_WINDOWS]
    try:
        with console.status("starting the emulated device") as status:
            prepare_emulator(status.update)
            with open_device("emulator") as device:
                loaded = our_run(device.load(artifact))
                status.update("running on the emulated device")
                found = [np.concatenate(loaded(np.ascontiguousarray(window))) for window in chosen]
    except DanceError as error:
        console.print(f"run on the emulated device: not run, {error}")
        return
    expected = [np.concatenate(torch_run(network)(np.ascontiguousarray(window))) for window in chosen]
    console.print(f"emulated aarch64 device behind a TVM RPC tracker: {len(chosen)} windows of 100 frames")
    compare(np.stack(found), np.stack(expected), show=False)


def torch_run(network: torch.nn.Module) -> Run:
    def run(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            single, every = network(torch.from_numpy(window))
        return single.numpy(), every.numpy()

    return run


def our_run(loaded: LoadedNetwork) -> Run:
    (name,) = [tensor.name for tensor in loaded.manifest.inputs]

    def run(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        single, every = loaded.run({name: window}).values()
        return single, every

    return run


def compare(found: np.ndarray, expected: np.ndarray, *, show: bool) -> None:
    """Print the largest difference, and the boundaries if asked; raises DanceError where they are not the same."""
    difference = float(np.abs(found - expected).max())
    console.print(f"largest difference from PyTorch: {difference:.2g} in probability (allowed {ALLOWED:g})")
    if show:
        ours, theirs = boundaries(found[0]), boundaries(expected[0])
        console.print(f"shot boundaries, ours:    {ours}")
        console.print(f"shot boundaries, PyTorch: {theirs}")
        if ours != theirs:
            raise DanceError("the compiled network finds other shot boundaries than PyTorch")
    if not difference <= ALLOWED:
        raise DanceError(f"the compiled network differs from PyTorch by {difference:.2g} in probability")


def timed(action: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    begin = time.perf_counter()
    return action(), time.perf_counter() - begin


def title(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


if __name__ == "__main__":
    with plain_errors():
        main()
