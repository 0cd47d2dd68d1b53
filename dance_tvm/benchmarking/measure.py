"""Runs in turns: warm up until steady, then measure several networks burst by burst, so that noise hits all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dance_tvm.benchmarking.results import Latency
from dance_tvm.benchmarking.statistics import latency
from dance_tvm.device import LoadedNetwork

Inputs = Mapping[str, np.ndarray]

# A burst is long enough for its own first run (cold caches, a woken core) to be a small part of it.
BURST_S = 0.02
MOST_IN_BURST = 32
STEADY = 0.03  # two bursts of warm-up whose medians differ by less are steady
MOST_WARM_UP_S = 10.0
SINGLE_STREAM_QUERIES = 1024  # MLPerf inference, single stream: at least this many queries, and seconds
SINGLE_STREAM_S = 60.0
MOST_RUNS = 100_000


@dataclass
class Contender:
    """One network in a measurement, with its input and what was measured of it so far.

    `rounds` are the medians of its bursts: the n-th of several contenders were measured right after one another.
    """

    network: LoadedNetwork
    inputs: Inputs
    seconds: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    burst: int = 1
    warm_up_runs: int = 0
    steady: bool = False

    def warm_up(self) -> None:
        """Run until two bursts take the same time, or for ten seconds; choose how long a burst is."""
        begin, previous = time.monotonic(), 0.0
        while not self.steady and time.monotonic() - begin < MOST_WARM_UP_S:
            runs = self.network.time(self.inputs, self.burst)
            self.warm_up_runs += len(runs)
            median = float(np.median(runs))
            self.steady = previous > 0 and abs(median / previous - 1) < STEADY
            self.burst = max(1, min(MOST_IN_BURST, round(BURST_S / median)))
            previous = median

    def figures(self) -> Latency:
        """The figures of all runs so far."""
        return latency(self.seconds, self.warm_up_runs, self.steady)


def in_turns(
    contenders: Sequence[Contender], runs: int, seconds: float, between: Callable[[], None] = lambda: None
) -> None:
    """Measure every contender at least `runs` times and for `seconds` s altogether, in bursts and changing order.

    `between` is called after every round (to cool down, to read sensors).
    """
    for contender in contenders:
        contender.warm_up()
    order, shuffle = list(contenders), random.Random(0)
    spent = 0.0
    while spent < seconds * len(order) or min(len(contender.seconds) for contender in order) < runs:
        shuffle.shuffle(order)
        for contender in order:
            measured = contender.network.time(contender.inputs, contender.burst)
            contender.seconds += measured
            contender.rounds.append(float(np.median(measured)))
            spent += sum(measured)
        between()
        if max(len(contender.seconds) for contender in order) >= MOST_RUNS:
            return


def single_stream(
    network: LoadedNetwork,
    clips: Sequence[Inputs],
    queries: int = SINGLE_STREAM_QUERIES,
    seconds: float = SINGLE_STREAM_S,
) -> dict[str, float]:
    """One query after the other, clips drawn at random, at least this many; the 90th percentile counts."""
    draw = random.Random(0)
    measured: list[float] = []
    begin = time.monotonic()
    while len(measured) < queries or time.monotonic() - begin < seconds:
        measured += network.time(draw.choice(clips), 1)
    elapsed = time.monotonic() - begin
    p50, p90, p99 = np.percentile(measured, [50, 90, 99])
    return {
        "queries": len(measured),
        "seconds": elapsed,
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "queries_per_second": len(measured) / sum(measured),
    }
