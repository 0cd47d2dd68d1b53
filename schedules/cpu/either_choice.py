"""Whether a layer under masks gets two kernels, and by what its calls choose one."""

from __future__ import annotations

import math

from ..emit import FLOAT
from ..layer import Limits
from .conv3d_gather import GatherConv
from .cost import (
    NOT_HIDDEN,
    TILE_CYCLES,
    chunk_seconds,
    first_reading,
    gather_cycles,
    memory_rate,
    seconds_per_cycle,
    tiles_filled,
    used_scratch,
    winograd_parts,
)
from .either import Decision, Either
from .live_counts import Costs, Grain, LiveCounts
from .tiles import Machine, predicted_cycles
from .winograd import WinogradConv

#: Share of the multiply-adds, scattered along one axis or along all that masks thin, at which the direct kernel must be
#: the faster one for a build to hold both.
THIN = 0.1
#: How much faster it must be predicted to be for a call to run it: the model is not exact.
CLEARLY = 0.9
#: Cycles that the direct kernel's lists take for each output position, a vector that is moved beside others, and a
#: single output that is stored where listed channels are; those to take up a register of sums again and put it back.
LIST_CYCLES, MOVE_CYCLES, SCATTER_CYCLES, RESUME_CYCLES = 8.0, 2.0, 2.0, 1.0


def either(winograd: WinogradConv, direct: GatherConv, machine: Machine, threads: int, limits: Limits) -> Either | None:
    """Both kernels in one, or None where thin masks make the direct one no faster, or weights in two layouts would
    take more memory than ``limits`` let. Living positions of inputs are not counted: such a layer has one kernel."""
    plan = winograd.plan
    if plan.in_positions is not None:
        return None
    thinned = (plan.in_frames, plan.out_frames, plan.positions is not None, direct.live_in, direct.live_out)
    if not any(thinned) or direct.dtype != FLOAT or winograd.growth + 1 > limits.growth:
        return None
    costs = winograd_costs(winograd, machine, threads), direct_costs(direct, machine, threads)
    grains = Grain(plan.m, winograd.unit, winograd.tile.vector_floats), Grain(panel=direct.tile.nr)
    axes = ((*thinned[:2], False, False, False), (False, False, thinned[2], False, False), (*[False] * 3, *thinned[3:]))
    if not any(_direct_is_faster(costs, grains, each, direct.channels_out) for each in (*axes, thinned) if any(each)):
        return None
    lists = (plan.samples, plan.in_frames, plan.out_frames, plan.positions, direct.live_in, direct.live_out)
    counts = LiveCounts(winograd.window, winograd.channels_in, winograd.channels_out, *lists)
    return Either(winograd, direct, Decision(counts, grains, costs))


def _direct_is_faster(
    costs: tuple[Costs, Costs], grains: tuple[Grain, Grain], thinned: tuple[bool, ...], channels_out: int
) -> bool:
    """Whether the second of two kernels is, of which a Winograd one is the first, where ``THIN`` is left."""
    density = THIN ** (1 / sum(thinned))
    first, second = (
        cost.seconds(*_scattered(grain, thinned, density, channels_out))
        for cost, grain in zip(costs, grains, strict=True)
    )
    return second < first


def _scattered(
    grain: Grain, thinned: tuple[bool, ...], density: float, channels_out: int
) -> tuple[float, float, float]:
    """Shares of rows and of channels on either side that are computed where ``density`` of each axis is left, single
    frames, positions and channels anywhere; ``thinned``: frames read and wanted, positions, channels on either side."""

    def alive(on: bool, pieces: int) -> float:
        return 1 - (1 - density) ** pieces if on else 1.0

    taps = density if thinned[0] and grain.tile[0] == 1 else 1.0
    rows = taps * alive(thinned[1], grain.tile[0]) * alive(thinned[2], grain.tile[1] * grain.tile[2])
    panels = math.ceil(alive(thinned[4], grain.unit_out) * channels_out / grain.panel)
    return rows, alive(thinned[3], grain.unit_in), panels / math.ceil(channels_out / grain.panel)


def winograd_costs(conv: WinogradConv, machine: Machine, threads: int) -> Costs:
    """What the cost model says of a Winograd kernel."""
    parts, chunks = winograd_parts(conv, conv.tile, conv.plan, machine), conv.plan.chunks
    cycle, byte = seconds_per_cycle(machine) / threads, 1 / memory_rate(machine, threads)
    return Costs(
        multiply=parts.multiply * chunks * cycle,
        weights=parts.weights * max(0.0, first_reading(machine, threads) - 1 / parts.nearer) * byte,
        again=parts.weights * chunks / parts.nearer * byte,
        rows=chunks * chunk_seconds(used_scratch(conv, conv.tile, conv.plan), machine, threads),
        read=chunks * parts.read * cycle,
        write=chunks * parts.write * cycle,
        exposed=NOT_HIDDEN,
    )


def direct_costs(conv: GatherConv, machine: Machine, threads: int) -> Costs:
    """The same of a direct kernel, so much slower that a call runs it only where it is ``CLEARLY`` faster."""
    window, tile = conv.window, conv.tile
    cycle, byte = seconds_per_cycle(machine) / threads / CLEARLY, 1 / memory_rate(machine, threads) / CLEARLY
    cycles = predicted_cycles(machine, window.positions_out, conv.channels_out, (tile.mr, tile.vectors, tile.step))
    cycles *= window.tap_positions / window.positions_out * conv.channels_in / tiles_filled(window, tile.mr, 0.5)
    elements = window.taps * conv.channels_in * conv.channels_out
    gathering, tiles = gather_cycles(conv, elements), window.positions_out / tile.mr
    moved = window.positions_in * conv.channels_in / machine.vector_floats if conv.live_in else 0.0
    # A pass of a register tile over a segment, and outputs that are stored one by one.
    segments = -(-window.taps // tile.segment_taps)
    passes = tiles * segments * conv.panels * (TILE_CYCLES + RESUME_CYCLES * tile.mr * tile.vectors)
    scattered = window.positions_out * conv.channels_out * SCATTER_CYCLES if conv.live_out else 0.0
    return Costs(
        multiply=(cycles + gathering * max(0.0, tiles / tile.block_tiles - 1)) * cycle,
        weights=machine.element_bytes * elements * first_reading(machine, threads) * byte,
        read=moved * MOVE_CYCLES * cycle,
        write=(passes + scattered) * cycle,
        pack=gathering * cycle,
        always=LIST_CYCLES * window.positions_out * seconds_per_cycle(machine) / CLEARLY,
        exposed=NOT_HIDDEN,
    )
