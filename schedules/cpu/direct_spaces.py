"""The decisions of direct convolutions: over index lists, and over the columns of kernel groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

from ..geometry import Window
from ..layer import Layer
from ..workload import Decisions, Workload
from .space import Loops, VectorSpace, are_whole, block_sizes, most_tiles, pass_taps, register_tiles
from .tiles import Machine, Tile, candidates, default_tile, window_cycles

#: Shares of the first-level cache that the weights of one pass may take.
CACHE_SHARES = (0.25, 0.5, 0.75, 1.0, 2.0)


#: General registers that may point to rows: on x86 the other six of sixteen hold the stack, the list and its end, the
#: weights, the entry and the index; with more rows than these, pointers are reloaded in the innermost loop.
X86_ROW_POINTERS = 10


def kernel_group_tile(
    machine: Machine, window: Window, channels: tuple[int, int], per_tap: int, gm: int, run: int, threads: int = 1
) -> Tile:
    """The tile of a convolution whose groups of ``gm`` filters keep ``per_tap`` columns a tap in runs of ``run``.

    ``channels``: in and out. Weights take the cache of what is left of them, but rows are read in whole cache lines,
    so as many of them share a block as if no column had gone.
    """
    most_rows = X86_ROW_POINTERS if machine.broadcast_loads else 16
    depth, filters = channels
    machine = replace(machine, most_terms=1 << 30)  # the kernel counts what it adds up, whatever a pass brings
    tile = default_tile(machine, window, per_tap, filters, gm, most_rows)
    block_tiles = default_tile(machine, window, depth, filters, gm, most_rows, threads=threads).block_tiles
    step = 1 if machine.broadcast_loads else math.gcd(run, machine.vector_floats)
    return replace(tile, depth_block=1 << 30, step=step, block_tiles=block_tiles)


@dataclass(frozen=True)
class GatherSpace(VectorSpace):
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
        samples = window.batch if gathers else 1  # one after the other
        threads = -(-samples * self.workload.threads // self.workload.groups)
        tile = default_tile(self.machine, window, depth, group_out, gathers=gathers, threads=threads)
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


@dataclass(frozen=True)
class KernelGroupSpace(VectorSpace):
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
        """Channels that one load brings, as in :class:`GatherSpace`; those of a run where they fill no vector."""
        return [1] if self.machine.broadcast_loads else [math.gcd(self.run, self.machine.vector_floats)]

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return sum(math.prod(map(len, part.values())) for part in self.parts())

    def default(self) -> Decisions:
        """What is chosen without a record."""
        work = self.workload
        per_tap = max(1, round(work.kept * work.channels_in))
        channels = (work.channels_in, work.channels_out)
        tile = kernel_group_tile(self.machine, work.window, channels, per_tap, work.group[0], self.run, work.threads)
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
