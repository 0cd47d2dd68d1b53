"""Max and average pooling, channels innermost, over the frames and positions that are alive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from tvm import tirx

from ..emit import (
    FLOAT,
    Expr,
    cast,
    choose,
    flat,
    lanes,
    let,
    number,
    parallel,
    scratch,
    serial,
    short,
    splat,
    store,
    when,
    write,
)
from ..pool import LOWEST, Pool
from ..space import Space
from ..taps import span
from ..workload import Workload
from .dead_outputs import clear_run
from .pool_space import PoolSpace
from .tiles import Machine


@dataclass(frozen=True)
class VectorPool(Pool):
    """As :class:`..pool.Pool`; ``vectors`` vectors of channels are reduced at once, in registers."""

    vector_floats: int = 1
    vectors: int = 1

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"pool3d_{self.pooling}_{short(self.dtype)}_v{self.vectors * self.vector_floats}"

    def space(self, machine: Machine, workload: Workload) -> Space:
        """Vectors that are reduced at once."""
        return PoolSpace(machine.storing(self.dtype), workload)

    def sized(self, decisions: Mapping[str, int]) -> VectorPool:
        """With so many vectors."""
        return replace(self, vectors=decisions["vectors"])

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Line by line of output positions."""
        out_t, out_h, _ = self.window.out
        out_frames = args.get("out_frames")
        emitter = PoolEmitter(self, args)
        with parallel(self.window.batch * out_t * out_h) as line:
            clip = let(tirx.floordiv(line, out_t * out_h))
            frame = let(tirx.floormod(tirx.floordiv(line, out_h), out_t))
            row = let(tirx.floormod(line, out_h))
            if out_frames is None:
                emitter.line(clip, frame, row)
            else:
                alive = out_frames[clip, frame] != number(0.0)
                if self.zero_dead:
                    choose(alive, lambda: emitter.line(clip, frame, row), lambda: emitter.clear(clip, frame, row))
                else:
                    with when(alive):
                        emitter.line(clip, frame, row)

    @property
    def shares_columns(self) -> bool:
        """Whether windows overlap by half along the width, so that a column is reduced once for all that it is in."""
        window = self.window
        return window.kernel[2] >= 2 * window.stride[2] and window.dilation[2] == 1 and window.kernel[:2] != (1, 1)


#: First coordinate of a window on one axis, and its taps inside the clip: begin, end.
Bounds = tuple[Expr, Expr, Expr]


class Area(NamedTuple):
    """What a window covers of frames and rows."""

    clip: Expr
    frames: Bounds
    rows: Bounds


class Lot(NamedTuple):
    """Channels that are reduced at once."""

    vectors: int
    floats: int

    @property
    def width(self) -> int:
        """How many they are."""
        return self.vectors * self.floats


class _Sums(NamedTuple):
    """One vector under reduction; of maxima, NaN apart."""

    values: tirx.Buffer
    not_numbers: tirx.Buffer | None


