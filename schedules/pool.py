"""What max and average pools have in common, on a CPU and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from .emit import FLOAT, Expr
from .geometry import Triple, Window
from .kernel import Kernel, Operand, output
from .plans import masks_of
from .taps import taps_inside

#: What a maximum starts from: less than any number.
LOWEST = -math.inf


@dataclass(frozen=True)
class Pool(Kernel):
    """One pooling kernel. ``in_frames``/``out_frames`` say which masks are given, as in the row plan.

    ``in_positions`` and ``positions``: how many clips and frames the mask of input and output positions tells apart,
    None where there is none. What is dead of the input is not read and counts as zeros; an output position that nobody
    reads, in a frame that somebody does, is set to zero; such a frame if ``zero_dead``, else it is left alone. An
    average divides by the taps that lie inside the clip or in the ``counted`` padding, before and behind it on each
    axis.
    """

    kind = "pool"
    window: Window
    channels: int
    pooling: Literal["max", "avg"]
    counted: tuple[Triple, Triple] = ((0, 0, 0), (0, 0, 0))
    in_frames: bool = False
    out_frames: bool = False
    zero_dead: bool = True
    in_positions: tuple[int, int] | None = None
    positions: tuple[int, int] | None = None
    #: How activations are stored.
    dtype: str = FLOAT

    @property
    def masks(self) -> dict[str, Operand]:
        """The masks that the kernel takes."""
        return masks_of(self.window, self.in_frames, self.out_frames, self.positions, self.in_positions)

    def operands(self) -> list[Operand]:
        """x (N, T, H, W, C), the masks, y (N, T', H', W', C)."""
        batch, size, out = self.window.batch, self.window.size, self.window.out
        x = Operand("x", (batch, *size, self.channels), self.dtype)
        return [x, *self.masks.values(), output("y", (batch, *out, self.channels), self.dtype)]

    def divisor(self, starts: Sequence[Expr]) -> Expr:
        """int32: how many taps count in the average over the window that begins at ``starts``."""
        taps: Expr = tirx.IntImm("int32", 1)
        for axis, start in enumerate(starts):
            before, behind = (side[axis] for side in self.counted)
            counts = {self._counted(axis, index, before, behind) for index in range(self.window.out[axis])}
            if len(counts) > 1:
                first, past = taps_inside(self.window, axis, start, before, behind)
                taps = taps * tirx.max(past - first, 0)
            else:
                taps = taps * counts.pop()
        return taps

    def _counted(self, axis: int, index: int, before: int, behind: int) -> int:
        window = self.window
        sources = [window.source(axis, index, tap) for tap in range(window.kernel[axis])]
        return sum(-before <= source < window.size[axis] + behind for source in sources)
