"""Tile sizes of the depthwise convolution: a model of its registers, its instructions and its caches, and its tuning
space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..geometry import HEIGHT, TIME, WIDTH, Window
from ..workload import DEPTHWISE, Decisions, Workload
from .space import WORTH_TRYING, Loops, VectorSpace, are_whole
from .tiles import CHAINS_TO_HIDE_LATENCY, Machine

#: Outputs of a line, vectors of channels beside one another, and frames of one tile that are tried.
MOST_OUTPUTS, MOST_VECTORS, MOST_FRAMES = 16, 4, 4
#: Rows of a block that are tried.
BLOCK_ROWS = (1, 2, 4, 8, 16, 32)
#: Axes along which it leaves something out.
MASKS = ("in_frames", "out_frames")
#: Cycles of a tile beside its multiplies: addresses, the loop over lines of taps, storing.
TILE_CYCLES, LINE_CYCLES = 8.0, 3.0
#: Share of the loads that does not go on beside the multiplies.
LOADS_BESIDE = 0.2
#: Cycles of an output for each pass over the channels.
PASS_CYCLES = 0.5
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
    """``mr`` outputs of a line in ``frames`` frames × ``vectors`` vectors of ``vector_floats`` channels in registers;
    ``rows`` rows of a frame are computed one after the other for the same channels, so that the lines that they share
    stay in the cache. ``inner`` (0 or 1): passes over the channels are made of each piece of a line, in all frames, and
    not of all rows."""

    mr: int
    vectors: int
    vector_floats: int
    rows: int
    frames: int = 1
    inner: int = 0


#: Outputs of a line, vectors of channels and frames of a register tile.
Option = tuple[int, int, int]


def fits(machine: Machine, taps: int, sums: int) -> bool:
    """Whether sums, the weights of the ``taps`` that are held and one input fit in the registers."""
    return sums + taps + 1 <= machine.registers


def line_axis(window: Window, masked_frames: bool) -> int:
    """The axis with the taps that share inputs: the width, or the frames where only they have taps."""
    only_frames = window.kernel[TIME] > 1 and window.kernel[HEIGHT] == window.kernel[WIDTH] == 1
    return TIME if only_frames and not masked_frames else WIDTH


def most_frames(window: Window, masked_frames: bool) -> int:
    """The most frames of a tile: those that share inputs, where no mask leaves single ones out."""
    alone = masked_frames or window.kernel[TIME] == 1 or line_axis(window, masked_frames) == TIME
    return 1 if alone else min(MOST_FRAMES, window.out[TIME])


def held_taps(window: Window, axis: int, frames: int) -> int:
    """Taps whose weights a tile holds in registers at once: those along its axes."""
    return window.kernel[axis] * (window.kernel[TIME] if frames > 1 else 1)


def register_tiles(
    machine: Machine, window: Window, channels_out: int, masked_frames: bool = False
) -> dict[Option, float]:
    """Register tiles that the layer can fill, and their predicted cycles for one row of outputs in all frames."""
    axis = line_axis(window, masked_frames)
    options = [
        (mr, abreast, frames)
        for frames in range(1, most_frames(window, masked_frames) + 1)
        for abreast in range(1, min(MOST_VECTORS, all_vectors(machine, channels_out)) + 1)
        for mr in range(1, min(window.out[axis], MOST_OUTPUTS) + 1)
        if fits(machine, held_taps(window, axis, frames), mr * abreast * frames)
    ] or [(1, 1, 1)]
    return {option: _cycles(machine, window, channels_out, axis, option) for option in options}


def crossing(machine: Machine, channels_out: int) -> float:
    """Lines of the cache that a vector of inputs lies in, on average."""
    aligned = channels_out % machine.vector_floats == 0
    return 1.0 if aligned else 1.0 + machine.element_bytes * machine.vector_floats / LINE_BYTES


def input_vectors(window: Window, axis: int, mr: int, frames: int) -> int:
    """Inputs that a tile reads for the taps that it holds."""
    line = (mr - 1) * window.stride[axis] + window.kernel[axis]
    return line * ((frames - 1) * window.stride[TIME] + window.kernel[TIME] if frames > 1 else 1)


def _cycles(machine: Machine, window: Window, channels_out: int, axis: int, option: Option) -> float:
    mr, abreast, frames = option
    taps = held_taps(window, axis, frames)
    sums = mr * abreast * frames
    inside = [len(window.live_taps(TIME, frame)) for frame in range(window.out[TIME])]
    live = sum(inside) / (len(inside) * window.kernel[TIME])  # of the taps along the frames
    multiplies = sums * taps * (live if frames > 1 else 1) / 2
    inputs = input_vectors(window, axis, mr, frames) * (live if frames > 1 else 1)
    loads = (crossing(machine, channels_out) * inputs + taps) * abreast / 2
    latency = taps * CHAINS_TO_HIDE_LATENCY / 2 if sums < CHAINS_TO_HIDE_LATENCY else 0.0
    lines = window.taps / taps * (1 if frames > 1 or axis == TIME else live)
    tile = lines * (max(multiplies, loads, latency) + LOADS_BESIDE * loads + LINE_CYCLES) + TILE_CYCLES
    passes = -(-all_vectors(machine, channels_out) // abreast)
    stacks = 1 if axis == TIME else -(-window.out[TIME] // frames)
    outputs = window.out[axis] * (1 if axis == TIME else window.out[TIME])
    return passes * (stacks * -(-window.out[axis] // mr) * tile + PASS_CYCLES * outputs)


def all_vectors(machine: Machine, channels_out: int) -> int:
    """Vectors that hold the output channels; one has no more lanes than there are channels."""
    return -(-channels_out // min(machine.vector_floats, 1 << (channels_out.bit_length() - 1)))


def default_tile(
    machine: Machine, window: Window, channels_out: int, masked_frames: bool = False, threads: int = 1
) -> DepthwiseTile:
    """The tile with the fewest predicted cycles, its rows sized to the second-level cache."""
    tiles = register_tiles(machine, window, channels_out, masked_frames)
    mr, abreast, frames = min(tiles, key=lambda option: tiles[option])
    axis = line_axis(window, masked_frames)
    rows = default_rows(machine, window, axis, channels_out, threads)
    clip_bytes = machine.element_bytes * channels_out * window.positions_in // window.batch
    inner = axis == WIDTH and crossing(machine, channels_out) > 1 and clip_bytes > machine.l2
    return DepthwiseTile(mr, abreast, machine.vector_floats, rows, frames, int(inner))


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
    frames           frames of the register tile
    rows             rows of outputs that are computed for the same channels one after the other
    inner            1: passes over the channels are made of each piece of a line, 0: of the rows of a block
    ===============  ===============================================================================================
    """

    machine: Machine
    workload: Workload
    names: ClassVar[tuple[str, ...]] = ("mr", "vectors", "frames", "rows", "inner")

    @property
    def masked_frames(self) -> bool:
        """Whether masks leave out frames."""
        return bool(set(MASKS) & set(self.workload.lists))

    @property
    def tiles(self) -> dict[Option, float]:
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
        return sum(math.prod(map(len, part.values())) for part in self.parts())

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
        most["frames"] = most_frames(work.window, self.masked_frames)
        return {name: min(value, most.get(name, value)) for name, value in decisions.items()}

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, and no more registers than there are."""
        if not are_whole(decisions, self.names):
            return False
        tile = (decisions["mr"], decisions["vectors"], decisions["frames"])
        return tile in self.tiles and 1 <= decisions["rows"] <= self.rows and decisions["inner"] in (0, 1)

    def parts(self) -> list[dict[str, list[int]]]:
        """One part for each number of vectors and frames: which outputs are worth trying depends on them."""
        tiles = self.tiles
        limit = WORTH_TRYING * min(tiles.values())
        rows = sorted({min(count, self.rows) for count in (*BLOCK_ROWS, self.default()["rows"], self.rows)})
        found: dict[tuple[int, int], list[int]] = {}
        for (mr, vectors, frames), cycles in tiles.items():
            if cycles <= limit:
                found.setdefault((vectors, frames), []).append(mr)
        rest = {"rows": rows, "inner": [0, 1]}
        return [
            {"mr": outputs, "vectors": [vectors], "frames": [frames], **rest}
            for (vectors, frames), outputs in found.items()
        ]

    def loops(self) -> Loops:
        """Rows of outputs, in tiles; vectors of a tile."""
        return {"rows": ("rows", "mr"), "channels_out": ("vectors", self.machine.vector_floats)}


def depthwise(workload: Workload) -> Workload:
    """The same layer by the depthwise convolution, which leaves out frames alone."""
    lists = tuple(axis for axis in workload.lists if axis in MASKS)
    return replace(workload, family=DEPTHWISE, lists=lists, density=workload.density if lists else 1.0)
