"""Carry a mask through a sliding window on a processor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

from tvm import tirx

from .. import mask_window
from ..emit import FLOAT, Expr, clear, flat, lanes, let, number, scratch, serial, store
from ..geometry import Triple, triple

BYTE = "uint8"
#: Bytes that are worked on together: a cache line.
LINE_BYTES = 64


@dataclass(frozen=True)
class _Axis:
    """How one axis grows in a box of bytes that holds padding too, so that no tap has to be tested.

    Entry ``i`` of the mask is placed at ``place[0] + i · place[1]``; every entry of the box then becomes the union of
    itself and those ``reach`` behind it; entry ``o`` of the result is picked at ``pick[0] + o · pick[1]``.
    """

    length: int
    place: tuple[int, int]
    pick: tuple[int, int]
    reach: tuple[int, ...]


@dataclass(frozen=True)
class GrownMask(mask_window.GrownMask):
    """The kernel for a processor.

    A window is a box: what it reaches along one axis grows along the next. All entries grow alike, in whole cache lines
    of bytes: of loops over few entries LLVM makes much code, which a call that runs it once has to fetch.
    """

    @property
    def name(self) -> str:
        """The kernel's name."""
        return "mask_forward" if self.forward else "mask_backward"

    @cached_property
    def axes(self) -> list[_Axis]:
        """The axes of the box, frames first."""
        return [self._axis(axis) for axis in range(3)]

    def _axis(self, axis: int) -> _Axis:
        window, entries, grown = self.window, self.field[axis + 1], self.shape[axis + 1]
        if entries == 1 and (window.size if self.forward else window.out)[axis] != 1:
            return _Axis(1, (0, 1), (0, 1), ())
        stride, padding = window.stride[axis], window.padding[axis]
        reach = tuple(tap * window.dilation[axis] for tap in range(1, window.kernel[axis]))
        furthest = max(reach, default=0)
        place, pick = ((padding, 1), (0, stride)) if self.forward else ((furthest, stride), (padding, 1))
        ends = [first + (count - 1) * step for (first, step), count in ((place, entries), (pick, grown))]
        return _Axis(max(ends[0], ends[1] + furthest) + 1, place, pick, reach)

    @property
    def extents(self) -> Triple:
        """Extents of the box."""
        return triple(axis.length for axis in self.axes)

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Ones where the mask is alive, grown axis by axis."""
        mask, grown = (flat(buffer) for buffer in args.values())
        steps = [math.prod(self.extents[axis + 1 :]) for axis in range(3)]
        reaches = [[distance * step for distance in axis.reach] for axis, step in zip(self.axes, steps, strict=True)]
        whole = -(-math.prod(self.extents) // LINE_BYTES)
        box = scratch((whole * LINE_BYTES + max(map(max, filter(None, reaches)), default=0),), BYTE)

        def place(at: Expr, entry: Expr) -> None:
            store(box, tirx.Cast(BYTE, mask[at] != number(0.0)), entry)

        def pick(at: Expr, entry: Expr) -> None:
            store(grown, tirx.Cast(FLOAT, box[entry]), at)

        with serial(self.field[0]) as n:
            clear(box)
            self._each(n, self.field, [axis.place for axis in self.axes], place)
            for reach in filter(None, reaches):
                with serial(whole) as line:
                    start = let(line * LINE_BYTES)
                    entries = [box[lanes(start + distance, LINE_BYTES)] for distance in (0, *reach)]
                    store(box, reduce(tirx.bitwise_or, entries), lanes(start, LINE_BYTES))
            self._each(n, self.shape, [axis.pick for axis in self.axes], pick)

    def _each(
        self, n: Expr, field: mask_window.Field, places: list[tuple[int, int]], visit: Callable[[Expr, Expr], None]
    ) -> None:
        """``visit`` each entry of one clip of ``field``, and where in the box it is."""
        _, frames, height, width = field
        _, rows, columns = self.extents
        with serial(frames) as frame, serial(height) as row, serial(width) as column:
            at = ((n * frames + frame) * height + row) * width + column
            x, y, z = (first + at * step for at, (first, step) in zip((frame, row, column), places, strict=True))
            visit(at, (x * rows + y) * columns + z)
