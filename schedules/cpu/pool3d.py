"""Max and average pooling, channels innermost, over the frames and positions that are alive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import (
    Expr,
    choose,
    flat,
    lanes,
    let,
    number,
    parallel,
    scratch,
    serial,
    splat,
    store,
    when,
)
from ..pool import LOWEST, Pool

#: Vectors of channels that hide the latency of their loads from one another: ``benchmarks.pools`` has four at 0.28 to
#: 1.05 of the time of one, and eight ahead of them over whole clips alone.
HIDING_VECTORS = 4


def default_vectors(channels: int, vector_floats: int) -> int:
    """Vectors of channels that a pool reduces at once without a record."""
    return max(1, min(HIDING_VECTORS, channels // vector_floats))


@dataclass(frozen=True)
class VectorPool(Pool):
    """As :class:`..pool.Pool`; ``vectors`` vectors of channels are reduced at once, in registers."""

    vector_floats: int = 1
    vectors: int = 1

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"pool3d_{self.pooling}_f32_v{self.vectors * self.vector_floats}"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Line by line of output positions."""
        out_t, out_h, _ = self.window.out
        out_frames = args.get("out_frames")
        emitter = _Emitter(self, args)
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


class _Emitter:
    def __init__(self, pool: VectorPool, args: Mapping[str, tirx.Buffer]) -> None:
        self.pool, self.window = pool, pool.window
        self.x, self.y = flat(args["x"]), flat(args["y"])
        self.in_frames, self.in_positions = args.get("in_frames"), args.get("in_positions")

    def _target(self, clip: Expr, frame: Expr, row: Expr) -> Expr:
        out_t, out_h, out_w = self.window.out
        return ((clip * out_t + frame) * out_h + row) * out_w * self.pool.channels

    def clear(self, clip: Expr, frame: Expr, row: Expr) -> None:
        """Zeros for one line of output positions."""
        target = let(self._target(clip, frame, row))
        with serial(self.window.out[2] * self.pool.channels) as index:
            store(self.y, number(0.0), target + index)

    def _bounds(self, axis: int, index: Expr) -> tuple[Expr, Expr, Expr]:
        """First coordinate of the window, and the taps that lie inside the clip: begin, end."""
        window = self.window
        start = let(index * window.stride[axis] - window.padding[axis])
        if window.classes[axis] == (tuple(range(window.kernel[axis])),):
            return start, 0, window.kernel[axis]
        begin, end = self.pool.span(axis, start)
        return start, let(begin), let(end)

    def line(self, clip: Expr, frame: Expr, row: Expr) -> None:
        """One line of output positions."""
        pool, window = self.pool, self.window
        target = let(self._target(clip, frame, row))
        frames, rows = self._bounds(0, frame), self._bounds(1, row)
        with serial(window.out[2]) as column:
            columns = self._bounds(2, column)
            place = let(target + column * pool.channels)
            done = 0
            # As many channels as one pass takes, then single vectors, then what does not fill one.
            for vectors, count in ((pool.vectors, pool.vector_floats), (1, pool.vector_floats), (1, 1)):
                width = vectors * count
                passes = (pool.channels - done) // width
                with serial(passes) as index:
                    self._window(clip, frames, rows, columns, place, done + index * width, vectors, count)
                done += passes * width

    def _window(
        self,
        clip: Expr,
        frames: tuple[Expr, Expr, Expr],
        rows: tuple[Expr, Expr, Expr],
        columns: tuple[Expr, Expr, Expr],
        place: Expr,
        channel: Expr,
        vectors: int,
        count: int,
    ) -> None:
        """One output position, ``vectors`` × ``count`` channels from ``channel`` on."""
        pool, window = self.pool, self.window
        size_t, size_h, size_w = window.size
        acc = [scratch((count,)) for _ in range(vectors)]
        for buffer in acc:
            store(buffer, number(0.0 if pool.pooling == "avg" else LOWEST, count), lanes(0, count))
        self.not_numbers = {buffer: scratch((count,)) for buffer in acc} if pool.pooling == "max" else {}
        for buffer in self.not_numbers.values():
            store(buffer, number(0.0, count), lanes(0, count))
        with serial(frames[2] - frames[1]) as f:
            source_frame = let(frames[0] + (frames[1] + f) * window.dilation[0])

            def read_zeros() -> None:
                for buffer in acc:
                    self._combine(buffer, number(0.0, count), count)

            def read_frame() -> None:
                with serial(rows[2] - rows[1]) as r, serial(columns[2] - columns[1]) as c:
                    source_row = let(rows[0] + (rows[1] + r) * window.dilation[1])
                    source_column = let(columns[0] + (columns[1] + c) * window.dilation[2])
                    position = ((clip * size_t + source_frame) * size_h + source_row) * size_w + source_column
                    source = let(position * pool.channels + channel)

                    def read_position() -> None:
                        for v, buffer in enumerate(acc):
                            self._combine(buffer, self.x[lanes(source + v * count, count)], count)

                    if self.in_positions is None or pool.in_positions is None:
                        read_position()
                    else:
                        clips, told = pool.in_positions
                        at = (clip if clips > 1 else 0, source_frame if told > 1 else 0, source_row, source_column)
                        choose(self.in_positions[at] != number(0.0), read_position, read_zeros)

            if self.in_frames is None:
                read_frame()
            else:
                choose(self.in_frames[clip, source_frame] != number(0.0), read_frame, read_zeros)
        for v, buffer in enumerate(acc):
            result = buffer[lanes(0, count)]
            if pool.pooling == "avg":
                taps = pool.divisor((frames[0], rows[0], columns[0]))
                result = result / splat(tirx.Cast("float32", taps), count)
            else:
                found = self.not_numbers[buffer][lanes(0, count)]
                result = tirx.Select(tirx.isnan(found), found, result)
            store(self.y, result, lanes(place + channel + v * count, count))

    def _combine(self, acc: tirx.Buffer, value: Expr, count: int) -> None:
        """Add ``value`` to a sum, or take it into a maximum: ``max`` forgets NaN, so the last one met is put aside."""
        now = acc[lanes(0, count)]
        if self.pool.pooling == "avg":
            store(acc, now + value, lanes(0, count))
            return
        value, found = let(value), self.not_numbers[acc]
        store(found, tirx.Select(tirx.isnan(value), value, found[lanes(0, count)]), lanes(0, count))
        store(acc, tirx.max(now, value), lanes(0, count))
