"""Geometry of a graph's convolutions and pools."""

from __future__ import annotations

from tvm import relax

from dance_tvm.schedules.geometry import Window

from .graph import Graph, shape_of

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


def _triple(values: object, fill: int) -> tuple[int, int, int]:
    items = [int(value) for value in values]  # type: ignore[attr-defined]
    return (*[fill] * (3 - len(items)), *items)  # type: ignore[return-value]
