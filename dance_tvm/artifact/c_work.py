"""What the C interface counts of a step while it profiles, as rows of the program's table (`interface/work.c`).

Sizes that a manifest and the shapes of tensors give are worked out here, so that a call reads lists and masks alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dance_tvm.artifact.layers import KernelInfo, LayerInfo

#: The operands that are read, by the names that kernels give them, in the order of `operand` in `interface/program.h`.
_OPERANDS = (
    ("tap_entries",),
    ("tap_planes",),
    ("rows_out",),
    ("segments", "runs"),
    ("blocks",),
    ("counts",),
    ("in_channels",),
    ("out_channels",),
    ("column_starts",),
    ("out_frames",),
    ("positions",),
    ("decision",),
)
_CONVOLUTION = "convolution"
_PLACES = 3  # axes of a clip


class Shaped(Protocol):
    """A tensor of a program."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""


@dataclass(frozen=True)
class Work:
    """A `program_work`; ``operands`` are the tensors that it reads, by their names, and ``taps`` numbers of its own."""

    kind: str
    operands: Mapping[str, Shaped] = field(default_factory=dict)
    macs: int = 0
    dense: int = 0
    depth: int = 0
    filters: int = 0
    group: int = 0
    taps: tuple[int, ...] = ()

    def row(self, numbers: Mapping[Any, int], taps: str) -> str:
        """As C, with the tensors' numbers in the program and the name of the array that holds ``taps``."""
        found = [next((self.operands[name] for name in names if name in self.operands), None) for names in _OPERANDS]
        listed = ", ".join("-1" if each is None else str(numbers[each]) for each in found)
        sizes = f"{self.macs}, {self.dense}, {self.depth}, {self.filters}, {self.group}"
        return f"{{{self.kind}, {sizes}, {{{listed}}}, {taps}}}"


def works_as_c(works: Sequence[Work], numbers: Mapping[Any, int]) -> list[str]:
    """The table `works`, with the tensors' numbers in the program, and before it the arrays that it points to."""
    arrays, rows = [], []
    for number, work in enumerate(works):
        taps = f"taps_{number}" if work.taps else "NULL"
        if work.taps:
            arrays.append(f"static const int32_t {taps}[] = {{{', '.join(map(str, work.taps))}}};")
        rows.append(f"    {work.row(numbers, taps)},")
    return [*arrays, "static const program_work works[] = {", *(rows or ["    {0},"]), "};"]


def works_of(kernel: KernelInfo, tensors: Sequence[Shaped], layer: LayerInfo | None) -> list[Work]:
    """How to count what a call of ``kernel`` with these tensors executes of ``layer``: of two kernels in one, both;
    nothing where that cannot be told."""
    if kernel.kind != _CONVOLUTION:
        return []
    named = dict(zip(kernel.operands, tensors, strict=True))
    first = _work(kernel, named, layer)
    if first is None or not kernel.second:
        return [] if first is None else [first]
    own = {name: named[here] for name, here in kernel.second.items()}
    return [first, _by_lists(KernelInfo(pool=kernel.pool), own, layer)]


def _work(kernel: KernelInfo, named: Mapping[str, Shaped], layer: LayerInfo | None) -> Work | None:
    if "counts" in named:
        return None if kernel.tile and layer is None else _by_lists(kernel, named, layer)
    if kernel.taps:
        taps = (*_computed(kernel, named)[:-1], *(count for axis in kernel.taps for count in axis))
        filters = named["y"].shape[-1]
        return Work("MASKS", named, depth=named["x"].shape[-1], filters=filters, taps=taps)
    return None if kernel.macs is None else Work("FIXED", macs=kernel.macs)


def _by_lists(kernel: KernelInfo, named: Mapping[str, Shaped], layer: LayerInfo | None) -> Work:
    """Of a convolution that walks lists; Winograd's is told as a share of its layer."""
    shape = _computed(kernel, named)
    depth, group = named["weights"].shape[-2:]
    channels_in, filters, tile = depth, shape[-1], kernel.tile
    if "column_starts" in named:
        channels_in = named["x"].shape[-1]
        depth //= named["column_places" if tile else "columns"].shape[-1]
    if not tile or layer is None:
        return Work("ROWS", named, depth=depth, filters=filters, group=group)
    tiles = math.prod(-(-extent // size) for extent, size in zip(shape[1 : 1 + _PLACES], tile, strict=True))
    dense = shape[0] * tiles * channels_in * filters
    return Work("TILES", named, layer.macs, dense, depth, filters, group)


def _computed(kernel: KernelInfo, named: Mapping[str, Shaped]) -> tuple[int, ...]:
    """Shape of what the convolution computes (N, T, H, W, C), before the pool behind it."""
    pool = (1, *(kernel.pool or [1] * _PLACES), 1)
    return tuple(extent * size for extent, size in zip(named["y"].shape, pool, strict=True))
