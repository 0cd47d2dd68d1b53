"""Default tile sizes, from the register file and the caches of the target."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from ..emit import FLOAT
from ..geometry import Window

#: Share of the first-level cache that a segment's weights may take; rows of the input and partial sums need the rest.
WEIGHTS_SHARE_OF_L1 = 0.5
#: Share of the second-level cache that the input rows of one block may take.
ROWS_SHARE_OF_L2 = 0.4
#: The same where a block gathers its weights first: more rows share the gathering, though some come from further away.
GATHERING_ROWS_SHARE_OF_L2 = 1.0
#: Share of it that a panel of weights may take that is read again and again, and how many more cycles a tile may take
#: whose panel is so small.
PANEL_SHARE_OF_L2, HARDLY_MORE = 0.7, 1.05
#: Share of the time that blocks keep all threads at work, from which on no smaller ones are sought.
BUSY = 0.85
#: Cycles that one fused multiply-add takes until its result can be added to again, times two a cycle.
CHAINS_TO_HIDE_LATENCY = 8
#: Products in half precision that are added up before their sum goes to float32: their largest error is then 1.6e-3 of
#: a layer's largest output, whatever its depth, and the sums take a twentieth of the time (docs/kernels.md).
HALF_TERMS = 128
#: Rows of a register tile in half precision: an instruction reaches the lanes of 16 registers alone, and with more rows
#: LLVM moves inputs between memory and those.
HALF_ROWS = 8


@dataclass(frozen=True)
class Machine:
    """The facts that tile sizes and choices of kernels follow from; cache sizes in bytes."""

    vector_floats: int
    registers: int
    l1d: int
    l2: int
    broadcast_loads: bool  #: single values are broadcast from memory at no cost (x86); else lanes of a vector are used
    l3: int = 0  #: shared by the cores
    l3_gb_per_s: float = 40.0  #: that one core reads from there
    gflops: float = 50.0  #: peak of one core
    memory_gb_per_s: float = 10.0
    weights_stay: bool = False  #: the network's weights stay in the last level of cache from call to call
    element_bytes: int = 4  #: of activations and weights
    most_rows: int = 16  #: of a register tile
    most_terms: int = 1 << 30  #: products that a register of sums adds up before they are put back

    def storing(self, dtype: str) -> Machine:
        """The same machine as kernels see it that multiply what is stored as ``dtype``."""
        if dtype == FLOAT or self.element_bytes == 2:
            return self
        return replace(
            self,
            vector_floats=2 * self.vector_floats,
            gflops=2 * self.gflops,
            element_bytes=2,
            most_rows=self.most_rows if self.broadcast_loads else HALF_ROWS,
            most_terms=HALF_TERMS,
        )


@dataclass(frozen=True)
class Tile:
    """Tile sizes of one kernel.

    ``mr`` rows × ``vectors`` vectors of ``vector_floats`` lanes are accumulated in registers; ``step`` input channels
    are loaded as one vector per row (1 where single values are broadcast from memory); ``block_tiles`` tiles share
    their pass over the weights; ``segment_taps`` taps of ``depth_block`` input channels are accumulated before partial
    sums are put back. Threads share out panels of output channels first where ``panels_outer``, else blocks of rows.
    """

    mr: int
    vectors: int
    vector_floats: int
    step: int
    block_tiles: int
    segment_taps: int
    depth_block: int = 1 << 30
    panels_outer: bool = False

    @property
    def nr(self) -> int:
        """Output channels of one tile."""
        return self.vectors * self.vector_floats


def candidates(machine: Machine) -> list[tuple[int, int, int]]:
    """Every (rows, vectors, step) whose accumulators, weights and inputs fit in the registers."""
    found = []
    for vectors in range(1, 9):
        for rows in range(1, machine.most_rows + 1):
            if machine.broadcast_loads:
                step, inputs = 1, 1
            else:
                step, inputs = machine.vector_floats, rows
            weights = vectors if rows > 1 else 1
            if rows * vectors + weights + inputs <= machine.registers:
                found.append((rows, vectors, step))
    return found


def predicted_cycles(machine: Machine, rows: int, panel: int, tile: tuple[int, int, int]) -> float:
    """Cycles per (channel, tap) to compute ``rows`` × ``panel`` output channels with ``tile``, padding included."""
    return -(-rows // tile[0]) * _panel_cycles(machine, panel, tile)


def window_cycles(machine: Machine, window: Window, panel: int, tile: tuple[int, int, int]) -> float:
    """Cycles per channel to compute all positions of ``window`` × ``panel`` output channels with ``tile``."""
    return tap_tiles(window, tile[0]) * _panel_cycles(machine, panel, tile)


@lru_cache(maxsize=1024)
def _row_classes(window: Window) -> list[tuple[int, int]]:
    """Rows that read the same taps, as rows at edges read fewer: how many rows, of how many taps."""
    counted = [Counter(window.live_taps(axis, index) for index in range(window.out[axis])) for axis in range(3)]
    found = product(*(axis.items() for axis in counted))
    return [
        (window.batch * math.prod(size for _, size in classes), math.prod(len(live) for live, _ in classes))
        for classes in found
    ]


@lru_cache(maxsize=1024)
def tap_tiles(window: Window, mr: int, share: float = 1.0) -> float:
    """Pairs of register tile and tap: rows that read other taps, as at edges, fill tiles of their own.

    ``share`` of the rows of each class are computed together.
    """
    return float(sum(math.ceil(rows * share / mr) * taps for rows, taps in _row_classes(window)))


def row_tiles(window: Window, mr: int, share: float = 1.0) -> int:
    """Register tiles of the rows, of which ``share`` of each class are computed together."""
    return sum(math.ceil(rows * share / mr) for rows, _ in _row_classes(window))


def evenly(extent: int, most: int, unit: int = 1) -> int:
    """The least multiple of ``unit`` with which ``extent`` falls into no more parts than it does with ``most``."""
    return -(-extent // -(-extent // most) // unit) * unit


def busy_share(tasks: int, threads: int) -> float:
    """Share of its threads' time in which a loop of equal tasks keeps them at work."""
    return tasks / (threads * -(-tasks // threads))


def excess_cycles(machine: Machine, vectors: int) -> float:
    """Cycles that tiles of so many ``vectors`` take at the least, over those of their multiply-adds alone."""
    tiles = [tile for tile in candidates(machine) if tile[1] == vectors]
    return min(
        (_panel_cycles(machine, vectors * machine.vector_floats, tile) / (tile[0] * vectors / 2) for tile in tiles),
        default=1.0,
    )


def _panel_cycles(machine: Machine, panel: int, tile: tuple[int, int, int]) -> float:
    """Cycles per (channel, tap) of one tile of rows and all its tiles of ``panel`` output channels."""
    mr, vectors, step = tile
    multiply = mr * vectors / 2
    loads = (mr / step + vectors) / 2
    latency = CHAINS_TO_HIDE_LATENCY / 2
    # Loads run beside the multiplies but are not free; those of weights come from further away than those of rows.
    panels = -(-panel // (vectors * machine.vector_floats))
    return panels * (max(multiply, loads, latency) + 0.1 * mr / step + 0.35 * vectors)


def _fewest_cycles(
    machine: Machine, window: Window, group_out: int, options: list[tuple[int, int, int]], vector_bytes: int
) -> tuple[int, int, int]:
    """Of ``options`` the tile with the fewest predicted cycles; of those that take hardly more, the first whose panel
    of weights stays in the second-level cache: rows that read other taps, as at edges, read it again."""
    cycles = {tile: window_cycles(machine, window, group_out, tile) for tile in options}
    ordered = sorted(options, key=lambda tile: cycles[tile])
    near = [tile for tile in ordered if cycles[tile] <= HARDLY_MORE * cycles[ordered[0]]]
    stays = (tile for tile in near if tile[1] * vector_bytes <= PANEL_SHARE_OF_L2 * machine.l2)
    return next(stays, ordered[0])


def default_tile(
    machine: Machine,
    window: Window,
    depth: int,
    group_out: int,
    nr: int | None = None,
    most_rows: int = 16,
    gathers: bool = False,
    threads: int = 1,
) -> Tile:
    """The tile with the fewest predicted cycles, its blocks sized to the caches.

    ``depth`` is how many input channels (or columns of a kernel group) one tap uses; ``nr`` fixes the output channels
    of a tile, as kernel groups do, and ``most_rows`` bounds its rows. ``gathers``: channel lists are given, so that
    every block gathers its weights. ``threads`` are to have something to do each.
    """
    fitting = [tile for tile in candidates(machine) if tile[0] <= most_rows]
    options = [tile for tile in fitting if nr is None or tile[1] * machine.vector_floats == nr]
    size = machine.element_bytes
    vector_bytes = size * machine.vector_floats * window.taps * depth
    mr, vectors, step = _fewest_cycles(machine, window, group_out, options, vector_bytes)
    nr = vectors * machine.vector_floats
    depth_block = max(step, int(WEIGHTS_SHARE_OF_L1 * machine.l1d) // (size * nr) // step * step)
    depth_block = min(depth_block, machine.most_terms)
    block_depth = min(depth, depth_block)
    segment_taps = max(1, min(window.taps, depth_block // block_depth))
    share = GATHERING_ROWS_SHARE_OF_L2 if gathers else ROWS_SHARE_OF_L2
    rows = max(mr, int(share * machine.l2) // (size * block_depth))
    block_tiles = min(max(8, rows // mr), 128, -(-window.positions_out // mr) + 8)
    block_tiles = _shared_out(block_tiles, row_tiles(window, mr), -(-group_out // nr), threads)
    if depth < step:
        step = 1
    # Weights that stay in the second-level cache are read again for each block, so that its rows are read but once.
    outer = size * window.taps * depth * group_out > machine.l2
    return Tile(mr, vectors, machine.vector_floats, step, block_tiles, segment_taps, depth_block, panels_outer=outer)


def _shared_out(block_tiles: int, tiles: int, panels: int, threads: int) -> int:
    """At most ``block_tiles``, and so few of the ``tiles`` of each panel that the threads get about equal shares of all
    blocks."""
    fewest = -(-tiles // block_tiles)
    for blocks in range(fewest, min(tiles, fewest + threads) + 1):
        if busy_share(blocks * panels, threads) >= BUSY:
            return min(block_tiles, -(-tiles // blocks))
    return block_tiles
