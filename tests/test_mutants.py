"""The tool that measures the build's check: it changes one number, and tells what became of that."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tvm import te

from benchmarks import mutants
from dance_tvm import Options


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> mutants.Subject:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)).eval()
    made = mutants.Subject("small", network, (1, 2, 4, 6, 6), Options(), tmp_path_factory.mktemp("mutants"))
    made.others = made.others[:4]
    made.expected = mutants.expected_answers(made)
    return made


def test_one_place_is_changed():
    x = te.placeholder((6,), name="x")
    func = te.create_prim_func([x, te.compute((6,), lambda i: 3.0 * x[i] + x[5 - i], name="y")])
    told = {mutants.mutated(func, np.random.default_rng(seed)) for seed in range(40)}
    said = {change for _, change in told}
    assert {"+ → -", "3 → -3", "5 → 4", "5 → 6"} <= said
    assert all(changed.script() != func.script() for changed, _ in told)


def test_few_mutants_that_matter_pass_the_check(subject):
    found = [mutants.judged(subject, seed) for seed in range(8)]
    outcomes = [mutant.outcome for mutant in found]
    assert "caught" in outcomes
    assert "escaped" not in outcomes
    assert all(mutant.worst > 1 for mutant in found if mutant.outcome == "caught")
    assert all(mutant.worst <= 1 for mutant in found if mutant.outcome == "same")


def test_a_mutant_that_shows_on_other_inputs_alone_escapes(subject, monkeypatch):
    """A wrong answer to each of the other inputs, right ones to those of the check."""
    runs = 0

    def runner(_subject: mutants.Subject, _library: Path):
        def run(arrays):
            nonlocal runs
            runs += 1
            right = subject.tried.answers.values()
            answers = [*right, *subject.expected]
            scale = 1.0 if runs <= len(right) else 1.01
            return {name: scale * array for name, array in answers[runs - 1].items()}

        return run

    monkeypatch.setattr(mutants.Subject, "runner", runner)
    assert mutants.judged(subject, 0).outcome == "escaped"


def test_a_process_that_dies_or_hangs_is_told():
    def dies(sender):
        sender.send(1)
        os.kill(os.getpid(), signal.SIGSEGV)

    def hangs(sender):
        signal.pause()

    assert mutants._in_a_process(dies) == ([1], "signal 11")
    assert mutants._in_a_process(hangs, timeout=0.2) == ([], "hangs")
