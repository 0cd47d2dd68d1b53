"""python -m tests.fuzz: try random programs, reduce and print what fails.

python -m tests.fuzz --minutes 30              # new seeds, for so long
python -m tests.fuzz --seed 1000 --count 200   # seeds 1000 to 1199
python -m tests.fuzz --replay 1042             # one seed, reduced and printed if it fails
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .generate import generate
from .program import Program
from .reduce import reduce
from .runner import TIMEOUT_S, Worker
from .script import script
from .trial import Verdict


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="the first seed; the clock's unless given")
    parser.add_argument("--count", type=int, help="how many seeds")
    parser.add_argument("--minutes", type=float, help="how long")
    parser.add_argument("--replay", help="this seed or this script alone")
    parser.add_argument("--log", type=Path, help="a line of JSON for each program is appended here")
    parser.add_argument("--findings", type=Path, help="a folder for the scripts that repeat what failed")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for a program")
    parser.add_argument("--no-reduce", action="store_true", help="print failing programs as they are")
    options = parser.parse_args()
    return Run(options).over(_programs(options))


def _programs(options: argparse.Namespace) -> Iterator[Program]:
    if options.replay is not None and options.replay.endswith(".py"):
        yield Program.from_json(Path(options.replay).read_text("utf-8").splitlines()[-1].lstrip("# "))
    elif options.replay is not None:
        yield generate(int(options.replay))
    else:
        first = int(time.time()) if options.seed is None else options.seed
        yield from map(generate, range(first, first + (options.count or (1 << 30 if options.minutes else 100))))


class Run:
    """Tries programs, each different one once, and keeps count."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.kinds: Counter[str] = Counter()
        self.seen = _seen(options.log)
        self.worker = Worker(options.timeout)

    def over(self, programs: Iterator[Program]) -> int:
        """0 if nothing failed, else 1."""
        end = time.monotonic() + 60 * self.options.minutes if self.options.minutes else float("inf")
        try:
            for program in programs:
                if time.monotonic() > end:
                    break
                self._try(program)
        except KeyboardInterrupt:
            pass
        finally:
            self.worker.close()
        print(f"{self.kinds.total()} different programs: " + ", ".join(f"{n} {kind}" for kind, n in self.kinds.items()))
        return int(any(Verdict(kind).is_fault for kind in self.kinds))

    def _try(self, program: Program) -> None:
        if program.digest in self.seen:
            return
        self.seen.add(program.digest)
        verdict, seconds = self.worker(program)
        self.kinds[verdict.kind] += 1
        self._log(program, verdict, seconds)
        if verdict.is_fault:
            self._report(program, verdict)

    def _log(self, program: Program, verdict: Verdict, seconds: float) -> None:
        if self.options.log is None:
            return
        told: dict[str, Any] = {"seed": program.seed, "digest": program.digest, **verdict.to_dict(), "seconds": seconds}
        told["steps"] = [step.name for step in program.steps]
        told["options"] = program.options
        with self.options.log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(told) + "\n")

    def _report(self, program: Program, verdict: Verdict) -> None:
        smallest, last = (program, verdict) if self.options.no_reduce else reduce(program, verdict, self.worker)
        text = script(smallest, last)
        print(f"seed {program.seed}: {verdict.kind}: {verdict.told}\n\n{text}\n", flush=True)
        if self.options.findings is not None:
            self.options.findings.mkdir(parents=True, exist_ok=True)
            (self.options.findings / f"{verdict.kind.replace(' ', '-')}-{program.seed}.py").write_text(text, "utf-8")


def _seen(log: Path | None) -> set[str]:
    if log is None or not log.exists():
        return set()
    return {json.loads(line)["digest"] for line in log.read_text("utf-8").splitlines()}


if __name__ == "__main__":
    sys.exit(main())
