"""Two kernels of one layer, of which each call runs the one that is predicted to be faster under its masks.

A Winograd kernel leaves out whole tiles and units of channels, a direct one single rows and channels; which is faster
depends on the masks, which no build knows. So the artifact has both, and a planner (:class:`Decision`) finds from
what the masks leave which of them runs: only its lists are planned, and only its code is entered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx

from ..convolution import LayerKernel
from ..emit import INT, choose, clear, let, serial, store, when
from ..geometry import Window
from ..kernel import FREE_CHOICE, PLANNER, Count, Kernel, Operand, Planned, Weights, listed, output
from ..preparation import Preparation
from .live_counts import Costs, Grain, LiveCounts

#: What stands before the names of the second kernel's lists and constants.
SECOND = "second_"
#: Roles of what both kernels have of their own.
_OWN = ("constant", "list")


def _theirs(operand: Operand) -> Operand:
    """An operand of the second kernel, under the name that it has beside those of the first."""
    return replace(operand, name=SECOND + operand.name) if operand.role in _OWN else operand


@dataclass(frozen=True)
class Either(LayerKernel):
    """``first``, or ``second`` where ``decision`` says so; both compute the same layer under the same masks."""

    first: LayerKernel
    second: LayerKernel
    decision: Decision

    @property
    def window(self) -> Window:  # type: ignore[override]  # a field of others
        """That of both."""
        return self.first.window

    @property
    def channels_in(self) -> int:  # type: ignore[override]  # a field of others
        """Of both."""
        return self.first.channels_in

    @property
    def channels_out(self) -> int:  # type: ignore[override]  # a field of others
        """Of both."""
        return self.first.channels_out

    @property
    def groups(self) -> int:  # type: ignore[override]  # a field of others
        """Of both."""
        return self.first.groups

    @property
    def samples(self) -> int:
        """Clips whose channel lists differ."""
        return self.first.samples

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.first.name}_or_{self.second.name.removeprefix('conv3d_')}"

    @property
    def exact(self) -> bool:  # type: ignore[override]  # a field of others
        """If both are."""
        return self.first.exact and self.second.exact

    @property
    def scratch_bytes(self) -> int:
        """One of them runs at a time."""
        return max(self.first.scratch_bytes, self.second.scratch_bytes)

    @property
    def preparations(self) -> dict[str, Preparation]:
        """Weights in two layouts, of the same source."""
        theirs = {SECOND + name: how for name, how in self.second.preparations.items()}
        return {**self.first.preparations, **theirs}

    def operands(self) -> list[Operand]:
        """What the first takes, what the second takes beside it, the decision, the output."""
        *ours, y = self.first.operands()
        theirs = [_theirs(operand) for operand in self.second.operands() if operand.role != "output"]
        return [*dict.fromkeys([*ours, *theirs, DECISION]), y]

    def lists(self) -> list[Planned]:
        """The decision, both kernels' lists if they are needed, and what was executed."""
        ours = [Planned(OnlyIf(each.planner, 0, ""), each.names) for each in self.first.lists()]
        theirs = [
            Planned(OnlyIf(each.planner, 1, SECOND), tuple(SECOND + name for name in each.names))
            for each in self.second.lists()
        ]
        decided = [Planned(Undecided(), (FORCED.name,)), Planned(self.decision, (DECISION.name,))]
        return [*decided, *ours, *theirs, Planned(Executed(self.first, self.second), ("executed",))]

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Constants of both."""
        theirs = {SECOND + name: array for name, array in self.second.prepare(weights).items()}
        return {**self.first.prepare(weights), **theirs}

    def work(self) -> tuple[Count, Count, Count]:
        """What the one that ran executed."""
        pairs, channels_in, channels_out = (Count(operand="executed", at=(index,)) for index in range(3))
        return pairs, channels_in, channels_out

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """One or the other."""

        def first() -> None:
            self.first.emit({each.name: args[each.name] for each in self.first.operands()})

        def second() -> None:
            self.second.emit({each.name: args[_theirs(each).name] for each in self.second.operands()})

        choose(args[DECISION.name][0] == 0, first, second)

    def describe(self) -> dict[str, Any]:
        """Also the first one's tile of outputs, and the second one's operands as they are called here."""
        theirs = {operand.name: _theirs(operand).name for operand in self.second.operands()}
        return {**self.first.describe(), **super().describe(), "second": theirs}


#: Which kernel runs: 0 or 1.
DECISION = listed("decision", (1,))
#: Which one a check wants to run whatever the masks are: 0 or 1, or -1 for neither.
FORCED = listed("forced", (1,))
#: Of every call but those that a check watches.
UNDECIDED = -1


@dataclass(frozen=True)
class Undecided(Kernel):
    """Writes "no decision", so that every call decides by its masks. A check writes another number in its place."""

    kind = FREE_CHOICE
    foldable = False
    name = "undecided"

    def operands(self) -> list[Operand]:
        """The number."""
        return [output(FORCED.name, FORCED.shape, INT)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Write :data:`UNDECIDED`."""
        store(args[FORCED.name], tirx.IntImm(INT, UNDECIDED), 0)


