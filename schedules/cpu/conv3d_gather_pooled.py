"""A convolution over lists and the max pool behind it in one kernel, one after the other.

It stores all that the pool reads, and saves nothing by itself: it stands beside a kernel that does (`either.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from tvm import tirx

from ..emit import Expr, big, flat, lanes, let, parallel, scratch, serial, store, when
from .conv3d_gather import GatherConv
from .dead_outputs import is_read, zero_dead
from .ends_in_pool import EndsInPool
from .pool3d import Area, Lot, PoolEmitter, VectorPool


@dataclass(frozen=True)
class PooledGather(EndsInPool, GatherConv):
    """A convolution over lists, and a max pool of ``pool`` frames, rows and columns behind it.

    Masks are those of the convolution's own outputs: what they leave out counts as zeros, where somebody reads others
    under the same window. ``zero_dead`` is of the pool's.
    """

    @property
    def marks(self) -> str:
        """The pool, and the lists of channels."""
        return f"_pool{super().marks}"

    @property
    def scratch_bytes(self) -> int:
        """The convolution's outputs."""
        return self._plain.outputs()[0].bytes

    @property
    def masks_read(self) -> list[str]:
        """What is wanted of the output."""
        return [key for key in self.plan.masks if key in ("out_frames", "positions")]

    @property
    def _plain(self) -> GatherConv:
        """The convolution alone, with zeros wherever it computes nothing: so maxima are of what was written."""
        given: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(GatherConv)}
        return GatherConv(**given | {"zero_dead": "all" if self.masks_read or self.live_out else ""})

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """The convolution, then maxima of what somebody reads."""
        plain, y = self._plain, flat(args["y"])
        between = scratch(plain.y_shape, self.dtype)
        plain.emit({**args, "y": between})
        if self.zero_dead:
            zero_dead(self, args, y, self.pool)
        outer, floats = self.pool_window, self.tile.vector_floats
        pool = VectorPool(outer, self.channels_out, "max", dtype=self.dtype)
        maxima, whole = PoolEmitter(pool, {"x": between, "y": y}), self.channels_out // floats
        frames, rows, columns = self.pool
        with parallel(outer.batch * outer.out[0] * outer.out[1]) as line:
            row = let(tirx.floormod(line, outer.out[1]))
            frame = let(tirx.floormod(tirx.floordiv(line, outer.out[1]), outer.out[0]))
            clip = let(tirx.floordiv(line, outer.out[0] * outer.out[1]))
            area = Area(clip, (let(frame * frames), 0, frames), (let(row * rows), 0, rows))
            with self._read(args, (clip, frame, row)) as column:
                target = let(big(line * outer.out[2] + column) * self.channels_out)
                span = let(column * columns), 0, columns
                for first, count, lots in ((0, floats, whole), (whole * floats, 1, self.channels_out - whole * floats)):
                    with serial(lots) as lot:
                        channel = let(first + lot * count)
                        (value,) = maxima.reduced(area, span, channel, Lot(1, count))
                        store(y, value, lanes(target + channel, count))

    @contextmanager
    def _read(self, args: Mapping[str, tirx.Buffer], line: tuple[Expr, Expr, Expr]) -> Iterator[Expr]:
        """Loop over the pool's outputs of a line (clip, frame, row) of which somebody reads something."""
        with serial(self.pool_window.out[2]) as column, when(is_read(self.plan, args, (*line, column), self.pool)):
            yield column
