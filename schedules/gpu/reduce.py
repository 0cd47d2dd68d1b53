"""Sum, mean, variance and deviation on a GPU, where float64 may be missing: float32 sums of sums.

Each thread adds up runs of :data:`RUN` elements and then the runs, and threads add up in pairs. A mean is taken twice:
what is left of the elements once the first mean is subtracted corrects it, so that equal elements have exactly their
own value for a mean, and variance is that about the mean (two sweeps), never a difference of large sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import Expr, flat, let, number, serial, store, when
from ..reduction import Reduction
from .emit import BLOCK, barrier, integer, launch, registers, shared

#: Elements that a thread adds up before it adds them to the rest.
RUN = 32
#: Threads side by side along what stays: one line of memory.
LINE = 32


@dataclass(frozen=True)
class BlockReduction(Reduction):
    """As :class:`..reduction.Reduction`; one block of threads for each :data:`LINE` results."""

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"{super().name}_gpu"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Sums of runs, then of threads in pairs."""
        inner = self.inner
        across = min(LINE, 1 << (inner - 1).bit_length())
        tiles = -(-inner // across)
        with launch(self.outer * tiles, BLOCK) as (block, thread):
            lane = let(tirx.truncmod(thread, across))
            # Lanes past the end do the last one's work again: every thread meets every barrier.
            column = let(tirx.min(tirx.truncmod(block, tiles) * across + lane, inner - 1))
            line = let(tirx.truncdiv(block, tiles))
            top = let(line * (self.reduced * inner) + column)
            total = _Total(self, flat(args["x"]), top, let(tirx.truncdiv(thread, across)), thread, across)
            store(flat(args["y"]), _result(self, total), line * inner + column)


def _result(reduction: Reduction, total: _Total) -> Expr:
    share = number(1.0 / reduction.reduced)
    if reduction.statistic == "sum":
        return total(lambda value: value * value if reduction.squared else value)
    if reduction.squared:
        return total(lambda value: value * value) * share
    first = let(total(lambda value: value) * share)
    apart = let(total(lambda value: value - first) * share)
    if reduction.statistic == "mean":
        return first + apart
    variance = total(lambda value: (value - first) * (value - first)) * share - apart * apart
    variance = let(variance)
    variance = tirx.Select(variance < number(0.0), number(0.0), variance)
    return tirx.sqrt(variance) if reduction.statistic == "std" else variance


class _Total:
    """The sum over what is reduced of a function of each element, the same for all threads of a lane."""

    def __init__(self, reduction: Reduction, x: tirx.Buffer, top: Expr, part: Expr, thread: Expr, across: int) -> None:
        self.reduction, self.x, self.top, self.part, self.thread = reduction, x, top, part, thread
        self.across, self.parts = across, BLOCK // across
        self.memory = shared((BLOCK,))
        self.sums = registers((2,))

    def __call__(self, of: Callable[[Expr], Expr]) -> Expr:
        reduced, inner = self.reduction.reduced, self.reduction.inner
        store(self.sums, number(0.0), 0)
        with serial(-(-reduced // (RUN * self.parts))) as run:
            store(self.sums, number(0.0), 1)
            with serial(RUN) as index:
                row = let((run * RUN + index) * self.parts + self.part)
                with when(row < reduced):
                    store(self.sums, self.sums[1] + of(self.x[self.top + row * inner]), 1)
            store(self.sums, self.sums[0] + self.sums[1], 0)
        store(self.memory, self.sums[0], self.thread)
        barrier()
        turns = self.parts.bit_length() - 1
        with serial(turns) as turn:
            half = let(tirx.shift_right(integer(self.parts // 2), turn))
            with when(self.part < half):
                store(
                    self.memory, self.memory[self.thread] + self.memory[self.thread + half * self.across], self.thread
                )
            barrier()
        result = registers((1,))
        store(result, self.memory[tirx.truncmod(self.thread, self.across)], 0)
        barrier()
        return let(result[0])
