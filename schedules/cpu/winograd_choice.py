"""Direct or Winograd, and with which tile: a model of the time each kernel takes where nothing has been measured.

Both are the same register tiles, so both are counted with :func:`~.tiles.predicted_cycles`; what differs is how many of
them there are, how many weights stream past them, and what the transforms add.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import mean

from ..convolution import LayerKernel
from ..geometry import Triple, Window
from ..layer import Choice, Limits
from .conv3d_gather import GatherConv
from .conv3d_kgs import KernelGroupConv
from .tiles import WEIGHTS_SHARE_OF_L1, Machine, Tile, candidates, predicted_cycles, tap_tiles
from .winograd import WinogradConv
from .winograd_plan import WinogradPlan

#: Tiles tried along height and width, and over frames. Each keeps the largest error of a layer under 1e-4 of its
#: largest output, by a factor of three at least (docs/winograd.md), so the largest is not nested with frames.
SPATIAL_TILES = (2, 3, 4, 5, 6)
FRAME_TILES = (1, 2, 4)
MOST_SPATIAL_WITH_FRAMES = 5
#: Cycles of one core per vector that is transformed and stored, fitted to layers of C3D and R(2+1)D: inputs, products,
#: and more for each of the planes that one tile is spread over, as every plane lies in a page of its own.
INPUT_CYCLES, OUTPUT_CYCLES, PLANE_CYCLES = 5.0, 4.0, 0.02
#: Cycles to start a register tile: its list entries, its addresses and the end of its loops.
TILE_CYCLES = 40.0
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
#: Share of a cache that the scratch of a chunk may fill before it is taken to spill.
SCRATCH_SHARE = 0.6
#: Bytes of scratch beyond which a chunk is never made.
MOST_SCRATCH = 96 << 20
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
#: A kernel with the larger weights or scratch must be this much faster to be worth its memory.
WORTH_MEMORY = 0.95
UNLIMITED = Limits()
#: Masks must not make a layer slower than it is without any: where they leave everything, a kernel may be predicted to
#: take so much longer than the fastest one does.
NEVER_SLOWER = 1.03


def why_not(conv: GatherConv) -> str:
    """Why no Winograd kernel can compute ``conv``; empty if one can."""
    window = conv.window
    if conv.groups > 1:
        return "it is grouped"
    if conv.plan.in_positions is not None:
        return "it leaves out the taps that read dead positions"
    if window.taps == 1:
        return "a 1×1×1 kernel has no taps to share"
    if not any(_can_transform(conv, axis) for axis in range(3)):
        return f"no axis of kernel {'×'.join(map(str, window.kernel))} is 3 long with stride and dilation 1"
    if any(window.kernel[axis] > 1 and not _can_transform(conv, axis) for axis in (1, 2)):
        return "its kernel over height and width is not 3×3 with stride and dilation 1"
    return ""


def _can_transform(conv: GatherConv, axis: int) -> bool:
    window = conv.window
    return (window.kernel[axis], window.stride[axis], window.dilation[axis]) == (3, 1, 1)


def choose(
    conv: GatherConv, machine: Machine, threads: int, wanted: str = "auto", limits: Limits = UNLIMITED
) -> Choice[LayerKernel]:
    """``conv`` itself or the Winograd kernel within ``limits`` predicted to be faster; ``wanted`` is auto, direct or
    winograd."""
    if wanted == "direct":
        return Choice(conv, "")
    if refusal := why_not(conv):
        return Choice(conv, f"direct: {refusal}" if wanted == "winograd" else "")
    found = best(conv, machine, threads, limits=limits)
    if found is None:
        return Choice(conv, "direct: no tile's transformed inputs fit the memory allowed")
    direct = direct_seconds(conv, machine, threads)
    transformed = winograd_seconds(found, machine, threads)
    kind = "kernel groups" if isinstance(conv, KernelGroupConv) else "direct"
    times = f"{1e3 * transformed:.2g} ms predicted, {kind} {1e3 * direct:.2g} ms"
    if wanted == "auto" and transformed > direct:
        dense = winograd_seconds(found, machine, threads, [1.0])
        if direct_seconds(conv, machine, threads, [1.0]) <= NEVER_SLOWER * dense:
            return Choice(conv, f"{kind}: Winograd {times}")
        times += ", but more where masks leave everything"
    return Choice(found, f"{times}; scratch {found.scratch_bytes / 2**20:.0f} MiB")


def best(
    conv: GatherConv,
    machine: Machine,
    threads: int,
    densities: Sequence[float] | None = None,
    limits: Limits = UNLIMITED,
) -> WinogradConv | None:
    """The Winograd kernel with the shortest predicted time, a smaller one's weights preferred where they are close.

    Of kernels that masks thin, only those that keep pace with the fastest where masks leave everything.
    """
    fitting = [option for option in options(conv, machine) if fits(option, limits)]
    dense = {id(option): winograd_seconds(option, machine, threads, [1.0]) for option in fitting}
    bound = NEVER_SLOWER * min(dense.values(), default=0.0)
    chosen, least = None, float("inf")
    for option in sorted(fitting, key=_weights):
        seconds = winograd_seconds(option, machine, threads, densities)
        keeps_pace = dense[id(option)] <= bound or _densities(conv) == [1.0]
        larger = chosen is not None and (
            _weights(option) > _weights(chosen) or option.scratch_bytes > chosen.scratch_bytes
        )
        if keeps_pace and seconds < least * (WORTH_MEMORY if larger else 1.0):
            chosen, least = option, seconds
    return chosen


def trades(conv: GatherConv, machine: Machine, threads: int, most_scratch: float) -> list[tuple[float, float]]:
    """How far weights may grow, and the predicted seconds that this buys: those of ``conv`` itself, which keeps them as
    they are, then of each Winograd kernel that is faster than all with fewer weights."""
    least = {1.0: direct_seconds(conv, machine, threads)}
    fitting = [] if why_not(conv) else [each for each in options(conv, machine) if each.scratch_bytes <= most_scratch]
    for option in sorted(fitting, key=_weights):
        seconds = winograd_seconds(option, machine, threads)
        if seconds < min(least.values()):
            least[growth(option)] = seconds
    return list(least.items())


def fits(conv: WinogradConv, limits: Limits) -> bool:
    """Whether its memory is within the limits."""
    return growth(conv) <= limits.growth and conv.scratch_bytes <= limits.scratch


def growth(conv: WinogradConv) -> float:
    """How many times the memory of the layer's own weights the transformed ones take."""
    return _weights(conv) / conv.window.taps


