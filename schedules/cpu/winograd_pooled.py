"""The Winograd convolution with the max pool behind it, of windows that lie side by side (`docs/winograd.md`).

Windows of the pool never cross a tile whose sizes they divide, so that a tile's results are reduced where they are
transformed back, and nothing else of them is ever stored.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import Expr, big, lanes, let, number, serial, store, when, write
from ..geometry import Window, side_by_side, triple
from .ends_in_pool import EndsInPool
from .pool3d import Area, Lot, PoolEmitter, VectorPool
from .winograd import Results, WinogradConv, WinogradEmitter


@dataclass(frozen=True)
class PooledWinograd(EndsInPool, WinogradConv):
    """A Winograd kernel and a max pool of ``pool`` frames, rows and columns behind it.

    Masks are those of the convolution's own outputs: what they leave out counts as zeros, where somebody reads others
    under the same window. ``zero_dead`` is of the pool's.
    """

    @property
    def marks(self) -> str:
        """The pool, and the lists of channels."""
        return f"_pool{super().marks}"

    @property
    def divides_tiles(self) -> bool:
        """Whether no window of the pool crosses a tile."""
        return not any(map(operator.mod, self.plan.m, self.pool))

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Chunk by chunk, three phases each."""
        _Emitter(self, args).emit()


class _Emitter(WinogradEmitter):
    """A tile's results stay in its scratch, from where their maxima are stored."""

    def __init__(self, conv: PooledWinograd, args: Mapping[str, tirx.Buffer]) -> None:
        super().__init__(conv, args)
        self.outer = side_by_side(self.window, conv.pool)
        self.step = conv.pool

    def _result(self, of: Results, waiting: tirx.Buffer, at: Expr, value: Expr) -> None:
        found = self._finished(of, let(value + of.bias))
        if of.read is not None:
            found = tirx.if_then_else(of.read[at] != 0, found, number(0.0, of.count))
        store(waiting, found, lanes(at * of.count, of.count))

    def _end_tile(self, of: Results, waiting: tirx.Buffer) -> None:
        """The maxima of one tile."""
        size, count, out = self.step, of.count, self.outer.out
        windows = [m // each for m, each in zip(self.plan.m, size, strict=True)]
        inner = Window(1, self.plan.alpha, triple(windows), size, size)
        maxima = PoolEmitter(VectorPool(inner, count, "max"), {"x": waiting, "y": waiting})
        with serial(windows[0]) as frame, serial(windows[1]) as row, serial(windows[2]) as column:
            begin = [let(index * each) for index, each in zip((frame, row, column), size, strict=True)]
            coordinates = [let(start + offset) for start, offset in zip(of.starts, begin, strict=True)]
            inside = self._inside(coordinates)
            with when(tirx.all(*inside) if inside else tirx.IntImm("bool", 1)):
                spans = [(first, 0, each) for first, each in zip(begin, size, strict=True)]
                (value,) = maxima.reduced(Area(0, *spans[:2]), spans[2], 0, Lot(1, count))
                place = [tirx.floordiv(at, each) for at, each in zip(coordinates, size, strict=True)]
                position = ((of.clip * out[0] + place[0]) * out[1] + place[1]) * out[2] + place[2]
                write(self.y, value, let(big(position) * self.conv.channels_out + of.first), count)
