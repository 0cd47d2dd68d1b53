"""Transposed convolutions as ordinary ones over their input spread out by zeros, which are never multiplied.

Along an axis output ``o`` reads spread position ``o − padding + tap``. Outputs of one *phase*, a remainder of ``o``
by the spread, read every ``spread``-th tap, and these lie on positions of the input that follow one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .geometry import Triple, Window, triple


@dataclass(frozen=True)
class Phase:
    """Along one axis: the first tap that outputs of a phase read, how many in steps of the spread, the input position
    at the first tap of the phase's first output, and how many outputs the phase has."""

    first: int
    taps: int
    source: int
    outputs: int


@dataclass(frozen=True)
class Spread:
    """``window`` slides over the spread input with stride 1; its taps are those of the transposed weights, turned."""

    window: Window
    spread: Triple

    @property
    def size(self) -> Triple:
        """The extents of the input itself."""
        return triple(-(-extent // step) for extent, step in zip(self.window.size, self.spread, strict=True))

    def phase(self, axis: int, remainder: int) -> Phase:
        """The outputs along ``axis`` that leave ``remainder``."""
        step, padding = self.spread[axis], self.window.padding[axis]
        first = (padding - remainder) % step
        taps = max(0, -(-(self.window.kernel[axis] - first) // step))
        source = (remainder - padding + first) // step
        return Phase(first, taps, source, max(0, -(-(self.window.out[axis] - remainder) // step)))

    def phases(self, axis: int) -> list[Phase]:
        """All phases of an axis."""
        return [self.phase(axis, remainder) for remainder in range(self.spread[axis])]

    def within(self, axis: int, remainder: int) -> Window:
        """One phase of one axis as an ordinary convolution along it."""
        phase, one = self.phase(axis, remainder), (1, 1, 1)

        def only(value: int, other: int = 1) -> Triple:
            return triple(value if at == axis else other for at in range(3))

        sizes = only(self.size[axis]), only(phase.outputs), only(phase.taps)
        return Window(self.window.batch, *sizes, one, only(-phase.source, 0))

    @property
    def width_taps(self) -> list[int]:
        """Taps along the width, those of a phase side by side."""
        return [phase.first + at * self.spread[2] for phase in self.phases(2) for at in range(phase.taps)]

    @property
    def tiles_output(self) -> bool:
        """Whether every output reads one tap, and no position of the output is without: windows side by side."""
        window = self.window
        side_by_side = window.kernel == self.spread and window.padding == triple(k - 1 for k in window.kernel)
        return side_by_side and window.out == triple(n * s for n, s in zip(self.size, self.spread, strict=True))

    @property
    def tap_positions(self) -> int:
        """Pairs of output position and tap that is not on a zero."""
        per_axis = []
        for axis in range(3):
            windows = [self.within(axis, remainder) for remainder in range(self.spread[axis])]
            per_axis.append(sum(len(w.live_taps(axis, at)) for w in windows for at in range(w.out[axis])))
        return self.window.batch * math.prod(per_axis)
