"""`dance-tvm device`: real trackers and servers, and a phone played by a script."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from dance_tvm import devices
from dance_tvm.core.errors import DanceError
from dance_tvm.device import adb, open_device, processes

# Plays a phone: logs what it is told, prints sensors, and keeps "the server" running until it is ended.
FAKE_ADB = """#!{python}
import sys, time, pathlib
words = sys.argv[1:]
log = pathlib.Path({log!r})
with log.open("a") as stream:
    print(" ".join(words), file=stream)
if words == ["devices"]:
    print("List of devices attached")
    print(pathlib.Path({state!r}).read_text(), end="")
elif "shell" in words and ("tvm_rpc server" in words[-1] or "./dance_server" in words[-1]):
    for number in range(20000):  # more than a pipe holds
        print("bind to 127.0.0.1, try", number, flush=number == 0)
    print("the phone's memory is full", flush=True)
    pathlib.Path({log!r}).with_name("printed").touch()
    time.sleep(600)
elif "shell" in words and "scaling_cur_freq" in words[-1]:
    print("khz cpu0 1800000\\nmax_khz cpu0 1800000\\ngovernor cpu0 schedutil\\nkhz cpu7 2995200\\nmax_khz cpu7 2995200")
    print("millidegrees cpu-0-0 41000\\nmillidegrees strange zone 1\\nbattery power -450000 4100000")
elif "push" in words and words[-1].endswith("refused"):
    print("adb: error: failed to copy: No space left on device", file=sys.stderr)
    sys.exit(1)
