"""Tuning spaces: what may be chosen for a kernel, and the one place where it is chosen.

A kernel family declares its decisions once. The default (``tiles.default_tile``), a tuned record and the tuner's
candidates are all the same mapping from a decision's name to a small integer, turned into a ``Tile`` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

from ..convolution import LayerKernel
from ..geometry import Triple, Window
from ..kernel import Kernel
from ..layer import Choice, Layer
from ..pool import Pool
from ..workload import GATHER, KERNEL_GROUPS, LINE, POINTWISE, POOL, WINOGRAD, Decisions, Workload
from .conv3d_gather import GatherConv
from .conv3d_kgs import KernelGroupConv, kernel_group_tile
from .line_tiles import FEW_CHANNELS, LineSpace, is_dense, line, listing_seconds, predicted_seconds
from .pointwise_tiles import PointwiseSpace, is_pointwise, pointwise
from .pool3d import VectorPool, default_vectors
from .row_plan import RowPlan
from .tiles import Machine, Tile, candidates, default_tile, predicted_cycles, window_cycles
from .winograd import WinogradConv
from .winograd_choice import (
    MOST_SCRATCH,
    best,
    choose,
    configured,
    direct_seconds,
    growth,
    options,
    why_not,
    winograd_seconds,
)

#: Register tiles that the model of ``tiles.predicted_cycles`` holds for this much slower than its best are not tried.
WORTH_TRYING = 1.5
#: Shares of the first-level cache that the weights of one pass may take.
CACHE_SHARES = (0.25, 0.5, 0.75, 1.0, 2.0)
#: Tiles that share a pass over the weights.
BLOCK_TILES = (8, 16, 32, 64, 128, 256)
#: Vectors of channels that a pool may reduce at once.
POOLED_VECTORS = (1, 2, 4, 8)
#: Measured gain from which records turn a choice between direct and Winograd: the two were not measured in turns.
WORTH_SWITCHING = 1.05

#: What tiles each axis of a convolution's loops, outermost first: names of decisions, or sizes that are given.
Loops = dict[str, tuple[str | int, ...]]


def direct(layer: Layer, tile: Tile) -> GatherConv:
    """The direct kernel of a layer: over its live columns where it is pruned."""
    dynamic = (layer.samples, *layer.masks, layer.in_positions)
    plan = RowPlan(layer.window, tile.mr, tile.block_tiles, tile.segment_taps, *dynamic)
    if layer.columns is None:
        return GatherConv(**layer.fields, tile=tile, plan=plan)
    fields = {**layer.fields, "columns": layer.columns, "run": layer.run, "threads": layer.threads}
    return KernelGroupConv(**fields, tile=tile, plan=plan)


def register_tiles(
    machine: Machine, cycles: Callable[[tuple[int, int, int]], float], vectors: int | None = None
) -> dict[int, list[int]]:
    """Rows worth trying for each number of vectors (for ``vectors`` alone where given), as the model of the register
    file has it: ``cycles`` of a tile (rows, vectors, step)."""
    cost = {tile: cycles(tile) for tile in candidates(machine) if vectors in (None, tile[1])}
    limit = WORTH_TRYING * min(cost.values())
    found: dict[int, list[int]] = {}
    for (mr, columns, _), predicted in cost.items():
        if predicted <= limit:
            found.setdefault(columns, []).append(mr)
    return found


def pass_taps(window: Window) -> list[int]:
    """Taps of one pass: one, a line, a plane, the whole kernel, and what lies between."""
    _, height, width = window.kernel
    return sorted({min(count, window.taps) for count in (1, 2, width, 2 * width, height * width, window.taps)})


def most_tiles(window: Window, mr: int) -> int:
    """Row tiles beyond which a block holds all rows."""
    return -(-window.positions_out // mr) + 8


def block_sizes(window: Window, fewest_rows: int) -> list[int]:
    """Row tiles of one block; more than there are rows is the same as all of them."""
    return sorted({min(count, most_tiles(window, fewest_rows)) for count in BLOCK_TILES})


def are_whole(decisions: Mapping[str, int], names: tuple[str, ...]) -> bool:
    """Whether these decisions were taken, and no others."""
    return set(decisions) == set(names) and all(isinstance(value, int) for value in decisions.values())


class Space(Protocol):
    """What may be decided for one workload on one machine."""

    @property
    def workload(self) -> Workload:
        """For which workload."""

    @property
    def names(self) -> tuple[str, ...]:
        """The decisions, in order."""

    @property
    def size(self) -> int:
        """How many candidates there are."""

    def default(self) -> Decisions:
        """What is chosen without a record."""

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them."""

    def parts(self) -> list[dict[str, list[int]]]:
        """The values of each decision, in parts within which each goes with each."""

    def kernel(self, decisions: Mapping[str, int]) -> Kernel:
        """The kernel that the decisions describe."""


