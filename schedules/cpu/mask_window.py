"""Carry a mask through a sliding window: forward (what a window touches) and backward (what windows read)."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from ..emit import Expr, argument, kernel, let, number, serial, store, when
from ..geometry import Window, triple

Field = tuple[int, int, int, int]


def grow_forward(window: Window, field: Field, name: str = "mask_forward") -> tirx.PrimFunc:
    """Output alive where any input that its window reads is: field (N, T, H, W) → (N, T', H', W').

    Axes of extent 1 in ``field`` that are longer in the window are broadcast axes and stay of extent 1.
    """
    return _grow(window, field, name, forward=True)


def grow_backward(window: Window, field: Field, name: str = "mask_backward") -> tirx.PrimFunc:
    """Input read where any living output's window reads it: field (N, T', H', W') → (N, T, H, W)."""
    return _grow(window, field, name, forward=False)


def grown_shape(window: Window, field: Field, forward: bool) -> Field:
    """Shape of the grown field."""
    source, target = (window.size, window.out) if forward else (window.out, window.size)
    extents = (1 if field[axis + 1] == 1 and source[axis] != 1 else target[axis] for axis in range(3))
    return (field[0], *triple(extents))


def _grow(window: Window, field: Field, name: str, forward: bool) -> tirx.PrimFunc:
    shape = grown_shape(window, field, forward)
    source = window.size if forward else window.out
    spans = [field[axis + 1] != 1 or source[axis] == 1 for axis in range(3)]
    with kernel(name) as built:
        mask = argument("mask", field)
        grown = argument("grown", shape)
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
    return built.func


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
