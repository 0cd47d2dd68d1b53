"""`dance_server`: the same answers as here without TVM on the device, and whatever a client or a network does wrong."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from devices import emulated, matmul_artifact, matmul_case, video_artifact
from test_tuning import workload

from dance_tvm import devices
from dance_tvm.artifact.staging import MANIFEST
from dance_tvm.core.errors import DanceError
from dance_tvm.core.hashing import file_sha256
from dance_tvm.device import open_device, processes
from dance_tvm.device import served as sessions
from dance_tvm.device.remote import Connection
from dance_tvm.device.server_connection import TOKEN, Operation
from dance_tvm.device.server_program import build_server
from dance_tvm.lowering.machine import machine_of
from dance_tvm.lowering.registry import kernel_of
from dance_tvm.machines.target import load_target
from dance_tvm.records.advice import tuned_tiles
from dance_tvm.tuning.farm import Farm, server_of
from dance_tvm.tuning.instances import Instance
from dance_tvm.tuning.libraries import require_processor
from dance_tvm.tuning.tasks import Plan
from dance_tvm.tuning.trials import build_trial, open_trial
from dance_tvm.tuning.tuner import Tuner
from dance_tvm.tuning.workloads import Tunable

HOST = load_target("host")
MACHINE = machine_of(HOST)
READY = "dance-tvm device ready on port "


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_server(load_target("host"), tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def clip_network(tmp_path_factory):
    """Two convolutions, the second of which walks lists of a mask."""
    return video_artifact(tmp_path_factory.mktemp("artifact") / "video", size=8)


@pytest.fixture(scope="module")
def weights_apart(tmp_path_factory):
    return matmul_artifact(tmp_path_factory.mktemp("artifact") / "apart", separate_weights=True)


@pytest.fixture
def start(program, tmp_path):
    """Starts servers: give options, have (process, port)."""
    running = []

    def started(*options, command=None, environment=None):
        words = [*(command or [str(program)]), "--store", str(tmp_path / "store"), "--end-with-stdin", *options]
        process = processes.PortProcess("dance_server", words, environment)
        running.append(process)
        return process, process.wait_ready(READY, 60)

    yield started
    for process in running:
        process.stop()


@pytest.fixture
def server(start):
    return f"rpc://127.0.0.1:{start()[1]}"


def clip():
    return {"clip": np.random.default_rng(3).integers(-2, 3, (1, 3, 8, 8, 8)).astype("float32")}


def test_answers_times_and_kernels_are_those_of_this_machine(server, clip_network, weights_apart):
    with open_device("local") as here, open_device(server) as there:
        ours, theirs = here.load(clip_network), there.load(clip_network)
        assert isinstance(there, sessions.ServedSession)
        np.testing.assert_array_equal(theirs.run(clip())["y"], ours.run(clip())["y"])
        assert [each > 0 for each in theirs.time(clip(), 3)] == [True] * 3
        kernels = [theirs.kernels(clip()), ours.kernels(clip())]
        assert all(call.seconds > 0 for call in kernels[0])
        untimed = [[dataclasses.replace(call, seconds=0) for call in calls] for calls in kernels]
        assert untimed[0] == untimed[1]
        assert any(call.work for call in untimed[0])
        assert theirs.peak_memory(clip()) > 1 << 20
        assert there.facts()["machine"] == here.facts()["machine"]
        assert set(there.sensors()) <= set(here.sensors())
        inputs, expected = matmul_case()
        np.testing.assert_array_equal(there.load(weights_apart).run(inputs)["y"], expected)


def test_it_pins_its_threads_and_says_which_cpus_it_lacks(server, clip_network):
    with open_device(server) as device:
        device.pin([0], 1)
        device.load(clip_network).run(clip())
        device.pin(None, None)
        with pytest.raises(DanceError, match="no such CPUs"):
            device.pin([1000], None)
        with pytest.raises(DanceError, match="takes the inputs clip"):
            device.load(clip_network).run({"x": np.zeros(3)})


def test_a_build_for_android_on_another_system_is_told(server, clip_network, monkeypatch):
    with open_device(server) as device:
        ask = device.connection.ask

        def without_libc(what, operation, *rest, **more):
            if operation is Operation.LOAD:
                raise DanceError(f"board failed while {what}: libc.so: cannot open shared object file")
            return ask(what, operation, *rest, **more)

        monkeypatch.setattr(device.connection, "ask", without_libc)
        with pytest.raises(DanceError, match=r"libc.so: cannot open .*built for Android.*--target aarch64-linux"):
            device.load(clip_network)


def test_no_tvm_is_loaded_for_it(server, clip_network):
    words = [f"import sys; sys.argv[1:] = {[str(clip_network.path), '--device', server]!r}"]
    words += ["from dance_tvm import run", "from dance_tvm.core.cli import start"]
    words += ["try: start(run.app, 'run')", "except SystemExit as end: assert not end.code, end.code"]
    words += ["assert 'tvm' not in sys.modules", "assert 'torch' not in sys.modules"]
    done = subprocess.run([sys.executable, "-c", "\n".join(words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tokens(start, monkeypatch, program):
    _, port = start(environment={TOKEN: "a secret of ours"})
    for token, message in [("", "demands a token: set DANCE_TVM_TOKEN"), ("another", "refused: it wants its token")]:
        monkeypatch.setenv(TOKEN, token)
        with pytest.raises(DanceError, match=message):
            open_device(f"rpc://127.0.0.1:{port}")
    monkeypatch.setenv(TOKEN, "a secret of ours")
    open_device(f"rpc://127.0.0.1:{port}").close()
    with socket.create_connection(("127.0.0.1", port)) as stranger:  # no request is heard before the proof
        stranger.sendall(struct.pack("<III", 0x45434E44, 1, 0))
        stranger.recv(44, socket.MSG_WAITALL)
        stranger.sendall(bytes(32) + struct.pack("<IIQ", Operation.FACTS, 0, 0))
        assert b"machine" not in stranger.recv(4096, socket.MSG_WAITALL)
    monkeypatch.delenv(TOKEN)
    open_to_all = subprocess.run([str(program), "--host", "0.0.0.0"], capture_output=True, text=True, timeout=10)
    assert open_to_all.returncode == 2
    assert "set DANCE_TVM_TOKEN" in open_to_all.stderr


def test_nothing_damaged_is_loaded(server, weights_apart, tmp_path):
    def load_again():
        with open_device(server) as device:
            return device.load(weights_apart)

    load_again()
    files = weights_apart.manifest.files
    library, weights = (tmp_path / "store" / files[name].sha256 for name in ("model.so", "weights.safetensors"))
    sound = library.read_bytes()
    library.write_bytes(sound[:-1] + b"!")
    with pytest.raises(DanceError, match=r"model\.so was damaged on this device"):
        load_again()
    load_again()  # it was removed, and comes anew
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    with pytest.raises(DanceError, match="the file of weights is damaged"):
        load_again()
    manifest = (weights_apart.path / MANIFEST).read_bytes().replace(b'"matmul"', b'"natmul"')
    other = tmp_path / "other.json"
    other.write_bytes(manifest)
    digest = bytes.fromhex(file_sha256(other))
    with open_device(server) as device:
        ask = device.connection.ask
        ask("taking", Operation.APPEND, digest, struct.pack("<Q", 0), manifest)
        ask("taking", Operation.FINISH, digest)
        with pytest.raises(DanceError, match="its seal does not fit"):
            ask("loading", Operation.LOAD, digest, struct.pack("<II", 1, 0))
        ask("taking", Operation.APPEND, bytes(32), struct.pack("<Q", 0), b"not the bytes of this hash")
        with pytest.raises(DanceError, match="arrived damaged"):
            ask("taking", Operation.FINISH, bytes(32))
        with pytest.raises(DanceError, match="was not uploaded"):  # code as such is never loaded
            ask("loading", Operation.LOAD, bytes(32), struct.pack("<II", 1, 0))


def test_a_second_client_waits_for_its_turn(server, clip_network):
    first = open_device(server)
    with pytest.raises(DanceError, match=r"accepted no session within 0\.3 s: it is busy"):
        open_device(server, timeout=0.3)
    threading.Timer(0.5, first.close).start()
    with open_device(server, timeout=20) as second:
        second.load(clip_network).run(clip())


def test_a_client_that_goes_in_the_middle_of_a_run_is_noticed(start, clip_network):
    process, port = start()
    gone = open_device(f"rpc://127.0.0.1:{port}", call_timeout=0.3)
    network = gone.load(clip_network)
    with pytest.raises(DanceError, match=r"gave no sign for 0\.3 s while being timed"):
        network.time(clip(), 900_000)
    with open_device(f"rpc://127.0.0.1:{port}", timeout=20) as device:
        device.load(clip_network).run(clip())
        assert len(psutil.Process(process.pid).children()) == 1


@pytest.mark.parametrize("who", ["server", "session"])
def test_a_server_that_dies_in_the_middle_of_a_run(start, clip_network, who):
    process, port = start()
    with open_device(f"rpc://127.0.0.1:{port}", call_timeout=60) as device:
        network = device.load(clip_network)
        (session,) = psutil.Process(process.pid).children()
        threading.Timer(0.3, os.kill, [process.pid if who == "server" else session.pid, signal.SIGKILL]).start()
        with pytest.raises(DanceError, match="closed the connection while being timed"):
            network.time(clip(), 900_000)
        psutil.wait_procs([session], 10)
        assert not session.is_running()
    if who == "session":
        open_device(f"rpc://127.0.0.1:{port}", timeout=20).close()


def test_malformed_requests_end_in_a_sentence(server, clip_network):
    with open_device(server) as device:
        number = device.load(clip_network)._number
    for operation, data, length in [
        (Operation.RUN, struct.pack("<II", number + 7, 0), None),
        (Operation.RUN, struct.pack("<II", 2**32 - 1, 0), 1 << 62),
        (Operation.APPEND, bytes(40), (1 << 64) - 1),
        (Operation.PIN, struct.pack("<I", 2**32 - 1), None),
        (Operation.FINISH, b"short", None),
        (99, b"", None),
        (0, b"", None),
    ]:
        with open_device(server) as device:
            connection = device.connection._socket
            connection.sendall(struct.pack("<IIQ", operation, 0, len(data) if length is None else length) + data)
            status, _, size = struct.unpack("<IIQ", connection.recv(16, socket.MSG_WAITALL))
            assert status == 1
            assert len(connection.recv(size, socket.MSG_WAITALL).decode()) > 10
    with pytest.raises(DanceError, match="before greeting: its server died"):  # what TVM's client hears
        Connection("the phone", "127.0.0.1", int(server.rpartition(":")[2]), "", 20, 20)
    open_device(server).close()


def test_behind_a_tracker(start, clip_network):
    tracker, port = processes.start_tracker()
    try:
        spec = f"tracker://127.0.0.1:{port}/board"
        process, _ = start("--tracker", f"127.0.0.1:{port}", "--key", "board")
        for _ in range(2):  # it offers itself again after a session
            with open_device(spec, timeout=20) as device:
                assert isinstance(device, sessions.ServedSession)
                device.load(clip_network).run(clip())
        deadline = time.monotonic() + 20
        while (found := devices.look(f"127.0.0.1:{port}")[0])[0].state != "free" and time.monotonic() < deadline:
            time.sleep(0.1)
        (found,) = devices.look(f"127.0.0.1:{port}", probe=True)[0]
        assert "x86_64" in found.health
        process.stop()  # and the tracker gives it to nobody any more
        with pytest.raises(DanceError, match="it has no devices at all"):
            open_device(spec, timeout=1)
    finally:
        tracker.stop()


@pytest.mark.parametrize("lists", [(), ("positions", "in_channels")])
def test_trials_give_the_same_as_on_servers_of_tvm(server, tmp_path, lists):
    """Also what a kernel leaves out, which the digest sees as it was filled before."""
    work = workload(24, lists=lists, density=0.5 if lists else 1.0)
    kernel, space = kernel_of(work, MACHINE), kernel_of(work, MACHINE).space(MACHINE, work)
    both = frozenset({"tvm", "dance_server"})
    instance = Instance(work, kernel.sized(space.default()))
    build_trial(instance, HOST, tmp_path / "trial.so", both)
    with Farm(["local", server], trial_timeout=60) as devices:
        digests = {}
        for _ in devices.specs:
            with devices.session(2) as session:
                trial = open_trial(session, instance, tmp_path / "trial.so", "llvm")
                digests[server_of(session)] = trial.digest()
                assert min(trial.times(3)) > 0
        assert devices.servers == both
    assert len(set(digests.values())) == 1
    assert digests.keys() == both


def test_layers_are_tuned_on_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr("dance_tvm.tuning.tuner.DISTURBED", math.inf)  # other tests run beside this one
    monkeypatch.setattr("dance_tvm.records.kernel_log.MOST_SPREAD", math.inf)
    with Farm([server], trial_timeout=60) as devices:
        require_processor(devices, HOST)
        tuner = Tuner(HOST, MACHINE, [Tunable(workload(16), ["conv"])], devices, Plan(2), tmp_path)
        tuner.run()
    assert tuner.tasks[0].after > 0
    assert [health.failed for health in devices.health.values()] == [0]
    assert tuned_tiles(HOST, tmp_path).advise(workload(16)).origin.startswith("tuned")


@pytest.mark.device
def test_an_emulated_phone_needs_no_tvm(start, clip_network, tmp_path):
    from dance_tvm.device import emulator

    if reason := emulator.why_no_emulator():
        pytest.skip(f"no emulated device: {reason}")
    phone = build_server(load_target("snapdragon"), tmp_path / "phone")
    assert b"/system/bin/linker64\0" in phone.read_bytes()
    _, port = start(command=emulated(phone))
    artifact = video_artifact(tmp_path / "video", "snapdragon", size=8)
    with open_device("local") as here, open_device(f"rpc://127.0.0.1:{port}") as there:
        assert there.facts()["machine"] == "aarch64"
        network, expected = there.load(artifact), here.load(clip_network)
        np.testing.assert_array_equal(network.run(clip())["y"], expected.run(clip())["y"])
        work = [[call.work for call in loaded.kernels(clip(), 1)] for loaded in (network, expected)]
        assert work[0] == work[1]
        with pytest.raises(DanceError, match="is built for host"):
            there.load(clip_network)
        with open_device("emulator") as same:
            assert isinstance(same, sessions.ServedSession)
            np.testing.assert_array_equal(same.load(artifact).run(clip())["y"], network.run(clip())["y"])
