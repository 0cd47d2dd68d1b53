"""Servers die, links crawl, disks fill: every case ends in a result or one clear sentence, within its timeout."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from devices import matmul_artifact, matmul_case

from dance_tvm.core.errors import DanceError
from dance_tvm.device import open_device, processes

SLOW_LINK = 50_000  # bytes a second


@pytest.fixture
def server(tmp_path):
    """A server that the test may kill: its process, its port and its store."""
    process, port = processes.start_server(store=tmp_path / "store")
    yield process, port, tmp_path / "store"
    process.stop()


@pytest.fixture(scope="module")
def big_artifact(tmp_path_factory):
    """1.4 MB of weights: several pieces of upload."""
    return matmul_artifact(tmp_path_factory.mktemp("big") / "big", size=600)


RELAY = """
import os, socket, sys, threading, time
port, speed = int(sys.argv[1]), float(sys.argv[2])
total = 0

def carry(source, sink, up):
    global total
    try:
        while data := source.recv(2048):
            time.sleep(len(data) / speed)
            sink.sendall(data)
            if up:
                total += len(data)
                print(total, flush=True)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
listening = socket.create_server(("127.0.0.1", 0))
print("relay", listening.getsockname()[1], flush=True)
while True:
    client = listening.accept()[0]
    upstream = socket.create_connection(("127.0.0.1", port))
    for pair in ((client, upstream, True), (upstream, client, False)):
        threading.Thread(target=carry, args=pair, daemon=True).start()
"""


@contextlib.contextmanager
def slow_link(port: int, bytes_per_second: float = SLOW_LINK):
    """A port whose traffic to `port` is slowed down; gives the port and how many bytes went up so far.

    It is a process of its own: some of TVM's calls keep Python's global lock while they wait for an answer.
    """
    command = [sys.executable, "-c", RELAY, str(port), str(bytes_per_second)]
    sent = [0]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as relay:

        def count() -> None:
            for line in relay.stdout:
                sent[0] = int(line)

        listening = int(relay.stdout.readline().split()[1])
        counter = threading.Thread(target=count, daemon=True)
        counter.start()
        try:
            yield listening, sent
        finally:
            relay.kill()
            counter.join()


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def later(seconds: float, action) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_killed_during_upload_and_resumed_over_a_slow_link(server, host_artifact):
    process, port, store = server
    size = host_artifact.library.stat().st_size
    with slow_link(port) as (slow, sent), open_device(f"rpc://127.0.0.1:{slow}") as device:
        killer = threading.Thread(target=lambda: (wait_for(lambda: sent[0] > 4000), process.stop()))
        killer.start()
        with pytest.raises(DanceError, match="closed the connection while taking model"):
            device.load(host_artifact)
        killer.join()
    again, port = processes.start_server(store=store)
    try:
        with slow_link(port) as (slow, sent), open_device(f"rpc://127.0.0.1:{slow}") as device:
            begin = time.monotonic()
            network = device.load(host_artifact)
            assert time.monotonic() - begin > 0.8 * size / SLOW_LINK
            assert sent[0] >= size
            np.testing.assert_array_equal(network.run(matmul_case()[0])["y"], matmul_case()[1])
    finally:
        again.stop()


def test_a_link_that_falls_silent_is_given_up(server, big_artifact):
    process, port, _ = server
    with slow_link(port) as (slow, sent), open_device(f"rpc://127.0.0.1:{slow}", call_timeout=2) as device:
        waiter = threading.Thread(target=lambda: (wait_for(lambda: sent[0] > 4000), stop(process)))
        waiter.start()
        with pytest.raises(DanceError, match="gave no sign for 2 s while taking model"):
            device.load(big_artifact)
        waiter.join()
        with pytest.raises(DanceError, match="this session is closed"):
            device.load(big_artifact)


def stop(process) -> None:
    """SIGSTOP for a server and its session."""
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.suspend()


def test_killed_during_a_run_and_between_runs(server, host_artifact):
    process, port, _ = server
    with open_device(f"rpc://127.0.0.1:{port}") as device:
        network = device.load(host_artifact)
        later(0.5, process.stop)
        begin = time.monotonic()
        with pytest.raises(DanceError, match="closed the connection while being timed"):
            network.time(matmul_case()[0], 100_000_000)
        assert time.monotonic() - begin < 15
        with pytest.raises(DanceError, match="closed the connection while taking its inputs"):
            network.run(matmul_case()[0])
    with pytest.raises(DanceError, match="cannot be reached"):
        open_device(f"rpc://127.0.0.1:{port}", timeout=5)


def test_stopped_and_continued_in_time_is_no_failure(server, host_artifact):
    process, port, _ = server
    with open_device(f"rpc://127.0.0.1:{port}") as device:
        network = device.load(host_artifact)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.suspend()
        later(1.0, lambda: [member.resume() for member in family])
        begin = time.monotonic()
        np.testing.assert_array_equal(network.run(matmul_case()[0])["y"], matmul_case()[1])
        assert time.monotonic() - begin > 0.8


def test_a_tracker_killed_and_restarted(host_artifact):
    tracker, port = processes.start_tracker()
    server, _ = processes.start_server("board", ("127.0.0.1", port))
    spec = f"tracker://127.0.0.1:{port}/board"
    try:
        with open_device(spec, timeout=30) as device:
            network = device.load(host_artifact)
            tracker.stop()
            np.testing.assert_array_equal(network.run(matmul_case()[0])["y"], matmul_case()[1])
        with pytest.raises(DanceError, match="no tracker answers"):
            open_device(spec, timeout=1)
        tracker, _ = processes.start_tracker(port=port)
        with open_device(spec, timeout=60) as device:
            np.testing.assert_array_equal(device.load(host_artifact).run(matmul_case()[0])["y"], matmul_case()[1])
    finally:
        server.stop()
        tracker.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_device_without_space(tmp_path, host_artifact, big_artifact, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        process, port = processes.start_server(store=disk / "store")
        try:
            with open_device(f"rpc://127.0.0.1:{port}") as device:
                with pytest.raises(DanceError, match=r"has no space left for model\.so \(1\.[0-9] MB\)"):
                    device.load(big_artifact)
                monkeypatch.setattr(type(device), "_require_space", lambda *_: None)
                with pytest.raises(DanceError, match="has no space left for model"):  # told by the disk itself
                    device.load(big_artifact)
            shutil.rmtree(disk / "store")
            (disk / "store").mkdir()
            with open_device(f"rpc://127.0.0.1:{port}") as device:
                np.testing.assert_array_equal(device.load(host_artifact).run(matmul_case()[0])["y"], matmul_case()[1])
        finally:
            process.stop()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_many_short_sessions_leave_nothing(tmp_path, host_artifact):
    scratch, store = tmp_path / "scratch", tmp_path / "store"
    scratch.mkdir()
    process, port = processes.start_server(store=store, environment={"TMPDIR": str(scratch)})
    try:
        use_and_count(process, port, store, scratch, host_artifact, 200)
    finally:
        process.stop()


def use_and_count(process, port, store, scratch, artifact, sessions):
    """So many sessions one after the other; nothing of ours or of the server's may have grown."""
    inputs, expected = matmul_case()

    def session() -> None:
        with open_device(f"rpc://127.0.0.1:{port}") as device:
            np.testing.assert_array_equal(device.load(artifact).run(inputs)["y"], expected)

    us, them = psutil.Process(), psutil.Process(process.pid)

    def memory(one: psutil.Process) -> int:
        """Bytes that it wrote itself: pages of files come and go with what the system reclaims."""
        gc.collect()
        lines = (line.split() for line in Path(f"/proc/{one.pid}/status").read_text().splitlines())
        return next(int(line[1]) << 10 for line in lines if line[0] == "RssAnon:")

    for _ in range(20):  # what is loaded and cached once
        session()
    wait_for(lambda: not them.children() and them.num_fds() < 6)
    before = us.num_fds(), us.num_threads(), them.num_fds()
    left = set(os.listdir(scratch))
    for _ in range(3):  # a leak grows every time, what an allocator keeps of a busy process does not
        held = memory(us), memory(them)
        for _ in range(sessions):
            session()
        wait_for(lambda: not them.children() and them.num_fds() <= before[2])
        grown = memory(us) - held[0], memory(them) - held[1]
        if max(grown) < 2 << 20:
            break
    assert max(grown) < 2 << 20
    assert (us.num_fds(), them.num_fds()) <= (before[0], before[2])
    assert us.num_threads() <= before[1] + 1  # a timer that is just ending
    assert not them.children()
    assert len(list(store.iterdir())) == 1
    assert not set(os.listdir(scratch)) - left


