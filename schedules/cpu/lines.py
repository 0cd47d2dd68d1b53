"""Lines of outputs along one axis, in pieces that know which of their taps read outside the clip."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from ..emit import Expr, let, serial
from ..geometry import Window

#: What is done with a piece: its first output, and for each of its outputs the taps that read inside the clip.
Visit = Callable[[Expr, list[list[int]]], None]


def each_piece(window: Window, axis: int, mr: int, visit: Visit) -> None:
    """``visit`` pieces of at most ``mr`` outputs that together are the line: those at its ends one by one, those
    between in a loop. The last of each kind overlaps the one before."""
    extent = window.out[axis]
    mr = min(mr, extent)
    whole = list(range(window.kernel[axis]))
    taps = [list(window.live_taps(axis, index)) for index in range(extent)]
    inner = [index for index in range(extent) if taps[index] == whole]
    first, past = (inner[0], inner[-1] + 1) if inner else (extent, extent)
    if past - first < mr:  # nothing to loop over
        for begin in dict.fromkeys(min(place, extent - mr) for place in range(0, extent, mr)):
            visit(begin, taps[begin : begin + mr])
        return
    before = range(0, first, mr)
    for begin in before:
        visit(begin, taps[begin : begin + mr])
    done = len(before) * mr
    behind = range(extent - mr, past - mr, -mr) if past < extent else range(0)
    end = min(behind, default=extent)
    if end > done:
        with serial(-(-(end - done) // mr)) as index:
            visit(let(tirx.min(done + index * mr, past - mr)), [whole] * mr)
    for begin in behind:
        visit(begin, taps[begin : begin + mr])