@dataclass(frozen=True)
class Decision(Kernel):
    """Which of two kernels is predicted to be faster where masks leave what they leave of a layer.

    ``grains`` say in which pieces each kernel leaves work out, ``costs`` what it takes.
    """

    kind = PLANNER
    name = "decide"
    counts: LiveCounts
    grains: tuple[Grain, Grain]
    costs: tuple[Costs, Costs]

    def operands(self) -> list[Operand]:
        """What is forced, the masks, the decision."""
        return [FORCED, *self.counts.masks(), output(DECISION.name, DECISION.shape, INT)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Both costs, compared."""
        shares = self.counts.emit(args, self.grains)
        first, second = (cost.microseconds(*share) for cost, share in zip(self.costs, shares, strict=True))
        forced = let(args[FORCED.name][0])
        store(args[DECISION.name], tirx.Select(forced < 0, tirx.Cast(INT, let(second) < let(first)), forced), 0)


@dataclass(frozen=True)
class OnlyIf(Kernel):
    """A planner that runs only where the decision is ``which``; ``prefix`` is before the names of lists it reads."""

    kind = PLANNER
    planner: Kernel
    which: int
    prefix: str

    @property
    def name(self) -> str:
        """The planner's, and when."""
        return f"{self.planner.name}_if{self.which}"

    def _renamed(self, operand: Operand) -> Operand:
        return replace(operand, name=self.prefix + operand.name) if operand.role == "list" else operand

    def operands(self) -> list[Operand]:
        """The decision, then the planner's."""
        return [DECISION, *map(self._renamed, self.planner.operands())]

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """The planner's tables."""
        return self.planner.prepare(weights)

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Plan or leave it."""
        with when(args[DECISION.name][0] == self.which):
            self.planner.emit({each.name: args[self._renamed(each).name] for each in self.planner.operands()})


@dataclass(frozen=True)
class Executed(Kernel):
    """What the kernel that runs executes: pairs of row and tap, input channels, output channels of each sample."""

    kind = PLANNER
    name = "executed"
    first: LayerKernel
    second: LayerKernel

    def _read(self, kernel: LayerKernel, prefix: str) -> list[Operand]:
        """The lists that the counts of a kernel are read from."""
        shapes = {
            name: operand.shape
            for each in kernel.lists()
            for name, operand in zip(each.names, each.planner.outputs(), strict=True)
        }
        return [
            listed(prefix + count.operand, shapes[count.operand])
            for count in dict.fromkeys(kernel.work())
            if count.operand
        ]

    def operands(self) -> list[Operand]:
        """The decision, the lists with counts, what is executed (samples, 3)."""
        read = [*self._read(self.first, ""), *self._read(self.second, SECOND)]
        return [DECISION, *dict.fromkeys(read), output("executed", (self.first.samples, 3), INT)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Those of the one that runs."""
        clear(args["executed"])
        for which, (kernel, prefix) in enumerate(((self.first, ""), (self.second, SECOND))):
            with when(args[DECISION.name][0] == which), serial(self.first.samples) as sample:
                for index, count in enumerate(kernel.work()):
                    value: Any = tirx.IntImm(INT, count.factor)
                    if count.operand:
                        counts = args[prefix + count.operand]
                        row = sample if int(counts.shape[0]) > 1 else 0
                        at = (row, *count.at)
                        value = tirx.floordiv(value * counts[at], count.divisor)
                    store(args["executed"], value, sample, index)
