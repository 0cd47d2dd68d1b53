"""The tuner on a farm of real servers behind a real tracker."""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from test_tuning import workload
from torch import nn

from dance_tvm.core.errors import DanceError
from dance_tvm.device import emulator, processes
from dance_tvm.device.tracker import tracker_summary
from dance_tvm.lowering.machine import machine_of
from dance_tvm.lowering.registry import kernel_of
from dance_tvm.machines.target import load_target
from dance_tvm.records.advice import tuned_tiles
from dance_tvm.records.kernel_log import Log, log_path
from dance_tvm.schedules.cpu.choice import FAMILIES
from dance_tvm.schedules.cpu.direct_spaces import GatherSpace
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.workload import KERNEL_GROUPS, LISTS, POOL, TRANSPOSED, WINOGRAD, Workload
from dance_tvm.tuning import search
from dance_tvm.tuning.farm import Farm
from dance_tvm.tuning.instances import Instance, Loaded, build_instance, interleaved
from dance_tvm.tuning.tasks import Plan
from dance_tvm.tuning.tuner import Tuner
from dance_tvm.tuning.workloads import Tunable

TRIALS = 3
HOST = load_target("host")
LAYER = Tunable(workload(16), ["conv"])
pytestmark = pytest.mark.usefixtures("small_generations")


def registered(tracker: int, count: int) -> None:
    """Wait until the tracker knows so many servers."""
    deadline = time.monotonic() + 60
    while len(tracker_summary("127.0.0.1", tracker)["server_info"]) < count and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.fixture
def farm(tmp_path):
    """A tracker and two servers of one key."""
    tracker, port = processes.start_tracker()
    servers = [processes.start_server("board", ("127.0.0.1", port), tmp_path / f"store{n}")[0] for n in range(2)]
    registered(port, 2)
    yield port, servers
    for process in [*servers, tracker]:
        process.stop()


def test_a_device_killed_in_the_middle_is_dropped_and_the_run_ends_well(farm, tmp_path, monkeypatch):
    monkeypatch.setattr("dance_tvm.tuning.tuner.DISTURBED", math.inf)  # other tests run beside this one
    monkeypatch.setattr("dance_tvm.records.kernel_log.MOST_SPREAD", math.inf)
    port, servers = farm
    heard: list[str] = []

    def kill_one(sentence: str) -> None:
        heard.append(sentence)
        servers[0].stop()

    with Farm([f"tracker://127.0.0.1:{port}/board"], trial_timeout=20, wait=30) as devices:
        assert devices.lanes == 2
        tuner = Tuner(HOST, machine_of(HOST), [LAYER], devices, Plan(TRIALS), tmp_path, kill_one)
        tuner.run()
    assert heard
    assert not tuner.lost
    assert tuner.tasks[0].after > 0
    log = Log.read(log_path(HOST, folder=tmp_path))
    assert sum(1 for _ in log.records(statuses=["trial"])) >= TRIALS - 1
    assert tuned_tiles(HOST, tmp_path).advise(workload(16)).origin.startswith("tuned")
    with Farm([f"tracker://127.0.0.1:{port}/board"], trial_timeout=20, wait=30) as devices:
        again = Tuner(HOST, machine_of(HOST), [LAYER], devices, Plan(TRIALS), tmp_path)
        assert again.tasks[0].trials == tuner.tasks[0].trials  # goes on where it stood
        again.run()
    assert again.made <= 1


