"""Carry a mask through a sliding window on a GPU: one thread an element of the grown mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from .. import mask_window
from ..emit import Expr, let, number, serial, store, when
from ..geometry import Window
from ..mask_window import Field
from .emit import each_element, registers


@dataclass(frozen=True)
class GrownMask(mask_window.GrownMask):
    """The kernel for a GPU."""

    name = "mask_grown_gpu"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Search what each element would be grown from."""
        window, field, shape, forward = self.window, self.field, self.shape, self.forward
        mask, grown = args.values()
        with each_element(shape[0] * shape[1] * shape[2] * shape[3]) as index:
            clip, at = _place(index, shape)
            found = registers((1,))
            store(found, number(0.0), 0)
            taps = [1 if field[axis + 1] == 1 and _extent(window, forward, axis) != 1 else window.kernel[axis]
                    for axis in range(3)]  # fmt: skip
            with serial(taps[0]) as f, serial(taps[1]) as r, serial(taps[2]) as c:
                source: list[Expr] = []
                inside: list[Expr] = []
                for axis, tap in enumerate((f, r, c)):
                    if field[axis + 1] == 1 and _extent(window, forward, axis) != 1:
                        source.append(0)
                        continue
                    place, fits = _source(window, axis, at[axis], tap, forward)
                    inside += [*fits, place >= 0, place < field[axis + 1]]
                    source.append(tirx.max(tirx.min(place, field[axis + 1] - 1), 0))
                with when(tirx.all(mask[clip, source[0], source[1], source[2]] != number(0.0), *inside)):
                    store(found, number(1.0), 0)
            store(grown, found[0], clip, *at)


def _extent(window: Window, forward: bool, axis: int) -> int:
    return (window.size if forward else window.out)[axis]


def _place(index: Expr, shape: Field) -> tuple[Expr, list[Expr]]:
    """Clip and coordinates of an element."""
    _, frames, height, width = shape
    column, line = tirx.truncmod(index, width), let(tirx.truncdiv(index, width))
    row, frame = tirx.truncmod(line, height), let(tirx.truncdiv(line, height))
    return let(tirx.truncdiv(frame, frames)), [let(tirx.truncmod(frame, frames)), let(row), let(column)]


def _source(window: Window, axis: int, at: Expr, tap: Expr, forward: bool) -> tuple[Expr, list[Expr]]:
    """The coordinate of the other side that meets ``at`` through ``tap``, and conditions under which there is one."""
    stride, padding, dilation = window.stride[axis], window.padding[axis], window.dilation[axis]
    if forward:
        return let(at * stride - padding + tap * dilation), []
    steps = let(at + padding - tap * dilation)
    if stride == 1:
        return steps, []
    return let(tirx.floordiv(steps, stride)), [tirx.floormod(steps, stride) == 0]
