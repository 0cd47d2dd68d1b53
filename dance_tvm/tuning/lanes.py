"""Threads that may be abandoned: a run that is asked to stop does not wait for a device's answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Lanes:
    """So many calls at once, each in a thread of its own, which ends with the process whatever it waits for."""

    def __init__(self, count: int) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """What ``call()`` will give, once a thread is free."""
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def end(self, patience: float) -> None:
        """Take no more calls, and give those in flight this many seconds."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(patience / len(self._threads))

    def _work(self) -> None:
        while (next_call := self._calls.get()) is not None:
            future, call = next_call
            try:
                future.set_result(call())
            except BaseException as error:  # whoever asks for the result gets it
                future.set_exception(error)
