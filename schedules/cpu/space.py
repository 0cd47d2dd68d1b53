"""What the tuning spaces of kernels for processors share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import s_tir

from ..geometry import Window
from .tiles import Machine, candidates

#: Register tiles that the model of ``tiles.predicted_cycles`` holds for this much slower than its best are not tried.
WORTH_TRYING = 1.5


#: Tiles that share a pass over the weights.
BLOCK_TILES = (8, 16, 32, 64, 128, 256)


#: What tiles each axis of a convolution's loops, outermost first: names of decisions, or sizes that are given.
Loops = dict[str, tuple[str | int, ...]]


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


#: The axes of :data:`Loops`, as an implicit GEMM nests them.
AXES = ("rows", "channels_out", "taps", "channels_in")


class VectorSpace(ABC):
    """The space of a kernel for a CPU."""

    @abstractmethod
    def loops(self) -> Loops:
        """How the decisions tile ``rows``, ``channels_out``, ``taps`` and ``channels_in``."""

    def tile_loops(self, sch: s_tir.Schedule, loops: Sequence[Any], chosen: Mapping[str, Any]) -> None:
        """Threads share out panels and blocks of rows, a register tile is unrolled."""
        sizes = self.loops()
        rows, outs, taps, channels = (
            _split(sch, loop, [size if isinstance(size, int) else chosen[size] for size in sizes.get(axis, ())])
            for axis, loop in zip(AXES, loops, strict=True)
        )
        register_rows = rows[1:][-1:]
        in_block = [*rows[1 : len(rows) - len(register_rows)], *taps[1:], *channels[1:]]
        sch.reorder(outs[0], rows[0], taps[0], channels[0], *in_block, *register_rows, *outs[1:])
        sch.parallel(sch.fuse(outs[0], rows[0]))
        sch.vectorize(outs[-1])
        for loop in (*outs[1:-1], *register_rows):
            sch.unroll(loop)


def _split(sch: s_tir.Schedule, loop: Any, sizes: Sequence[Any]) -> list[Any]:
    return list(sch.split(loop, [None, *sizes])) if sizes else [loop]
