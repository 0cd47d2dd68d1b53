"""Several processes and threads at once, strange folders, other users: nothing is lost, closed or taken over."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from devices import matmul_artifact, matmul_case

from dance_tvm.artifact import staging
from dance_tvm.artifact.folder import load_artifact
from dance_tvm.core.errors import DanceError
from dance_tvm.device import open_device, processes, serve
from dance_tvm.records.group_choice import GroupMeasurement
from dance_tvm.records.group_log import read_log, write_log

FORK = multiprocessing.get_context("fork")  # the writers need nothing but files


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_a_session_that_is_given_up_leaves_another_of_the_same_port_alone(host_artifact, tmp_path):
    """A silent server at another address of this machine has the port of a good one: both are connected to at once."""
    server, port = processes.start_server(store=tmp_path / "store")
    inputs, expected = matmul_case(3)
    said: list[str] = []

    def give_up() -> None:
        with pytest.raises(DanceError) as raised:
            open_device(f"rpc://127.0.0.2:{port}", timeout=4)
        said.append(str(raised.value))

    try:
        with socket.create_server(("127.0.0.2", port)):
            waiting = threading.Thread(target=give_up)
            waiting.start()
            time.sleep(0.5)
            with open_device(f"rpc://127.0.0.1:{port}", timeout=30) as device:
                network = device.load(host_artifact)
                waiting.join()
                np.testing.assert_array_equal(network.run(inputs)["y"], expected)
    finally:
        server.stop()
    assert "accepted no session within 4 s" in said[0]


def test_threads_take_turns_with_one_server(host_artifact, tmp_path):
    server, port = processes.start_server(store=tmp_path / "store")
    failures: list[Exception] = []

    def use(seed: int) -> None:
        inputs, expected = matmul_case(seed)
        try:
            with open_device(f"rpc://127.0.0.1:{port}", timeout=60) as device:
                np.testing.assert_array_equal(device.load(host_artifact).run(inputs)["y"], expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.stop()
    assert not failures


# -- the store of a served device -------------------------------------------------------------------------------------


def test_a_store_that_others_may_write_to_is_refused(tmp_path):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    command = [sys.executable, "-P", serve.__file__, "--store", str(open_to_all)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"`chmod go-w {open_to_all}`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user needs root")
@pytest.mark.parametrize("link", [False, True])
def test_a_store_of_another_user_is_refused(tmp_path, link):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    store = tmp_path / "link" if link else theirs
    if link:
        store.symlink_to(theirs)
    os.chown(store, 12345, 12345, follow_symlinks=False)
    with pytest.raises(PermissionError, match="belongs to another user"):
        serve.Store(store, 100)


def test_the_usual_store_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = serve.Store(serve.default_store(), 100)
    assert store.folder == tmp_path / "cache/dance_tvm/store"
    assert store.folder.stat().st_mode & 0o777 == 0o700


# -- logs -------------------------------------------------------------------------------------------------------------


def measurement(number: int) -> GroupMeasurement:
    return GroupMeasurement(
        fingerprint="0" * 16, device="local", threads=number, channels_in=8, channels_out=8, kernel=(1, 1, 1),
        size=(1, 4, 4), scheme="kgs", gm=8, gn=4, rate=2.0, seconds=1.0,
    )  # fmt: skip


def write_measurements(path: Path, first: int) -> None:
    for number in range(first, first + 10):
        write_log(path, [measurement(number)])


def test_processes_that_measure_groups_at_a_time_lose_nothing(tmp_path):
    path = tmp_path / "board.kernel_groups.jsonl"
    writers = [FORK.Process(target=write_measurements, args=(path, 1 + 10 * index)) for index in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(entry.threads for entry in read_log(path)) == list(range(1, 31))


# -- artifacts --------------------------------------------------------------------------------------------------------


def write_and_fail(out: Path, content: str) -> None:
    with staging.staged(out) as folder:
        (folder / "model.so").write_text(content)
        raise InterruptedError


def test_a_place_asked_for_is_not_taken_from_under_another_build(tmp_path):
    """One build asks for `runs/b` and fails while another writes `runs/a`, again and again: both may make `runs`."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            staging.require_writable(tmp_path / "runs" / "b")
            with pytest.raises(InterruptedError):
                write_and_fail(tmp_path / "runs" / "b", "")

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            for number in range(300):
                with pytest.raises(InterruptedError):
                    write_and_fail(tmp_path / "runs" / "a", str(number))
        finally:
            stop.set()
        asking.result()  # raises what was refused there
    assert not list(tmp_path.glob("runs/*"))


def test_an_artifact_goes_where_a_link_leads(tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "linked"
    disk.mkdir()
    link.symlink_to(disk / "network")  # leads to what is yet to be made
    for _ in range(2):
        matmul_artifact(link)
    assert link.is_symlink()
    assert load_artifact(disk / "network").manifest.name == "matmul"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "linked"]
    assert [path.name for path in disk.iterdir()] == ["network"]
