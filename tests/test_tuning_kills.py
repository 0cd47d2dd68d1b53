"""kill -9, fifty times at random: nothing that was acknowledged is lost, and the next run goes on where this one stood.

A process that has everything imported forks a child for each life, so that fifty of them take seconds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from test_tuning import record, workload

from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import load_target
from dance_tvm.records.kernel_log import Log, append, log_path
from dance_tvm.tuning import search, tuner
from dance_tvm.tuning.workloads import Tunable

KILLS = 50
TRIALS = 2000  # of each layer: more than fifty short lives make
LAYERS = (16, 32)

ZYGOTE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import test_tuning_kills
test_tuning_kills.warm_up()
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            getattr(test_tuning_kills, line.split()[0])(*line.split()[1:])
        finally:
            os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


class Lives:
    """Runs functions of this module in children of one process, and kills them."""

    def __enter__(self) -> Lives:
        command = [sys.executable, "-c", ZYGOTE, str(Path(__file__).parent)]
        self.zygote = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.zygote.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *raised: object) -> None:
        self.zygote.kill()
        self.zygote.communicate()

    def killed(self, function: str, *arguments: object, acks: Path, after: float) -> None:
        """One life of so many seconds, counted from its first acknowledgement."""
        before = acknowledged(acks)
        self.zygote.stdin.write(" ".join(map(str, (function, *arguments))) + "\n")
        self.zygote.stdin.flush()
        child = int(self.zygote.stdout.readline())
        deadline = time.monotonic() + 20
        while acknowledged(acks) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        assert self.zygote.stdout.readline() == "ended\n"


def acknowledge(path: str | Path, text: str) -> None:
    """One more line in a file, in one write: what was written stays when the writer is killed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


def acknowledged(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def warm_up() -> None:
    """What each life would do first: read the target, import the search's libraries."""
    global first
    first = record()
    search.new_cost_model()


def write_records(log: str, acks: str, life: str) -> None:
    """Append records for as long as it lives."""
    for index in range(1_000_000):
        append(Path(log), [first.model_copy(update={"seconds": (index + 1) / 1e6, "origin": f"life {life}"})])
        acknowledge(acks, str(index))


def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path):
    path, acks = tmp_path / "log.jsonl", tmp_path / "acks"
    chance = random.Random(0)
    with Lives() as lives:
        for life in range(KILLS):
            lives.killed("write_records", path, acks, life, acks=acks, after=chance.uniform(0.0, 0.05))
    log = Log.read(path)
    records = sum(1 for _ in log.records())
    assert KILLS <= acknowledged(acks) <= records <= acknowledged(acks) + KILLS
    assert len(log.problems) <= KILLS
    assert all("torn" in reason for _, reason in log.problems)


class RandomSearch:
    """Proposes at random from the space; MetaSchedule's search takes longer than a life here."""

    def __init__(self, space, _target, _model, batch: int, seed: int) -> None:
        self.space, self.batch, self.told = space, batch, set()
        self.random = np.random.default_rng()

    def propose(self) -> list[dict[str, int]]:
        found = []
        while len(found) < self.batch:
            decisions = {**self.space.default(), "block_tiles": int(self.random.integers(1, 1_000_000))}
            if decisions["block_tiles"] not in self.told:
                found.append(decisions)
        return found

    def tell(self, results) -> None:
        self.told |= {decisions["block_tiles"] for decisions, _ in results}


class CheapTuner(tuner.Tuner):
    """Trials that cost a millisecond; the loop, the log and the resuming are the real ones."""

    acks = ""

    def _build(self, task, decisions):
        build: Future = Future()
        build.set_result(None)
        return decisions, Path(), build

    def _measure(self, task, instance, path, build, all_built):
        time.sleep(0.001)
        acknowledge(self.acks, str(instance["block_tiles"]))
        return [1e-9 * instance["block_tiles"]], "cheap", ""

    def _verify(self) -> None:
        pass


class NoDevice:
    """What the tuner asks of a farm."""

    lanes, is_here, specs, health = 1, True, ("cheap",), ()


def cheap_tuner(folder: Path) -> CheapTuner:
    host = load_target("host")
    tuner.PATIENCE = TRIALS
    search.LayerSearch = RandomSearch
    layers = [Tunable(workload(channels), [f"conv{channels}"]) for channels in LAYERS]
    CheapTuner.acks = str(folder / "acks")
    return CheapTuner(host, machine_of(host), layers, NoDevice(), tuner.Plan(TRIALS), folder)


def tune(folder: str) -> None:
    cheap_tuner(Path(folder)).run()


def test_a_tuner_killed_fifty_times_goes_on_where_it_stood(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "PATIENCE", tuner.PATIENCE)
    monkeypatch.setattr(search, "LayerSearch", search.LayerSearch)
    path = log_path(load_target("host"), folder=tmp_path)
    chance = random.Random(1)
    before = 0
    with Lives() as lives:
        for life in range(1, KILLS + 1):
            lives.killed("tune", tmp_path, acks=tmp_path / "acks", after=chance.uniform(0.0, 0.1))
            log = Log.read(path)
            made = sum(1 for _ in log.records())
            assert made >= before
            assert acknowledged(tmp_path / "acks") - made <= life * tuner.BATCH
            before = made
    log = Log.read(path)
    assert len(log.problems) <= KILLS
    assert before > 0
    resumed = cheap_tuner(tmp_path)
    assert sum(task.trials for task in resumed.tasks) == before
    assert min(task.trials for task in resumed.tasks) > 0
    best = {task.layer.workload.channels_in: task.best for task in resumed.tasks}
    assert best == {
        channels: min(found.seconds for found in log.records(workload=workload(channels).identity))
        for channels in LAYERS
    }


@pytest.mark.parametrize("cut", [2, 37, 400])
def test_a_log_cut_anywhere_is_resumed(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(tuner, "PATIENCE", tuner.PATIENCE)
    monkeypatch.setattr(search, "LayerSearch", search.LayerSearch)
    path = log_path(load_target("host"), folder=tmp_path)
    tile = record().decisions
    for index in range(3):
        append(
            path,
            [
                record(workload(16), seconds=0.01, status="trial").model_copy(
                    update={"decisions": {**tile, "block_tiles": 1 + index}}
                )
            ],
        )
    path.write_bytes(path.read_bytes()[:-cut])
    resumed = cheap_tuner(tmp_path)
    assert resumed.tasks[0].trials == 2
    assert [reason for *_, reason in resumed.problems] == ["it is torn or not JSON"]
