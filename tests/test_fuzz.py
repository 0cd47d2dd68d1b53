"""A fixed part of the fuzzer, and that it would see, reduce and repeat what is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fuzz.generate import generate
from fuzz.memory import library
from fuzz.oracle import answer
from fuzz.program import Program, Step, write_out
from fuzz.reduce import reduce
from fuzz.runner import Worker
from fuzz.script import script
from fuzz.trial import Verdict, compare

SEEDS = range(28)


@pytest.fixture(scope="module")
def worker():
    child = Worker()
    yield child
    child.close()


@pytest.mark.slow
def test_random_networks_answer_as_pytorch_in_float64(worker):
    failed = {}
    for seed in SEEDS:
        program = generate(seed)
        verdict, _ = worker(program)
        if verdict.is_fault:
            failed[seed] = f"{verdict.kind}: {verdict.told}\n{script(program, verdict)}"
    assert not failed, "\n\n".join(f"python -m tests.fuzz --replay {seed}\n{told}" for seed, told in failed.items())


def test_a_seed_gives_the_same_program_everywhere():
    told = "from fuzz.generate import generate; print(*(generate(seed).digest for seed in range(6)))"
    child = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, env=_environment(), check=True)
    assert child.stdout.split() == [generate(seed).digest for seed in range(6)]
    assert Program.from_json(generate(3).to_json()) == generate(3)


def small() -> Program:
    """Shift, convolution, pool and mask: four steps of which one will be called wrong."""
    steps = [
        Step("arithmetic", [0], ["{y} = {x} + 1"]),
        Step("convolution", [1], ["{y} = {l}({x})"], ["{l} = nn.Conv2d({c}, 6, 3, padding=1, groups=2)"]),
        Step("max_pool", [2], ["{y} = {l}({x})"], ["{l} = nn.MaxPool2d(2)"]),
        Step("mask_from_outside", [3], ["mask = ({m} > 0).float()", "a = {x} * mask", "{y} = a"], mask=[2, 6, 1, 1]),
    ]
    options = {"threads": 2, "conv": "winograd", "numerics": "exact", "sparsity": "auto"}
    return Program(0, [[2, 4, 6, 8]], steps, [4, 3], options)


def test_rounding_is_told_from_a_wrong_answer():
    network = write_out(small())
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in network.shapes.values()]
    told = answer(network, inputs, "float32")
    assert told is not None
    with torch.no_grad():
        found = [output.numpy() for output in network.module(*inputs)]
    assert compare(found, told) is None
    place = np.unravel_index(np.abs(found[1]).argmax(), found[1].shape)
    found[1][place] *= 1.001
    assert "output 1: 1 of" in compare(found, told)[1]
    found[1][place] = np.nan
    assert compare(found, told)[0] == np.inf


def test_a_decision_that_rounding_could_turn_is_left_alone():
    network = write_out(small())
    x, scores = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in network.shapes.values())
    scores[0, 0] = 1e-7
    assert answer(network, [x, scores], "float32") is None
    scores[0, 0] = 0.0  # exactly the threshold: no rounding leads there
    assert answer(network, [x, scores], "float32") is not None


def test_a_failing_program_is_reduced_to_the_step_that_fails():
    def fails_in_pools(program: Program) -> tuple[Verdict, float]:
        return Verdict("wrong" if any("MaxPool2d" in str(step.init) for step in program.steps) else "right"), 0.0

    least, verdict = reduce(small(), Verdict("wrong"), fails_in_pools)
    assert [step.name for step in least.steps] == ["max_pool"]
    assert verdict.kind == "wrong"
    assert least.inputs == [[1, 1, 2, 2]] or least.steps[0].init == ["{l} = nn.MaxPool2d(1)"]
    assert least.options["threads"] == 1
    assert least.options["conv"] == "auto"


def test_a_script_repeats_a_program_without_the_fuzzer(tmp_path):
    program = replace(small(), outputs=[4], options={"threads": 1, "conv": "direct"})
    path = tmp_path / "repeat.py"
    path.write_text(script(program, Verdict("wrong", "output 0")), "utf-8")
    assert "fuzz" not in path.read_text("utf-8").split("\n\n\n")[-1].replace(program.to_json(), "")
    child = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, env=_environment()
    )
    assert child.stdout.splitlines()[-1].startswith("PASS"), child.stdout + child.stderr


GUARDED = """
import ctypes
own = ctypes.CDLL(None)
own.guard_on(0x7f)
buffer = ctypes.c_void_p()
own.posix_memalign(ctypes.byref(buffer), 64, 100)
size = ctypes.c_char * 128
room = size.from_address(buffer.value)
assert room.raw == b"\\x7f" * 128
room[{index}] = b"a"
own.free(buffer)
own.guard_off()
print(own.guard_damaged())
{after}
"""


@pytest.mark.parametrize(("index", "damaged"), [(99, 0), (100, 1), (127, 1)])
def test_writes_around_a_buffer_are_counted(index, damaged):
    assert _guarded(GUARDED.format(index=index, after="")).stdout.split() == [str(damaged)]


@pytest.mark.parametrize("after", ["ctypes.string_at(buffer.value)", "ctypes.string_at(buffer.value + 128, 1)"])
def test_reading_what_was_freed_or_lies_behind_ends_the_process(after):
    child = _guarded(GUARDED.format(index=0, after=after))
    assert child.stdout.split() == ["0"]
    assert child.returncode == -signal.SIGSEGV


def _guarded(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**_environment(), "LD_PRELOAD": str(library())}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TVM_NUM_THREADS": "2"}
