"""Child processes that announce a port and end with us: on success, on failure, on Ctrl-C, and when we are killed."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from dance_tvm.core.errors import DanceError

STOP_TIMEOUT_S = 10
#: What a device's server says before its port.
DEVICE_READY = "dance-tvm device ready on port "
#: By these a user sets how many threads TVM's pool has.
THREADS_BY_ENVIRONMENT = {"TVM_NUM_THREADS", "OMP_NUM_THREADS"}


def _inherited() -> dict[str, str]:
    """This process's environment without its own share of the cores: a device's threads are pinned by its session.

    TVM's pool aborts the process when it is asked for more threads than the environment allowed at the start.
    """
    return {key: value for key, value in os.environ.items() if key not in THREADS_BY_ENVIRONMENT}


class PortProcess:
    """A server in a process of its own that prints one line, `<ready><port>`, when it listens.

    Its standard input is a pipe of ours; the server ends when that pipe closes, which the kernel does when we die.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**_inherited(), **(environment or {})},
            # A session of its own: Ctrl-C in the terminal reaches only us, and we end it in order.
            start_new_session=True,
        )
        self.pid = self._process.pid

    def wait_ready(self, ready: str, timeout: float) -> int:
        """The port, once announced. Raises DanceError if the process ends before, or says nothing in `timeout` s."""
        deadline = time.monotonic() + timeout
        line = b""
        with selectors.DefaultSelector() as waiting:
            assert self._process.stdout is not None
            output = self._process.stdout.fileno()
            waiting.register(output, selectors.EVENT_READ)
            while b"\n" not in line:
                if not waiting.select(max(0, deadline - time.monotonic())):
                    raise DanceError(f"{self.name} did not start within {timeout:.0f} s{self._last_words()}")
                chunk = os.read(output, 4096)
                if not chunk:
                    raise DanceError(f"{self.name} ended while starting{self._last_words()}")
                line += chunk
        text = line.decode(errors="replace").strip()
        if not text.startswith(ready):
            raise DanceError(f"{self.name} said {text!r} instead of its port")
        return int(text.removeprefix(ready))

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the process and all that it started, and wait until they are gone."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.pid)
            family = [*top.children(recursive=True), top] if self.running else []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        psutil.wait_procs(family, STOP_TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def said(self) -> str:
        """All that it wrote to its standard error so far."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def _last_words(self) -> str:
        lines = self.said().strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def start_tracker(timeout: float = 60, port: int = 0) -> tuple[PortProcess, int]:
    """TVM's RPC tracker on `port` of 127.0.0.1, by default a free one."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("serve_tracker.py")), "--end-with-stdin"]
    process = PortProcess("the RPC tracker", [*command, "--port", str(port)])
    return process, _ready(process, "dance-tvm tracker ready on port ", timeout)


def start_server(
    key: str = "",
    tracker: tuple[str, int] | None = None,
    store: Path | None = None,
    python: Sequence[str] = (),
    timeout: float = 60,
    environment: Mapping[str, str] | None = None,
) -> tuple[PortProcess, int]:
    """The device server on a free port of 127.0.0.1; `python` is the command of the interpreter that runs it."""
    command = [*(python or [sys.executable]), "-P", str(Path(__file__).with_name("serve.py")), "--end-with-stdin"]
    if tracker:
        command += ["--tracker", f"{tracker[0]}:{tracker[1]}", "--key", key]
    if store:
        command += ["--store", str(store)]
    process = PortProcess("the device server", command, environment)
    return process, _ready(process, DEVICE_READY, timeout)


def _ready(process: PortProcess, ready: str, timeout: float) -> int:
    try:
        return process.wait_ready(ready, timeout)
    except BaseException:
        process.stop()
        raise
