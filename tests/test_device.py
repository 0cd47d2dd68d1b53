"""Devices: the same answers everywhere, and one sentence for whatever is wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from devices import CONSTANT, matmul_artifact, matmul_case

from dance_tvm.core.errors import DanceError
from dance_tvm.device import open_device, processes, program
from dance_tvm.device.remote import Connection, RemoteSession
from dance_tvm.device.serve import PROTOCOL, Store


@pytest.fixture(scope="module")
def tracker():
    process, port = processes.start_tracker()
    yield port
    process.stop()


@pytest.fixture(scope="module")
def tracked(tracker):
    """Spec of a device server that is found by the tracker, and by it alone."""
    process, _ = processes.start_server("board", ("127.0.0.1", tracker))
    yield f"tracker://127.0.0.1:{tracker}/board"
    process.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A device server without a tracker: its store and its spec."""
    store = tmp_path_factory.mktemp("store")
    process, port = processes.start_server(store=store)
    yield store, f"rpc://127.0.0.1:{port}"
    process.stop()


@pytest.fixture
def victim(tmp_path):
    """A server without a tracker that a test may kill: (process, spec)."""
    process, port = processes.start_server(store=tmp_path / "store")
    yield process, f"rpc://127.0.0.1:{port}"
    process.stop()


def assert_all_calls_work(device, artifact):
    network = device.load(artifact)
    for seed in range(2):
        inputs, expected = matmul_case(seed)
        np.testing.assert_array_equal(network.run(inputs)["y"], expected)
    seconds = network.time(inputs, 5)
    assert len(seconds) == 5
    assert all(0 < second < 60 for second in seconds)
    kernels = network.kernels(inputs)
    assert sum("matmul" in kernel.symbol for kernel in kernels) == 1
    assert next(kernel.bytes for kernel in kernels if "matmul" in kernel.symbol) >= CONSTANT.nbytes
    peak = network.peak_memory(inputs)
    assert peak is None or peak > 1 << 20
    np.testing.assert_array_equal(network.run(inputs)["y"], expected)


@pytest.mark.parametrize("separate", [False, True])
def test_local(host_artifact, weighty_artifact, separate):
    with open_device("local") as device:
        assert device.facts()["machine"]
        assert_all_calls_work(device, weighty_artifact if separate else host_artifact)


def test_what_was_built_anew_is_loaded_while_the_old_one_still_runs(tmp_path):
    """The dynamic loader knows the file's name already, and would take it for the library of then."""
    with open_device("local") as device:
        answers = []
        for size in (2, 3):
            network = device.load(matmul_artifact(tmp_path / "net", size=size))
            answers.append((network, network.run({"x": np.ones((2, size), "float32")})["y"]))
        assert [float(y[0, 0]) for _, y in answers] == [3.0, 4.0]


def test_a_local_network_has_the_threads_of_its_build_unless_told_otherwise(host_artifact, monkeypatch):
    asked = []
    monkeypatch.setattr(program, "Model", lambda _folder, threads, **_options: asked.append(threads))
    for variable in processes.THREADS_BY_ENVIRONMENT:
        monkeypatch.delenv(variable, raising=False)
    with open_device("local") as device:
        device.load(host_artifact)
        assert asked.pop() == host_artifact.manifest.target.threads
        device.pin(None, 3)
        device.load(host_artifact)
        assert asked.pop() == 3
    monkeypatch.setenv("TVM_NUM_THREADS", "5")
    with open_device("local") as device:
        device.load(host_artifact)
        assert asked.pop() == 5


def test_a_tracked_server_takes_one_session_at_a_time(tracked, host_artifact, weighty_artifact):
    with open_device(tracked) as device:
        assert device.facts()["protocol"] == PROTOCOL
        device.pin([min(os.sched_getaffinity(0))], 1)
        assert_all_calls_work(device, host_artifact)
        assert_all_calls_work(device, weighty_artifact)
        with pytest.raises(DanceError, match="became free within 1 s: all 1 are busy"):
            open_device(tracked, timeout=1)
    with open_device(tracked) as device:  # the device is free again
        np.testing.assert_array_equal(device.load(host_artifact).run(matmul_case()[0])["y"], matmul_case()[1])


