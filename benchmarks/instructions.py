"""How many aarch64 instructions one call of a built network executes, counted in emulation.

    python -m benchmarks.instructions ARTIFACT [ARTIFACT ...]      artifacts built for aarch64, one thread

A plugin of qemu adds up the instructions of every translated block as it is executed. `examples/c/run_clip.c` runs an
artifact once and then twice: the difference is one call, the same number every time, and the reading of its inputs,
which takes some thousands. Needs the emulated device (`dance-tvm doctor`) and a C compiler (cc, or the ziglang wheel).
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dance_tvm.artifact.folder import Artifact, load_artifact
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import prepare_emulator
from dance_tvm.device.emulator import prepare, python_command
from dance_tvm.device.instruction_counter import InstructionCounter

from .c_windows import CROSS, compiled

TIMEOUT_S = 3600
CALLS = 3


def count_calls(python: Sequence[str], program: str, arguments: Sequence[object], calls: int = CALLS) -> int:
    """Instructions of one call: the mean over so many ``calls`` after the first.

    ``python`` starts the device's Python under qemu; ``program`` takes ``arguments`` and how often to call.
    Raises DanceError where it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "run.py"
        script.write_text(program)
        counter = InstructionCounter(Path(name))
        counts = [_count(counter, [*python, script, *arguments, times]) for times in (1, 1 + calls)]
    return (counts[1] - counts[0]) // calls


def _count(counter: InstructionCounter, command: Sequence[object]) -> int:
    """Instructions of one run of ``command``, which begins with qemu."""
    before = counter.read() if counter.file.exists() else 0
    run_emulated(counter.options, command)
    return counter.read() - before


def run_emulated(options: Sequence[str], command: Sequence[object]) -> None:
    """Run ``command``, which begins with qemu, on one thread and with more options for qemu.

    Raises DanceError where it fails.
    """
    qemu, *rest = map(str, command)
    command = [qemu, *options, "-E", "TVM_NUM_THREADS=1", *rest]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        reason = ((done.stderr or done.stdout).strip().splitlines() or ["no output"])[-1]
        raise DanceError(f"{rest[-2]} does not run on the emulated device: {reason}")


def instructions(artifact: Artifact, given: Sequence[Mapping[str, np.ndarray]] = ()) -> list[int]:
    """Instructions of one call of an artifact built for aarch64, on each of the inputs ``given``, or on random ones.

    Raises DanceError where the emulated device is not there or cannot run the artifact.
    """
    *qemu, _python = python_command(prepare(lambda _sentence: None))
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program, counter = compiled(CROSS, folder), InstructionCounter(folder)
        for arrays in given or [random_inputs(artifact.manifest.inputs)]:
            counts = []
            for calls in (1, 2):
                place = folder / "inputs.bin"
                place.write_bytes(calls * b"".join(arrays[each.name].tobytes() for each in artifact.manifest.inputs))
                counts.append(_count(counter, [*qemu, *program, artifact.path, place, folder / "outputs.bin", 1]))
            found.append(counts[1] - counts[0])
    return found


def main(artifacts: Annotated[list[Path], typer.Argument(help="built for aarch64, the dense one first")]) -> None:
    """Print the instructions of one call of each, and how many times fewer than the first's."""
    prepare_emulator()
    first = 0
    for path in artifacts:
        (found,) = instructions(load_artifact(path))
        first = first or found
        print(f"{path}: {found / 1e6:.2f} M instructions a call, {first / found:.2f}x fewer than the first")


if __name__ == "__main__":
    typer.run(main)
