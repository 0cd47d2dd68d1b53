"""Tile sizes of the depthwise convolution: a model of its registers, its instructions and its caches, and its tuning
space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..geometry import HEIGHT, TIME, WIDTH, Window
from ..workload import DEPTHWISE, Decisions, Workload
from .space import WORTH_TRYING, Loops, VectorSpace, are_whole
from .tiles import CHAINS_TO_HIDE_LATENCY, Machine

#: Outputs of one tile, and vectors of channels beside one another, that are tried.
MOST_OUTPUTS, MOST_VECTORS = 16, 4
#: Rows of a block that are tried.
BLOCK_ROWS = (1, 2, 4, 8, 16, 32)
#: Axes along which it leaves something out.
MASKS = ("in_frames", "out_frames")
#: Cycles of a tile beside its multiplies: addresses, the loop over lines of taps, storing.
TILE_CYCLES, LINE_CYCLES = 12.0, 3.0
#: Cycles of an output for each pass over the channels: parts of its cache lines are read again.
PASS_CYCLES = 3.0
#: Bytes of a cache line: a vector that crosses two is loaded twice.
LINE_BYTES = 64
#: What a block of rows takes beside them, in rows: lines at its ends are read for the next block as well.
BLOCK_ROWS_MORE = 0.5
#: Rows of a block that are tried, whatever the cache holds.
FEWEST_ROWS = 4
#: Share of the second-level cache that the lines of one block of rows may take, over all frames.
ROWS_SHARE_OF_L2 = 0.3


@dataclass(frozen=True)
class DepthwiseTile:
    """``mr`` outputs × ``vectors`` vectors of ``vector_floats`` channels in registers; ``rows`` rows of a frame are
    computed one after the other for the same channels, so that the lines that they share stay in the cache."""

    mr: int
    vectors: int
    vector_floats: int
    rows: int


def fits(machine: Machine, taps: int, mr: int, vectors: int) -> bool:
    """Whether sums, the weights of one line of taps and one input fit in the registers."""
    return mr * vectors + taps + 1 <= machine.registers


def line_axis(window: Window, masked_frames: bool) -> int:
    """The axis with the taps that share inputs: the width, or the frames where only they have taps."""
    only_frames = window.kernel[TIME] > 1 and window.kernel[HEIGHT] == window.kernel[WIDTH] == 1
    return TIME if only_frames and not masked_frames else WIDTH


def register_tiles(
    machine: Machine, window: Window, channels_out: int, masked_frames: bool = False
) -> dict[tuple[int, int], float]:
    """Register tiles (outputs, vectors) that the layer can fill, and their predicted cycles for a row of outputs."""
    axis = line_axis(window, masked_frames)
    taps, extent = window.kernel[axis], window.out[axis]
    lines = window.taps // taps
    vectors = all_vectors(machine, channels_out)
    aligned = channels_out % machine.vector_floats == 0
    crossing = 1.0 if aligned else 1.0 + machine.element_bytes * machine.vector_floats / LINE_BYTES

    def cycles(mr: int, abreast: int) -> float:
        multiplies = mr * taps * abreast / 2
        loads = crossing * ((mr - 1) * window.stride[axis] + 2 * taps) * abreast / 2
        latency = taps * CHAINS_TO_HIDE_LATENCY / 2 if mr * abreast < CHAINS_TO_HIDE_LATENCY else 0.0
        tile = lines * (max(multiplies, loads, latency) + LINE_CYCLES) + TILE_CYCLES
        passes = -(-vectors // abreast)
        return passes * (-(-extent // mr) * tile + PASS_CYCLES * extent)

    options = [
        (mr, abreast)
        for abreast in range(1, min(MOST_VECTORS, vectors) + 1)
        for mr in range(1, min(extent, MOST_OUTPUTS) + 1)
        if fits(machine, taps, mr, abreast)
    ] or [(1, 1)]
    return {option: cycles(*option) for option in options}


def all_vectors(machine: Machine, channels_out: int) -> int:
    """Vectors that hold the output channels; one has no more lanes than there are channels."""
    return -(-channels_out // min(machine.vector_floats, 1 << (channels_out.bit_length() - 1)))


def default_tile(
    machine: Machine, window: Window, channels_out: int, masked_frames: bool = False, threads: int = 1
) -> DepthwiseTile:
    """The tile with the fewest predicted cycles, its rows sized to the second-level cache."""
    tiles = register_tiles(machine, window, channels_out, masked_frames)
    mr, abreast = min(tiles, key=lambda option: tiles[option])
    rows = default_rows(machine, window, line_axis(window, masked_frames), channels_out, threads)
    return DepthwiseTile(mr, abreast, machine.vector_floats, rows)


def rows_of_frame(window: Window, axis: int) -> int:
    """Among how many rows of outputs those of a block are: lines beside one another."""
    return window.out[WIDTH] if axis == TIME else window.out[HEIGHT]


def default_rows(machine: Machine, window: Window, axis: int, channels_out: int, threads: int) -> int:
    """Rows of a block: about as many as the cache holds of all frames, no more than leave each thread a block, and so
    that the last block, which overlaps the one before, computes little twice."""
    second = rows_of_frame(window, axis)
    across = 1 if axis == TIME else window.size[2] * window.stride[1]
    row_bytes = machine.element_bytes * channels_out * window.size[0] * across
    of_thread = -(-second // min(second, -(-threads // window.batch)))
    most = min(of_thread, max(FEWEST_ROWS, int(ROWS_SHARE_OF_L2 * machine.l2) // row_bytes))
    return min(range(1, most + 1), key=lambda rows: -(-second // rows) * (rows + BLOCK_ROWS_MORE))


@dataclass(frozen=True)
class DepthwiseSpace(VectorSpace):
    """The decisions of the depthwise convolution for one workload on one machine.

    ===============  ===============================================================================================
    decision         meaning
    ===============  ===============================================================================================
    mr, vectors      the register tile: outputs of a line, vectors of channels
    rows             rows of outputs that are computed for the same channels one after the other
    ===============  ===============================================================================================
    """

    machine: Machine
    workload: Workload
    names: ClassVar[tuple[str, ...]] = ("mr", "vectors", "rows")

    @property
    def masked_frames(self) -> bool:
        """Whether masks leave out frames."""
        return bool(set(MASKS) & set(self.workload.lists))

    @property
    def tiles(self) -> dict[tuple[int, int], float]:
        """Register tiles and their predicted cycles."""
        work = self.workload
        return register_tiles(self.machine, work.window, work.channels_out, self.masked_frames)

    @property
    def rows(self) -> int:
        """The most rows of a block."""
        return rows_of_frame(self.workload.window, line_axis(self.workload.window, self.masked_frames))

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(len(part["mr"]) * len(part["rows"]) for part in self.parts())

    def default(self) -> Decisions:
        """What is chosen without a record."""
        work = self.workload
        tile = default_tile(self.machine, work.window, work.channels_out, self.masked_frames, work.threads)
        return {name: getattr(tile, name) for name in self.names}

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one."""
        work = self.workload
        extent = work.window.out[line_axis(work.window, self.masked_frames)]
        most = {"mr": extent, "vectors": all_vectors(self.machine, work.channels_out), "rows": self.rows}
        return {name: min(value, most.get(name, value)) for name, value in decisions.items()}

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, and no more registers than there are."""
        if not are_whole(decisions, self.names):
            return False
        return (decisions["mr"], decisions["vectors"]) in self.tiles and 1 <= decisions["rows"] <= self.rows

    def parts(self) -> list[dict[str, list[int]]]:
        """One part for each number of vectors: which outputs are worth trying depends on it."""
        tiles = self.tiles
        limit = WORTH_TRYING * min(tiles.values())
        rows = sorted({min(count, self.rows) for count in (*BLOCK_ROWS, self.default()["rows"], self.rows)})
        found: dict[int, list[int]] = {}
        for (mr, vectors), cycles in tiles.items():
            if cycles <= limit:
                found.setdefault(vectors, []).append(mr)
        return [{"mr": outputs, "vectors": [vectors], "rows": rows} for vectors, outputs in found.items()]

    def loops(self) -> Loops:
        """Rows of outputs, in tiles; vectors of a tile."""
        return {"rows": ("rows", "mr"), "channels_out": ("vectors", self.machine.vector_floats)}


def depthwise(workload: Workload) -> Workload:
    """The same layer by the depthwise convolution, which leaves out frames alone."""
    lists = tuple(axis for axis in workload.lists if axis in MASKS)
    return replace(workload, family=DEPTHWISE, lists=lists, density=workload.density if lists else 1.0)