@pytest.mark.device
def test_emulated_device(emulator, tmp_path, monkeypatch):
    artifact = matmul_artifact(tmp_path / "linux", "aarch64-linux")
    android = matmul_artifact(tmp_path / "android", "snapdragon", separate_weights=True)
    monkeypatch.setattr("dance_tvm.device.emulated_tvm.start", lambda _stack: emulator.tracker_port)
    with open_device("emulator", behind_tracker=True) as device:
        assert isinstance(device, RemoteSession)
        assert device.facts()["machine"] == "aarch64"
        assert_all_calls_work(device, artifact)
        assert_all_calls_work(device, android)


def test_tvms_own_server(host_artifact, weighty_artifact):
    """Without our helper everything works but what TVM cannot tell."""
    code = (
        "import os, threading, socket; from tvm.rpc import server; s = socket.create_server(('127.0.0.1', 0));"
        "threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start();"
        "print('up', s.getsockname()[1], flush=True); server._listen_loop(s, s.getsockname()[1], '', None, '', None)"
    )
    process = processes.PortProcess("TVM's server", [sys.executable, "-c", code])
    try:
        with open_device(f"rpc://127.0.0.1:{process.wait_ready('up ', 60)}") as device:
            assert device.facts() == {}
            for artifact in (host_artifact, weighty_artifact):
                network = device.load(artifact)
                np.testing.assert_array_equal(network.run(matmul_case()[0])["y"], matmul_case()[1])
                assert len(network.time(matmul_case()[0], 3)) == 3
            assert network.peak_memory(matmul_case()[0]) is None
            with pytest.raises(DanceError, match="no kernel clock"):
                network.kernels(matmul_case()[0])
    finally:
        process.stop()


def test_an_upload_is_sent_once_and_resumed_where_it_was_cut(server, tmp_path):
    store, spec = server
    artifact = matmul_artifact(tmp_path / "big", size=600)  # 1.4 MB: several chunks
    sha256 = artifact.manifest.files["model.so"].sha256
    sent = []

    class Counting(RemoteSession):
        def _store(self, what, path, name, *arguments):
            if name == "append":
                sent.append(len(arguments[-1]))
                if len(sent) == 3:
                    self.connection.close()
            return super()._store(what, path, name, *arguments)

    with open_device(spec) as device:
        device.__class__ = Counting
        with pytest.raises(DanceError, match="session is closed"):
            device.load(artifact)
    assert (store / f"{sha256}.so.part").stat().st_size == sum(sent[:2])
    with open_device(spec) as device:
        device.__class__ = Counting
        device.load(artifact)
    total = artifact.library.stat().st_size
    assert sum(sent) - sent[2] == total
    before = len(sent)
    with open_device(spec) as device:
        device.__class__ = Counting
        device.load(artifact)
    assert len(sent) == before


def test_a_damaged_upload_is_refused_and_forgotten(tmp_path):
    store = Store(tmp_path, limit_bytes=100)
    with pytest.raises(ValueError, match="not a SHA-256"):
        store.path("../../etc/passwd")
    store.append("a" * 64, 0, b"other bytes")
    with pytest.raises(ValueError, match="arrived damaged"):
        store.finish("a" * 64)
    assert store.have("a" * 64, 11) == 0


def test_the_store_forgets_the_oldest(tmp_path):
    import hashlib

    store = Store(tmp_path, limit_bytes=100)
    names = []
    for age, data in enumerate([b"x" * 60, b"y" * 60, b"z" * 30]):
        names.append(hashlib.sha256(data).hexdigest())
        store.append(names[-1], 0, data)
        store.finish(names[-1])
        os.utime(store.path(names[-1]), (age, age))
    assert [Path(store.path(name)).exists() for name in names] == [False, True, True]


def test_a_stopped_server_is_waited_for_and_given_up_in_time(victim, host_artifact):
    process, spec = victim
    with open_device(spec, timeout=30, call_timeout=2) as device:
        network = device.load(host_artifact)
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.suspend()
        start = time.monotonic()
        with pytest.raises(DanceError, match="gave no sign for 2 s while taking its inputs"):
            network.run(matmul_case()[0])
        assert time.monotonic() - start < 6
        with pytest.raises(DanceError, match="accepted no session within 1 s"):
            open_device(spec, timeout=1)
        for member in family:
            member.resume()
    with open_device(spec, timeout=30) as device:
        np.testing.assert_array_equal(device.load(host_artifact).run(matmul_case()[0])["y"], matmul_case()[1])


