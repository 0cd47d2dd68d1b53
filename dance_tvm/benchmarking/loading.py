"""How long an artifact takes to be ready: from its files to the first answer, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from dance_tvm.benchmarking.results import Loading
from dance_tvm.core.errors import DanceError

_TIMEOUT_S = 600
_SCRIPT = """
import json, sys, time
from dance_tvm.artifact.folder import load_artifact
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import open_device
import dance_tvm.device.local
path = sys.argv[1]
start = time.perf_counter()
artifact = load_artifact(path)
verified = time.perf_counter()
with open_device("local") as device:
    network = device.load(artifact)
    loaded = time.perf_counter()
    inputs = random_inputs(artifact.manifest.inputs)
    begin = time.perf_counter()
    network.run(inputs)
    end = time.perf_counter()
print(json.dumps([verified - start, loaded - verified, end - begin]))
"""


def measure_loading(path: Path) -> list[Loading]:
    """Cold, with the files out of the system's cache as far as it lets them go, then warm.

    TVM and Python are there already; they are no part of the seconds. Raises DanceError where the process fails.
    """
    found = []
    for cold in (True, False):
        if cold:
            evict(path)
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(path)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise DanceError(f"{path} could not be loaded in a process of its own: {said}")
        verify, load, first = json.loads(done.stdout.splitlines()[-1])
        found.append(Loading(cold=cold, verify=verify, load=load, first_run=first))
    return found


def evict(path: Path) -> None:
    """Ask the system to drop a folder's files from its cache; those that a process has mapped stay."""
    for file in path.iterdir():
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