@pytest.mark.device
@pytest.mark.slow
def test_two_emulated_devices_tune_a_small_network_though_one_dies(tmp_path, monkeypatch):
    if reason := emulator.why_no_emulator():
        pytest.skip(f"no emulated device: {reason}")
    monkeypatch.setattr("dance_tvm.tuning.farm.CONNECT_TIMEOUT_S", emulator.START_TIMEOUT_S)
    python = emulator.python_command(emulator.prepare(lambda _sentence: None))
    phone = load_target("snapdragon")
    layers = [Tunable(replace(workload(channels), threads=1), [f"conv{channels}"]) for channels in (4, 8)]
    with contextlib.ExitStack() as stack:
        tracker, port = processes.start_tracker(emulator.START_TIMEOUT_S)
        stack.callback(tracker.stop)
        servers = []
        for number in range(2):
            store, where = tmp_path / f"store{number}", ("127.0.0.1", port)
            server, _ = processes.start_server("arm", where, store, python, emulator.START_TIMEOUT_S)
            stack.callback(server.stop)
            servers.append(server)
        registered(port, 2)
        spec = f"tracker://127.0.0.1:{port}/arm"
        with Farm([spec], trial_timeout=300, wait=300) as devices:
            assert devices.lanes == 2
            tuner = Tuner(
                phone, machine_of(phone), layers, devices, Plan(2), tmp_path, lambda _sentence: servers[0].stop()
            )
            tuner.run()
    assert not tuner.lost
    assert all(0 < task.best < math.inf for task in tuner.tasks)
    assert [task.layer.names for task in tuner.tasks] == [["conv4"], ["conv8"]]


def test_a_tracker_killed_and_restarted_is_found_again(tmp_path):
    tracker, port = processes.start_tracker()
    server, _ = processes.start_server("board", ("127.0.0.1", port), tmp_path / "store")
    trackers = [tracker]

    def restart(_sentence: str) -> None:
        if len(trackers) == 1:
            trackers[0].stop()
            trackers.append(processes.start_tracker(port=port)[0])

    try:
        with Farm([f"tracker://127.0.0.1:{port}/board"], trial_timeout=20, wait=60) as devices:
            tuner = Tuner(HOST, machine_of(HOST), [LAYER], devices, Plan(TRIALS), tmp_path, restart)
            tuner.run()
        assert len(trackers) == 2
        assert not tuner.lost
        assert tuner.made >= TRIALS - 1
        assert 0 < tuner.tasks[0].best < math.inf
    finally:
        for process in [server, *trackers]:
            process.stop()


