"""Tiles of GPU kernels, and the defaults that follow from a GPU's facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..geometry import Window
from .emit import QUAD

#: What a kernel that walks every list at once may need beyond :attr:`BlockTile.registers`.
MARGIN = 1.15


@dataclass(frozen=True)
class Gpu:
    """The facts that tiles follow from: of one multiprocessor (compute unit), and how many there are.

    ``warp`` threads run in step; ``registers`` are 32-bit ones; ``shared`` counts bytes. ``block_…`` is the most that
    one block may have.
    """

    units: int
    warp: int
    unit_threads: int
    block_threads: int
    registers: int
    block_registers: int
    shared: int
    block_shared: int


@dataclass(frozen=True)
class BlockTile:
    """Tile of one block of threads: ``mr`` rows × ``nr`` output channels, ``step`` values of the sum at a time.

    Each thread accumulates ``thread_rows`` × ``thread_channels`` in registers.
    """

    mr: int
    nr: int
    step: int
    thread_rows: int
    thread_channels: int

    @property
    def name(self) -> str:
        """Its sizes, for a kernel's name."""
        return f"b{self.mr}x{self.nr}x{self.step}_t{self.thread_rows}x{self.thread_channels}"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return (self.mr // self.thread_rows) * (self.nr // self.thread_channels)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: two buffers of rows and of weights, three numbers a row, one a channel."""
        return 4 * (2 * self.step * (self.mr + QUAD + self.nr) + 3 * self.mr + self.nr)

    @property
    def registers(self) -> int:
        """Registers that a thread needs, roughly: sums, what it multiplies, what it fetches ahead, addresses."""
        fetched = self.step * (self.mr + self.nr) // self.threads
        return self.thread_rows * (self.thread_channels + 1) + self.thread_channels + fetched + 32


def is_whole(tile: BlockTile) -> bool:
    """Whether threads share out the tile and its fetches evenly."""
    threads = tile.threads
    if tile.mr % tile.thread_rows or tile.nr % tile.thread_channels or threads % tile.step:
        return False
    rows = tile.mr * tile.step
    return rows % (threads * QUAD) == 0 and tile.step * tile.nr % threads == 0 and tile.mr * tile.step >= threads


def candidates(gpu: Gpu) -> Iterator[BlockTile]:
    """Every tile that fits a block of the GPU without spilling."""
    for mr in (16, 32, 64, 128):
        for nr in (8, 16, 32, 64, 128):
            for step in (8, 16):
                for rows, channels in ((8, 8), (8, 4), (4, 8), (4, 4)):
                    if rows > mr or channels > nr:
                        continue
                    tile = BlockTile(mr, nr, step, rows, channels)
                    if gpu.warp <= tile.threads <= gpu.block_threads and is_whole(tile) and _fits(gpu, tile):
                        yield tile


def _fits(gpu: Gpu, tile: BlockTile) -> bool:
    registers = min(255, gpu.block_registers // tile.threads)
    return tile.shared_bytes <= gpu.block_shared and MARGIN * tile.registers <= registers


def resident_blocks(gpu: Gpu, tile: BlockTile) -> int:
    """Blocks that share one unit."""
    by_registers = gpu.registers // (tile.registers * tile.threads)
    return max(1, min(by_registers, gpu.shared // tile.shared_bytes, gpu.unit_threads // tile.threads))


def predicted_cost(gpu: Gpu, window: Window, group_out: int, tile: BlockTile) -> float:
    """Relative time of a step of the sum over the whole layer, rounding up to whole tiles and whole waves of blocks.

    A thread multiplies ``thread_rows × thread_channels`` and loads their sum from shared memory at a quarter of the
    rate; a block also fetches its rows and weights from memory.
    """
    blocks = -(-window.positions_out // tile.mr) * -(-group_out // tile.nr)
    resident = min(resident_blocks(gpu, tile), -(-blocks // gpu.units))
    multiply = tile.mr * tile.nr
    loads = tile.threads * (tile.thread_rows + tile.thread_channels) / QUAD * 2
    fetch = 4 * (tile.mr + tile.nr)
    # A unit hides latencies with about eight warps of such kernels; fewer leave it waiting.
    waiting = max(1.0, 8 / max(1.0, resident * tile.threads / gpu.warp))
    waves = -(-blocks // (gpu.units * resident))
    return waves * resident * (multiply + loads + fetch) * waiting


def default_tile(gpu: Gpu, window: Window, group_out: int, nr: int | None = None) -> BlockTile:
    """The tile with the least predicted cost; ``nr`` fixes its output channels, as kernel groups do."""
    options = [tile for tile in candidates(gpu) if nr is None or tile.nr == nr]
    return min(options, key=lambda tile: (predicted_cost(gpu, window, group_out, tile), tile.threads))