def _weights(conv: WinogradConv) -> int:
    return conv.plan.xi * conv.plan.taps


def options(conv: GatherConv, machine: Machine) -> Iterator[WinogradConv]:
    """Every tile and chunk worth predicting."""
    window = conv.window
    frames = FRAME_TILES if _can_transform(conv, 0) else (1,)
    spatial = SPATIAL_TILES if any(window.kernel[axis] > 1 for axis in (1, 2)) else (1,)
    for m_t in frames:
        for m in spatial:
            if m_t > 1 and m > MOST_SPATIAL_WITH_FRAMES:
                continue
            tile = (min(m_t, window.out[0]), *(min(m, window.out[a]) if window.kernel[a] > 1 else 1 for a in (1, 2)))
            transformed = tile[0] > 1 or window.kernel[1:] != (1, 1)
            if transformed and all(tile[axis] > 1 or window.kernel[axis] == 1 for axis in (1, 2)):
                yield from _chunked(conv, machine, tile)  # type: ignore[arg-type]  # a product of three tuples has three


def _chunked(conv: GatherConv, machine: Machine, m: Triple) -> Iterator[WinogradConv]:
    """``m`` with every sensible number of columns per chunk, each with its best register tile."""
    plan = conv.plan
    masks = (plan.samples, plan.in_frames, plan.out_frames, plan.positions)
    whole = WinogradPlan(conv.window, m, plan.mr, 1, *masks)
    total = conv.window.batch // plan.samples * whole.places
    for columns in sorted({-(-total // chunks) for chunks in _steps(total)}):
        option = configured(conv, m, columns, _register_tile(conv, machine, replace(whole, columns=columns)))
        if option.scratch_bytes <= MOST_SCRATCH:
            yield option


def configured(conv: GatherConv, m: Triple, columns: int, tile: Tile) -> WinogradConv:
    """The Winograd kernel in the place of ``conv``, with tiles of ``m`` outputs and so many columns in a chunk."""
    plan = conv.plan
    return WinogradConv(
        conv.window,
        conv.channels_in,
        conv.channels_out,
        1,
        tile,
        WinogradPlan(conv.window, m, tile.mr, columns, plan.samples, plan.in_frames, plan.out_frames, plan.positions),
        conv.live_in,
        conv.live_out,
        conv.residual,
        conv.activation,
        conv.zero_dead,
        conv.dtype,
    )


def _steps(total: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, … numbers of chunks up to ``total``."""
    steps = {min(total, base << power) for base in (1, 3) for power in range(12)}
    return sorted(steps | {total})


def _register_tile(conv: GatherConv, machine: Machine, plan: WinogradPlan) -> Tile:
    """The register tile with the fewest predicted cycles over the runs of a full chunk, its sums blocked for L1.

    Where output channels are listed, those are counted that fill its panels when half of the work is left, too.
    """
    runs, floats = _runs(plan), machine.vector_floats
    shares = [left**0.5 for left in ASSUMED_LEFT] if conv.live_out else [1.0]
    written = [min(conv.channels_out, math.ceil(share * conv.channels_out / floats) * floats) for share in shares]

    def cycles(tile: tuple[int, int, int]) -> float:
        return sum(
            predicted_cycles(machine, rows, channels, tile) * taps for rows, taps in runs for channels in written
        )

    mr, vectors, step = min(candidates(machine), key=cycles)
    nr = vectors * machine.vector_floats
    depth_block = max(step, int(WEIGHTS_SHARE_OF_L1 * machine.l1d) // (4 * nr) // step * step)
    segment_taps = max(1, depth_block // min(conv.channels_in, depth_block))
    step = step if conv.channels_in >= step else 1
    return Tile(mr, vectors, machine.vector_floats, step, 1, segment_taps, depth_block)


def _runs(plan: WinogradPlan) -> list[tuple[int, int]]:
    """Rows and taps of the runs of a full, dense chunk."""
    rows: dict[tuple[int, ...], int] = {}
    for frame in range(plan.tiles[0]):
        taps = plan.live_taps(frame)
        rows[taps] = rows.get(taps, 0) + plan.columns
    return [(count, len(taps)) for taps, count in rows.items()]


def _densities(conv: GatherConv | WinogradConv) -> list[float]:
    """Shares of each thinned axis that may be alive, all axes alike."""
    plan = conv.plan
    positions = (plan.positions, getattr(plan, "in_positions", None))
    return axis_densities((conv.live_in, conv.live_out, plan.in_frames, plan.out_frames, *positions))


def axis_densities(masks: Iterable[object]) -> list[float]:
    """Shares that may be alive of each axis that one of ``masks`` thins (those that are neither None nor False)."""
    thinned = sum(mask is not None and mask is not False for mask in masks)
    return [left ** (1 / thinned) for left in ASSUMED_LEFT] if thinned else [1.0]


def _live_share(conv: WinogradConv, density: float, whole_tiles: bool) -> float:
    """Share of the rows of tiles that is alive, and in frames of one another, where each axis keeps ``density``."""
    plan, dead = conv.plan, 1 - density
    dead_frame = dead ** (1 if whole_tiles else plan.m[0]) if plan.out_frames else 0.0
    dead_place = dead ** (1 if whole_tiles else PATCHES_IN_TILE) if plan.positions else 0.0
    taps = 1 - dead if plan.in_frames and not plan.transformed[0] else 1.0
    return (1 - dead_frame) * (1 - dead_place) * taps


def _seconds_per_cycle(machine: Machine) -> float:
    """Of one core; a cycle is two vector multiply-adds, as in :func:`~.tiles.predicted_cycles`."""
    return 4 * machine.vector_floats / (1e9 * machine.gflops)


def _l3(machine: Machine) -> int:
    """Bytes of the last level of cache that are ours."""
    return min(machine.l3, MOST_SHARED_CACHE)


def _memory_rate(machine: Machine, threads: int) -> float:
    """Bytes per second that the threads get from memory together."""
    return 1e9 * machine.memory_gb_per_s * min(1.0, ONE_CORE_SHARE * threads)


def _with_traffic(machine: Machine, threads: int, cycles: float, weight_bytes: float) -> float:
    """Seconds of arithmetic shared out over the threads beside weights that stream in from memory."""
    arithmetic = cycles * _seconds_per_cycle(machine) / threads
    traffic = weight_bytes / _memory_rate(machine, threads)
    return max(arithmetic, traffic) + NOT_HIDDEN * min(arithmetic, traffic)


def _channel_share(conv: GatherConv | WinogradConv, density: float) -> float:
    return density ** (conv.live_in + conv.live_out)


def _gather_cycles(conv: GatherConv | WinogradConv, weights: float) -> float:
    """Cycles to pack ``weights`` (elements) into panels of live channels, once."""
    if conv.live_out:
        return weights * GATHER_COLUMN_CYCLES
    return weights * GATHER_ROW_CYCLES if conv.live_in else 0.0


def direct_seconds(conv: GatherConv, machine: Machine, threads: int, densities: Sequence[float] | None = None) -> float:
    """Predicted time of the direct kernel, the mean over the masks that are expected.

    ``densities`` of each axis: by default those that the kernel itself thins leave ``ASSUMED_LEFT`` together.
    """
    machine = machine.storing(conv.dtype)
    return mean(_direct_seconds(conv, machine, threads, density) for density in densities or _densities(conv))


def _direct_seconds(conv: GatherConv, machine: Machine, threads: int, density: float) -> float:
    window, tile, plan = conv.window, conv.tile, conv.plan
    share = _channel_share(conv, density)
    if isinstance(conv, KernelGroupConv):
        share *= conv.columns / (conv.panels * window.taps * conv.depth) / KERNEL_GROUP_EFFICIENCY
    for thinned in (plan.out_frames, plan.positions is not None, plan.dynamic_taps, plan.in_positions is not None):
        share *= density if thinned else 1.0
    register_tile = (tile.mr, tile.vectors, tile.step)
    cycles = predicted_cycles(machine, window.positions_out, conv.group_out, register_tile) * conv.groups
    taps = window.tap_positions / max(1, window.positions_out)
    cycles *= taps * conv.depth * share / _tiles_filled(window, tile.mr, _row_share(conv, density))
    elements = window.taps * conv.depth * conv.channels_out * _channel_share(conv, density)
    blocks = max(1.0, window.positions_out * _row_share(conv, density) / plan.samples / (tile.mr * tile.block_tiles))
    cycles += _gather_cycles(conv, elements) * plan.samples * blocks
    repeats = 1 + (plan.samples - 1) / (1 if machine.element_bytes * elements > machine.l3 / 2 else CACHE_RATE)
    weights = float(machine.element_bytes) * window.taps * conv.depth * conv.channels_out * share * repeats
    return _with_traffic(machine, threads, cycles, weights)


def _tiles_filled(window: Window, mr: int, share: float) -> float:
    """Share of the register tiles' rows that hold one: rows that read other taps, as at edges, fill tiles of their own.

    ``share`` of the rows of each class are computed together.
    """
    slots = mr * tap_tiles(window, mr, share)
    return window.tap_positions * share / slots if slots else 1.0


def _row_share(conv: GatherConv, density: float) -> float:
    """Share of the rows that are computed where each axis keeps ``density``."""
    return density ** (conv.plan.out_frames + (conv.plan.positions is not None))


def winograd_seconds(
    conv: WinogradConv,
    machine: Machine,
    threads: int,
    densities: Sequence[float] | None = None,
    whole_tiles: bool = False,
) -> float:
    """Predicted time of a Winograd kernel, the mean over the masks that are expected, as :func:`direct_seconds` has.

    ``whole_tiles``: masks leave frames and positions out by whole tiles, not in patches that lie anywhere.
    """
    chosen = densities or _densities(conv)
    return mean(_winograd_seconds(conv, machine, threads, density, whole_tiles) for density in chosen)


def _winograd_seconds(conv: WinogradConv, machine: Machine, threads: int, density: float, whole_tiles: bool) -> float:
    plan, tile = conv.plan, conv.tile
    alive, share = _live_share(conv, density, whole_tiles), _channel_share(conv, density)
    chunks = plan.chunks * alive
    register_tile = (tile.mr, tile.vectors, tile.step)
    cycles = 0.0
    for rows, taps in _runs(plan):
        tiles = -(-rows // tile.mr) * conv.panels
        cycles += predicted_cycles(machine, rows, conv.channels_out, register_tile) * taps * conv.channels_in * share
        cycles += tiles * TILE_CYCLES * (density if conv.live_out else 1.0)
    elements = plan.taps * conv.channels_in * conv.channels_out * share
    weights = 4.0 * plan.xi * elements
    repeats = max(0.0, chunks - 1)  # from memory, from the last level that the cores share, or from a core's own cache
    repeats /= 1.0 if weights > _l3(machine) / 2 else CACHE_RATE if weights > machine.l2 / 2 else math.inf
    multiply = _with_traffic(machine, threads, cycles * plan.xi * chunks, weights * (1 + repeats))

    read, written = (density if listed else 1.0 for listed in (conv.live_in, conv.live_out))
    vectors_in = plan.xi * plan.source_rows * conv.channels_in / machine.vector_floats * read
    vectors_out = plan.xi * plan.tiles[0] * plan.columns * conv.panels * tile.vectors * written
    planes = PLANE_CYCLES * plan.xi
    transforms = vectors_in * (INPUT_CYCLES + planes) + vectors_out * (OUTPUT_CYCLES + planes)
    seconds = multiply + chunks * transforms * _seconds_per_cycle(machine) / threads
    return seconds + chunks * (3 * BARRIER_SECONDS + _spill_seconds(conv.scratch_bytes, machine, threads))


def _spill_seconds(scratch_bytes: int, machine: Machine, threads: int) -> float:
    """Time to write the scratch of a chunk and read it back, beyond what the second-level cache hides."""
    if scratch_bytes <= SCRATCH_SHARE * machine.l2:
        return 0.0
    cached = scratch_bytes <= SCRATCH_SHARE * _l3(machine)
    return 2.0 * scratch_bytes / (_memory_rate(machine, threads) * (CACHE_RATE if cached else 1.0))
