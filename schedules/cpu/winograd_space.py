"""Sizes of Winograd's kernels: which there are, a model of what they take, and the tuning space."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from statistics import mean
from typing import ClassVar, TypeVar

from ..convolution import Convolution
from ..geometry import Triple, Window
from ..layer import UNLIMITED, Limits
from ..workload import Decisions, Workload
from .cost import axis_densities, reads_more_weights, runs, winograd_seconds
from .direct_spaces import GatherSpace
from .space import WORTH_TRYING, Loops, VectorSpace, are_whole, register_tiles
from .tiles import Machine, Tile, candidates, evenly, predicted_cycles
from .winograd_plan import WinogradPlan

#: Floats between the ξ planes of a scratch buffer beyond their content: planes a power of two apart would share the
#: few lines of one cache set.
PLANE_SKEW = 16
#: Share of the first-level cache that the weights of one pass may take: rows of V are read once for each of them.
WEIGHTS_SHARE_OF_L1 = 0.7
#: The least unit of input channels: an inner loop over fewer of them takes longer to begin than to run.
LEAST_UNIT = 8
#: Sums of a register tile below which a multiply-add waits for the one before.
LEAST_SUMS = 8
#: Tiles tried along height and width, and over frames. Each keeps the largest error of a layer under 1e-4 of its
#: largest output, by a factor of three at least (docs/winograd.md), so the largest is not nested with frames.
SPATIAL_TILES = (2, 3, 4, 5, 6)
FRAME_TILES = (1, 2, 4)
MOST_SPATIAL_WITH_FRAMES = 5
#: Bytes of scratch beyond which a chunk is never made.
MOST_SCRATCH = 96 << 20
#: A kernel with the larger weights or scratch must be this much faster to be worth its memory.
WORTH_MEMORY = 0.95
#: Masks must not make a layer slower than it is without any: where they leave everything, a kernel may be predicted to
#: take so much longer than the fastest one does.
NEVER_SLOWER = 1.03


@dataclass(frozen=True)
class Transformed(Convolution):
    """A Winograd kernel as the choice of its sizes sees it, of one convolution group.

    Of ``tile``, the register tile (``mr``, ``vectors``, ``vector_floats``, ``step``) and the cache blocking of the sum
    (``segment_taps``, ``depth_block``) are used.
    """

    tile: Tile
    plan: WinogradPlan

    #: Tiles tried along height and width.
    spatial_tiles: ClassVar[tuple[int, ...]] = SPATIAL_TILES

    @property
    def weights(self) -> float:
        """Transformed weights of one pair of channels."""
        return self.plan.xi * self.plan.taps

    def most_rows(self, machine: Machine) -> int:
        """Rows of a register tile."""
        return machine.most_rows

    def columns_share(self, nr: int, plan: WinogradPlan) -> float:
        """Of the products in panels of ``nr`` output channels, those that zero weights leave, each slower than a dense
        one."""
        return 1.0

    @property
    def growth(self) -> float:
        """How many times the memory of the layer's own weights the transformed ones take."""
        return self.weights / self.window.taps

    @property
    def source_plane(self) -> int:
        """Floats of one ξ plane of V."""
        return self.plan.source_rows * self.channels_in + PLANE_SKEW

    @property
    def product_plane(self) -> int:
        """Floats of one ξ plane of M."""
        return self.plan.tiles_capacity * self.tile.mr * self.panels * self.tile.nr + PLANE_SKEW

    @property
    def scratch_bytes(self) -> int:
        """Memory of V and M."""
        return 4 * self.plan.xi * (self.source_plane + self.product_plane)

    @property
    def memory_bytes(self) -> int:
        """Memory that the kernel needs while it runs, and no longer."""
        return self.scratch_bytes

    def retiled(self: W, m: Triple, columns: int, tile: Tile) -> W:
        """The same layer with tiles of ``m`` outputs and so many columns in a chunk."""
        return replace(self, tile=tile, plan=replace(self.plan, m=m, mr=tile.mr, columns=columns))

    def space(self, machine: Machine, workload: Workload) -> WinogradSpace:
        """Tile of outputs, columns of a chunk, register tile, cache blocking."""
        return WinogradSpace(machine, workload, self)

    def sized(self: W, decisions: Mapping[str, int]) -> W:
        """With these sizes."""
        sizes = {name: decisions[name] for name in ("mr", "vectors", "step", "segment_taps", "depth_block")}
        tile = Tile(vector_floats=self.tile.vector_floats, block_tiles=1, panels_outer=False, **sizes)
        return self.retiled(_winograd_m(self.window, decisions), decisions["columns"], tile)

    def register_tile(self, machine: Machine, plan: WinogradPlan) -> Tile:
        """The register tile with the fewest predicted cycles over the runs of a full chunk, its sums blocked for L1.

        Where output channels are listed, those are counted that are alive when half of the work is left, too, and the
        last panel is as narrow as they let it be.
        """
        listed, floats = runs(plan), machine.vector_floats
        shares = axis_densities((True, True)) if self.live_out else [1.0]
        written = [min(self.channels_out, math.ceil(share * self.channels_out / floats) * floats) for share in shares]

        def panels(rows: int, channels: int, tile: tuple[int, int, int]) -> float:
            rest = channels % (tile[1] * floats) if channels < self.channels_out else 0
            narrow = (tile[0], narrowest(rest, tile, floats), tile[2])
            return sum(
                predicted_cycles(machine, rows, some, each) for some, each in ((channels - rest, tile), (rest, narrow))
            )

        def cycles(tile: tuple[int, int, int]) -> float:
            dense = sum(panels(rows, channels, tile) * taps for rows, taps in listed for channels in written)
            return dense * self.columns_share(tile[1] * floats, plan)

        fitting = [tile for tile in candidates(machine) if tile[0] <= self.most_rows(machine)]
        mr, vectors, step = min(fitting, key=cycles)
        most = max(step, int(WEIGHTS_SHARE_OF_L1 * machine.l1d) // (4 * vectors * floats) // step * step)
        depth_block = min(most, evenly(self.channels_in, most, unit_in(floats)))
        segment_taps = evenly(plan.taps, max(1, most // depth_block))
        step = step if self.channels_in >= step else 1
        return Tile(mr, vectors, floats, step, 1, segment_taps, depth_block)

    @property
    def expected(self) -> list[float]:
        """Shares of each thinned axis that may be alive, all axes alike."""
        plan = self.plan
        return axis_densities((self.live_in, self.live_out, plan.in_frames, plan.out_frames, plan.positions))

    def predict(
        self, machine: Machine, threads: int, shares: Sequence[float] | None = None, whole_units: bool = False
    ) -> float:
        """As :mod:`~.cost` has it."""
        columns = self.columns_share(self.tile.nr, self.plan)
        found = (
            winograd_seconds(self, self.tile, self.plan, machine, threads, share, whole_units, columns)
            for share in shares or self.expected
        )
        return mean(found)


W = TypeVar("W", bound=Transformed)


def unit_in(vector_floats: int) -> int:
    """Input channels that are left out together: whole vectors of V, and enough of them for a loop."""
    return max(vector_floats, LEAST_UNIT)


def widths(tile: tuple[int, int, int]) -> list[int]:
    """Vectors of a panel that there is code for where output channels are listed, ascending: the last panel that they
    fill may be narrower than ``tile`` (rows, vectors, step)."""
    rows, vectors, _ = tile
    return [width for width in range(1, vectors) if width * rows >= LEAST_SUMS] + [vectors]


def narrowest(channels: int, tile: tuple[int, int, int], vector_floats: int) -> int:
    """Vectors of the panel that takes so few channels."""
    return next(width for width in widths(tile) if width * vector_floats >= channels)


def why_no_tiles(window: Window, groups: int, skips_positions: bool) -> str:
    """Why no Winograd kernel can compute a layer; empty if one can. ``skips_positions``: it reads no dead positions."""
    if groups > 1:
        return "it is grouped"
    if skips_positions:
        return "it leaves out the taps that read dead positions"
    if window.taps == 1:
        return "a 1×1×1 kernel has no taps to share"
    if not any(can_transform(window, axis) for axis in range(3)):
        return f"no axis of kernel {'×'.join(map(str, window.kernel))} is 3 long with stride and dilation 1"
    if any(window.kernel[axis] > 1 and not can_transform(window, axis) for axis in (1, 2)):
        return "its kernel over height and width is not 3×3 with stride and dilation 1"
    return ""


def can_transform(window: Window, axis: int) -> bool:
    """Whether products along an axis can be transformed."""
    return (window.kernel[axis], window.stride[axis], window.dilation[axis]) == (3, 1, 1)


def best(
    conv: W,
    machine: Machine,
    threads: int,
    densities: Sequence[float] | None = None,
    limits: Limits = UNLIMITED,
) -> W | None:
    """The Winograd kernel with the shortest predicted time, a smaller one's weights preferred where they are close.

    Of kernels that masks thin, only those that keep pace with the fastest where masks leave everything.
    """
    fitting = [option for option in options(conv, machine) if within(option, limits)]
    dense = {id(option): option.predict(machine, threads, [1.0]) for option in fitting}
    bound = NEVER_SLOWER * min(dense.values(), default=0.0)
    chosen: W | None = None
    least = math.inf
    for option in sorted(fitting, key=attrgetter("weights")):
        seconds = option.predict(machine, threads, densities)
        keeps_pace = dense[id(option)] <= bound or conv.expected == [1.0]
        if keeps_pace and seconds < least * (WORTH_MEMORY if chosen is not None and _larger(option, chosen) else 1.0):
            chosen, least = option, seconds
    return chosen


def _larger(option: Transformed, other: Transformed) -> bool:
    """Whether it takes more memory. Of a chunk's scratch, masks of positions leave a part untouched."""
    thinned = option.plan.positions is not None and reads_more_weights(option, option.plan)
    return option.weights > other.weights or (not thinned and option.scratch_bytes > other.scratch_bytes)


def within(option: Transformed, limits: Limits) -> bool:
    """Whether its memory is within the limits."""
    return option.growth <= limits.growth and option.memory_bytes <= limits.scratch


def options(conv: W, machine: Machine) -> Iterator[W]:
    """Every tile and chunk worth predicting."""
    window = conv.window
    frames = FRAME_TILES if can_transform(window, 0) else (1,)
    spatial = conv.spatial_tiles if any(window.kernel[axis] > 1 for axis in (1, 2)) else (1,)
    for m_t in frames:
        for m in spatial:
            if m_t > 1 and m > MOST_SPATIAL_WITH_FRAMES:
                continue
            height, width = (min(m, window.out[axis]) if window.kernel[axis] > 1 else 1 for axis in (1, 2))
            tile = (min(m_t, window.out[0]), height, width)
            transformed = tile[0] > 1 or window.kernel[1:] != (1, 1)
            if transformed and all(tile[axis] > 1 or window.kernel[axis] == 1 for axis in (1, 2)):
                yield from _chunked(conv, machine, tile)


def _chunked(conv: W, machine: Machine, m: Triple) -> Iterator[W]:
    """``m`` with every sensible number of columns per chunk, each with its best register tile."""
    whole = replace(conv.plan, m=m, columns=1)
    total = whole.window.batch * whole.places
    for columns in sorted({-(-total // chunks) for chunks in _steps(total)}):
        option = conv.retiled(m, columns, conv.register_tile(machine, replace(whole, columns=columns)))
        if option.scratch_bytes <= MOST_SCRATCH:
            yield option


def _steps(total: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, … numbers of chunks up to ``total``."""
    steps = {min(total, base << power) for base in (1, 3) for power in range(12)}
    return sorted(steps | {total})


@dataclass(frozen=True)
class WinogradSpace(VectorSpace):
    """The decisions of the Winograd convolution for one workload on one machine.

    =======================  ===================================================================================
    decision                 meaning
    =======================  ===================================================================================
    frames_tile, space_tile  outputs of one transformed tile, over frames and along height and width
    columns                  columns of tiles in a chunk, whose transformed values stay in cache (cache blocking)
    mr, vectors, step        the register tile, as in :class:`GatherSpace`
    segment_taps             taps over frames of one pass
    depth_block              input channels of one pass
    =======================  ===================================================================================
    """

    machine: Machine
    workload: Workload
    conv: Transformed
    names = ("frames_tile", "space_tile", "columns", "mr", "vectors", "step", "segment_taps", "depth_block")

    @cached_property
    def tiles(self) -> dict[tuple[int, int], list[int]]:
        """Columns of a chunk worth trying for each (frames_tile, space_tile), as the cost model has it."""
        seconds = {}
        for option in options(self.conv, self.machine):
            predicted = option.predict(self.machine, self.workload.threads)
            frames_tile, space_tile = _winograd_tile(option)
            seconds[frames_tile, space_tile, option.plan.columns] = predicted
        limit = WORTH_TRYING * min(seconds.values())
        found: dict[tuple[int, int], list[int]] = {}
        for (frames_tile, space_tile, columns), predicted in seconds.items():
            if predicted <= limit:
                found.setdefault((frames_tile, space_tile), []).append(columns)
        return found

    @cached_property
    def register_tiles(self) -> dict[int, list[int]]:
        """Rows worth trying for each number of vectors: the rows of a chunk are many."""
        rows, panel = self.workload.window.positions_out, self.workload.channels_out
        return register_tiles(self.machine, partial(predicted_cycles, self.machine, rows, panel))

    @property
    def _gather(self) -> GatherSpace:
        return GatherSpace(self.machine, self.workload.direct)

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(math.prod(map(len, part.values())) for part in self.parts())

    def default(self) -> Decisions:
        """The kernel that the cost model prefers. Raises ValueError where no Winograd kernel can be built."""
        found = best(self.conv, self.machine, self.workload.threads)
        if found is None:
            raise ValueError("no Winograd kernel can compute this workload")
        return self._decisions(found)

    def _decisions(self, conv: Transformed) -> Decisions:
        tile, (frames_tile, space_tile) = conv.tile, _winograd_tile(conv)
        sizes = {name: int(getattr(tile, name)) for name in self.names[3:]}
        return self.normal(
            {"frames_tile": frames_tile, "space_tile": space_tile, "columns": conv.plan.columns, **sizes}
        )

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""
        window, fitted = self.workload.window, dict(decisions)
        fitted["frames_tile"] = min(fitted["frames_tile"], window.out[0])
        space = [extent for extent, kernel in zip(window.out[1:], window.kernel[1:], strict=True) if kernel > 1]
        fitted["space_tile"] = min(fitted["space_tile"], max(space, default=1))
        fitted["columns"] = min(fitted["columns"], self._most_columns(fitted))
        fitted["depth_block"] = min(fitted["depth_block"], self.workload.depth)
        taps = 1 if fitted["frames_tile"] > 1 else window.kernel[0]
        fitted["segment_taps"] = min(fitted["segment_taps"], taps)
        fitted["step"] = fitted["step"] if self.workload.depth >= fitted["step"] else 1
        return fitted

    def _most_columns(self, decisions: Mapping[str, int]) -> int:
        window, m = self.conv.plan.window, _winograd_m(self.workload.window, decisions)
        return window.batch * math.prod(-(-extent // size) for extent, size in zip(window.out[1:], m[1:], strict=True))

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, its registers there, its tile one that keeps accuracy,
        its scratch within bounds."""
        if not are_whole(decisions, self.names):
            return False
        work = self.workload
        skips = "in_positions" in work.lists
        if min(decisions.values()) < 1 or why_no_tiles(work.window, work.groups, skips):
            return False
        registers = any((decisions["mr"], decisions["vectors"]) == tile[:2] for tile in candidates(self.machine))
        steps = decisions["step"] in (1, *self._gather.steps)
        m = (decisions["frames_tile"], decisions["space_tile"])
        known = any(m == _winograd_tile(option) for option in options(self.conv, self.machine))
        return registers and steps and known and self.conv.sized(decisions).scratch_bytes <= MOST_SCRATCH

    def parts(self) -> list[dict[str, list[int]]]:
        """One part for each tile of outputs and number of vectors."""
        default, gather = self.default(), self._gather
        found = []
        for (frames_tile, space_tile), columns in self.tiles.items():
            taps = 1 if frames_tile > 1 else self.workload.window.kernel[0]
            for vectors, rows in self.register_tiles.items():
                found.append(
                    {
                        "frames_tile": [frames_tile],
                        "space_tile": [space_tile],
                        "columns": sorted(columns),
                        "mr": rows,
                        "vectors": [vectors],
                        "step": sorted({*gather.steps, default["step"]}),
                        "segment_taps": sorted({1, taps}),
                        "depth_block": sorted({*gather.depth_blocks(vectors), default["depth_block"]}),
                    }
                )
        return found

    def loops(self) -> Loops:
        """Chunks of columns of output tiles, and register tiles; the rest as in :class:`GatherSpace`."""
        return {**self._gather.loops(), "rows": ("columns", "frames_tile", "space_tile", "space_tile", "mr")}


def _winograd_m(window: Window, decisions: Mapping[str, int]) -> Triple:
    """The tile of outputs on each axis."""
    m, space = window.out, decisions["space_tile"]
    sizes = [min(space, m[axis]) if window.kernel[axis] > 1 else 1 for axis in (1, 2)]
    return (min(decisions["frames_tile"], m[0]), sizes[0], sizes[1])


def _winograd_tile(conv: Transformed) -> tuple[int, int]:
    """frames_tile and space_tile of a kernel."""
    return conv.plan.m[0], max(conv.plan.m[1:])
