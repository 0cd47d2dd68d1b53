"""Geometry of a graph's convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tvm import relax

from dance_tvm.schedules.geometry import Triple, Window, triple
from dance_tvm.transform.graph import Graph, shape_of

CONVOLUTIONS = {"nn.conv2d", "nn.conv3d"}
POOLS = {"nn.max_pool2d", "nn.max_pool3d", "nn.avg_pool2d", "nn.avg_pool3d"}


def window_of(graph: Graph, var: relax.Var) -> Window | None:
    """The window of a convolution or pool whose data has channels innermost; 2D ones get depth 1."""
    name = graph.op(var)
    if name not in CONVOLUTIONS and name not in POOLS:
        return None
    call = graph.call(var)
    attrs = call.attrs
    data, out = shape_of(call.args[0]), shape_of(var)
    layout = attrs.data_layout if name in CONVOLUTIONS else attrs.layout
    if not layout.endswith("C"):
        return None
    rank = len(data) - 2
    kernel = shape_of(call.args[1])[2:] if name in CONVOLUTIONS else attrs.pool_size
    padding = [int(pad) for pad in attrs.padding]
    return Window(
        data[0],
        _triple(data[1:-1], 1),
        _triple(out[1:-1], 1),
        _triple(kernel, 1),
        _triple(attrs.strides, 1),
        _triple(padding[:rank], 0),
        _triple(attrs.dilation, 1),
    )


def zero_padded(graph: Graph, data: relax.Expr, window: Window) -> tuple[relax.Expr, Window] | None:
    """What ``data`` was before zeros were put around it, and ``window`` as it slides over that; None if none were.

    ``data`` has channels innermost. The zeros need not be stored for a window that knows its padding.
    """
    if graph.op(data) != "nn.pad" or any(window.padding):
        return None
    attrs = graph.call(data).attrs
    source, widths = graph.call(data).args[0], [int(width) for width in attrs.pad_width]
    around = widths[2:-2]
    if str(attrs.pad_mode) != "constant" or float(attrs.pad_value) or any(widths[:2] + widths[-2:]) or min(around) < 0:
        return None
    before = _triple(around[::2], 0)
    return source, replace(window, size=_triple(shape_of(source)[1:-1], 1), padding=before)


def _triple(values: Sequence[Any], fill: int) -> Triple:
    """At most three integers of TVM's; ``fill`` stands for the axes before them."""
    return triple([fill] * (3 - len(values)) + [int(value) for value in values])
