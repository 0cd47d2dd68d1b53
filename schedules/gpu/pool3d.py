"""Max and average pooling on a GPU: one thread per output value, over the frames that are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import FLOAT, Expr, choose, flat, let, number, read, serial, short, store, when, write
from ..pool import LOWEST, Pool
from ..taps import span
from .emit import each_element, registers


@dataclass(frozen=True)
class BlockPool(Pool):
    """As :class:`..pool.Pool`; ``dtype`` is how activations are stored."""

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"pool3d_{self.pooling}_gpu_{short(self.dtype)}"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """One thread per output value."""
        window, channels = self.window, self.channels
        out_t, out_h, out_w = window.out
        in_frames, out_frames = args.get("in_frames"), args.get("out_frames")
        x, y = flat(args["x"]), flat(args["y"])
        with each_element(window.positions_out * channels) as index:
            channel, position = let(tirx.truncmod(index, channels)), let(tirx.truncdiv(index, channels))
            column, line = tirx.truncmod(position, out_w), let(tirx.truncdiv(position, out_w))
            row, frame = tirx.truncmod(line, out_h), let(tirx.truncdiv(line, out_h))
            clip, of_clip = let(tirx.truncdiv(frame, out_t)), let(tirx.truncmod(frame, out_t))

            def compute() -> None:
                write(y, _pooled(self, x, in_frames, clip, (of_clip, row, column), channel), index)

            if out_frames is None:
                compute()
            else:
                alive = let(out_frames[clip, of_clip] != number(0.0))
                with when(alive):
                    compute()
                if self.zero_dead:
                    with when(tirx.Not(alive)):
                        write(y, number(0.0), index)


def _pooled(
    pool: BlockPool,
    x: tirx.Buffer,
    in_frames: tirx.Buffer | None,
    clip: Expr,
    at: tuple[Expr, Expr, Expr],
    channel: Expr,
) -> Expr:
    """One output value."""
    window = pool.window
    size_t, size_h, size_w = window.size
    starts, begins, ends = zip(*(span(window, axis, index) for axis, index in enumerate(at)), strict=True)
    counts = [let(end - begin) for begin, end in zip(begins, ends, strict=True)]
    acc = registers((1,))
    store(acc, number(LOWEST if pool.pooling == "max" else 0.0), 0)

    def combine(value: Expr) -> None:
        value = let(value)
        if pool.pooling == "avg":
            store(acc, acc[0] + value, 0)
        else:  # ``max`` would forget NaN
            with when(tirx.any(acc[0] < value, tirx.isnan(value))):
                store(acc, value, 0)

    with serial(counts[0]) as f:
        frame = let(starts[0] + (begins[0] + f) * window.dilation[0])

        def read_frame() -> None:
            with serial(counts[1]) as r, serial(counts[2]) as c:
                row = starts[1] + (begins[1] + r) * window.dilation[1]
                column = starts[2] + (begins[2] + c) * window.dilation[2]
                position = ((clip * size_t + frame) * size_h + row) * size_w + column
                combine(read(x, position * pool.channels + channel))

        if in_frames is None:
            read_frame()
        else:
            choose(let(in_frames[clip, frame] != number(0.0)), read_frame, lambda: combine(number(0.0)))
    if pool.pooling == "max":
        return acc[0]
    return acc[0] / tirx.Cast(FLOAT, pool.divisor(starts))