"""


@pytest.fixture
def phone(tmp_path, monkeypatch):
    """The phone's log and the file that says which phones are connected."""
    log, state, program = tmp_path / "log", tmp_path / "state", tmp_path / "adb"
    state.write_text("R3CT\tdevice\n")
    program.write_text(FAKE_ADB.format(python=sys.executable, log=str(log), state=str(state)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("ADB", str(program))
    return log, state


def test_sensors_of_a_phone(phone):
    sensors = adb.Adb().sensors()
    assert sensors["khz"] == {"cpu0": 1800000, "cpu7": 2995200}
    assert sensors["governor"] == {"cpu0": "schedutil"}
    assert sensors["millidegrees"] == {"cpu-0-0": 41000}
    assert sensors["milliwatts"]["battery total"] == pytest.approx(1845.0)


def test_the_server_is_pushed_started_and_undone(phone, tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "tvm_rpc").write_text("program")
    (folder / "libtvm_runtime.so").write_text("library")
    with adb.Adb("R3CT").server(folder, "galaxy", 9190, 9090) as server:
        deadline = time.monotonic() + 20
        while "tvm_rpc server" not in phone[0].read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.process.poll() is None
        while not phone[0].with_name("printed").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.last_words() == "the phone's memory is full"
    assert not psutil.pid_exists(server.process.pid)
    said = phone[0].read_text().splitlines()
    assert said[2:5] == [
        f"-s R3CT push {folder}/libtvm_runtime.so {adb.FOLDER}/libtvm_runtime.so",
        f"-s R3CT push {folder}/tvm_rpc {adb.FOLDER}/tvm_rpc",
        f"-s R3CT shell chmod 755 {adb.FOLDER}/tvm_rpc",
    ]
    assert said[5:7] == ["-s R3CT reverse tcp:9190 tcp:9190", "-s R3CT forward tcp:9090 tcp:9090"]
    assert "--tracker=127.0.0.1:9190 --key=galaxy" in said[7]
    assert said[-3:] == [
        "-s R3CT shell pkill tvm_rpc",
        "-s R3CT forward --remove tcp:9090",
        "-s R3CT reverse --remove tcp:9190",
    ]


def test_phones_that_cannot_be_used(phone, tmp_path, monkeypatch):
    _, state = phone
    for text, message in [
        ("", "no phone is connected"),
        ("A\tdevice\nB\tdevice\n", "2 phones are connected: choose one with --serial"),
        ("A\tunauthorized\n", "accept its key"),
        ("A\toffline\n", "phone A is offline"),
    ]:
        state.write_text(text)
        with pytest.raises(DanceError, match=message):
            adb.Adb()
    state.write_text("A\tdevice\n")
    with pytest.raises(DanceError, match="No space left on device"):
        adb.Adb().push(tmp_path / "x", "refused")
    with pytest.raises(DanceError, match="holds no dance_server"), adb.Adb().server(tmp_path, "k", 1, 2):
        pass
    monkeypatch.setenv("ADB", "no-such-adb")
    with pytest.raises(DanceError, match="apt-get install adb"):
        adb.Adb()


def test_list_and_watch_real_servers():
    tracker, port = processes.start_tracker()
    address = f"127.0.0.1:{port}"
    server = None
    try:
        assert json.loads(run("list", "--tracker", address, "--json")) == {"servers": [], "waiting": {}}
        none = f"the tracker at {address} has no devices: `dance-tvm device phone` brings one (docs/devices.md)\n"
        assert run("list", "--tracker", address) == run("watch", "--tracker", address, "--times", "1") == none
        server, _ = processes.start_server("board", ("127.0.0.1", port))
        deadline = time.monotonic() + 20
        servers = devices.look(address)[0]
        while [item.state for item in servers] != ["free"] and time.monotonic() < deadline:  # it registers in two steps
            time.sleep(0.1)
            servers = devices.look(address)[0]
        assert [(item.key, item.state) for item in servers] == [("board", "free")]
        assert "x86_64" in devices.look(address, probe=True)[0][0].health
        with open_device(f"tracker://{address}/board"):
            assert devices.look(address)[0][0].state == "busy"
            assert "busy" in run("watch", "--tracker", address, "--times", "1")
        deadline = time.monotonic() + 20
        while devices.look(address)[0][0].state != "free" and time.monotonic() < deadline:
            time.sleep(0.1)
        psutil.Process(server.pid).suspend()
        found = devices.look(address, probe=True)[0][0]
        assert found.state == "lost"
        assert "accepted no session" in found.health
    finally:
        if server:
            server.stop()
        tracker.stop()
    assert "no tracker answers" in run("watch", "--tracker", address, "--times", "1")
    with pytest.raises(DanceError, match="no tracker answers at"):
        devices.look(address)
    with pytest.raises(DanceError, match="HOST:PORT"):
        devices.look("nonsense")
    with pytest.raises(DanceError, match="HOST:PORT"):
        CliRunner().invoke(devices.app, ["watch", "--tracker", "nonsense"], catch_exceptions=False)


@pytest.mark.parametrize("server", ["device.serve", "devices tracker"])
def test_a_port_that_is_taken_is_one_sentence(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        more = ["--store", str(tmp_path)] if server == "device.serve" else []
        line = [sys.executable, "-m", *f"dance_tvm.{server}".split(), "--port", port, *more]
        done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("choose another --port")
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_watch_quietly():
    command = [sys.executable, "-m", "dance_tvm.devices", "watch", "--tracker", "127.0.0.1:1", "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path.home()) as process:
        process.stdout.readline()
        process.send_signal(2)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def run(*words: str) -> str:
    result = CliRunner().invoke(devices.app, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_server_of_ours_is_started_with_its_token(phone, tmp_path, monkeypatch):
    monkeypatch.setenv("DANCE_TVM_TOKEN", "a secret")
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "dance_server").write_text("program")
    with adb.Adb("R3CT").server(tmp_path / "server", "galaxy", 9190, 9090):
        deadline = time.monotonic() + 20
        while "./dance_server" not in phone[0].read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
    said = phone[0].read_text()
    assert "DANCE_TVM_TOKEN='a secret' ./dance_server --port 9090 --tracker 127.0.0.1:9190 --key galaxy" in said
    assert "shell pkill dance_server" in said