def test_two_benches_take_turns(host_artifact, tmp_path):
    tracker, port = processes.start_tracker()
    server, _ = processes.start_server("board", ("127.0.0.1", port))
    command = [sys.executable, "-m", "dance_tvm.bench", str(host_artifact.path), "--json", "--seconds", "0.5"]
    command += ["--device", f"tracker://127.0.0.1:{port}/board", "--timeout", "120"]
    try:
        benches = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
        for bench in benches:
            told, errors = bench.communicate(timeout=200)
            assert bench.returncode == 0, errors.decode()
            assert json.loads(told)["devices"][0]["measured"][0]["latency"]["runs"] >= 20
    finally:
        server.stop()
        tracker.stop()


def test_ctrl_c_in_the_middle_of_a_bench_leaves_the_device_free(server, host_artifact):
    process, port, _ = server
    command = [sys.executable, "-m", "dance_tvm.bench", str(host_artifact.path), "--seconds", "600"]
    command += ["--device", f"rpc://127.0.0.1:{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        while "measuring in turns" not in bench.stderr.readline():
            assert bench.poll() is None
        bench.send_signal(signal.SIGINT)
        errors = bench.communicate(timeout=60)[1]
    assert bench.returncode == 130
    assert "Traceback" not in errors
    with open_device(f"rpc://127.0.0.1:{port}", timeout=10) as device:
        np.testing.assert_array_equal(device.load(host_artifact).run(matmul_case()[0])["y"], matmul_case()[1])
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.Process(process.pid).children()
