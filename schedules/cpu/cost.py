"""The time that a convolution's kernel is predicted to take where nothing has been measured.

Direct and Winograd kernels are the same register tiles, so both are counted with :func:`~.tiles.predicted_cycles`; what
differs is how many of them there are, how many weights stream past them, and what the transforms add.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..convolution import Convolution
from ..geometry import Window
from ..plans import RowPlan
from .tiles import Machine, Tile, busy_share, predicted_cycles, row_tiles, tap_tiles
from .winograd_plan import WinogradPlan

#: Cycles of one core per vector that is transformed and stored, fitted to layers of C3D and R(2+1)D: inputs, products,
#: and more for each of the planes that one tile is spread over, as every plane lies in a page of its own.
INPUT_CYCLES, OUTPUT_CYCLES, PLANE_CYCLES = 5.0, 4.0, 0.02
#: The same of products of tiles of inputs, which become as many values that are added up.
ADDED_CYCLES = 6.0
#: The same of weights that are transformed in every call, in float64.
WEIGHT_CYCLES = 6.0
#: Cycles to start a register tile: its list entries, its addresses and the end of its loops.
TILE_CYCLES = 40.0
#: Cycles to list a row by the living positions that it reads: 16 to 40 on an AMD EPYC with AVX-512.
ROW_CYCLES = 25.0
#: Seconds until the threads have met at the end of a phase.
BARRIER_SECONDS = 5e-6
#: Share of the shorter of arithmetic and weight traffic that is not hidden behind the longer.
NOT_HIDDEN = 0.5
#: Share of the memory's rate that one core reaches alone.
ONE_CORE_SHARE = 0.6
#: How much faster the last-level cache is than memory.
CACHE_RATE = 3.0
#: Bytes of a last-level cache on which one network may count: servers have larger ones, but share them among many.
MOST_SHARED_CACHE = 32 << 20
#: Share of that cache that a network's weights may be to stay there from call to call: prepared, they are several times
#: larger, and activations pass through it too.
STAYING_SHARE = 0.25
#: Share of a cache that the scratch of a chunk may fill before it is taken to spill.
SCRATCH_SHARE = 0.6
#: Share of the direct kernel's rate that the columns of kernel groups reach (docs/rt3d.md).
KERNEL_GROUP_EFFICIENCY = 0.9
#: Cycles to copy one weight into a panel: of single output channels, or of rows for listed input channels.
GATHER_COLUMN_CYCLES, GATHER_ROW_CYCLES = 0.8, 0.2
#: Shares of the multiply-adds that masks may leave, each axis thinned alike. They are not known when a network is
#: built, so a kernel is judged by its mean time over these: one that is fast under thin masks alone would be slow on a
#: clip that keeps nearly everything.
ASSUMED_LEFT = (0.5, 1.0)
#: Of the positions of a tile, so many are taken to live or die on their own: masks come in patches.
PATCHES_IN_TILE = 2
#: Of a share, so that floating-point error makes no further chunk of none.
ROUNDING = 1e-6


def axis_densities(masks: Iterable[object]) -> list[float]:
    """Shares that may be alive of each axis that one of ``masks`` thins (those that are neither None nor False)."""
    thinned = sum(mask is not None and mask is not False for mask in masks)
    return [left ** (1 / thinned) for left in ASSUMED_LEFT] if thinned else [1.0]


def seconds_per_cycle(machine: Machine) -> float:
    """Seconds of one cycle of one core; a cycle is two vector multiply-adds, as in :func:`~.tiles.predicted_cycles`."""
    return 4 * machine.vector_floats / (1e9 * machine.gflops)


def _l3(machine: Machine) -> int:
    """Bytes of the last level of cache that are ours."""
    return min(machine.l3, MOST_SHARED_CACHE)


def running(machine: Machine, weight_bytes: int) -> Machine:
    """``machine`` as a network of so many bytes of weights finds it when it runs again and again."""
    return replace(machine, weights_stay=weight_bytes <= STAYING_SHARE * _l3(machine))


def first_reading(machine: Machine, threads: int) -> float:
    """What it takes a call to read weights for the first time, as a share of reading them from memory."""
    cached = memory_rate(machine, threads) / (1e9 * machine.l3_gb_per_s * threads)
    return min(1.0, cached) if machine.weights_stay else 1.0


def memory_rate(machine: Machine, threads: int) -> float:
    """Bytes per second that the threads get from memory together."""
    return 1e9 * machine.memory_gb_per_s * min(1.0, ONE_CORE_SHARE * threads)


def _with_traffic(machine: Machine, threads: int, cycles: float, weight_bytes: float) -> float:
    """Seconds of arithmetic shared out over the threads beside weights that stream in from memory."""
    arithmetic = cycles * seconds_per_cycle(machine) / threads
    traffic = weight_bytes / memory_rate(machine, threads)
    return max(arithmetic, traffic) + NOT_HIDDEN * min(arithmetic, traffic)


def _channel_share(conv: Convolution, density: float) -> float:
    return density ** (conv.live_in + conv.live_out)


def gather_cycles(conv: Convolution, weights: float) -> float:
    """Cycles to pack ``weights`` (elements) into panels of live channels, once."""
    if conv.live_out:
        return weights * GATHER_COLUMN_CYCLES
    return weights * GATHER_ROW_CYCLES if conv.live_in else 0.0


def direct_seconds(
    conv: Convolution,
    tile: Tile,
    plan: RowPlan,
    machine: Machine,
    threads: int,
    density: float,
    columns_share: float = 1.0,
) -> float:
    """Seconds of a direct kernel with ``density`` of each thinned axis left, and ``columns_share`` of the columns."""
    window = conv.window
    share = _channel_share(conv, density) * columns_share
    for thinned in (plan.out_frames, plan.positions is not None, plan.dynamic_taps, plan.in_positions is not None):
        share *= density if thinned else 1.0
    register_tile = (tile.mr, tile.vectors, tile.step)
    cycles = predicted_cycles(machine, window.positions_out, conv.group_out, register_tile) * conv.groups
    taps = window.tap_positions / max(1, window.positions_out)
    cycles *= taps * conv.depth * share / tiles_filled(window, tile.mr, _row_share(plan, density))
    elements = window.taps * conv.depth * conv.channels_out * _channel_share(conv, density)
    blocks = max(1.0, window.positions_out * _row_share(plan, density) / plan.samples / (tile.mr * tile.block_tiles))
    cycles += gather_cycles(conv, elements) * plan.samples * blocks
    readings = first_reading(machine, threads)
    readings += (plan.samples - 1) / (1 if machine.element_bytes * elements > machine.l3 / 2 else CACHE_RATE)
    weights = float(machine.element_bytes) * window.taps * conv.depth * conv.channels_out * share * readings
    panels = math.ceil(conv.panels * (density if conv.live_out else 1.0))
    tiles = row_tiles(window, tile.mr, _row_share(plan, density)) / plan.samples
    tasks = panels * max(1, math.ceil(tiles / tile.block_tiles))
    listing = 0.0 if plan.in_positions is None else ROW_CYCLES * window.positions_out * seconds_per_cycle(machine)
    return listing + _with_traffic(machine, threads, cycles / busy_share(tasks, threads), weights)


def tiles_filled(window: Window, mr: int, share: float) -> float:
    """Share of the register tiles' rows that hold one: rows that read other taps, as at edges, fill tiles of their own.

    ``share`` of the rows of each class are computed together.
    """
    slots = mr * tap_tiles(window, mr, share)
    return window.tap_positions * share / slots if slots else 1.0


def _row_share(plan: RowPlan, density: float) -> float:
    """Share of the rows that are computed where each axis keeps ``density``."""
    return density ** (plan.out_frames + (plan.positions is not None))


@dataclass(frozen=True)
class WinogradParts:
    """Of a chunk that is full: cycles of its products, of transforms on either side; bytes of weights that it reads,
    and how many times faster than from memory they come once an earlier chunk has read them."""

    multiply: float
    read: float
    write: float
    weights: float
    nearer: float


def winograd_parts(
    conv: Convolution,
    tile: Tile,
    plan: WinogradPlan,
    machine: Machine,
    density: float = 1.0,
    columns_share: float = 1.0,
) -> WinogradParts:
    """The parts where ``density`` of the channels is left on each listed side, and ``columns_share`` of the columns."""
    share, register_tile = _channel_share(conv, density) * columns_share, (tile.mr, tile.vectors, tile.step)
    cycles = 0.0
    for rows, taps in runs(plan):
        tiles = -(-rows // tile.mr) * conv.panels
        cycles += predicted_cycles(machine, rows, conv.channels_out, register_tile) * taps * conv.channels_in * share
        cycles += tiles * TILE_CYCLES * (density if conv.live_out else 1.0)
    # Samples that list channels of their own leave out few that are the same.
    weights = 4.0 * plan.xi * plan.taps * conv.channels_in * conv.channels_out * (share if plan.samples == 1 else 1.0)
    read, written = (density if listed else 1.0 for listed in (conv.live_in, conv.live_out))
    vectors_in = plan.xi * plan.source_rows * conv.channels_in / machine.vector_floats * read
    vectors_out = plan.xi * plan.tiles[0] * plan.columns * conv.panels * tile.vectors * written
    planes = PLANE_CYCLES * plan.xi
    return WinogradParts(
        multiply=cycles * plan.xi,
        read=vectors_in * (INPUT_CYCLES + planes),
        write=vectors_out * ((ADDED_CYCLES if plan.in_positions else OUTPUT_CYCLES) + planes),
        weights=weights,
        # from memory, from the last level that the cores share, or from a core's own cache
        nearer=1.0 if weights > _l3(machine) / 2 else CACHE_RATE if weights > machine.l2 / 2 else math.inf,
    )


def winograd_seconds(
    conv: Convolution,
    tile: Tile,
    plan: WinogradPlan,
    machine: Machine,
    threads: int,
    density: float,
    whole_tiles: bool,
    columns_share: float = 1.0,
) -> float:
    """Seconds of a Winograd kernel with ``density`` of each thinned axis left, and ``columns_share`` of the columns;
    ``whole_tiles``: masks leave out whole tiles of outputs."""
    parts = winograd_parts(conv, tile, plan, machine, density, columns_share)
    rows, places = _live_shares(plan, density, whole_tiles)
    full = plan.chunks * rows * places  # if chunks had all their rows
    chunks = max(1, math.ceil(plan.chunks * places * (rows if plan.one_source else 1.0) - ROUNDING))
    readings = first_reading(machine, threads) + (chunks - 1) / parts.nearer
    multiply = _with_traffic(machine, threads, parts.multiply * full, parts.weights * readings)
    seconds = multiply + full * (parts.read + parts.write) * seconds_per_cycle(machine) / threads
    touched = 1.0
    if reads_more_weights(conv, plan):  # elsewhere larger chunks cost what they do without masks
        touched = full / chunks * (density if conv.live_in and conv.live_out else 1.0)
    return seconds + chunks * chunk_seconds(used_scratch(conv, tile, plan) * touched, machine, threads)


def used_scratch(conv: Convolution, tile: Tile, plan: WinogradPlan) -> int:
    """Bytes of scratch of a full chunk, less the room for rows of more samples than its columns are of."""
    if plan.samples == 1:
        return conv.scratch_bytes
    spare = plan.tiles_capacity - sum(-(-rows // tile.mr) for rows, _ in runs(plan))
    return conv.scratch_bytes - 4 * plan.xi * spare * tile.mr * conv.panels * tile.nr


def transform_seconds(stored: int, machine: Machine, threads: int) -> float:
    """Seconds to transform weights into ``stored`` bytes; reading them again counts as with weights that are kept.

    A cache line that is written is fetched first, and written back later.
    """
    cycles = stored / (4 * machine.vector_floats) * WEIGHT_CYCLES
    rate = memory_rate(machine, threads) * (CACHE_RATE if stored <= _l3(machine) / 2 else 1.0)
    return cycles * seconds_per_cycle(machine) / threads + 2 * stored / rate


def reads_more_weights(conv: Convolution, plan: WinogradPlan) -> bool:
    """Whether each chunk reads at least as many bytes of weights as it has scratch, so that fewer chunks pay."""
    return 4 * plan.xi * plan.taps * conv.channels_in * conv.channels_out >= conv.scratch_bytes


def chunk_seconds(scratch_bytes: float, machine: Machine, threads: int) -> float:
    """What a chunk takes beside products and transforms."""
    return 3 * BARRIER_SECONDS + _spill_seconds(scratch_bytes, machine, threads)


def _live_shares(plan: WinogradPlan, density: float, whole_tiles: bool) -> tuple[float, float]:
    """Share of the rows of a place that are alive, and in frames of one another, and share of the places that are,
    where each axis keeps ``density``."""
    dead = 1 - density
    dead_frame = dead ** (1 if whole_tiles else plan.m[0]) if plan.out_frames else 0.0
    dead_place = dead ** (1 if whole_tiles else PATCHES_IN_TILE) if plan.positions else 0.0
    dead_place = dead if plan.in_positions else dead_place  # tiles of inputs are no larger than masks' own
    taps = 1 - dead if plan.in_frames and not plan.transformed[0] else 1.0
    return (1 - dead_frame) * taps, 1 - dead_place


def runs(plan: WinogradPlan) -> list[tuple[int, int]]:
    """Rows and taps of the runs of a full, dense chunk, whose samples have runs of their own."""
    frames: dict[tuple[int, ...], int] = {}
    for frame in range(plan.tiles[0]):
        taps = plan.live_taps(frame)
        frames[taps] = frames.get(taps, 0) + 1
    whole, rest = divmod(plan.columns, plan.sample_columns) if plan.samples > 1 else (0, plan.columns)
    parts = [plan.sample_columns] * whole + [rest] * (rest > 0)
    return [(count * columns, len(taps)) for columns in parts for taps, count in frames.items()]


def _spill_seconds(scratch_bytes: float, machine: Machine, threads: int) -> float:
    """Time to write the scratch of a chunk and read it back, beyond what the second-level cache hides."""
    if scratch_bytes <= SCRATCH_SHARE * machine.l2:
        return 0.0
    cached = scratch_bytes <= SCRATCH_SHARE * _l3(machine)
    return 2.0 * scratch_bytes / (memory_rate(machine, threads) * (CACHE_RATE if cached else 1.0))
