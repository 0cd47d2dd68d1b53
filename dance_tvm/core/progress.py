"""How a long command reports its progress: people on standard error, programs in JSON lines on standard output."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from dance_tvm.core.verbosity import level

JsonLines = Annotated[
    bool, typer.Option("--json-lines", help="Print each step and the result as a line of JSON, as they come.")
]


class Progress:
    """Phases of one command. Each is a line when it is done, with a spinner while it lasts where somebody watches.

    With ``lines`` each event is a JSON object on a line of standard output: ``{"event": "phase", "name": …}`` when a
    phase begins, others as ``tell`` is called. With ``quiet``, or -q, nothing is said.
    """

    def __init__(self, quiet: bool = False, lines: bool = False) -> None:
        self._lines = lines
        self._quiet = quiet or lines or level() < 0
        self._watched = not self._quiet and sys.stderr.isatty()
        self._status: Any = nullcontext()
        if self._watched:
            from rich.console import Console

            self._status = Console(stderr=True).status("start")
        self._running, self._since = "", 0.0

    def __enter__(self) -> Progress:
        self._status.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if raised[0] is None:
            self.phase("")
        self._status.__exit__(*raised)

    def phase(self, name: str) -> None:
        """The phase before is done, and this one begins; an empty name: nothing does."""
        now = time.monotonic()
        if self._running:
            took = f" {now - self._since:.1f} s" if level() > 0 else ""
            self.say(f"✓ {self._running}{took}")
        self._running, self._since = name, now
        if name:
            self._event("phase", name=name)
            if self._watched:
                self._status.update(name)

    def say(self, sentence: str) -> None:
        """A sentence for people."""
        if not self._quiet:
            print(sentence, file=sys.stderr, flush=True)

    def tell(self, event: str, sentence: str = "", **facts: Any) -> None:
        """Something happened: a sentence for people, facts for programs."""
        if sentence:
            self.say(sentence)
            facts = {"said": sentence, **facts}
        self._event(event, **facts)

    def result(self, facts: Any) -> None:
        """The result, as the last line for programs."""
        self._event("result", result=facts)

    def _event(self, event: str, **facts: Any) -> None:
        if self._lines:
            print(json.dumps({"event": event, "time": round(time.time(), 3), **facts}), flush=True)
