"""Convolutions and the max pools behind them in one kernel: which there are."""

from __future__ import annotations

import operator
from dataclasses import fields, replace
from typing import Any

from ..convolution import LayerKernel
from ..geometry import Triple
from .conv3d_gather import GatherConv
from .conv3d_gather_pooled import PooledGather
from .conv3d_line import LineConv
from .conv3d_line_pooled import PooledLineConv
from .either import Either
from .tiles import Machine
from .winograd import WinogradConv
from .winograd_pooled import PooledWinograd

#: Share of the second-level cache that the lines under one of a pool's may take.
NEAR = 0.5


def pooled(
    kernel: LayerKernel, pool: Triple, zero_dead: str, machine: Machine, together: bool = True
) -> LayerKernel | None:
    """``kernel`` and a max pool of so many frames, rows and columns behind it, whose windows lie side by side, in one;
    None where there is no such kernel, or what the pool reads would not stay near.

    ``zero_dead`` is to the pool's outputs what that of ``kernel`` is to its own. ``together``: masks leave out all
    outputs under one window or none; else those that they leave out count as zeros.
    """
    if any(map(operator.mod, kernel.window.out, pool)):
        return None
    if type(kernel) is LineConv and not kernel.residual and together and kernel.groups == 1:
        lines = PooledLineConv(**_fields(kernel) | {"zero_dead": zero_dead}, pool=pool)
        return lines if lines.scratch_bytes <= NEAR * machine.l2 else None
    if isinstance(kernel, Either) and type(kernel.second) is GatherConv:
        first = pooled(kernel.first, pool, zero_dead, machine, together)
        second = PooledGather(**_fields(kernel.second) | {"zero_dead": zero_dead}, pool=pool)
        return first and replace(kernel, first=first, second=second)
    if type(kernel) is WinogradConv and not kernel.residual:
        tiles = PooledWinograd(**_fields(kernel) | {"zero_dead": zero_dead}, pool=pool)
        return tiles if tiles.divides_tiles else None
    return None


def _fields(kernel: Any) -> dict[str, Any]:
    return {each.name: getattr(kernel, each.name) for each in fields(kernel)}
