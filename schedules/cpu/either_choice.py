"""Whether a layer under masks gets two kernels, and by what its calls choose one."""

from __future__ import annotations

from ..emit import FLOAT
from ..layer import Limits
from .conv3d_gather import GatherConv
from .cost import NOT_HIDDEN, chunk_seconds, gather_cycles, memory_rate, seconds_per_cycle, tiles_filled, winograd_parts
from .either import Decision, Either
from .live_counts import Costs, Grain, LiveCounts
from .tiles import Machine, predicted_cycles
from .winograd import WinogradConv

#: Share of the multiply-adds, all thinned axes alike and scattered, at which the direct kernel must be the faster one
#: for a build to hold both.
THIN = 0.1
#: How much faster it must be predicted to be for a call to run it: the model is not exact.
CLEARLY = 0.85
#: Cycles that the direct kernel's lists take for each output position, and a vector that is moved beside others.
LIST_CYCLES, MOVE_CYCLES = 8.0, 2.0


def either(winograd: WinogradConv, direct: GatherConv, machine: Machine, threads: int, limits: Limits) -> Either | None:
    """Both kernels in one, or None where thin masks make the direct one no faster, or weights in two layouts would
    take more memory than ``limits`` let."""
    plan = winograd.plan
    thinned = (plan.in_frames, plan.out_frames, plan.positions is not None, direct.live_in, direct.live_out)
    if not any(thinned) or direct.dtype != FLOAT or winograd.growth + 1 > limits.growth:
        return None
    costs = winograd_costs(winograd, machine, threads), direct_costs(direct, machine, threads)
    grains = Grain(plan.m, winograd.unit, winograd.tile.vector_floats), Grain()
    density = THIN ** (1 / sum(thinned))
    first, second = (
        cost.seconds(*_scattered(grain, thinned, density)) for cost, grain in zip(costs, grains, strict=True)
    )
    if second >= first:
        return None
    lists = (plan.samples, plan.in_frames, plan.out_frames, plan.positions, direct.live_in, direct.live_out)
    counts = LiveCounts(winograd.window, winograd.channels_in, winograd.channels_out, *lists)
    return Either(winograd, direct, Decision(counts, grains, costs))


def _scattered(grain: Grain, thinned: tuple[bool, ...], density: float) -> tuple[float, float, float]:
    """Shares of rows and of channels on either side that are computed where ``density`` of each axis is left, single
    frames, positions and channels anywhere; ``thinned``: frames read and wanted, positions, channels on either side."""

    def alive(on: bool, pieces: int) -> float:
        return 1 - (1 - density) ** pieces if on else 1.0

    taps = density if thinned[0] and grain.tile[0] == 1 else 1.0
    rows = taps * alive(thinned[1], grain.tile[0]) * alive(thinned[2], grain.tile[1] * grain.tile[2])
    return rows, alive(thinned[3], grain.unit_in), alive(thinned[4], grain.unit_out)


def winograd_costs(conv: WinogradConv, machine: Machine, threads: int) -> Costs:
    """What the model of time says of a Winograd kernel."""
    parts, chunks = winograd_parts(conv, conv.tile, conv.plan, machine), conv.plan.chunks
    cycle, byte = seconds_per_cycle(machine) / threads, 1 / memory_rate(machine, threads)
    return Costs(
        multiply=parts.multiply * chunks * cycle,
        weights=parts.weights * (1 - 1 / parts.nearer) * byte,
        again=parts.weights * chunks / parts.nearer * byte,
        rows=chunks * chunk_seconds(conv.scratch_bytes, machine, threads),
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
    blocks = max(1.0, window.positions_out / (tile.mr * tile.block_tiles))
    moved = window.positions_in * conv.channels_in / machine.vector_floats if conv.live_in else 0.0
    return Costs(
        multiply=(cycles + gather_cycles(conv, elements) * blocks) * cycle,
        weights=machine.element_bytes * elements * byte,
        read=moved * MOVE_CYCLES * cycle,
        always=LIST_CYCLES * window.positions_out * seconds_per_cycle(machine) / CLEARLY,
        exposed=NOT_HIDDEN,
    )
