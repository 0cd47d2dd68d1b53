"""What a run of the tuner works on: one task for each distinct kernel, and how much may be done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dance_tvm.lowering.registry import kernel_of
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.gpu.tiles import Gpu
from dance_tvm.schedules.kernel import Kernel
from dance_tvm.schedules.space import Space
from dance_tvm.schedules.workload import Decisions
from dance_tvm.tuning.workloads import Tunable


@dataclass
class Task:
    """One kernel, its search and what came of it. ``before`` and ``after`` are seconds of the verifying run."""

    layer: Tunable
    kernel: Kernel
    space: Space
    results: dict[tuple[int, ...], float | None] = field(default_factory=dict)
    best: float = math.inf
    best_decisions: Decisions = field(default_factory=dict)
    stale: int = 0
    exhausted: bool = False
    history: list[float] = field(default_factory=list)
    before: float = 0.0
    after: float = 0.0
    failures: int = 0
    #: Why what was found was not verified, where it was tried.
    unverified: str = ""
    search: Any = None

    @staticmethod
    def of(layer: Tunable, machine: Machine | Gpu) -> Task:
        """That of a layer on a machine, with no trials."""
        kernel = kernel_of(layer.workload, machine)
        space = kernel.space(machine, layer.workload)
        assert space is not None, f"{kernel.name} has nothing to decide"
        return Task(layer, kernel, space)

    @property
    def trials(self) -> int:
        """Trials so far, those of earlier runs included."""
        return len(self.results)

    def key(self, decisions: Decisions) -> tuple[int, ...]:
        """The decisions in the order of the space."""
        return tuple(decisions[name] for name in self.space.names)

    def note(self, decisions: Decisions, seconds: float | None) -> None:
        """Keep one result."""
        self.results[self.key(decisions)] = seconds
        self.failures += seconds is None
        if seconds is not None and seconds < self.best:
            self.best, self.best_decisions = seconds, decisions
        self.history.append(self.best)

    @property
    def expected_gain(self) -> float:
        """Share of the network's time that may still be won here; layers that stopped improving come last."""
        if self.best == math.inf:
            return math.inf
        return self.layer.count * self.best / (1 + self.stale) ** 2


@dataclass
class Plan:
    """What a run may do; ``trials`` is for each layer, those of earlier runs counted, ``time_limit`` in seconds."""

    trials: int = 64
    time_limit: float = math.inf
    jobs: int = 1
    seed: int = 0
