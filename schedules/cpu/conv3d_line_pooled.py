"""The convolution along lines with the max pool behind it, of windows that lie side by side (`docs/kernels.md`).

The lines of outputs that one line of the pool reads are computed into memory that stays in the first-level cache, a
panel of output channels at a time, and reduced there: what the convolution would write and the pool read again, four or
eight times as much as is left of it, never exists.

Where masks say which outputs of the pool are read, what no such output needs is left out as in :mod:`.conv3d_line`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tvm import tirx

from ..emit import Expr, big, choose, lanes, let, scratch, serial, store, when
from ..geometry import HEIGHT, TIME, WIDTH
from ..taps import span
from .conv3d_gather import parts_of
from .conv3d_line import Line, LineConv, LineEmitter
from .ends_in_pool import EndsInPool
from .lines import each_piece
from .pool3d import Area, Lot, PoolEmitter, VectorPool
from .row_tiles import panel_widths


@dataclass(frozen=True)
class PooledLineConv(EndsInPool, LineConv):
    """A convolution along lines, and a max pool of ``pool`` frames, rows and columns behind it.

    Masks are those of the convolution's own outputs: those under one of the pool's are read together or not at all.
    ``zero_dead`` is of the pool's.
    """

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"conv3d_line_pool_{self.size_name}"

    @property
    def scratch_bytes(self) -> int:
        """The lines of outputs under one of the pool's."""
        frames, rows, _ = self.pool
        floats = frames * rows * self.window.out[WIDTH] * self.stored_floats
        return floats * np.dtype(self.dtype).itemsize

    @property
    def stored_floats(self) -> int:
        """Outputs of a line lie side by side, so many channels of each."""
        return min(self.tile.vectors, self.vectors) * self.tile.vector_floats

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Line by line of the pool's outputs."""
        _Emitter(self, args).emit()


class _Emitter(LineEmitter):
    """The kernel's loops: the line of a pool, its panels, the lines of outputs under it, and the tiles of these."""

    conv: PooledLineConv

    def __init__(self, conv: PooledLineConv, args: Mapping[str, tirx.Buffer]) -> None:
        super().__init__(conv, args)
        self.step = conv.pool
        self.outer, self.width = conv.pool_window, conv.pool_window.out[WIDTH]

    def _line(self, line: Line) -> None:
        """One line of the pool's outputs in a frame that somebody reads."""
        conv, (frames, rows, _) = self.conv, self.conv.pool
        read = None if self.position_mask is None else self._count_read(line, 0, self.width)
        if read is not None:
            self._clear_unread(line, read)
        self.remember()
        self.y = scratch((frames * rows * conv.window.out[WIDTH] * conv.stored_floats,), conv.dtype)
        first = 0
        for panels, vectors in panel_widths(conv.vectors, self.tile.vectors):
            with serial(panels) as index:
                panel = (let(first + index * vectors), vectors)
                with serial(frames) as frame, serial(rows) as row:
                    self._under(replace(line, under=let(frame * rows + row)), frame, row, read, panel)
                self._reduce(line, panel)
            first += panels * vectors

    def _under(self, line: Line, frame: Expr, row: Expr, read: Expr | None, panel: tuple[Expr, int]) -> None:
        """One of the lines of outputs under it, of one panel."""
        window, (frames, rows, _) = self.conv.window, self.conv.pool
        first, second = let(line.frame * frames + frame), let(line.row * rows + row)
        spans = span(window, TIME, first), span(window, HEIGHT, second)
        each_piece(window, WIDTH, self.tile.mr, partial(self._piece, line, read, spans, panel))

    def _read_in(self, line: Line, begin: Expr, count: int) -> Expr:
        size = self.conv.pool[WIDTH]
        first, last = let(tirx.floordiv(begin, size)), tirx.floordiv(begin + (count - 1), size)
        return self._count_read(line, first, let(tirx.max(0, tirx.min(last + 1, self.width) - first)))

    def _target(self, line: Line, begin: Expr, vector: Expr) -> Expr:
        return (line.under * self.conv.window.out[WIDTH] + begin) * self.conv.stored_floats

    def _store_row(self, row: Sequence[tuple[tirx.Buffer, Expr]], target: Expr, first: Expr, vector: Expr) -> None:
        """Whole vectors: behind the last channel there is room, and nothing but zeros."""
        for v, total in enumerate(row):
            self._store(total, 0, target + (first + v * self.count), self.count)

    # -- the pool ----------------------------------------------------------------------------------------------------

    def _reduce(self, line: Line, panel: tuple[Expr, int]) -> None:
        """The maxima of a panel."""
        conv, (vector, vectors), (frames, rows, size) = self.conv, panel, self.conv.pool
        below = replace(self.outer, batch=1, size=(frames, rows, conv.window.out[WIDTH]), out=(1, 1, self.width))
        maxima = PoolEmitter(VectorPool(below, conv.stored_floats, "max", dtype=conv.dtype), {"x": self.y, "y": self.y})
        area, lot = Area(0, (0, 0, frames), (0, 0, rows)), Lot(vectors, self.count)
        found = [scratch((self.count,), conv.dtype) for _ in range(vectors)]
        with self._read_columns(line) as column:
            values = maxima.reduced(area, (let(column * size), 0, size), 0, lot)
            target = let(big(line.index * self.width + column) * conv.channels_out + vector * self.count)
            for v, (value, vector_of) in enumerate(zip(values, found, strict=True)):
                store(vector_of, value, lanes(0, self.count))
                self._put(vector_of, target + v * self.count, vector + v)

    @contextmanager
    def _read_columns(self, line: Line) -> Iterator[Expr]:
        """Loop over the pool's outputs of a line that somebody reads."""
        with serial(self.width) as column:
            if self.position_mask is None:
                yield column
            else:
                with when(self._is_read(line, column) != 0):
                    yield column

    def _put(self, found: tirx.Buffer, at: Expr, vector: Expr) -> None:
        """One vector of the pool's results, or what there is of the layer's last."""

        def put(first: int, size: int) -> None:
            store(self.result, found[lanes(first, size)], lanes(at + first, size))

        def part() -> None:
            for first, size in parts_of(self.conv.channels_out % self.count):
                put(first, size)

        if self.conv.channels_out % self.count:
            choose(vector + 1 < self.conv.vectors, partial(put, 0, self.count), part)
        else:
            put(0, self.count)
