"""Carry a mask through a sliding window on a processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx

from .. import mask_window
from ..emit import Expr, let, number, serial, store, when
from ..geometry import Window


@dataclass(frozen=True)
class GrownMask(mask_window.GrownMask):
    """The kernel for a processor."""

    @property
    def name(self) -> str:
        """The kernel's name."""
        return "mask_forward" if self.forward else "mask_backward"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Visit every tap of every output position."""
        window, field, shape, forward = self.window, self.field, self.shape, self.forward
        mask, grown = args.values()
        source = window.size if forward else window.out
        spans = [field[axis + 1] != 1 or source[axis] == 1 for axis in range(3)]
        out_shape = shape if forward else field
        if not forward:
            with serial(shape[0]) as n, serial(shape[1]) as t, serial(shape[2]) as h, serial(shape[3]) as w:
                store(grown, number(0.0), n, t, h, w)
        with (
            serial(field[0]) as n,
            serial(out_shape[1]) as t,
            serial(out_shape[2]) as h,
            serial(out_shape[3]) as w,
        ):
            if forward:
                store(grown, number(0.0), n, t, h, w)
                _each_tap(window, spans, (t, h, w), lambda at: _raise(grown, mask[n, at[0], at[1], at[2]], n, t, h, w))
            else:
                with when(mask[n, t, h, w] != number(0.0)):
                    _each_tap(window, spans, (t, h, w), lambda at: store(grown, number(1.0), n, *at))


def _raise(grown: tirx.Buffer, value: Expr, *at: Expr) -> None:
    with when(value != number(0.0)):
        store(grown, number(1.0), *at)


def _each_tap(
    window: Window, spans: list[bool], out: tuple[Expr, Expr, Expr], visit: Callable[[list[Expr]], None]
) -> None:
    """Call ``visit`` for every input coordinate that output ``out`` reads inside the clip."""
    extents = [window.kernel[axis] if spans[axis] else 1 for axis in range(3)]
    with serial(extents[0]) as f, serial(extents[1]) as r, serial(extents[2]) as c:
        at: list[Expr] = []
        inside: list[Expr] = []
        for axis, tap in enumerate((f, r, c)):
            if not spans[axis]:
                at.append(0)
                continue
            place = let(out[axis] * window.stride[axis] - window.padding[axis] + tap * window.dilation[axis])
            at.append(place)
            inside += [place >= 0, place < window.size[axis]]
        if not inside:
            visit(at)
            return
        with when(tirx.all(*inside)):
            visit(at)