class VectorSpace(Space, Protocol):
    """The space of a kernel for a CPU."""

    @property
    def machine(self) -> Machine:
        """On which machine."""

    def loops(self) -> Loops:
        """How the decisions tile ``rows``, ``channels_out``, ``taps`` and ``channels_in``."""


@dataclass(frozen=True)
class GatherSpace:
    """The decisions of the gathered convolution for one workload on one machine.

    ===============  ===============================================================================================
    decision         meaning
    ===============  ===============================================================================================
    vectors, mr      the register tile: output channels in vectors, rows (vectorised and unrolled whole)
    step             input channels loaded as one vector per row
    depth_block      input channels of one pass over a tile (cache blocking)
    segment_taps     taps of one pass
    block_tiles      row tiles that share a pass over the weights
    panels_outer     loop order and split of threads: panels of output channels outermost, or blocks of rows
    ===============  ===============================================================================================
    """

    machine: Machine
    workload: Workload
    names = ("mr", "vectors", "step", "block_tiles", "segment_taps", "depth_block", "panels_outer")

    @cached_property
    def register_tiles(self) -> dict[int, list[int]]:
        """Rows worth trying for each number of vectors."""
        work = self.workload
        return register_tiles(self.machine, partial(window_cycles, self.machine, work.window, work.group_out))

    @property
    def steps(self) -> list[int]:
        """Channels that one load brings: one where values are broadcast from memory, else a vector where it fits."""
        floats = self.machine.vector_floats
        return [1] if self.machine.broadcast_loads or self.workload.depth < floats else [floats]

    def depth_blocks(self, vectors: int) -> list[int]:
        """Input channels that fit shares of the first-level cache beside one tap, and all of them."""
        step, nr = self.steps[-1], vectors * self.machine.vector_floats
        room = self.machine.l1d // (self.machine.element_bytes * nr)
        fitting = {max(step, int(share * room) // step * step) for share in CACHE_SHARES}
        most = min(self.workload.depth, self.machine.most_terms)
        return sorted({min(size, most) for size in {*fitting, 64, 128}})

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(math.prod(map(len, part.values())) for part in self.parts())

    def default(self) -> Decisions:
        """What is chosen without a record."""
        window, depth, group_out = self.workload.window, self.workload.depth, self.workload.group_out
        gathers = bool({"in_channels", "out_channels"} & set(self.workload.lists))
        tile = default_tile(self.machine, window, depth, group_out, gathers=gathers)
        return self.normal({name: int(getattr(tile, name)) for name in self.names})

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""
        window, floats = self.workload.window, self.machine.vector_floats
        fitted = dict(decisions)
        most = self.machine.most_terms
        fitted["depth_block"] = min(fitted["depth_block"], self.workload.depth, most)
        fitted["segment_taps"] = min(fitted["segment_taps"], window.taps, max(1, most // fitted["depth_block"]))
        fitted["step"] = fitted["step"] if self.workload.depth >= fitted["step"] and fitted["step"] <= floats else 1
        fitted["block_tiles"] = min(fitted["block_tiles"], most_tiles(window, fitted["mr"]))
        return fitted

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, positive, and no more registers than there are."""
        if not are_whole(decisions, self.names):
            return False
        mr, vectors = decisions["mr"], decisions["vectors"]
        fits = any((mr, vectors) == (rows, columns) for rows, columns, _ in candidates(self.machine))
        positive = all(value >= 1 for name, value in decisions.items() if name != "panels_outer")
        return fits and positive and decisions["panels_outer"] in (0, 1) and decisions["step"] in (1, *self.steps)

    def parts(self) -> list[dict[str, list[int]]]:
        """One part for each number of vectors: which rows are worth trying depends on it."""
        default, window = self.default(), self.workload.window
        fewest = min(min(rows) for rows in self.register_tiles.values())
        found = []
        for vectors, rows in self.register_tiles.items():
            values = {
                "step": self.steps,
                "block_tiles": block_sizes(window, fewest),
                "segment_taps": pass_taps(window),
                "depth_block": self.depth_blocks(vectors),
                "panels_outer": [0, 1],
            }
            shared = {name: sorted({*choices, default[name]}) for name, choices in values.items()}
            found.append({"mr": rows, "vectors": [vectors], **shared})
        return found

    def loops(self) -> Loops:
        """Blocks of tiles of rows; vectors of a panel; passes over taps and channels."""
        return {
            "rows": ("block_tiles", "mr"),
            "channels_out": ("vectors", self.machine.vector_floats),
            "taps": ("segment_taps",),
            "channels_in": ("depth_block",),
        }

    def tile(self, decisions: Mapping[str, int]) -> Tile:
        """The tile that the decisions describe."""
        sizes = {name: decisions[name] for name in self.names if name != "panels_outer"}
        return Tile(vector_floats=self.machine.vector_floats, panels_outer=bool(decisions["panels_outer"]), **sizes)

    def kernel(self, decisions: Mapping[str, int]) -> GatherConv:
        """The direct kernel."""
        return direct(Layer.of(self.workload), self.tile(decisions))


@dataclass(frozen=True)
class KernelGroupSpace:
    """The decisions of the convolution over the columns that kernel groups keep, for one workload on one machine.

    They are those of :class:`GatherSpace` but for two: the filters of a group are the output channels of a tile, and
    one list of columns has no cache blocks of channels. The columns are made up at random: of a network that was
    pruned to the same share the speed is the same, whichever they are.
    """

    machine: Machine
    workload: Workload
    names = ("mr", "step", "block_tiles", "segment_taps", "panels_outer")

    @property
    def vectors(self) -> int:
        """Vectors that hold the filters of a group."""
        return self.workload.group[0] // self.machine.vector_floats

    @property
    def run(self) -> int:
        """Columns of consecutive channels that one list entry stands for."""
        return Layer.of(self.workload).run

    @property
    def rows(self) -> list[int]:
        """Rows worth trying."""
        work = self.workload
        cycles = partial(window_cycles, self.machine, work.window, work.channels_out)
        tiles = register_tiles(self.machine, cycles, self.vectors)
        return tiles[self.vectors]

    @property
    def steps(self) -> list[int]:
        """Channels that one load brings, as in :class:`GatherSpace`; a vector of them where runs fill it."""
        floats = self.machine.vector_floats
        return [1] if self.machine.broadcast_loads or self.run % floats else [floats]

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(math.prod(map(len, part.values())) for part in self.parts())

    def default(self) -> Decisions:
        """What is chosen without a record."""
        work = self.workload
        per_tap = max(1, round(work.kept * work.channels_in))
        channels = (work.channels_in, work.channels_out)
        tile = kernel_group_tile(self.machine, work.window, channels, per_tap, work.group[0], self.run)
        return self.normal({name: int(getattr(tile, name)) for name in self.names})

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""
        window, fitted = self.workload.window, dict(decisions)
        fitted["segment_taps"] = min(fitted["segment_taps"], window.taps)
        fitted["step"] = fitted["step"] if fitted["step"] in self.steps else 1
        fitted["block_tiles"] = min(fitted["block_tiles"], most_tiles(window, fitted["mr"]))
        return fitted

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, positive, and no more registers than there are."""
        if not are_whole(decisions, self.names):
            return False
        fits = any((decisions["mr"], self.vectors) == tile[:2] for tile in candidates(self.machine))
        positive = all(value >= 1 for name, value in decisions.items() if name != "panels_outer")
        return fits and positive and decisions["panels_outer"] in (0, 1) and decisions["step"] in (1, *self.steps)

    def parts(self) -> list[dict[str, list[int]]]:
        """One part: every choice goes with every other."""
        default, rows, window = self.default(), self.rows, self.workload.window
        values = {
            "mr": rows,
            "step": self.steps,
            "block_tiles": block_sizes(window, min(rows)),
            "segment_taps": pass_taps(window),
            "panels_outer": [0, 1],
        }
        return [{name: sorted({*choices, default[name]}) for name, choices in values.items()}]

    def loops(self) -> Loops:
        """Blocks of tiles of rows; a group's filters; passes over taps."""
        return {
            "rows": ("block_tiles", "mr"),
            "channels_out": (self.vectors, self.machine.vector_floats),
            "taps": ("segment_taps",),
        }

    def tile(self, decisions: Mapping[str, int]) -> Tile:
        """The tile that the decisions describe."""
        sizes = {name: decisions[name] for name in self.names if name != "panels_outer"}
        floats, outer = self.machine.vector_floats, bool(decisions["panels_outer"])
        return Tile(vectors=self.vectors, vector_floats=floats, panels_outer=outer, **sizes)

    def kernel(self, decisions: Mapping[str, int]) -> GatherConv:
        """The kernel over the made-up columns."""
        return direct(Layer.of(self.workload), self.tile(decisions))


@dataclass(frozen=True)
class PoolSpace:
    """The decisions of a pool for one workload on one machine.

    There is one: ``vectors``, how many vectors of channels are reduced at once. The rest of its time a pool waits for
    memory.
    """

    machine: Machine
    workload: Workload
    names = ("vectors",)

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return len(self.parts()[0]["vectors"])

    def default(self) -> Decisions:
        """What is chosen without a record."""
        return {"vectors": default_vectors(self.workload.channels_in, self.machine.vector_floats)}

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one: vectors beyond the channels are never used."""
        return {"vectors": min(decisions["vectors"], max(1, self.workload.channels_in // self.machine.vector_floats))}

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: sums, one value and an address fit in the registers."""
        return are_whole(decisions, self.names) and 1 <= decisions["vectors"] <= self.machine.registers - 2

    def parts(self) -> list[dict[str, list[int]]]:
        """One part."""
        return [{"vectors": sorted({self.normal({"vectors": count})["vectors"] for count in POOLED_VECTORS})}]

    def loops(self) -> Loops:
        """Vectors of channels."""
        return {"channels_out": ("vectors", self.machine.vector_floats)}

    def kernel(self, decisions: Mapping[str, int]) -> VectorPool:
        """The pool."""
        work, lists = self.workload, self.workload.lists
        return VectorPool(
            work.window,
            work.channels_in,
            work.pooling,  # type: ignore[arg-type]  # a pool's is "max" or "avg"
            in_frames="in_frames" in lists,
            out_frames="out_frames" in lists,
            zero_dead=False,
            vector_floats=self.machine.vector_floats,
            vectors=decisions["vectors"],
            in_positions=(work.window.batch, 1) if "in_positions" in lists else None,
            dtype=work.dtype,
        )


@dataclass(frozen=True)
class WinogradSpace:
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
    names = ("frames_tile", "space_tile", "columns", "mr", "vectors", "step", "segment_taps", "depth_block")

    @cached_property
    def direct(self) -> GatherConv:
        """The direct kernel that it stands in for."""
        space = direct_space(self.machine, self.workload.direct)
        return space.kernel(space.default())

    @cached_property
    def tiles(self) -> dict[tuple[int, int], list[int]]:
        """Columns of a chunk worth trying for each (frames_tile, space_tile), as the model of time has it."""
        seconds = {}
        for option in options(self.direct, self.machine):
            predicted = winograd_seconds(option, self.machine, self.workload.threads)
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
        """The kernel that the model of time prefers. Raises ValueError where no Winograd kernel can be built."""
        found = best(self.direct, self.machine, self.workload.threads)
        if found is None:
            raise ValueError("no Winograd kernel can compute this workload")
        return self._decisions(found)

    def _decisions(self, conv: WinogradConv) -> Decisions:
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
        window, m = self.workload.window, _winograd_m(self.workload.window, decisions)
        clips = window.batch // self.workload.samples
        return clips * math.prod(-(-extent // size) for extent, size in zip(window.out[1:], m[1:], strict=True))

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, its registers there, its tile one that keeps accuracy,
        its scratch within bounds."""
        if not are_whole(decisions, self.names):
            return False
        if min(decisions.values()) < 1 or why_not(self.direct):
            return False
        registers = any((decisions["mr"], decisions["vectors"]) == tile[:2] for tile in candidates(self.machine))
        steps = decisions["step"] in (1, *self._gather.steps)
        m = (decisions["frames_tile"], decisions["space_tile"])
        known = any(m == _winograd_tile(option) for option in options(self.direct, self.machine))
        return registers and steps and known and self.kernel(decisions).scratch_bytes <= MOST_SCRATCH

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
                        "depth_block": gather.depth_blocks(vectors),
                    }
                )
        return found

    def loops(self) -> Loops:
        """Chunks of columns of output tiles, and register tiles; the rest as in :class:`GatherSpace`."""
        return {**self._gather.loops(), "rows": ("columns", "frames_tile", "space_tile", "space_tile", "mr")}

    def kernel(self, decisions: Mapping[str, int]) -> WinogradConv:
        """The Winograd kernel."""
        return self.fitted(self.direct, decisions)

    def fitted(self, conv: GatherConv, decisions: Mapping[str, int]) -> WinogradConv:
        """The Winograd kernel in the place of ``conv``, a direct one of this workload."""
        sizes = {name: decisions[name] for name in ("mr", "vectors", "step", "segment_taps", "depth_block")}
        tile = Tile(vector_floats=self.machine.vector_floats, block_tiles=1, panels_outer=False, **sizes)
        return configured(conv, _winograd_m(conv.window, decisions), decisions["columns"], tile)


def _winograd_m(window: Window, decisions: Mapping[str, int]) -> Triple:
    """The tile of outputs on each axis."""
    m, space = window.out, decisions["space_tile"]
    sizes = [min(space, m[axis]) if window.kernel[axis] > 1 else 1 for axis in (1, 2)]
    return (min(decisions["frames_tile"], m[0]), sizes[0], sizes[1])


def _winograd_tile(conv: WinogradConv) -> tuple[int, int]:
    """frames_tile and space_tile of a kernel."""
    return conv.plan.m[0], max(conv.plan.m[1:])


#: The space of each kernel family.
SPACES: dict[str, Callable[[Machine, Workload], VectorSpace]] = {
    GATHER: lambda machine, workload: GatherSpace(machine.storing(workload.dtype), workload),
    WINOGRAD: WinogradSpace,
    KERNEL_GROUPS: lambda machine, workload: KernelGroupSpace(machine.storing(workload.dtype), workload),
    POOL: lambda machine, workload: PoolSpace(machine.storing(workload.dtype), workload),
    POINTWISE: PointwiseSpace,
    LINE: LineSpace,
}


@dataclass(frozen=True)
class Advice:
    """Decisions that were tuned for ``workload``, where they come from, in a few words, and what they took."""

    workload: Workload
    decisions: Decisions
    origin: str
    seconds: float = 0.0


class TuningLog(Protocol):
    """What ``decide`` asks a log for: the record nearest to the workload, made for this very target."""

    def advise(self, workload: Workload) -> Advice | None:
        """The best record of the workload, else of the nearest one, or None where nothing is near enough."""


def choose_tile(workload: Workload, machine: Machine, log: TuningLog | None = None) -> tuple[Tile, str]:
    """The tile for a workload and where it comes from: a record of the log, or the default (an empty origin).

    The workload is one of a gathered convolution or of kernel groups.
    """
    space = direct_space(machine, workload)
    decisions, origin = decide(space, log)
    return space.tile(decisions), origin


def direct_space(machine: Machine, workload: Workload) -> GatherSpace | KernelGroupSpace:
    """The space of the direct kernel of a workload."""
    kind = KernelGroupSpace if workload.family == KERNEL_GROUPS else GatherSpace
    return kind(machine.storing(workload.dtype), workload)


def decide(space: Space, log: TuningLog | None) -> tuple[Decisions, str]:
    """The decisions for a space's workload and where they come from: a record, or the defaults (an empty origin)."""
    advice = log.advise(space.workload) if log is not None else None
    if advice is not None:
        decisions = space.normal(advice.decisions)
        if space.allows(decisions):
            return decisions, advice.origin
    return space.default(), ""


def choose_kernel(
    conv: GatherConv,
    origin: str,
    workload: Workload,
    machine: Machine,
    wanted: str = "auto",
    log: TuningLog | None = None,
    most_growth: float = math.inf,
) -> Choice[LayerKernel]:
    """``conv`` or Winograd in its place, and the record that chose its sizes ("": the defaults).

    The model of time decides, unless the log holds measurements of both for this very workload. ``origin`` tells where
    the tile of ``conv`` comes from; ``wanted`` is auto, direct or winograd, ``most_growth`` that of ``choose``.
    """
    choice = replace(choose(conv, machine, workload.threads, wanted, most_growth), workload=workload)
    default = replace(choice, origin=origin if choice.kernel is conv else "")
    if log is None or wanted == "direct" or why_not(conv):
        return default
    transformed = workload.winograd
    space, advice = WinogradSpace(machine, transformed), log.advise(transformed)
    decisions = space.normal(advice.decisions) if advice is not None else {}
    if advice is None or not space.allows(decisions):
        return default
    fitted = space.fitted(conv, decisions)
    if growth(fitted) > most_growth:
        return default
    tuned: Choice[LayerKernel] = Choice(fitted, choice.reason, advice.origin, workload)
    measured = log.advise(workload)
    if wanted == "auto" and measured and (measured.workload, advice.workload) == (workload, transformed):
        kind = "kernel groups" if workload.family == KERNEL_GROUPS else "direct"
        told = f"{1e3 * advice.seconds:.3g} ms measured, {kind} {1e3 * measured.seconds:.3g} ms"
        if measured.seconds > WORTH_SWITCHING * advice.seconds:
            return replace(tuned, reason=told)
        if advice.seconds > WORTH_SWITCHING * measured.seconds:
            return Choice(conv, f"{kind}: Winograd {told}", origin, workload)
    return default if choice.kernel is conv else tuned


def offer(layer: Layer, machine: Machine, wanted: str, log: TuningLog | None) -> Choice[LayerKernel]:
    """The direct kernel of a layer, over lists or along lines, or Winograd in its place."""
    tile, origin = choose_tile(layer.workload, machine, log)
    conv = direct(layer, tile)
    choice = choose_kernel(conv, origin, layer.workload, machine, wanted, log, layer.most_growth)
    if not is_dense(layer) or (wanted == "winograd" and choice.kernel is not conv):
        return choice
    space = LineSpace(machine, line(layer.workload))
    if layer.channels_in > FEW_CHANNELS:
        lists = listing_seconds(machine, layer.workload, tile.mr, tile.vectors)
        direct_time = direct_seconds(conv, machine, layer.threads) + lists
        slower = predicted_seconds(machine, space.workload) > direct_time
        if choice.kernel is not conv or choice.origin or slower:
            return choice
    decisions, origin = decide(space, log)
    return Choice(space.fitted(layer, decisions), "", origin, space.workload)


def offer_pointwise(layer: Layer, machine: Machine, _wanted: str, log: TuningLog | None) -> Choice[LayerKernel] | None:
    """The pointwise kernel of a layer that leaves nothing out."""
    if not is_pointwise(layer):
        return None
    space = PointwiseSpace(machine, pointwise(layer.workload))
    decisions, origin = decide(space, log)
    return Choice(space.fitted(layer, decisions), "", origin, space.workload)


def offer_pool(workload: Workload, fields: Mapping[str, Any], machine: Machine, log: TuningLog | None) -> Choice[Pool]:
    """The pool of a workload; ``fields`` are those that its sizes do not decide."""
    machine = machine.storing(workload.dtype)
    decisions, origin = decide(PoolSpace(machine, workload), log)
    pool = VectorPool(**fields, vector_floats=machine.vector_floats, vectors=decisions["vectors"])
    return Choice(pool, "", origin, workload)
