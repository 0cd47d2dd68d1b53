"""Geometry of a graph's convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax

from dance_tvm.ir.graph import Graph, shape_of
from dance_tvm.schedules.geometry import Triple, Window, added, triple

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


def padding_behind(graph: Graph, pool: relax.Var) -> Triple:
    """The padding behind the clip that a pool's attributes give; what ``ceil_mode`` reaches beyond it is none."""
    padding = graph.call(pool).attrs.padding
    return _triple(padding[len(padding) // 2 :], 0)


@dataclass(frozen=True)
class ZeroPadded:
    """Zeros that an operator put around what a window slides over: what lay inside, and how many on each side."""

    source: relax.Expr
    before: Triple
    behind: Triple

    def inside(self, window: Window) -> Window:
        """``window`` as it slides over what lay inside, the zeros being padding that it knows of."""
        size = _triple(shape_of(self.source)[1:-1], 1)
        return replace(window, size=size, padding=added(window.padding, self.before))


def zero_padded(graph: Graph, data: relax.Expr) -> ZeroPadded | None:
    """The zeros around ``data``, which has channels innermost; None if there are none, or not on these axes alone."""
    if graph.op(data) != "nn.pad":
        return None
    attrs = graph.call(data).attrs
    source, widths = graph.call(data).args[0], [int(width) for width in attrs.pad_width]
    around = widths[2:-2]
    if str(attrs.pad_mode) != "constant" or float(attrs.pad_value) or any(widths[:2] + widths[-2:]) or min(around) < 0:
        return None
    return ZeroPadded(source, _triple(around[::2], 0), _triple(around[1::2], 0))


def _triple(values: Sequence[Any], fill: int) -> Triple:
    """At most three integers of TVM's; ``fill`` stands for the axes before them."""
    return triple([fill] * (3 - len(values)) + [int(value) for value in values])
