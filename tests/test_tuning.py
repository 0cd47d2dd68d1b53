"""Tuning: logs that survive damage, records that stay with their target, spaces, and the tuner end to end."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.errors import DanceError
from dance_tvm.lowering.registry import kernel_of
from dance_tvm.machines.target import load_target
from dance_tvm.records import places
from dance_tvm.records.advice import TunedTiles, tuned_tiles
from dance_tvm.records.kernel_log import Log, append, log_path, new_record, parse_loosely
from dance_tvm.schedules.cpu.choice import Advice, direct_or_winograd, settled_direct
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.direct_spaces import GatherSpace
from dance_tvm.schedules.cpu.tiles import Machine, busy_share, default_tile, row_tiles
from dance_tvm.schedules.cpu.winograd import WinogradConv
from dance_tvm.schedules.cpu.winograd_space import best
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.layer import Layer
from dance_tvm.schedules.workload import FAMILIES, WINOGRAD, Workload
from dance_tvm.tuning import farm
from dance_tvm.tuning.farm import CountedSession, Farm
from dance_tvm.tuning.instances import LEAST_SECONDS, Loaded
from dance_tvm.tuning.libraries import TvmLibrary
from dance_tvm.tuning.tuner import Tuner

AVX2 = Machine(8, 16, 32768, 524288, True)
NEON = Machine(4, 32, 65536, 524288, False)
SERVER = Machine(16, 32, 49152, 2 << 20, True)
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
    chosen = settled_direct(Layer.of(work), AVX2)
    assert chosen.origin == ""
    default = default_tile(AVX2, work.window, 64, 64)
    assert (chosen.kernel.tile.mr, chosen.kernel.tile.vectors) == (default.mr, default.vectors)

    class Tuned:
        def advise(self, asked: Workload) -> Advice:
            return Advice(asked, TILE, "tuned")

    tuned = settled_direct(Layer.of(work), AVX2, Tuned())
    assert tuned.origin == "tuned"
    assert {name: getattr(tuned.kernel.tile, name) for name in TILE} == TILE
    assert (tuned.kernel.plan.mr, tuned.kernel.plan.block_tiles) == (TILE["mr"], TILE["block_tiles"])


@pytest.mark.parametrize("threads", [2, 3, 4, 8])
@pytest.mark.parametrize("machine", [AVX2, NEON, SERVER], ids=["avx2", "neon", "server"])
def test_all_threads_have_something_to_do_in_a_small_layer(machine, threads):
    window = Window(1, (3, 5, 5), (3, 5, 5), (3, 3, 3), padding=(1, 1, 1))
    conv = settled_direct(Layer.of(Workload(window, 96, 96, threads=threads)), machine).kernel
    tile, tiles = conv.tile, row_tiles(window, conv.tile.mr)
    blocks = -(-tiles // tile.block_tiles)
    assert busy_share(blocks * conv.panels, threads) > 0.7
    whole = conv.sized({**{name: int(getattr(tile, name)) for name in TILE}, "block_tiles": tiles})
    together, alone = whole.predict(machine, threads), whole.predict(machine, 1)
    assert together * min(threads, conv.panels) > 0.7 * alone  # a block of a panel is one thread's
    assert conv.predict(machine, threads) <= together


def test_advice_that_does_not_fit_the_registers_is_not_followed():
    class Wrong:
        def advise(self, asked: Workload) -> Advice:
            return Advice(asked, {**TILE, "mr": 16, "vectors": 4}, "tuned")

    assert settled_direct(Layer.of(workload()), AVX2, Wrong()).origin == ""


@pytest.mark.parametrize("machine", [AVX2, NEON], ids=["avx2", "neon"])
@pytest.mark.parametrize("channels", [3, 64, 512])
def test_a_space_holds_its_defaults_and_only_what_fits(machine, channels):
    space = GatherSpace(machine, workload(channels))
    assert space.allows(space.default())
    assert space.size > 20
    for vectors, rows in space.register_tiles.items():
        for mr in rows:
            assert space.allows({**space.default(), "mr": mr, "vectors": vectors})


class Told:
    """A log that holds these decisions and seconds by family, for any workload."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def advise(self, asked: Workload) -> Advice | None:
        if asked.family not in self.seconds:
            return None
        decisions = kernel_of(asked, AVX2).space(AVX2, asked).default()
        if asked.family == WINOGRAD:
            decisions = {**decisions, "frames_tile": 1, "space_tile": 3, "columns": 2}
        return Advice(asked, decisions, f"tuned {asked.family}", self.seconds[asked.family])


