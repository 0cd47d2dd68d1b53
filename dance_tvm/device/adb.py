"""Phones on a cable: push files, forward ports, start a server, read sensors, through the `adb` program."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dance_tvm.core.errors import DanceError
from dance_tvm.device.server_connection import TOKEN
from dance_tvm.device.server_program import NAME

COMMAND_TIMEOUT_S = 60
PUSH_TIMEOUT_S = 600
FOLDER = "/data/local/tmp/dance_tvm"
TVM_SERVER = "tvm_rpc"
_LAST_BYTES = 4096

# One shell command that prints `name value` a line; what cannot be read prints nothing.
_SENSORS = (
    "for c in /sys/devices/system/cpu/cpu[0-9]*; do n=${c##*/};"
    " f=$c/cpufreq/scaling_cur_freq; [ -r $f ] && echo khz $n $(cat $f);"
    " f=$c/cpufreq/cpuinfo_max_freq; [ -r $f ] && echo max_khz $n $(cat $f);"
    " f=$c/cpufreq/scaling_governor; [ -r $f ] && echo governor $n $(cat $f); done;"
    " for z in /sys/class/thermal/thermal_zone*; do"
    " [ -r $z/temp ] && echo millidegrees $(cat $z/type) $(cat $z/temp); done;"
    " b=/sys/class/power_supply/battery; [ -r $b/current_now ] &&"
    " echo battery power $(cat $b/current_now) $(cat $b/voltage_now); true"
)


@dataclass(frozen=True)
class PhoneServer:
    """A server as it runs on a phone, and what it has printed."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def last_words(self) -> str:
        """The last line that the server printed."""
        size = self.said.seek(0, os.SEEK_END)
        self.said.seek(max(0, size - _LAST_BYTES))
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.poll()}"


class Adb:
    """One phone. The program is `adb`, or what the variable ADB names."""

    def __init__(self, serial: str | None = None) -> None:
        program = os.environ.get("ADB", "adb")
        if shutil.which(program) is None:
            raise DanceError(f"there is no {program}: install it with `apt-get install adb`")
        self._program = program
        self.serial = serial or ""
        self.serial = self._choose(serial)

    def shell(self, command: str, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """What a shell command on the phone prints. Raises DanceError where it fails."""
        return self._run(["shell", command], timeout)

    def push(self, local: Path, remote: str) -> None:
        """Copy a file or folder onto the phone."""
        self._run(["push", str(local), remote], PUSH_TIMEOUT_S)

    def sensors(self) -> dict[str, dict[str, Any]]:
        """Clocks, governors, temperatures, and the battery's power in milliwatts, as far as the phone lets us read."""
        found: dict[str, dict[str, Any]] = {
            "khz": {},
            "max_khz": {},
            "governor": {},
            "millidegrees": {},
            "milliwatts": {},
        }
        for line in self.shell(_SENSORS).splitlines():
            words = line.split()
            if len(words) == 4 and words[0] == "battery":  # microampere and microvolt
                found["milliwatts"]["battery total"] = abs(int(words[2])) * int(words[3]) * 1e-9
            elif len(words) == 3 and words[0] == "governor":
                found["governor"][words[1]] = words[2]
            elif len(words) == 3 and words[0] in found and words[2].lstrip("-").isdigit():
                found[words[0]][words[1]] = int(words[2])
        return found

    @contextlib.contextmanager
    def server(self, folder: Path, key: str, tracker_port: int, port: int) -> Iterator[PhoneServer]:
        """Push `folder`, start its `dance_server` or `tvm_rpc` and register it with our tracker; undone at the end.

        The phone's server listens on its own 127.0.0.1, reached only through the cable.
        """
        program = next((name for name in (NAME, TVM_SERVER) if (folder / name).is_file()), None)
        if program is None:
            raise DanceError(f"{folder} holds no {NAME}, which `dance-tvm device server` writes, and no {TVM_SERVER}")
        self.shell(f"mkdir -p {FOLDER}")
        for path in sorted(folder.iterdir()):
            self.push(path, f"{FOLDER}/{path.name}")
        self.shell(f"chmod 755 {FOLDER}/{program}")
        self._run(["reverse", f"tcp:{tracker_port}", f"tcp:{tracker_port}"])
        self._run(["forward", f"tcp:{port}", f"tcp:{port}"])
        command = _start(program, key, tracker_port, port)
        # What it prints goes to a file: an unread pipe fills up, and the server would wait for ever.
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                self._command(["shell", command]), stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
            )
            try:
                yield PhoneServer(process, said)
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                for undo in (
                    ["shell", f"pkill {program}"],
                    ["forward", "--remove", f"tcp:{port}"],
                    ["reverse", "--remove", f"tcp:{tracker_port}"],
                ):
                    with contextlib.suppress(DanceError):
                        self._run(undo)

    def _choose(self, serial: str | None) -> str:
        lines = [line.split() for line in self._run(["devices"], plain=True).splitlines()[1:] if line.strip()]
        states = {words[0]: words[1] for words in lines if len(words) >= 2}
        if serial is None and len(states) > 1:
            raise DanceError(f"{len(states)} phones are connected: choose one with --serial ({', '.join(states)})")
        chosen = serial or next(iter(states), "")
        if chosen not in states:
            raise DanceError(f"no phone {chosen!r} is connected" if chosen else "no phone is connected: plug one in")
        if states[chosen] == "unauthorized":
            raise DanceError(f"phone {chosen} does not trust this machine: accept its key on the phone's screen")
        if states[chosen] != "device":
            raise DanceError(f"phone {chosen} is {states[chosen]}: unlock it, or plug it in again")
        return chosen

    def _command(self, words: list[str], plain: bool = False) -> list[str]:
        return [self._program, *([] if plain else ["-s", self.serial]), *words]

    def _run(self, words: list[str], timeout: float = COMMAND_TIMEOUT_S, plain: bool = False) -> str:
        try:
            done = subprocess.run(
                self._command(words, plain), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise DanceError(f"adb {words[0]} did not end within {timeout:.0f} s: is the phone still there?") from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise DanceError(f"adb {words[0]} failed: {said[-1] if said else f'exit code {done.returncode}'}")
        return done.stdout


def _start(program: str, key: str, tracker_port: int, port: int) -> str:
    """The phone's command that starts the server and registers it with the tracker at its own end of the cable."""
    if program == TVM_SERVER:
        return (
            f"cd {FOLDER} && LD_LIBRARY_PATH={FOLDER} ./{program} server --host=127.0.0.1 --port={port} "
            f"--port-end={port + 1} --tracker=127.0.0.1:{tracker_port} --key={key} --custom-addr=127.0.0.1"
        )
    token = os.environ.get(TOKEN, "")
    secret = f"{TOKEN}={shlex.quote(token)} " if token else ""
    return (
        f"cd {FOLDER} && {secret}./{program} --port {port} --tracker 127.0.0.1:{tracker_port} --key {shlex.quote(key)} "
        f"--custom-addr 127.0.0.1"
    )
