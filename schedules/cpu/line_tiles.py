"""Tile sizes of the convolution along lines: a model of its time, and its tuning space."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..geometry import HEIGHT, TIME, WIDTH, Window
from ..workload import LINE, Workload
from .cost import seconds_per_cycle
from .row_space import L2_BYTES, TILE_CYCLES, VECTOR_CYCLES, RowSpace, put_cycles
from .row_tiles import joined, panel_widths
from .space import Loops
from .tiles import CHAINS_TO_HIDE_LATENCY, Machine, tap_tiles

#: Bytes a cycle that come from beyond the second-level cache, where weights that take more than this share of it are:
#: every line of outputs reads them all.
L3_BYTES, WEIGHTS_SHARE_OF_L2 = 6.0, 0.6
#: Cycles that the gathered convolution takes for the address of a row at a tap, and for a vector of partial sums.
ADDRESS_CYCLES, PARTIAL_CYCLES = 2.0, 6.0
#: Input channels up to which the addresses of rows, or Winograd's transforms, take longer than the multiplies.
FEW_CHANNELS = 8
#: Cycles of a tile for each line of taps.
LINE_CYCLES = 6.0


def tap_lines(window: Window) -> int:
    """Pairs of line of outputs and line of taps inside the clip."""
    live = [sum(len(window.live_taps(axis, index)) for index in range(window.out[axis])) for axis in (TIME, HEIGHT)]
    return window.batch * live[0] * live[1]


def predicted_cycles(
    machine: Machine, window: Window, channels: tuple[int, int], tile: tuple[int, int, int], groups: int = 1
) -> float:
    """Cycles of one thread for the layer with register tiles of (rows, vectors, step)."""
    mr, most, step = tile
    blocks = groups // joined(groups, channels[1] // groups, machine.vector_floats)
    depth, channels_out = (channel // blocks for channel in channels)
    tiles = -(-window.out[WIDTH] // mr)
    near = machine.element_bytes * window.taps * depth * channels[1] <= WEIGHTS_SHARE_OF_L2 * machine.l2
    lines, terms = window.positions_out // window.out[WIDTH], window.kernel[WIDTH] * depth
    total = 0.0
    for panels, vectors in panel_widths(-(-channels_out // machine.vector_floats), most):
        floats = vectors * machine.vector_floats
        far = machine.element_bytes * floats / (L2_BYTES if near else L3_BYTES)
        bound = max(mr * vectors / 2, (mr / step + vectors) / 2, far, CHAINS_TO_HIDE_LATENCY / 2)
        line = terms * (bound + 0.1 * mr / step + 0.35 * vectors) + LINE_CYCLES
        put = put_cycles(machine, terms * tap_lines(window) // lines, mr * vectors)
        store = put + VECTOR_CYCLES * mr * vectors + TILE_CYCLES
        total += panels * tiles * (tap_lines(window) * line + lines * store)
    return blocks * total


def listing_seconds(machine: Machine, workload: Workload, mr: int, vectors: int) -> float:
    """What the gathered convolution takes beside its multiplies, with tiles of ``mr`` rows × ``vectors``: an address
    for each row and tap, and partial sums that are stored and read."""
    panels = workload.groups * -(-workload.group_out // (vectors * machine.vector_floats))
    addresses = ADDRESS_CYCLES * tap_tiles(workload.window, mr) * mr
    sums = PARTIAL_CYCLES * workload.window.positions_out * vectors
    return panels * (addresses + sums) * seconds_per_cycle(machine) / workload.threads


@dataclass(frozen=True)
class LineSpace(RowSpace):
    """The decisions of the convolution along lines: those of :class:`RowSpace` alone."""

    @property
    def rows(self) -> int:
        """Outputs of a line."""
        return self.workload.window.out[WIDTH]

    @property
    def terms(self) -> int:
        """What one output reads of a line of taps that lies side by side."""
        work, blocks = self.workload, self.blocks
        return work.channels_in // blocks * (work.window.kernel[WIDTH] if blocks == 1 else 1)

    @property
    def blocks(self) -> int:
        """Blocks of groups that are computed as one."""
        work = self.workload
        return work.groups // joined(work.groups, work.group_out, self.machine.vector_floats)

    @property
    def vectors(self) -> int:
        """Vectors of a block's output channels."""
        return super().vectors // self.blocks

    def predicted(self, tile: tuple[int, int, int]) -> float:
        """As the model has it."""
        work = self.workload
        return predicted_cycles(self.machine, work.window, (work.channels_in, work.channels_out), tile, work.groups)

    def loops(self) -> Loops:
        """Outputs of a line; vectors of a panel."""
        return {"rows": ("mr",), "channels_out": ("vectors", self.machine.vector_floats)}


def line(workload: Workload) -> Workload:
    """The same layer by the convolution along lines."""
    return replace(workload, family=LINE)
