"""Values in order on a GPU: a value's rank is the number of those of its line that stand before it.

Each thread compares one value with all of its line and writes it where its rank says: no thread waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import INT, flat, let, serial, store, when
from ..sort import Sort
from .emit import each_element, integer, registers


@dataclass(frozen=True)
class CountingSort(Sort):
    """As :class:`..sort.Sort`; it takes ``comparisons``."""

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"{super().name}_gpu"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """One thread per value."""
        memory = {name: flat(buffer) for name, buffer in args.items()}
        span = self.extent * self.inner
        with each_element(self.lines * self.extent) as index:
            before, rest = let(tirx.truncdiv(index, span)), let(tirx.truncmod(index, span))
            at, column = let(tirx.truncdiv(rest, self.inner)), let(tirx.truncmod(rest, self.inner))
            first = let(before * span + column)
            its, rank = let(tirx.Cast(self.compared, memory["x"][index])), registers((1,), INT)
            store(rank, integer(0), 0)
            with serial(self.extent) as other:
                one = let(tirx.Cast(self.compared, memory["x"][first + other * self.inner]))
                earlier = tirx.all(other < at, self.stays_before(one, its))
                store(rank, rank[0] + tirx.Cast(INT, tirx.any(self.precedes(one, its), earlier)), 0)
            target = let((before * self.kept + rank[0]) * self.inner + column)
            with when(rank[0] < self.kept):
                if self.values:
                    store(memory["values"], memory["x"][index], target)
                if self.places:
                    store(memory["places"], tirx.Cast(self.places, at), target)