def running(server: int) -> list[psutil.Process]:
    """The server's sessions; those that have ended are reaped when the next one begins."""
    return [child for child in psutil.Process(server).children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_trial_that_hangs_is_ended_on_the_device_too(tmp_path):
    kernel, machine = kernel_of(LAYER.workload, machine_of(HOST)), machine_of(HOST)
    instance = Instance(LAYER.workload, kernel.sized(kernel.space(machine, LAYER.workload).default()))
    build_instance(instance, HOST, tmp_path / "trial.so")
    server, port = processes.start_server(store=tmp_path / "store")
    try:
        with Farm([f"rpc://127.0.0.1:{port}"], trial_timeout=3, wait=10) as devices:
            begin = time.monotonic()
            with pytest.raises(DanceError), devices.session(1) as session:
                Loaded.on(session, instance, tmp_path / "trial.so").times(1_000_000_000)
            assert time.monotonic() - begin < 20
            deadline = time.monotonic() + 20
            while running(server.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not running(server.pid)
            with devices.session(1) as session:
                assert Loaded.on(session, instance, tmp_path / "trial.so").measure()
    finally:
        server.stop()


def thinned(family: str) -> Workload:
    """A small layer that every list thins which its family knows."""
    if family == POOL:
        window = Window(2, (4, 14, 14), (2, 7, 7), (2, 2, 2), (2, 2, 2))
        return Workload(window, 40, 40, 40, LISTS[:2], threads=2, density=0.5, family=POOL, pooling="max")
    if family == TRANSPOSED:
        window = Window(1, (4, 7, 7), (8, 14, 14), (2, 2, 2))
        return Workload(window, 24, 24, threads=2, family=TRANSPOSED, spread=(2, 2, 2))
    lists = ("in_frames", "out_frames", "in_channels", "out_channels")
    work = workload(24, lists=lists, density=0.5)
    return work.grouped((16, 4), 0.4) if family == KERNEL_GROUPS else replace(work, family=family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tile_of_a_thinned_layer_runs_and_tells_the_same(tmp_path, family):
    work = thinned(family)
    kernel = kernel_of(work, machine_of(HOST))
    space = kernel.space(machine_of(HOST), work)
    ends = [space.normal({name: values[end] for name, values in space.parts()[-1].items()}) for end in (-1, 0)]
    other = next(decisions for decisions in ends if decisions != space.default())
    instances = [Instance(work, kernel.sized(decisions)) for decisions in (space.default(), other)]
    assert instances[0] != instances[1]
    for number, instance in enumerate(instances):
        build_instance(instance, HOST, tmp_path / f"{number}.so")
    with Farm(["local"], trial_timeout=60) as devices, devices.session(2) as session:
        loaded = [Loaded.on(session, each, tmp_path / f"{n}.so") for n, each in enumerate(instances)]
        digests = {each.digest() for each in loaded}
        assert all(min(times) > 0 for times in interleaved(loaded, rounds=2))
    assert digests == {None} if family == WINOGRAD else len(digests) == 1 and None not in digests


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("network") / "one.pt2"
    layer = nn.Conv3d(16, 32, 3, padding=1).eval()
    torch.export.save(torch.export.export(layer, (torch.randn(1, 16, 4, 14, 14),)), path)
    return path


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_ends_within_seconds_and_the_next_run_goes_on(tmp_path, network, signals):
    command = [sys.executable, "-m", "dance_tvm", "tune", "--model", str(network), "--conv", "direct"]
    command += ["--logs", str(tmp_path), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tuning:
        while " trial" not in tuning.stderr.readline():
            assert tuning.poll() is None
        begin = time.monotonic()
        for _ in range(signals):
            tuning.send_signal(signal.SIGINT)
            time.sleep(0.3)
        said, errors = tuning.communicate(timeout=60)
        assert time.monotonic() - begin < 10  # about 2 s, with room for a busy machine
    assert "Traceback" not in errors
    if signals == 1:
        assert tuning.returncode == 130, errors
        assert "interrupted: run again to continue" in said
        assert "trials in flight are given up" in errors
    log = Log.read(log_path(HOST, folder=tmp_path))
    assert sum(1 for _ in log.records(statuses=["trial"])) > 0
    assert not log.problems


def test_the_search_learns_with_either_cost_model(monkeypatch):
    """What is best is found: the fewer rows of a tile, the faster, says the one who measures."""
    space = GatherSpace(machine_of(HOST), LAYER.workload)
    for missing in (False, True):
        if missing:
            monkeypatch.setattr(search, "find_spec", lambda _name: None)
        model, name = search.new_cost_model()
        assert name.startswith("plain" if missing else "xgboost")
        assert not missing or "pip install xgboost-cpu" in name
        asked = search.LayerSearch(space, HOST.tvm_target(2), model, 8)
        asked.tell([(space.default(), 1.0)])
        seen = []
        for _ in range(3):
            found = asked.propose()
            assert found
            assert all(space.allows(decisions) for decisions in found)
            seen += [tuple(decisions.values()) for decisions in found]
            asked.tell([(decisions, 1e-3 * decisions["mr"]) for decisions in found])
        assert len(set(seen)) == len(seen)


def test_a_key_that_the_tracker_lacks_is_told_with_those_it_has(farm, monkeypatch):
    monkeypatch.setattr("dance_tvm.tuning.farm.CONNECT_TIMEOUT_S", 1)
    with pytest.raises(DanceError, match="no device 'phone': it has board"):
        Farm([f"tracker://127.0.0.1:{farm[0]}/phone"]).__enter__()
    with pytest.raises(DanceError, match="no tracker answers"):
        Farm(["tracker://127.0.0.1:1/board"]).__enter__()


def test_a_run_that_is_stopped_while_its_devices_are_silent_ends(tmp_path):
    """Neither what a device has yet to answer nor what a worker has yet to build holds up a run that is stopped."""
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never greets
    with Farm([f"rpc://127.0.0.1:{silent.getsockname()[1]}"], 60) as farm:
        tuner = Tuner(HOST, machine_of(HOST), [LAYER], farm, Plan(trials=2), tmp_path)
        threading.Timer(1, lambda: setattr(tuner, "stopped", True)).start()
        begin = time.monotonic()
        tuner.run()
        assert time.monotonic() - begin < 15  # a session would wait 20 s, a trial 60
    log = Log.read(log_path(HOST, folder=tmp_path))
    assert (tuner.made, tuner.lost, list(log.records()), log.problems) == (0, "", [], [])
    silent.close()
