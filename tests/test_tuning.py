"""Tuning: logs that survive damage, records that stay with their target, spaces, and the tuner end to end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dance_tvm.errors import DanceError
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.spaces import Advice, GatherSpace, Workload, choose_tile, tile_of
from dance_tvm.schedules.tiles import Machine, default_tile
from dance_tvm.target import load_target
from dance_tvm.tuning.advice import TunedTiles, tuned_tiles
from dance_tvm.tuning.records import Log, append, log_path, new_record, parse_loosely

AVX2 = Machine(8, 16, 32768, 524288, True)
NEON = Machine(4, 32, 65536, 524288, False)
TILE = {"mr": 4, "vectors": 2, "step": 1, "block_tiles": 16, "segment_taps": 3, "depth_block": 64, "panels_outer": 0}


def workload(channels: int = 64, **rest) -> Workload:
    window = Window(1, (4, 14, 14), (4, 14, 14), (3, 3, 3), padding=(1, 1, 1))
    return Workload(window, channels, channels, threads=2, **rest)


def record(work: Workload | None = None, seconds: float = 0.01, status: str = "verified", target: str = "host", **rest):
    times = [seconds] if seconds else []
    about = {"status": status, "origin": "local", "trials": 3, "default_seconds": 0.02, **rest}
    return new_record(work or workload(), load_target(target), TILE, times, **about)


def test_defaults_and_tuned_choices_come_from_one_place():
    work = workload()
    tile, origin = choose_tile(work, AVX2)
    assert origin == ""
    assert (tile.mr, tile.vectors) == (default_tile(AVX2, work.window, 64, 64).mr, tile.vectors)

    class Tuned:
        def advise(self, asked: Workload) -> Advice:
            return Advice(asked, TILE, "tuned")

    assert choose_tile(work, AVX2, Tuned()) == (tile_of(AVX2, TILE), "tuned")


def test_advice_that_does_not_fit_the_registers_is_not_followed():
    class Wrong:
        def advise(self, asked: Workload) -> Advice:
            return Advice(asked, {**TILE, "mr": 16, "vectors": 4}, "tuned")

    assert choose_tile(workload(), AVX2, Wrong())[1] == ""


@pytest.mark.parametrize("machine", [AVX2, NEON], ids=["avx2", "neon"])
@pytest.mark.parametrize("channels", [3, 64, 512])
def test_a_space_holds_its_defaults_and_only_what_fits(machine, channels):
    space = GatherSpace(machine, workload(channels))
    assert space.allows(space.default())
    assert space.size > 20
    for vectors, rows in space.register_tiles.items():
        for mr in rows:
            assert space.allows({**space.default(), "mr": mr, "vectors": vectors})


def test_a_workload_is_read_back_from_its_facts():
    work = workload(lists=("in_frames", "out_channels"), density=0.5, activation="relu")
    again = Workload.of(json.loads(json.dumps(work.facts())))
    assert again == work
    assert again.identity == work.identity
    assert work.identity != work.at(0.25).identity
    assert work.kernel_identity == work.at(0.25).kernel_identity


def test_torn_foreign_and_repeated_lines_are_reported_and_skipped(tmp_path):
    path = tmp_path / "log.jsonl"
    first, second = record(), record(seconds=0.005)
    append(path, [first])
    with path.open("ab") as stream:
        stream.write(second.line()[:200] + b"\n")  # torn
        stream.write(b"not json\n\n")
        stream.write(b'{"kind": "kernel_group", "gm": 8}\n')
        stream.write(first.line().replace(b'"version": 1', b'"version": 9'))
        stream.write(first.line())  # repeated
        stream.write(second.line()[:300])  # torn by a kill, no end of line
    append(path, [second])
    log = Log.read(path)
    assert [found.seconds for found in log.records()] == [0.01, 0.005]
    assert sorted(number for number, _ in log.problems) == [2, 3, 4, 5, 6, 7, 8]
    reasons = dict(log.problems)
    assert "torn" in reasons[2]
    assert "kernel_group" in reasons[5]
    assert "version 9" in reasons[6]
    assert "repeats" in reasons[7]


def test_a_damaged_line_that_begins_well_is_not_used(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(record(seconds=0.001).line().replace(b'"mr": 4', b'"mr": "four"') + record().line())
    log = Log.read(path)
    best = log.best(load_target("host").fingerprint)
    assert [found.seconds for found in best.values()] == [0.01]
    assert log.problems[0][0] == 1


def test_records_of_one_target_do_not_apply_to_another(tmp_path):
    host, phone = load_target("host"), load_target("snapdragon")
    append(log_path(host, folder=tmp_path), [record()])
    append(log_path(phone, folder=tmp_path), [record()])  # the host's record, put into the phone's file
    assert tuned_tiles(host, tmp_path).advise(workload()) is not None
    assert tuned_tiles(phone, tmp_path).advise(workload()) is None
    asked = tuned_tiles(phone, tmp_path, logs_from=host).advise(workload())
    assert "made for host" in asked.origin
    with pytest.raises(DanceError, match="no verified record of that target"):
        tuned_tiles(host, tmp_path, logs_from=phone)


def test_only_verified_records_are_followed(tmp_path):
    host = load_target("host")
    append(log_path(host, folder=tmp_path), [record(status="trial", seconds=0.001), record(status="failed", seconds=0)])
    assert tuned_tiles(host, tmp_path).advise(workload()) is None


def test_the_nearest_layer_is_asked_and_strangers_are_not(tmp_path):
    host = load_target("host")
    log = log_path(host, folder=tmp_path)
    append(log, [record(workload(64)), record(workload(512), seconds=0.5)])
    tiles = TunedTiles(host.fingerprint, [Log.read(log)])
    assert tiles.advise(workload(64)).origin.startswith("tuned")
    assert tiles.advise(workload(60)).origin.startswith("from a similar layer")
    assert tiles.advise(workload(4)) is None
    assert tiles.advise(workload(64, lists=("in_channels",), density=0.5)) is None


def test_a_log_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DanceError, match="cannot be written"):
        append(tmp_path / "file" / "log.jsonl", [record()])


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_tuning import record
from dance_tvm.tuning.records import append
print("ready", flush=True)
for index in range(100000):
    append(Path(sys.argv[1]), [record(seconds=(index + 1) / 1e5, origin=sys.argv[2])])
    print(index, flush=True)
"""


