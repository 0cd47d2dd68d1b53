"""How many aarch64 instructions one call of a built network executes, counted in emulation.

    python benchmarks/instructions.py ARTIFACT [ARTIFACT ...]      artifacts built for aarch64, one thread

A plugin of qemu adds up the instructions of every translated block as it is executed, in a file that the emulated
program reads before and after a call. Starting the emulated Python takes a thousand times more than a call. The same
call takes the same number every time, but for some thousands of Python's own. Needs the emulated device (`dance-tvm
doctor`) and a C compiler (cc, or the ziglang wheel).
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dance_tvm.artifact.c_interface import INTERFACE
from dance_tvm.artifact.folder import Artifact, load_artifact
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import prepare_emulator
from dance_tvm.device.emulator import prepare, python_command
from dance_tvm.device.instruction_counter import InstructionCounter

TIMEOUT_S = 3600
CALLS = 3

# What the emulated Python runs: an artifact, the folder of dance_model.py, the counter's file, and inputs. Reading the
# counter twice in a row tells what reading takes. The first call of each input is not counted.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy
from dance_model import Model
def executed():
    with open(sys.argv[3], "rb") as file:
        return int.from_bytes(file.read(8), "little")
executed()
with Model(sys.argv[1], 1) as model:
    for given in sys.argv[4:]:
        inputs = dict(numpy.load(given))
        model.run(inputs)
        before, begin = executed(), executed()
        model.run(inputs)
        print(executed() - begin - (begin - before))
"""


def count_calls(python: Sequence[str], program: str, arguments: Sequence[object], calls: int = CALLS) -> int:
    """Instructions of one call: the mean over so many ``calls`` after the first.

    ``python`` starts the device's Python under qemu; ``program`` takes ``arguments`` and how often to call.
    Raises DanceError where it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        counter = InstructionCounter(Path(name))

        def count(times: int) -> int:
            before = counter.read() if counter.file.exists() else 0
            _run(counter, python, program, [*arguments, times])
            return counter.read() - before

        return (count(1 + calls) - count(1)) // calls


def _run(counter: InstructionCounter, python: Sequence[str], program: str, arguments: Sequence[object]) -> str:
    """What ``program`` prints, its instructions counted."""
    qemu, *rest = python
    script = counter.file.with_name("run.py")
    script.write_text(program)
    command = [qemu, *counter.options, "-E", "TVM_NUM_THREADS=1", *rest, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DanceError(f"{arguments[0]} does not run on the emulated device: {reason}")
    return done.stdout


def instructions(artifact: Artifact, given: Sequence[Mapping[str, np.ndarray]] = ()) -> list[int]:
    """Instructions of one call of an artifact built for aarch64, on each of the inputs ``given``, or on random ones.

    Raises DanceError where the emulated device is not there or cannot run the artifact.
    """
    system = prepare(lambda _sentence: None)
    with tempfile.TemporaryDirectory() as name:
        folder, places = Path(name), []
        for index, arrays in enumerate(given or [random_inputs(artifact.manifest.inputs)]):
            places.append(folder / f"inputs-{index}.npz")
            np.savez(places[-1], **arrays)  # type: ignore[arg-type]  # names are not options
        counter = InstructionCounter(folder)
        arguments = [artifact.path, INTERFACE, counter.file, *places]
        return [int(line) for line in _run(counter, python_command(system), PROGRAM, arguments).split()]


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
