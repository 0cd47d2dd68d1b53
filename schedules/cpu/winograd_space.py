"""The decisions of Winograd's kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from ..geometry import Triple, Window
from ..workload import Decisions, Workload
from .conv3d_gather import GatherConv
from .direct_spaces import GatherSpace, direct_space
from .space import WORTH_TRYING, Loops, are_whole, register_tiles
from .tiles import Machine, Tile, candidates, predicted_cycles
from .winograd import WinogradConv
from .winograd_choice import MOST_SCRATCH, best, configured, options, why_not, winograd_seconds


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
