"""Carry a mask through a sliding window on a processor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from .. import mask_window
from ..emit import Expr, flat, let, number, scratch, serial, store


@dataclass(frozen=True)
class GrownMask(mask_window.GrownMask):
    """The kernel for a processor.

    A window is a box: what it reaches along one axis grows along the next. Loops over what one tap reaches have no
    branch, so that they become vectors.
    """

    @property
    def name(self) -> str:
        """The kernel's name."""
        return "mask_forward" if self.forward else "mask_backward"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Zeros and ones first, then axis by axis, the last into the result."""
        mask, grown = (flat(buffer) for buffer in args.values())
        ends = self.window.size if self.forward else self.window.out
        axes = [axis for axis in range(3) if self.field[axis + 1] != 1 or ends[axis] == 1]
        extents = [*self.field[1:]]
        with serial(self.field[0]) as n:
            result = let(n * math.prod(self.shape[1:]))
            current = scratch((math.prod(extents),)) if axes else grown
            start = 0 if axes else result
            with serial(math.prod(extents)) as at:
                alive = mask[n * math.prod(extents) + at] != number(0.0)
                store(current, tirx.Select(alive, number(1.0), number(0.0)), start + at)
            for axis in axes:
                final = axis == axes[-1]
                wider = [*extents[:axis], self.shape[axis + 1], *extents[axis + 1 :]]
                target = grown if final else scratch((math.prod(wider),))
                self._grow(axis, extents, current, target, result if final else 0)
                current, extents = target, wider

    def _grow(self, axis: int, extents: list[int], mask: tirx.Buffer, grown: tirx.Buffer, start: Expr) -> None:
        """Along one axis, a ``mask`` of these extents into ``grown`` from ``start`` on."""
        window, length = self.window, self.shape[axis + 1]
        stride, size, out = window.stride[axis], window.size[axis], window.out[axis]
        outer, inner = math.prod(extents[:axis]), math.prod(extents[axis + 1 :])
        with serial(outer * length * inner) as at:
            store(grown, number(0.0), start + at)
        with serial(outer) as line, serial(window.kernel[axis]) as tap:
            shift = let(tap * window.dilation[axis] - window.padding[axis])
            first = let(tirx.max(0, tirx.floordiv(stride - 1 - shift, stride)))
            last = let(tirx.min(out, tirx.floordiv(size - 1 - shift, stride) + 1))
            with serial(tirx.max(last - first, 0)) as index, serial(inner) as within:
                inside = (first + index) * stride + shift
                read, written = (inside, first + index) if self.forward else (first + index, inside)
                place = let(start + (line * length + written) * inner + within)
                value = mask[(line * extents[axis] + read) * inner + within]
                store(grown, tirx.max(grown[place], value), place)
