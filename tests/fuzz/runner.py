"""Workers kept and replaced: a program that crashes or hangs ends its worker, not the run."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .memory import library
from .program import Program
from .trial import Verdict

TIMEOUT_S = 150
_LIMIT_MIB = 3000  # a library that was loaded stays; a worker past this is replaced
_TESTS = Path(__file__).parents[1]


class Worker:
    """One child process that tries programs; started when needed."""

    def __init__(self, timeout: float = TIMEOUT_S) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()

    def __call__(self, program: Program) -> tuple[Verdict, float]:
        """The verdict, and the seconds of processor time that it took."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        self._errors.seek(0)
        self._errors.truncate()
        process.stdin.write(program.to_json() + "\n")
        process.stdin.flush()
        line = self._line(process)
        if line is None:
            self._end()
            return Verdict("timeout", f"no answer within {self._timeout:g} s"), self._timeout
        if not line:
            return self._crash(process), 0.0
        told: dict[str, Any] = json.loads(line)
        seconds, resident = told.pop("seconds"), told.pop("resident_mib")
        if resident > _LIMIT_MIB:
            self._end()
        return Verdict(**told), seconds

    def close(self) -> None:
        self._end()
        self._errors.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            paths = [str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")]
            # TVM's pool takes no more threads than the environment allows at the start.
            environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
            environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "LD_PRELOAD": str(library())}
            environment |= {"TVM_NUM_THREADS": "2", "MKL_NUM_THREADS": "1", "PYTHONUTF8": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
            )
        return self._process

    def _line(self, process: subprocess.Popen[str]) -> str | None:
        """The worker's answer; empty if it ended, None if it says nothing for too long."""
        assert process.stdout is not None
        deadline = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            if not waiting.select(max(0.0, deadline - time.monotonic())):
                return None
            return process.stdout.readline()

    def _crash(self, process: subprocess.Popen[str]) -> Verdict:
        code = process.wait()
        self._end()
        self._errors.seek(0)
        last = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Verdict("crash", f"{name}: {' | '.join(last[:8])}"[:600])

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()
            self._process = None