class PoolEmitter:
    def __init__(self, pool: VectorPool, args: Mapping[str, tirx.Buffer]) -> None:
        self.pool, self.window = pool, pool.window
        self.x, self.y = flat(args["x"]), flat(args["y"])
        self.in_frames, self.in_positions = args.get("in_frames"), args.get("in_positions")
        self.positions = args.get("positions")
        #: What is reduced: maxima as they are stored, sums in float32.
        self.kept = FLOAT if pool.pooling == "avg" else pool.dtype

    def _input(self, start: Expr, count: int) -> Expr:
        """Consecutive inputs as they are reduced."""
        value = self.x[lanes(start, count)]
        return value if self.pool.dtype == self.kept else cast(value, self.kept, count)

    def _target(self, clip: Expr, frame: Expr, row: Expr) -> Expr:
        out_t, out_h, out_w = self.window.out
        return ((clip * out_t + frame) * out_h + row) * out_w * self.pool.channels

    def clear(self, clip: Expr, frame: Expr, row: Expr) -> None:
        """Zeros for one line of output positions."""
        target = let(self._target(clip, frame, row))
        with serial(self.window.out[2] * self.pool.channels) as index:
            write(self.y, number(0.0), target + index)

    def line(self, clip: Expr, frame: Expr, row: Expr) -> None:
        """One line of output positions."""
        pool, window = self.pool, self.window
        target = let(self._target(clip, frame, row))
        area = Area(clip, span(window, 0, frame), span(window, 1, row))
        if self.positions is not None:
            with serial(window.out[2]) as column, when(tirx.Not(self._is_read((clip, frame, row, column)))):
                clear_run(self.y, let(target + column * pool.channels), pool.channels, pool.vector_floats)
        widest = pool.vectors * pool.vector_floats
        reduced = scratch((window.size[2] * widest,), self.kept) if pool.shares_columns else None
        done = 0
        # As many channels as one pass takes, then single vectors, then what does not fill one.
        for vectors, count in ((pool.vectors, pool.vector_floats), (1, pool.vector_floats), (1, 1)):
            width = vectors * count
            passes = (pool.channels - done) // width
            lot = Lot(vectors, count)
            if reduced is None:
                with self._read_columns((clip, frame, row)) as column:
                    columns = span(window, 2, column)
                    with serial(passes) as index:
                        channel = let(done + index * width)
                        found = self.reduced(area, columns, channel, lot)
                        self._store(found, area, columns[0], target + column * pool.channels + channel, count)
            else:
                with serial(passes) as index:
                    self._by_columns(area, (clip, frame, row), target, let(done + index * width), lot, reduced)
            done += passes * width

    def _is_read(self, at: tuple[Expr, Expr, Expr, Expr]) -> Expr:
        """Whether somebody reads an output position: clip, frame, row, column."""
        assert self.positions is not None
        assert self.pool.positions is not None
        clips, frames = self.pool.positions
        clip, frame, row, column = at
        return self.positions[clip if clips > 1 else 0, frame if frames > 1 else 0, row, column] != number(0.0)

    @contextmanager
    def _read_columns(self, line: tuple[Expr, Expr, Expr]) -> Iterator[Expr]:
        """Loop over the output positions of a line (clip, frame, row) that somebody reads."""
        with serial(self.window.out[2]) as column:
            if self.positions is None:
                yield column
            else:
                with when(self._is_read((*line, column))):
                    yield column

    def _by_columns(
        self, area: Area, at: tuple[Expr, Expr, Expr], target: Expr, channel: Expr, lot: Lot, reduced: tirx.Buffer
    ) -> None:
        """All positions of the line: each column of the input is reduced once, for all windows that it is in."""
        window = self.window
        with serial(window.size[2]) as column:
            for v, value in enumerate(self.reduced(area, (column, 0, 1), channel, lot)):
                store(reduced, value, lanes(column * lot.width + v * lot.floats, lot.floats))
        with self._read_columns(at) as column:
            start, begin, end = span(window, 2, column)
            acc = [self._started(lot.floats) for _ in range(lot.vectors)]
            with serial(end - begin) as tap:
                place = let((start + begin + tap) * lot.width)
                for v, sums in enumerate(acc):
                    self._combine(sums, reduced[lanes(place + v * lot.floats, lot.floats)], lot.floats)
            found = [self._ended(sums, lot.floats) for sums in acc]
            self._store(found, area, start, target + column * self.pool.channels + channel, lot.floats)

    def reduced(self, area: Area, columns: Bounds, channel: Expr, lot: Lot) -> list[Expr]:
        """The sums or maxima over some columns of the area, ``lot`` channels from ``channel`` on."""
        pool, window, count = self.pool, self.window, lot.floats
        size_t, size_h, size_w = window.size
        clip, frames, rows = area
        acc = [self._started(count) for _ in range(lot.vectors)]
        with serial(frames[2] - frames[1]) as f:
            source_frame = let(frames[0] + (frames[1] + f) * window.dilation[0])

            def read_zeros() -> None:
                for sums in acc:
                    self._combine(sums, number(0.0, count, self.kept), count)

            def read_frame() -> None:
                with serial(rows[2] - rows[1]) as r, serial(columns[2] - columns[1]) as c:
                    source_row = let(rows[0] + (rows[1] + r) * window.dilation[1])
                    source_column = let(columns[0] + (columns[1] + c) * window.dilation[2])
                    position = ((clip * size_t + source_frame) * size_h + source_row) * size_w + source_column
                    source = let(position * pool.channels + channel)

                    def read_position() -> None:
                        for v, sums in enumerate(acc):
                            self._combine(sums, self._input(source + v * count, count), count)

                    if self.in_positions is None or pool.in_positions is None:
                        read_position()
                    else:
                        clips, frames = pool.in_positions
                        at = (clip if clips > 1 else 0, source_frame if frames > 1 else 0, source_row, source_column)
                        choose(self.in_positions[at] != number(0.0), read_position, read_zeros)

            if self.in_frames is None:
                read_frame()
            else:
                choose(self.in_frames[clip, source_frame] != number(0.0), read_frame, read_zeros)
        return [self._ended(sums, count) for sums in acc]

    def _store(self, found: list[Expr], area: Area, first_column: Expr, place: Expr, count: int) -> None:
        """One output position: maxima as they are, sums divided by how many values they are of."""
        place = let(place)
        for v, value in enumerate(found):
            if self.pool.pooling == "avg":
                taps = self.pool.divisor((area.frames[0], area.rows[0], first_column))
                value = value / splat(tirx.Cast(FLOAT, taps), count)
                write(self.y, value, place + v * count, count)
            else:
                store(self.y, value, lanes(place + v * count, count))

    def _started(self, count: int) -> _Sums:
        """A sum of nothing, or a maximum of nothing and the NaN met so far."""
        average = self.pool.pooling == "avg"
        kept = self.kept
        sums = _Sums(scratch((count,), kept), None if average else scratch((count,), kept))
        store(sums.values, number(0.0 if average else LOWEST, count, kept), lanes(0, count))
        if sums.not_numbers is not None:
            store(sums.not_numbers, number(0.0, count, kept), lanes(0, count))
        return sums

    def _combine(self, sums: _Sums, value: Expr, count: int) -> None:
        """Add ``value`` to a sum, or take it into a maximum: ``max`` forgets NaN, so the last one met is put aside."""
        now = sums.values[lanes(0, count)]
        if sums.not_numbers is None:
            store(sums.values, now + value, lanes(0, count))
            return
        value, found = let(value), sums.not_numbers
        store(found, tirx.Select(tirx.isnan(value), value, found[lanes(0, count)]), lanes(0, count))
        store(sums.values, tirx.max(now, value), lanes(0, count))

    def _ended(self, sums: _Sums, count: int) -> Expr:
        """The sum; the maximum, or the NaN that was met."""
        value = sums.values[lanes(0, count)]
        if sums.not_numbers is None:
            return let(value)
        found = let(sums.not_numbers[lanes(0, count)])
        return let(tirx.Select(tirx.isnan(found), found, value))
