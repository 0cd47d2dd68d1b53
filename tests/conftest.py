"""Fixtures shared by the tests: small artifacts, servers, and the one emulated device of a session."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# A shell without job control starts what runs in the background deaf to Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of our own."""
    parser.addoption("--refresh-golden", action="store_true", help="write the files of tests/golden anew")


@dataclass(frozen=True)
class Server:
    """A device server with its tracker."""

    pid: int
    port: int
    tracker_port: int
    key: str

    @property
    def rpc(self) -> str:
        return f"rpc://127.0.0.1:{self.port}"

    @property
    def tracker(self) -> str:
        return f"tracker://127.0.0.1:{self.tracker_port}/{self.key}"


@pytest.fixture(scope="session", autouse=True)
def kernels_of_this_session(tmp_path_factory) -> Iterator[None]:
    """What one test compiled, the others take, in all processes of the session; the user's cache stays out of it."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setenv("DANCE_TVM_KERNELS", str(folder / "kernels"))
        yield


@pytest.fixture(scope="session", autouse=True)
def operators_listed_once() -> Iterator[None]:
    """PyTorch fetches all operators of C++ for each of its namespaces at every export, which takes 0.1 s."""
    from torch._export import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))
        yield


@pytest.fixture
def own_logs(tmp_path, monkeypatch) -> Path:
    """The empty folder of tuning logs of a project that is worked in, with none in the package."""
    from dance_tvm.records import places

    folder = tmp_path / places.IN_PROJECT
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "SHIPPED", folder)
    return folder


@pytest.fixture
def small_generations(monkeypatch) -> None:
    """The search for tiles proposes the best of a few candidates, in place of hundreds."""
    from dance_tvm.tuning import search

    monkeypatch.setattr(search, "POPULATION", 16)
    monkeypatch.setattr(search, "GENERATIONS", 1)


@pytest.fixture(scope="session")
def host_artifact(tmp_path_factory):
    """A small network for this machine, its weights inside the library."""
    from devices import matmul_artifact

    return matmul_artifact(tmp_path_factory.mktemp("artifact") / "matmul")


@pytest.fixture(scope="session")
def weighty_artifact(tmp_path_factory):
    """A small network for this machine, its weights in a file of their own."""
    from devices import matmul_artifact

    return matmul_artifact(tmp_path_factory.mktemp("artifact") / "weighty", separate_weights=True)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Iterator[Server]:
    """A tracker with one emulated aarch64 device, for the whole session; skips with the reason if there is none."""
    from dance_tvm.core.errors import DanceError
    from dance_tvm.device import emulator as device

    if reason := device.why_no_emulator():
        pytest.skip(f"no emulated device: {reason}")
    with contextlib.ExitStack() as stack:
        try:
            port = device.start(stack, tmp_path_factory.mktemp("emulator") / "store")
        except DanceError as error:
            if "cannot be fetched" not in str(error):
                raise
            pytest.skip(f"no emulated device: {error}")
        yield Server(0, 0, port, device.KEY)
