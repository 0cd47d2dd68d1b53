"""Ten devices behind one tracker, as docs/farm.md has them: all at once, watched, and one that dies in the middle."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time

import numpy as np
import pytest
from devices import emulated, matmul_artifact, matmul_case
from test_tuning import workload
from test_tuning_farm import registered

from dance_tvm import devices
from dance_tvm.core.errors import DanceError
from dance_tvm.device import emulator, holds, open_device, processes
from dance_tvm.device.server_program import build_server
from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import load_target
from dance_tvm.tuning.farm import Farm
from dance_tvm.tuning.tasks import Plan
from dance_tvm.tuning.tuner import Tuner
from dance_tvm.tuning.workloads import Tunable

COUNT = 10


@pytest.fixture
def ten(tmp_path, monkeypatch):
    """A tracker with ten servers of one key: they are processes here, whose code is that of the emulated ones."""
    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path / "cache"))
    with behind_a_tracker(lambda tracker, store: processes.start_server("phone", tracker, store), tmp_path) as found:
        yield found


@contextlib.contextmanager
def behind_a_tracker(start, folder):
    """A tracker's port, and ten servers that it knows by address; ``start`` gives a server and its port."""
    with contextlib.ExitStack() as stack:
        tracker, port = processes.start_tracker()
        stack.callback(tracker.stop)
        servers = {}
        for number in range(COUNT):
            server, at = start(("127.0.0.1", port), folder / f"store{number}")
            stack.callback(server.stop)
            servers[f"127.0.0.1:{at}"] = server
        registered(port, COUNT)
        yield port, servers


def use_all_while_one_dies(port, servers, artifact, inputs, expected):
    """Ten sessions at once, watched; one server is killed and nine give the answer. Those that are left."""
    spec, address = f"tracker://127.0.0.1:{port}/phone", f"127.0.0.1:{port}"
    all_there, one_died = threading.Barrier(COUNT + 1), threading.Event()
    right: list[int] = []
    failures: list[str] = []

    def use(seed: int) -> None:
        try:
            with open_device(spec, timeout=60) as device:
                network = device.load(artifact)
                all_there.wait(timeout=60)
                one_died.wait(timeout=60)
                np.testing.assert_array_equal(network.run(inputs)["y"], expected)
                right.append(seed)
        except DanceError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(COUNT)]
    for thread in threads:
        thread.start()
    all_there.wait(timeout=60)
    seen = devices.look(address)[0]
    assert [(server.state, server.runs) for server in seen] == [("busy", "dance-tvm bench artifacts/net")] * COUNT
    with pytest.raises(DanceError, match=f"all {COUNT} are busy"):
        open_device(spec, timeout=0.5)
    servers[seen[3].address].stop()
    one_died.set()
    for thread in threads:
        thread.join(timeout=60)
    assert len(right) == COUNT - 1
    (failure,) = failures
    assert re.search("closed the connection while .*: its server or network died", failure)
    deadline = time.monotonic() + 20
    while [server.state for server in seen] != ["free"] * (COUNT - 1) and time.monotonic() < deadline:
        time.sleep(0.1)
        seen = devices.look(address)[0]
    assert [(server.state, server.runs) for server in seen] == [("free", "")] * (COUNT - 1)
    return seen


def test_ten_devices_at_once_are_watched_and_tuned_on_though_one_dies(ten, host_artifact, tmp_path, monkeypatch):
    port, servers = ten
    monkeypatch.setattr("sys.argv", ["/usr/bin/dance-tvm", "bench", "artifacts/net"])
    seen = use_all_while_one_dies(port, servers, host_artifact, *matmul_case())

    # Tuning takes all that are left, and goes on when another one dies.
    monkeypatch.setattr("dance_tvm.tuning.tuner.DISTURBED", math.inf)  # other tests run beside this one
    host, dying = load_target("host"), servers[seen[0].address]
    with Farm([f"tracker://127.0.0.1:{port}/phone"], trial_timeout=60, wait=60) as farm:
        assert farm.lanes == COUNT - 1
        layer = Tunable(workload(16), ["conv"])
        tuner = Tuner(host, machine_of(host), [layer], farm, Plan(COUNT), tmp_path, lambda _sentence: dying.stop())
        tuner.run()
        assert not tuner.lost
        assert len([name for name, health in farm.health.items() if health.done]) > 1
    assert 0 < tuner.tasks[0].best < math.inf


@pytest.mark.device
def test_ten_emulated_phones_at_once_though_one_dies(tmp_path, monkeypatch):
    """dance_server for Android ten times under emulation, behind one tracker, each with code for the phone."""
    if reason := emulator.why_no_emulator():
        pytest.skip(f"no emulated device: {reason}")
    command = emulated(build_server(load_target("snapdragon"), tmp_path / "phone"))
    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["/usr/bin/dance-tvm", "bench", "artifacts/net"])

    def start(tracker, store):
        options = ["--tracker", f"{tracker[0]}:{tracker[1]}", "--key", "phone", "--store", str(store)]
        server = processes.PortProcess("dance_server", [*command, *options, "--end-with-stdin"])
        return server, server.wait_ready("dance-tvm device ready on port ", 60)

    artifact = matmul_artifact(tmp_path / "matmul", "snapdragon")
    with behind_a_tracker(start, tmp_path) as (port, servers):
        use_all_while_one_dies(port, servers, artifact, *matmul_case())
        with open_device(f"tracker://127.0.0.1:{port}/phone", timeout=60) as device:
            assert device.facts()["machine"] == "aarch64"


def test_what_a_killed_command_held_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path))
    note = holds.hold("phone.lan", 9090)
    assert "phone.lan:9090" in holds.held()
    monkeypatch.setattr(holds, "_lives", lambda _running: False)
    assert not holds.held()
    assert not note.exists()
    holds.release(note)
    (tmp_path / holds.FOLDER / "torn.json").write_text("{")
    assert not holds.held()
    monkeypatch.setenv("DANCE_TVM_CACHE", "/proc/nowhere")
    assert holds.hold("phone.lan", 9090) is None
    assert holds.held() == {}