def choice(log: Told | None, wanted: str = "auto", work: Workload | None = None):
    work = work or workload()
    conv = settled_direct(Layer.of(work), AVX2).kernel
    return direct_or_winograd(conv, "direct's", work, AVX2, wanted, log)


def test_measurements_of_both_choose_between_direct_and_winograd():
    predicted = choice(None)
    assert isinstance(predicted.kernel, WinogradConv)
    assert predicted.origin == ""
    slow = choice(Told(conv3d_gather=0.01, conv3d_winograd=0.02))
    assert isinstance(slow.kernel, GatherConv)
    assert slow.origin == "direct's"
    assert "20 ms measured, direct 10 ms" in slow.reason
    fast = choice(Told(conv3d_gather=0.02, conv3d_winograd=0.01))
    assert fast.kernel.plan.m == (1, 3, 3)
    assert fast.kernel.plan.columns == 2
    assert fast.origin == "tuned conv3d_winograd"
    close = choice(Told(conv3d_gather=0.0100, conv3d_winograd=0.0102))
    assert isinstance(close.kernel, WinogradConv)  # as the model has it: the two were not measured in turns


def test_a_winograd_record_alone_sets_its_sizes_and_changes_no_choice():
    tuned = choice(Told(conv3d_winograd=0.01))
    assert tuned.kernel.plan.m == (1, 3, 3)
    assert tuned.origin == "tuned conv3d_winograd"
    direct = choice(Told(conv3d_winograd=0.01), "direct")
    assert isinstance(direct.kernel, GatherConv)
    assert direct.origin == "direct's"
    strided = Workload(Window(1, (4, 8, 8), (2, 4, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1)), 8, 8)
    assert isinstance(choice(Told(conv3d_winograd=0.01), work=strided).kernel, GatherConv)


@pytest.mark.parametrize("wrong", [{"space_tile": 7}, {"columns": 0}, {"mr": 16, "vectors": 4}])
def test_winograd_records_that_cannot_be_built_are_not_followed(wrong):
    class Wrong(Told):
        def advise(self, asked: Workload) -> Advice | None:
            advice = super().advise(asked)
            return advice and replace(advice, decisions={**advice.decisions, **wrong})

    chosen = choice(Wrong(conv3d_winograd=0.01))
    assert chosen.origin == ""
    assert chosen.kernel == choice(None).kernel


@pytest.mark.parametrize("lists", [(), ("in_frames", "out_frames", "out_channels")])
def test_the_winograd_space_holds_the_default_kernel(lists):
    work = workload(lists=lists, family=WINOGRAD)
    kernel = kernel_of(work, AVX2)
    space = kernel.space(AVX2, work)
    assert space.allows(space.default())
    assert space.size > 20
    chosen, wanted = kernel.sized(space.default()), best(kernel, AVX2, work.threads)
    assert (chosen.plan, chosen.name) == (wanted.plan, wanted.name)
    for part in space.parts():
        assert space.allows(space.normal({name: values[-1] for name, values in part.items()}))


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
    path.write_bytes(record().line() + record(seconds=0.001).line().replace(b'"mr": 4', b'"mr": "four"'))
    log = Log.read(path)
    best = log.best(load_target("host").fingerprint)
    assert [found.seconds for found in best.values()] == [0.01]
    assert log.problems[0][0] == 2


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


def test_builds_follow_the_logs_without_being_asked(tmp_path, own_logs):
    """The record names a tile that no default would be; the manifest tells it, and what was built is that tile."""
    network = torch.nn.Conv3d(16, 16, 3, padding=1).eval()
    example = torch.zeros(1, 16, 4, 14, 14)
    options = Options(threads=2, conv="direct")
    plain = build_network(network, tmp_path / "plain", example_inputs=(example,), options=options, check=False)
    assert plain.artifact.manifest.layers[0].tuned == ""
    append(own_logs / log_path(load_target("host")).name, [record(workload(16))])
    tuned = build_network(network, tmp_path / "tuned", example_inputs=(example,), options=options, check=True)
    layer = tuned.artifact.manifest.layers[0]
    assert layer.tuned.startswith("tuned 20")
    assert "on local, 2.00x the defaults" in layer.tuned
    assert f"mr4_nr{2 * load_target('host').vector.floats}" in layer.kernel
    assert layer.kernel != plain.artifact.manifest.layers[0].kernel
    assert tuned.artifact.manifest.check.status == "passed"


