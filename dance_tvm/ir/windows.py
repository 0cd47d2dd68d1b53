"""Geometry of a graph's convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax

from dance_tvm.ir.graph import Graph, constant, dtype_of, is_tensor, shape_of
from dance_tvm.schedules.geometry import WIDTH, Triple, Window, added, triple

CONVOLUTIONS = {"nn.conv2d", "nn.conv3d"}
MAX_POOLS = {"nn.max_pool2d", "nn.max_pool3d"}
POOLS = {*MAX_POOLS, "nn.avg_pool2d", "nn.avg_pool3d"}


def window_of(graph: Graph, var: relax.Var) -> Window | None:
    """The window of a convolution or pool whose data has channels innermost; 2D ones get depth 1."""
    name = graph.op(var)
    if name not in CONVOLUTIONS and name not in POOLS:
        return None
    attrs = graph.call(var).attrs
    layout = str(attrs.data_layout if name in CONVOLUTIONS else attrs.layout)
    return _window(graph, var, slice(1, -1)) if layout.endswith("C") else None


def planar_window_of(graph: Graph, var: relax.Var) -> Window | None:
    """The same where channels come first."""
    name = graph.op(var)
    if name not in CONVOLUTIONS and name not in POOLS:
        return None
    attrs = graph.call(var).attrs
    layout = str(attrs.data_layout if name in CONVOLUTIONS else attrs.layout)
    return _window(graph, var, slice(2, None)) if layout.startswith("NC") else None


def _window(graph: Graph, var: relax.Var, positions: slice) -> Window:
    call = graph.call(var)
    attrs, data = call.attrs, shape_of(call.args[0])
    rank = len(data) - 2
    kernel = shape_of(call.args[1])[2:] if graph.op(var) in CONVOLUTIONS else attrs.pool_size
    padding = [int(pad) for pad in attrs.padding]
    return Window(
        data[0],
        _triple(data[positions], 1),
        _triple(shape_of(var)[positions], 1),
        _triple(kernel, 1),
        _triple(attrs.strides, 1),
        _triple(padding[:rank], 0),
        _triple(attrs.dilation, 1),
    )


def is_planar_convolution(graph: Graph, var: relax.Var) -> bool:
    """Whether a convolution whose channels come first is a matrix product over all positions of each clip."""
    call, window = graph.call(var), planar_window_of(graph, var)
    weight = constant(call.args[1])
    if window is None or weight is None or int(call.attrs.groups) != 1 or str(weight.dtype) != "float32":
        return False
    data = call.args[0]
    if not isinstance(data, relax.Var) or not is_tensor(data) or dtype_of(data) != "float32":
        return False
    return window.taps == 1 and window.size == window.out and not any(window.padding)


def is_planar_pool(graph: Graph, var: relax.Var) -> bool:
    """Whether ``var`` is a pool of maxima whose channels come first, over lines of which every window or every second
    one is taken."""
    window = planar_window_of(graph, var)
    known = window is not None and is_tensor(var) and dtype_of(var) == "float32" and window.stride[WIDTH] <= 2
    return known and graph.op(var) in MAX_POOLS


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
