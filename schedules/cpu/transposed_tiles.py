"""Which kernel and tile a transposed convolution gets."""

from __future__ import annotations

from dataclasses import replace

from ..convolution import LayerKernel
from ..geometry import WIDTH, Window
from ..layer import Choice, Layer
from ..spread import Spread
from ..workload import LINE, POINTWISE, Workload
from .conv3d_transposed import TransposedConv
from .line_tiles import LineSpace
from .pointwise_tiles import PointwiseSpace, PointwiseTile
from .row_tiles import RowTile
from .tiles import Machine


def offer(layer: Layer, machine: Machine, _wanted: str, _log: object) -> Choice[LayerKernel] | None:
    """The kernel of a transposed convolution: over all positions where windows lie side by side, else along lines."""
    if layer.spread is None:
        return None
    geometry = Spread(layer.window, layer.spread)
    tile = _tile(machine.storing(layer.dtype), geometry, layer)
    behind = layer.residual, layer.activation, layer.dtype
    return Choice(TransposedConv(layer.window, layer.spread, layer.channels_in, layer.channels_out, tile, *behind))


def _tile(machine: Machine, geometry: Spread, layer: Layer) -> RowTile:
    """The tile of an ordinary convolution like one phase."""
    window, size = geometry.window, geometry.size
    like = Workload(window, layer.channels_in, layer.channels_out, threads=layer.threads)
    if geometry.tiles_output:
        pointwise = Window(window.batch, size, size, (1, 1, 1))
        space = PointwiseSpace(machine, replace(like, window=pointwise, family=POINTWISE))
        return PointwiseTile(vector_floats=machine.vector_floats, **{**space.default(), "splits": 1})
    phase = max(geometry.phases(WIDTH), key=lambda each: (each.taps, each.outputs))
    taps = tuple(-(-k // s) for k, s in zip(window.kernel, geometry.spread, strict=True))
    out = (window.out[0], window.out[1], max(1, phase.outputs))
    line = Window(window.batch, size, out, (taps[0], taps[1], max(1, phase.taps)))
    return RowTile(
        vector_floats=machine.vector_floats, **LineSpace(machine, replace(like, window=line, family=LINE)).default()
    )