SHIPPED = sorted(path for family in FAMILIES for path in places.SHIPPED.glob(f"*.{family}.jsonl"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_logs_that_ship_are_whole_and_made_for_their_target(path):
    log = Log.read(path)
    found = list(log.records())
    assert found
    assert not log.problems
    for each in found:
        assert each.status == "verified"
        assert each.steady
        assert path.name == f"{each.target}.{each.shape.family}.jsonl"
        assert each.seconds <= each.default_seconds
        assert (each.unit == "seconds") == ("emulated" not in each.origin)


def test_a_log_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DanceError, match="cannot be written"):
        append(tmp_path / "file" / "log.jsonl", [record()])


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
    assert [found.seconds for found in best.values()] == [0.1999999]


def test_fields_in_another_order_are_still_read_by_merge():
    shuffled = json.dumps(dict(reversed(list(record().model_dump().items())))).encode()
    assert parse_loosely(shuffled).seconds == 0.01
    assert parse_loosely(b"{}").startswith("it is of another kind")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", "0"], "--trials must be at least 1"),
        (["--time-limit", "0"], "--time-limit must be above 0"),
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


class Counting:
    """A server that executes 100,000 instructions a call, and besides them what it is doing anyway."""

    def __init__(self, besides: list[int]) -> None:
        self.executed, self.besides = 0, itertools.cycle(besides)

    def read(self) -> int:
        return self.executed

    def times(self, _kernel: str, _arguments: list[object], repeats: int) -> list[float]:
        self.executed += 100_000 * (1 + repeats) + next(self.besides)
        return [0.0] * repeats


@pytest.mark.parametrize(("call", "number"), [(3e-6, 67), (3e-4, 1)], ids=["short", "long"])
def test_short_calls_are_timed_as_means_of_many(call, number):
    numbers = []

    def time_evaluator(_function: str, _device: object, number: int, repeat: int) -> object:
        numbers.append(number)
        return lambda *_tensors: SimpleNamespace(results=[call] * repeat)

    library = TvmLibrary.__new__(TvmLibrary)
    library._call, library._device = (lambda _what, run: run()), None
    library._module = SimpleNamespace(time_evaluator=time_evaluator)
    assert library.times("conv", [], 3, LEAST_SECONDS) == [call] * 3
    assert numbers == [1, number]
    library.times("conv", [], 3)
    assert numbers[2:] == [1]


def test_the_instructions_of_a_call_are_told_from_what_the_server_does_besides():
    def counted(besides: list[int]) -> list[float]:
        session = CountedSession.__new__(CountedSession)
        session.name, session.counter = "phone", Counting(besides)
        return Loaded(None, session, session.counter, []).measure()

    assert counted([700]) == [100_000]
    (found,) = counted([0, 900, 300, 2000, 100, 1500, 50])
    assert found == pytest.approx(100_000, rel=0.005)
    with pytest.raises(DanceError, match="phone executes another number of instructions at every call"):
        counted([0, 10**6, 10**8, 10**5, 10**9])


def test_a_device_on_which_instructions_are_counted_has_no_threads_that_wait_for_work(monkeypatch):
    """They would spin, which is counted as well: more the busier the machine is."""
    started: dict[str, object] = {}
    connection = Mock()
    session = SimpleNamespace(pin=lambda *_: pytest.fail("pinning starts the pool of threads"))
    monkeypatch.setattr("dance_tvm.device.emulator.start", lambda _stack, **options: started.update(options) or 9)
    monkeypatch.setattr(Farm, "_connect", lambda farm, _limit: ("phone", connection, farm._places[0].counter))
    monkeypatch.setattr(farm, "_session", lambda *_: session)
    with Farm(["emulator"]) as devices, devices.session(threads=4) as opened:
        assert opened is session
    assert started["environment"] == {"TVM_NUM_THREADS": "1"}


def test_a_layer_that_cannot_be_verified_is_left_to_another_run(monkeypatch):
    tuner = Tuner.__new__(Tuner)
    heard: list[str] = []
    tuner.stopped, tuner.on_event = False, heard.append
    tuner.tasks = [SimpleNamespace(best_decisions=TILE, layer=SimpleNamespace(title=name)) for name in ("a", "b")]

    def verify(task: SimpleNamespace) -> None:
        if task is tuner.tasks[0]:
            raise DanceError("phone executes another number of instructions at every call")
        heard.append("b is verified")

    monkeypatch.setattr(tuner, "_is_verified", lambda _task: False)
    monkeypatch.setattr(tuner, "_verify_task", verify)
    tuner._verify()
    said = "phone executes another number of instructions at every call"
    assert heard == [f"a: {said}; to be verified by another run", "b is verified"]
    assert tuner.tasks[0].unverified == said
