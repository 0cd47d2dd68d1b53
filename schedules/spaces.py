"""Tuning spaces: what may be chosen for a kernel, and the one place where it is chosen.

A kernel family declares its decisions once. The default (``tiles.default_tile``), a tuned record and the tuner's
candidates are all the same mapping from a decision's name to a small integer, turned into a ``Tile`` here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from .conv3d_gather import GatherConv, Tile
from .conv3d_kgs import KernelGroupConv
from .geometry import Triple, Window
from .row_plan import RowPlan
from .tiles import Machine, candidates, default_tile, predicted_cycles
from .winograd import WinogradConv
from .winograd_choice import MOST_SCRATCH, Choice, best, choose, configured, options, why_not, winograd_seconds

if TYPE_CHECKING:
    from .gpu.conv3d_gather import BlockConv

#: Axes that index lists thin; ``positions`` are those of the output.
LISTS = ("in_frames", "out_frames", "positions", "in_channels", "out_channels", "in_positions")
#: Density that a build assumes of masks that it knows nothing about.
TYPICAL_DENSITY = 0.5
#: Register tiles that the model of ``tiles.predicted_cycles`` holds for this much slower than its best are not tried.
WORTH_TRYING = 1.5
#: Shares of the first-level cache that the weights of one pass may take.
CACHE_SHARES = (0.25, 0.5, 0.75, 1.0, 2.0)
#: Tiles that share a pass over the weights.
BLOCK_TILES = (8, 16, 32, 64, 128, 256)
#: Measured gain from which records turn a choice between direct and Winograd: the two were not measured in turns.
WORTH_SWITCHING = 1.05
GATHER, WINOGRAD = "conv3d_gather", "conv3d_winograd"


@dataclass(frozen=True)
class Workload:
    """A kernel to choose a tile for: all that its speed depends on, and nothing that changes from build to build.

    ``lists`` names the axes of ``LISTS`` that index lists thin; ``density`` is the share of each of them that is
    alive (1.0 where there are none).
    """

    window: Window
    channels_in: int
    channels_out: int
    groups: int = 1
    lists: tuple[str, ...] = ()
    residual: bool = False
    activation: str = ""
    threads: int = 1
    density: float = 1.0
    family: str = GATHER
    dtype: str = "float32"

    @property
    def depth(self) -> int:
        """Input channels that one output channel reads."""
        return self.channels_in // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of one convolution group."""
        return self.channels_out // self.groups

    @property
    def samples(self) -> int:
        """Clips whose channel lists differ: the batch where channels are listed, else 1."""
        return self.window.batch if {"in_channels", "out_channels"} & set(self.lists) else 1

    @property
    def work(self) -> float:
        """Multiply-accumulates expected at the workload's density, padding left out."""
        return self.window.tap_positions * self.depth * self.channels_out * self.density ** len(self.lists)

    def at(self, density: float) -> Workload:
        """The same kernel at another density; a kernel without lists has only one."""
        return replace(self, density=density if self.lists else 1.0)

    def facts(self) -> dict[str, Any]:
        """JSON-ready description without what is as usual, the inverse of ``Workload.of``."""
        usual = {part.name: part.default for part in fields(self)}
        told = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return json.loads(json.dumps(told))

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Workload:
        """The workload that ``facts`` describes. Raises KeyError, TypeError or ValueError where they describe none."""
        window: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in facts["window"].items()
        }
        rest = {key: value for key, value in facts.items() if key != "window"}
        return Workload(Window(**window), **{**rest, "lists": tuple(rest.get("lists", ()))})

    @cached_property
    def identity(self) -> str:
        """Sixteen hexadecimal digits, the same for the same workload."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def kernel_identity(self) -> str:
        """The same for all densities of a kernel."""
        return replace(self, density=1.0).identity

    def distance(self, other: Workload) -> float:
        """How unlike two workloads are for the choice of a tile, in doublings of what differs; inf: not comparable.

        Channels decide the register tile and the cache blocks, so they weigh most; rows matter where they are few.
        """
        same = ("family", "threads", "activation", "dtype")
        if any(getattr(self, name) != getattr(other, name) for name in same) or (self.groups > 1) != (other.groups > 1):
            return math.inf
        far = 2.0 * _doublings(self.depth, other.depth) + 2.0 * _doublings(self.group_out, other.group_out)
        far += 0.5 * _doublings(self.window.positions_out, other.window.positions_out)
        far += 1.0 * _doublings(self.window.taps, other.window.taps) + 0.5 * _doublings(self.density, other.density)
        far += 1.0 * (self.window.kernel != other.window.kernel) + 0.5 * (self.window.stride != other.window.stride)
        return far + 4.0 * len(set(self.lists) ^ set(other.lists)) + 0.25 * (self.residual != other.residual)


def _doublings(a: float, b: float) -> float:
    return abs(math.log2(a / b))


Decisions = dict[str, int]


def row_plan(workload: Workload, tile: Tile) -> RowPlan:
    """The row plan of a workload; masks over positions differ by frame, as D-STEP's do."""
    window, lists = workload.window, workload.lists
    positions = (window.batch, window.out[0]) if "positions" in lists else None
    in_positions = (window.batch, window.size[0]) if "in_positions" in lists else None
    dynamic = ("in_frames" in lists, "out_frames" in lists, positions, in_positions)
    return RowPlan(window, tile.mr, tile.block_tiles, tile.segment_taps, workload.samples, *dynamic)