def test_a_killed_session_is_told_and_the_server_lives_on(victim, host_artifact):
    process, spec = victim
    with open_device(spec) as device:
        network = device.load(host_artifact)
        for child in psutil.Process(process.pid).children():
            child.send_signal(signal.SIGKILL)
        with pytest.raises(DanceError, match="closed the connection"):
            network.run(matmul_case()[0])
    with open_device(spec) as device:
        np.testing.assert_array_equal(device.load(host_artifact).run(matmul_case()[0])["y"], matmul_case()[1])


def test_absent_devices(tracker):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DanceError, match=f"rpc://127.0.0.1:{port} cannot be reached"):
        open_device(f"rpc://127.0.0.1:{port}", timeout=5)
    with pytest.raises(
        DanceError, match=f"the board cannot be reached: nothing listens at 127.0.0.1:{port}; start its"
    ):
        Connection("the board", "127.0.0.1", port, "", 5, 5)  # as `tune` does
    with pytest.raises(DanceError, match=f"no tracker answers at 127.0.0.1:{port} .*device tracker --port {port}"):
        open_device(f"tracker://127.0.0.1:{port}/board", timeout=1)
    with pytest.raises(DanceError, match="has no device 'phone'"):
        open_device(f"tracker://127.0.0.1:{tracker}/phone", timeout=1)
    for wrong in ("telepathy", "rpc://nowhere", "rpc://host:99999", "tracker://127.0.0.1:1"):
        with pytest.raises(DanceError, match="device"):
            open_device(wrong)


def test_an_artifact_for_another_machine_is_refused(server, tmp_path):
    artifact = matmul_artifact(tmp_path / "arm", "aarch64-linux")
    for spec in ("local", server[1]):
        with open_device(spec) as device, pytest.raises(DanceError, match="built for aarch64-linux"):
            device.load(artifact)


def test_inputs_are_checked(host_artifact):
    with open_device("local") as device:
        with pytest.raises(DanceError, match="load takes an artifact or its folder, not a dict"):
            device.load({})
        network = device.load(str(host_artifact.path))
        with pytest.raises(DanceError, match="takes the inputs x, not y"):
            network.run({"y": np.zeros((2, 3), "float32")})
        with pytest.raises(DanceError, match=r"input x must be float32 of shape \(2, 3\), not float64"):
            network.run({"x": np.zeros((2, 3))})
        array = np.zeros((2, 3), "float32")
        for wrong, said in (
            ({"x": array.tolist()}, "input x must be a numpy array, not a list"),
            ({"x": None}, "input x must be a numpy array, not a NoneType"),
            ({"x": np.ma.masked_array(array)}, "input x is a masked array"),
            ({"x": torch.zeros(2, 3)}, r"input x is a PyTorch tensor: give an array, x.detach\(\).cpu\(\).numpy\(\)"),
            (array, "takes a dict of arrays by input name, not a ndarray"),
            ([array], "takes a dict of arrays by input name, not a list"),
        ):
            with pytest.raises(DanceError, match=said):
                network.run(wrong)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_children_end_with_whoever_started_them(end):
    code = (
        "from dance_tvm.device import processes as p; import time;"
        "t, port = p.start_tracker(); print(t.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.send_signal(end)
        parent.wait(30)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


@pytest.mark.device
def test_an_interrupted_bench_on_the_emulated_device_leaves_no_process(emulator, tmp_path):
    artifact = matmul_artifact(tmp_path / "arm", "aarch64-linux")
    words = [
        sys.executable,
        "-m",
        "dance_tvm.bench",
        str(artifact.path),
        "--device",
        "emulator",
        "--seconds",
        "100",
        "-q",
    ]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        parent = psutil.Process(process.pid)
        deadline = time.monotonic() + 120
        while not (qemu := [each for each in parent.children(recursive=True) if "qemu" in each.name()]):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        family = parent.children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert told.strip() == "error: interrupted"
    assert qemu
    assert not psutil.wait_procs(family, timeout=30)[1]


def test_a_server_ends_with_whoever_started_it_in_the_middle_of_a_session(victim, host_artifact):
    process, spec = victim
    with open_device(spec) as device:
        device.load(host_artifact)
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        assert len(family) == 2
        process._process.stdin.close()  # what the kernel does when we die
        assert not psutil.wait_procs(family, timeout=10)[1]
