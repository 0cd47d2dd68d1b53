"""Tuning spaces: what may be chosen for a kernel, and the one place where it is chosen.

A kernel family declares its decisions once. The default (``tiles.default_tile``), a tuned record and the tuner's
candidates are all the same mapping from a decision's name to a small integer, turned into a ``Tile`` here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from .conv3d_gather import Tile
from .geometry import Window
from .tiles import Machine, candidates, default_tile, predicted_cycles

#: Axes that index lists thin. Masks over positions of the input do not thin a kernel, see ``row_plan``.
LISTS = ("in_frames", "out_frames", "positions", "in_channels", "out_channels")
#: Density that a build assumes of masks that it knows nothing about.
TYPICAL_DENSITY = 0.5
#: Register tiles that the model of ``tiles.predicted_cycles`` holds for this much slower than its best are not tried.
WORTH_TRYING = 1.5
#: Shares of the first-level cache that the weights of one pass may take.
CACHE_SHARES = (0.25, 0.5, 0.75, 1.0, 2.0)
#: Tiles that share a pass over the weights.
BLOCK_TILES = (8, 16, 32, 64, 128, 256)


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
    family: str = "conv3d_gather"

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
        rows = self.density if {"out_frames", "positions"} & set(self.lists) else 1.0
        both = self.density ** sum(axis in self.lists for axis in ("in_channels", "out_channels"))
        return self.window.tap_positions * self.depth * self.channels_out * rows * both

    def at(self, density: float) -> Workload:
        """The same kernel at another density; a kernel without lists has only one."""
        return replace(self, density=density if self.lists else 1.0)

    def facts(self) -> dict[str, Any]:
        """JSON-ready description, the inverse of ``Workload.of``."""
        return json.loads(json.dumps(asdict(self)))

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
        same = ("family", "threads", "activation")
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
        return self.normal(decisions_of(default_tile(self.machine, window, depth, group_out)))

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
        if set(decisions) != set(DECISIONS) or any(not isinstance(value, int) for value in decisions.values()):
            return False
        mr, vectors = decisions["mr"], decisions["vectors"]
        fits = any((mr, vectors) == (rows, columns) for rows, columns, _ in candidates(self.machine))
        positive = all(value >= 1 for name, value in decisions.items() if name != "panels_outer")
        return fits and positive and decisions["panels_outer"] in (0, 1) and decisions["step"] in (1, *self.steps)


DECISIONS = ("mr", "vectors", "step", "block_tiles", "segment_taps", "depth_block", "panels_outer")


def tile_of(machine: Machine, decisions: Mapping[str, int]) -> Tile:
    """The tile that the decisions describe."""
    sizes = {name: decisions[name] for name in DECISIONS if name != "panels_outer"}
    return Tile(vector_floats=machine.vector_floats, panels_outer=bool(decisions["panels_outer"]), **sizes)


def decisions_of(tile: Tile) -> Decisions:
    """The decisions that make up a tile."""
    return {name: int(getattr(tile, name)) for name in DECISIONS}


#: The space of each kernel family.
SPACES = {"conv3d_gather": GatherSpace}


@dataclass(frozen=True)
class Advice:
    """Decisions that were tuned for ``workload``, and where they come from, in a few words."""

    workload: Workload
    decisions: Decisions
    origin: str


class TuningLog(Protocol):
    """What ``choose_tile`` asks a log for: the record nearest to the workload, made for this very target."""

    def advise(self, workload: Workload) -> Advice | None:
        """The best record of the workload, else of the nearest one, or None where nothing is near enough."""


def choose_tile(workload: Workload, machine: Machine, log: TuningLog | None = None) -> tuple[Tile, str]:
    """The tile for a workload and where it comes from: a record of the log, or the default (an empty origin)."""
    space = SPACES[workload.family](machine, workload)
    advice = log.advise(workload) if log is not None else None
    if advice is not None:
        decisions = space.normal(advice.decisions)
        if space.allows(decisions):
            return tile_of(machine, decisions), advice.origin
    return tile_of(machine, space.default()), ""