def _kill_writers(path: Path, times: int) -> int:
    """Start a writer and kill it at random, again and again; how many records were acknowledged."""
    acknowledged = 0
    for number in range(times):
        arguments = [sys.executable, "-c", _WRITER, str(path), f"writer {number}", str(Path(__file__).parent)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0.005, 0.1))
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged += len([line for line in writer.stdout.read().split("\n")[:-1] if line])
    return acknowledged


@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path, times):
    path = tmp_path / "log.jsonl"
    acknowledged = _kill_writers(path, times)
    log = Log.read(path)
    records = sum(1 for _ in log.records())
    assert acknowledged <= records <= acknowledged + times
    assert len(log.problems) <= times


@pytest.mark.slow
def test_a_million_lines_open_in_five_seconds(tmp_path):
    path, line = tmp_path / "log.jsonl", record(seconds=0.5).line()
    with path.open("wb") as stream:
        for index in range(1_000_000):
            stream.write(line.replace(b'"seconds": 0.5', b'"seconds": 0.%07d' % (1_000_000 + index)))
    started = time.process_time()
    log = Log.read(path)
    best = log.best(load_target("host").fingerprint)
    assert time.process_time() - started < 5
    assert log.lines == 1_000_000
    assert not log.problems
    assert [found.seconds for found in best.values()] == [0.1]


def test_fields_in_another_order_are_still_read_by_merge():
    shuffled = json.dumps(dict(reversed(list(record().model_dump().items())))).encode()
    assert parse_loosely(shuffled).seconds == 0.01
    assert parse_loosely(b"{}") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", "0"], "--trials must be at least 1"),
        (["--density", "2"], "--density must lie between"),
        (["--masks", "columns"], "--masks knows"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said):
    command = [sys.executable, "-m", "dance_tvm.tune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