def gathered(workload: Workload, tile: Tile) -> GatherConv:
    """The direct kernel of a workload."""
    return GatherConv(
        workload.window,
        workload.channels_in,
        workload.channels_out,
        workload.groups,
        tile,
        row_plan(workload, tile),
        live_in="in_channels" in workload.lists,
        live_out="out_channels" in workload.lists,
        residual=workload.residual,
        activation=workload.activation,
    )


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

    def kernel(self, decisions: Mapping[str, int]) -> GatherConv | WinogradConv | BlockConv:
        """The kernel that the decisions describe."""


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
        """Rows worth trying for each number of vectors, as the model of the register file has it."""
        rows, panel = self.workload.window.positions_out, self.workload.group_out
        cost = {tile: predicted_cycles(self.machine, rows, panel, tile) for tile in candidates(self.machine)}
        limit = WORTH_TRYING * min(cost.values())
        found: dict[int, list[int]] = {}
        for (mr, vectors, _), cycles in cost.items():
            if cycles <= limit:
                found.setdefault(vectors, []).append(mr)
        return found

    @property
    def steps(self) -> list[int]:
        """Channels that one load brings: one where values are broadcast from memory, else a vector where it fits."""
        floats = self.machine.vector_floats
        return [1] if self.machine.broadcast_loads or self.workload.depth < floats else [floats]

    def depth_blocks(self, vectors: int) -> list[int]:
        """Input channels that fit shares of the first-level cache beside one tap, and all of them."""
        step, nr = self.steps[-1], vectors * self.machine.vector_floats
        fitting = {max(step, int(share * self.machine.l1d) // (4 * nr) // step * step) for share in CACHE_SHARES}
        depth = self.workload.depth
        return sorted({min(size, depth) for size in fitting} | {min(64, depth), min(128, depth)})

    @property
    def segments(self) -> list[int]:
        """Taps of one pass: one, a line, a plane, the whole kernel, and what lies between."""
        taps = self.workload.window.taps
        _, height, width = self.workload.window.kernel
        return sorted({min(count, taps) for count in (1, 2, width, 2 * width, height * width, taps)})

    @property
    def blocks(self) -> list[int]:
        """Row tiles of one block; more than there are rows is the same as all of them."""
        most = -(-self.workload.window.positions_out // min(min(rows) for rows in self.register_tiles.values())) + 8
        return sorted({min(count, most) for count in BLOCK_TILES})

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(
            len(rows) * len(self.steps) * len(self.depth_blocks(vectors)) * len(self.segments) * len(self.blocks) * 2
            for vectors, rows in self.register_tiles.items()
        )

    def default(self) -> Decisions:
        """What is chosen without a record."""
        window, depth, group_out = self.workload.window, self.workload.depth, self.workload.group_out
        gathers = bool({"in_channels", "out_channels"} & set(self.workload.lists))
        return self.normal(decisions_of(default_tile(self.machine, window, depth, group_out, gathers=gathers)))

    def normal(self, decisions: Mapping[str, int]) -> Decisions:
        """Decisions of another shape fitted to this one; equal kernels get equal decisions."""
        window, floats = self.workload.window, self.machine.vector_floats
        fitted = dict(decisions)
        fitted["depth_block"] = min(fitted["depth_block"], self.workload.depth)
        fitted["segment_taps"] = min(fitted["segment_taps"], window.taps)
        fitted["step"] = fitted["step"] if self.workload.depth >= fitted["step"] and fitted["step"] <= floats else 1
        fitted["block_tiles"] = min(fitted["block_tiles"], -(-window.positions_out // fitted["mr"]) + 8)
        return fitted

    def allows(self, decisions: Mapping[str, int]) -> bool:
        """Whether the kernel can be built with them: complete, positive, and no more registers than there are."""
        if set(decisions) != set(self.names) or any(not isinstance(value, int) for value in decisions.values()):
            return False
        mr, vectors = decisions["mr"], decisions["vectors"]
        fits = any((mr, vectors) == (rows, columns) for rows, columns, _ in candidates(self.machine))
        positive = all(value >= 1 for name, value in decisions.items() if name != "panels_outer")
        return fits and positive and decisions["panels_outer"] in (0, 1) and decisions["step"] in (1, *self.steps)

    def parts(self) -> list[dict[str, list[int]]]:
        """One part for each number of vectors: which rows are worth trying depends on it."""
        default = self.default()
        found = []
        for vectors, rows in self.register_tiles.items():
            values = {
                "step": self.steps,
                "block_tiles": self.blocks,
                "segment_taps": self.segments,
                "depth_block": self.depth_blocks(vectors),
                "panels_outer": [0, 1],
            }
            shared = {name: sorted({*choices, default[name]}) for name, choices in values.items()}
            found.append({"mr": rows, "vectors": [vectors], **shared})
        return found

    def rows(self) -> tuple[str, ...]:
        """Blocks of tiles of rows."""
        return ("block_tiles", "mr")

    def kernel(self, decisions: Mapping[str, int]) -> GatherConv:
        """The direct kernel."""
        return gathered(self.workload, tile_of(self.machine, decisions))


def tile_of(machine: Machine, decisions: Mapping[str, int]) -> Tile:
    """The tile that the decisions of a direct kernel describe."""
    sizes = {name: decisions[name] for name in GatherSpace.names if name != "panels_outer"}
    return Tile(vector_floats=machine.vector_floats, panels_outer=bool(decisions["panels_outer"]), **sizes)


def decisions_of(tile: Tile) -> Decisions:
    """The decisions that make up a tile."""
    return {name: int(getattr(tile, name)) for name in GatherSpace.names}


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
        space = GatherSpace(self.machine, replace(self.workload, family=GATHER))
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
        rows = self.direct.window.positions_out
        panel = self.workload.channels_out
        cost = {tile: predicted_cycles(self.machine, rows, panel, tile) for tile in candidates(self.machine)}
        found: dict[int, list[int]] = {}
        for (mr, vectors, _), cycles in cost.items():
            if cycles <= WORTH_TRYING * min(cost.values()):
                found.setdefault(vectors, []).append(mr)
        return found

    @property
    def _gather(self) -> GatherSpace:
        return GatherSpace(self.machine, replace(self.workload, family=GATHER))

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
        if set(decisions) != set(self.names) or any(not isinstance(value, int) for value in decisions.values()):
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

    def rows(self) -> tuple[str, ...]:
        """Chunks of columns of output tiles, and register tiles."""
        return ("columns", "frames_tile", "space_tile", "space_tile", "mr")

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
SPACES: dict[str, Callable[[Machine, Workload], Space]] = {GATHER: GatherSpace, WINOGRAD: WinogradSpace}


@dataclass(frozen=True)
class Advice:
    """Decisions that were tuned for ``workload``, where they come from, in a few words, and what they took."""

    workload: Workload
    decisions: Decisions
    origin: str
    seconds: float = 0.0


class TuningLog(Protocol):
    """What ``choose_tile`` asks a log for: the record nearest to the workload, made for this very target."""

    def advise(self, workload: Workload) -> Advice | None:
        """The best record of the workload, else of the nearest one, or None where nothing is near enough."""


def choose_tile(workload: Workload, machine: Machine, log: TuningLog | None = None) -> tuple[Tile, str]:
    """The tile for a workload and where it comes from: a record of the log, or the default (an empty origin)."""
    decisions, origin = decide(SPACES[workload.family](machine, workload), log)
    return tile_of(machine, decisions), origin


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
) -> tuple[Choice, str]:
    """Direct or Winograd for ``conv``, and the record that chose its sizes ("": the defaults).

    The model of time decides, unless the log holds measurements of both for this very workload. ``origin`` tells where
    the tile of ``conv`` comes from; ``wanted`` is auto, direct or winograd.
    """
    choice = choose(conv, machine, workload.threads, wanted)
    default = (choice, origin if choice.conv is conv else "")
    if log is None or wanted == "direct" or isinstance(conv, KernelGroupConv) or why_not(conv):
        return default
    transformed = replace(workload, family=WINOGRAD)
    space, advice = WinogradSpace(machine, transformed), log.advise(transformed)
    decisions = space.normal(advice.decisions) if advice is not None else {}
    if advice is None or not space.allows(decisions):
        return default
    tuned = space.fitted(conv, decisions)
    direct = log.advise(workload)
    if wanted == "auto" and direct and (direct.workload, advice.workload) == (workload, transformed):
        told = f"{1e3 * advice.seconds:.3g} ms measured, direct {1e3 * direct.seconds:.3g} ms"
        if direct.seconds > WORTH_SWITCHING * advice.seconds:
            return Choice(tuned, told), advice.origin
        if advice.seconds > WORTH_SWITCHING * direct.seconds:
            return Choice(conv, f"direct: Winograd {told}"), origin
    return default if choice.conv is conv else (Choice(tuned, choice.reason), advice.origin)
