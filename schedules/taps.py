"""Which taps of a window read inside the clip, found out when a kernel runs."""

from __future__ import annotations

from tvm import tirx

from .emit import Expr, let
from .geometry import Window


def taps_inside(window: Window, axis: int, start: Expr, before: int = 0, behind: int = 0) -> tuple[Expr, Expr]:
    """The first tap of ``axis`` inside the clip, widened by so much on either side, and the one past the last: of a
    window that begins at ``start``. Where none is inside the second may be less than the first."""
    step = window.dilation[axis]
    first = tirx.floordiv(step - 1 - before - start, step)
    past = tirx.floordiv(window.size[axis] + behind - start + step - 1, step)
    return tirx.max(0, first), tirx.min(window.kernel[axis], past)


def span(window: Window, axis: int, index: Expr) -> tuple[Expr, Expr, Expr]:
    """Where output ``index`` begins to read on an axis, and its taps inside the clip: first, past the last."""
    start = let(index * window.stride[axis] - window.padding[axis])
    if window.classes[axis] == (tuple(range(window.kernel[axis])),):
        return start, 0, window.kernel[axis]
    first, past = taps_inside(window, axis, start)
    first = let(first)
    return start, first, let(tirx.max(first, past))
