"""Tile sizes of the depthwise convolution: a model of its registers, its instructions and its caches."""

from __future__ import annotations

from ..convolution import LayerKernel
from ..geometry import Window
from ..layer import Choice, Layer
from .depthwise import TIME, DepthwiseConv, DepthwiseTile, line_axis, why_no_depthwise
from .tiles import CHAINS_TO_HIDE_LATENCY, Machine

#: Outputs of one tile that are tried.
MOST_OUTPUTS = 16
#: Cycles of a tile beside its multiplies: addresses, the loop over lines of taps, storing.
TILE_CYCLES, LINE_CYCLES = 12.0, 3.0
#: Cycles of an output for each pass over the channels: parts of its cache lines are read again.
PASS_CYCLES = 3.0
#: Share of the second-level cache that the lines of one block of rows may take, over all frames.
ROWS_SHARE_OF_L2 = 0.3


def fits(machine: Machine, taps: int, mr: int, vectors: int) -> bool:
    """Whether sums, the weights of one line of taps and one input fit in the registers."""
    return mr * vectors + taps + 1 <= machine.registers


def default_tile(
    machine: Machine, window: Window, channels_out: int, masked_frames: bool = False, threads: int = 1
) -> DepthwiseTile:
    """The tile with the fewest predicted cycles, its rows sized to the second-level cache."""
    axis = line_axis(window, masked_frames)
    taps, extent = window.kernel[axis], window.out[axis]
    lines = window.taps // taps
    lanes = min(machine.vector_floats, 1 << (channels_out.bit_length() - 1))
    vectors = -(-channels_out // lanes)

    def cycles(mr: int, abreast: int) -> float:
        multiplies = mr * taps * abreast / 2
        loads = ((mr - 1) * window.stride[axis] + 2 * taps) * abreast / 2
        latency = taps * CHAINS_TO_HIDE_LATENCY / 2 if mr * abreast < CHAINS_TO_HIDE_LATENCY else 0.0
        tile = lines * (max(multiplies, loads, latency) + LINE_CYCLES) + TILE_CYCLES
        passes = -(-vectors // abreast)
        return passes * (-(-extent // mr) * tile + PASS_CYCLES * extent)

    options = [
        (mr, abreast)
        for abreast in range(1, min(4, vectors) + 1)
        for mr in range(1, min(extent, MOST_OUTPUTS) + 1)
        if fits(machine, taps, mr, abreast)
    ] or [(1, 1)]
    mr, abreast = min(options, key=lambda option: cycles(*option))
    return DepthwiseTile(mr, abreast, machine.vector_floats, default_rows(machine, window, axis, channels_out, threads))


def default_rows(machine: Machine, window: Window, axis: int, channels_out: int, threads: int) -> int:
    """Rows of a block: as many as the cache holds of all frames, and no more than leave each thread a block."""
    second = window.out[2] if axis == TIME else window.out[1]
    across = 1 if axis == TIME else window.size[2] * window.stride[1]
    row_bytes = machine.element_bytes * channels_out * window.size[0] * across
    fitting = max(4, int(ROWS_SHARE_OF_L2 * machine.l2) // row_bytes)
    blocks = max(-(-second // fitting), min(second, -(-threads // window.batch)))
    return -(-second // blocks)


def offer(layer: Layer, machine: Machine, _wanted: str, _log: object) -> Choice[LayerKernel] | None:
    """The depthwise kernel, which leaves out frames and no single positions."""
    channels = (layer.channels_in, layer.channels_out, layer.groups)
    machine = machine.storing(layer.dtype)
    if layer.groups == 1 or layer.positions is not None or layer.in_positions is not None:
        return None
    if why_no_depthwise(layer.window, *channels, machine.vector_floats):
        return None
    masked = layer.in_frames or layer.out_frames
    conv = DepthwiseConv(
        layer.window,
        layer.channels_in,
        layer.channels_out,
        default_tile(machine, layer.window, layer.channels_out, masked, layer.threads),
        layer.in_frames,
        layer.out_frames,
        layer.residual,
        layer.activation,
        layer.zero_dead == "all",
        layer.dtype,
    )
    return Choice(conv)
