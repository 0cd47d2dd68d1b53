"""Run the cases of a suite in child processes that live long, die alone and are given only so much time."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

Status = Literal["right", "refused", "wrong", "traceback", "crash", "timeout", "skipped"]
STATUSES: tuple[Status, ...] = ("right", "refused", "wrong", "traceback", "crash", "timeout", "skipped")

# A process that has built many networks is given up for a fresh one: LLVM and TVM keep memory.
CASES_OF_A_PROCESS = 100


class SkippedError(Exception):
    """The case is none: the suite's own tools do not take it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: its operator, how it ended, and the sentence, difference or exception it ended with."""

    case: str
    operator: str
    status: Status
    message: str = ""
    seconds: float = 0.0


# A suite's module offers this as ``attempt``: it raises DanceError for a refusal, AssertionError for wrong numbers.
Attempt = Callable[[str, Path, bool], None]


def run_suite(
    suite: str,
    cases: Sequence[tuple[str, str]],
    *,
    build: bool = True,
    processes: int = 1,
    timeout: float = 120,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run ``cases``, pairs of a case and its operator, of the module ``suite``; ``build`` False stops at the import.

    ``told`` hears of each case as it ends.
    """
    queue, done = list(enumerate(cases))[::-1], {}
    started = time.monotonic()

    def work(_number: int) -> None:
        child: _Child | None = None
        while queue:
            with contextlib.suppress(IndexError):
                index, (case, operator) = queue.pop()
                if child is None or child.cases >= CASES_OF_A_PROCESS:
                    child = _replaced(child, suite)
                since = time.monotonic()
                status, message = child.run(case, build, timeout)
                if status in ("crash", "timeout"):
                    child = _replaced(child, suite)
                done[index] = Outcome(case, operator, status, message, round(time.monotonic() - since, 2))
                _report(done[index], len(done), len(cases), time.monotonic() - started)
                told(done[index])
        if child is not None:
            child.end()

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(work, range(processes)))
    return [done[index] for index in sorted(done)]


def _report(outcome: Outcome, count: int, total: int, seconds: float) -> None:
    if outcome.status not in ("right", "skipped") or count % 100 == 0 or count == total:
        print(
            f"[{count}/{total} {seconds:.0f} s] {outcome.status:9} {outcome.case}: {outcome.message[:300]}", flush=True
        )


class _Child:
    """A process that runs one case after another."""

    def __init__(self, suite: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, suite), daemon=True)
        self._process.start()
        theirs.close()
        self.cases = 0

    def run(self, case: str, build: bool, timeout: float) -> tuple[Status, str]:
        self.cases += 1
        try:
            # The first case waits for the imports too.
            self._connection.send((case, build))
            if not self._connection.poll(timeout + (120 if self.cases == 1 else 0)):
                return "timeout", f"not done after {timeout:g} s"
            return self._connection.recv()
        except (EOFError, ConnectionError, BrokenPipeError):
            self._process.join(10)
            return "crash", f"the process ended with code {self._process.exitcode}"

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()


def _replaced(child: _Child | None, suite: str) -> _Child:
    if child is not None:
        child.end()
    return _Child(suite)


def ended(work: Callable[[], None]) -> tuple[Status, str]:
    """How ``work`` ended, with the sentence of what it raised."""
    from dance_tvm.core.errors import DanceError

    try:
        work()
    except DanceError as problem:
        return "refused", str(problem)
    except SkippedError as problem:
        return "skipped", str(problem)
    except AssertionError as problem:
        return "wrong", str(problem)
    except Exception as problem:
        return "traceback", f"{type(problem).__name__}: {problem}"[:1000]
    return "right", ""


def _serve(connection: Connection, suite: str) -> None:
    os.nice(10)
    attempt: Attempt = import_module(suite).attempt
    while True:
        try:
            case, build = connection.recv()
        except EOFError:
            return

        def work(case: str = case, build: bool = build) -> None:
            with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
                attempt(case, Path(folder), build)

        connection.send(ended(work))


def require_equal(found: Any, wanted: Any, relative: float, absolute: float) -> None:
    """Raise AssertionError where shapes, dtypes, places of NaN and infinity, or values differ."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape, f"shape {found.shape} in place of {wanted.shape}"
    assert found.dtype == wanted.dtype, f"dtype {found.dtype} in place of {wanted.dtype}"
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    close = np.isclose(a, b, rtol=relative, atol=absolute, equal_nan=True)
    if not close.all():
        place = tuple(int(i) for i in np.argwhere(~close)[0])
        raise AssertionError(f"{(~close).sum()} of {close.size} values differ: {a[place]} for {b[place]} at {place}")


def outputs(model: Any, arrays: Sequence[np.ndarray], folder: Path, shapes: Any = None) -> list[np.ndarray]:
    """What ``model``, built for this machine, answers to ``arrays``, in the order of its inputs."""
    from dance_tvm import build_network, open_device

    built = build_network(model, folder / "artifact", target="host", threads=1, shapes=shapes)
    names = [spec.name for spec in built.artifact.manifest.inputs]
    with open_device("local") as device:
        return list(device.load(built.artifact).run(dict(zip(names, arrays, strict=True))).values())


def suite_options(text: str | None) -> argparse.ArgumentParser:
    """What both suites' commands take."""
    options = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="a regular expression for cases, or for OpInfo's operators")
    options.add_argument("--import-only", action="store_true", help="stop after the import and its check")
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--timeout", type=float, default=120, help="seconds for one case")
    options.add_argument("--out", type=Path)
    options.add_argument("--log", type=Path, help="a line for each case as it ends; cases that it holds are not run")
    return options


def run_command(
    suite: str, title: str, cases: Sequence[tuple[str, str]], chosen: argparse.Namespace, packages: Sequence[str]
) -> int:
    """Run ``cases`` as ``chosen`` says, print how many ended how, and write the results."""
    build, processes, timeout = not chosen.import_only, chosen.processes, chosen.timeout
    known = logged(chosen.log) if chosen.log else {}

    def told(outcome: Outcome) -> None:
        if chosen.log:
            with chosen.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")

    left = [case for case in cases if case[0] not in known]
    outcomes = [known[case] for case, _ in cases if case in known]
    outcomes += run_suite(suite, left, build=build, processes=processes, timeout=timeout, told=told)
    print(summary(outcomes))
    if chosen.out:
        write_results(chosen.out, title, outcomes, packages)
    return 0


def logged(path: Path) -> dict[str, Outcome]:
    """What a run that was broken off said of its cases."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {outcome.case: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many cases ended in each way."""
    return {status: sum(outcome.status == status for outcome in outcomes) for status in STATUSES}


def write_results(path: Path, suite: str, outcomes: Sequence[Outcome], packages: Sequence[str]) -> None:
    """Every case with its end, sorted, so that two runs can be compared line by line."""
    cases = [
        {key: value for key, value in asdict(outcome).items() if key != "seconds" and value}
        for outcome in sorted(outcomes, key=lambda outcome: outcome.case)
    ]
    facts = {"suite": suite, "versions": {name: version(name) for name in packages}, "summary": summary(outcomes)}
    lines = ",\n".join(f"  {json.dumps(case)}" for case in cases)
    head = json.dumps(facts, indent=1)[:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "cases": [\n{lines}\n ]\n}}\n', encoding="utf-8")
