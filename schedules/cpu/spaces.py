"""Tuning spaces: what may be chosen for a kernel, and the one place where it is chosen.

A kernel family declares its decisions once. The default (``tiles.default_tile``), a tuned record and the tuner's
candidates are all the same mapping from a decision's name to a small integer, turned into a ``Tile`` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..convolution import LayerKernel
from ..layer import Choice, Layer
from ..pool import Pool
from ..workload import GATHER, KERNEL_GROUPS, LINE, POINTWISE, POOL, WINOGRAD, Decisions, Workload
from .conv3d_gather import GatherConv
from .direct_spaces import GatherSpace, KernelGroupSpace, direct, direct_space
from .line_tiles import FEW_CHANNELS, LineSpace, line, listing_seconds, predicted_seconds
from .pointwise_tiles import PointwiseSpace, is_pointwise, pointwise
from .pool3d import VectorPool
from .pool_space import PoolSpace
from .row_space import is_dense
from .space import Space, VectorSpace
from .tiles import Machine, Tile
from .winograd_choice import choose, direct_seconds, growth, why_not
from .winograd_space import WinogradSpace

#: Measured gain from which records turn a choice between direct and Winograd: the two were not measured in turns.
WORTH_SWITCHING = 1.05


#: The space of each kernel family.
SPACES: dict[str, Callable[[Machine, Workload], VectorSpace]] = {
    GATHER: lambda machine, workload: GatherSpace(machine.storing(workload.dtype), workload),
    WINOGRAD: WinogradSpace,
    KERNEL_GROUPS: lambda machine, workload: KernelGroupSpace(machine.storing(workload.dtype), workload),
    POOL: lambda machine, workload: PoolSpace(machine.storing(workload.dtype), workload),
    POINTWISE: lambda machine, workload: PointwiseSpace(machine.storing(workload.dtype), workload),
    LINE: lambda machine, workload: LineSpace(machine.storing(workload.dtype), workload),
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

    The model of time decides, unless the log holds measurements of both for this very workload. ``origin`` says where
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
    storing = machine.storing(layer.dtype)
    space = LineSpace(storing, line(layer.workload))
    if layer.channels_in > FEW_CHANNELS:
        lists = listing_seconds(storing, layer.workload, tile.mr, tile.vectors)
        direct_time = direct_seconds(conv, machine, layer.threads) + lists
        slower = predicted_seconds(storing, space.workload) > direct_time
        if choice.kernel is not conv or choice.origin or slower:
            return choice
    decisions, origin = decide(space, log)
    return Choice(space.fitted(layer, decisions), "", origin, space.workload)


def offer_pointwise(layer: Layer, machine: Machine, _wanted: str, log: TuningLog | None) -> Choice[LayerKernel] | None:
    """The pointwise kernel of a layer that leaves nothing out."""
    if not is_pointwise(layer):
        return None
    space = PointwiseSpace(machine.storing(layer.dtype), pointwise(layer.workload))
    decisions, origin = decide(space, log)
    return Choice(space.fitted(layer, decisions), "", origin, space.workload)


def offer_pool(workload: Workload, fields: Mapping[str, Any], machine: Machine, log: TuningLog | None) -> Choice[Pool]:
    """The pool of a workload; ``fields`` are those that its sizes do not decide."""
    machine = machine.storing(workload.dtype)
    decisions, origin = decide(PoolSpace(machine, workload), log)
    pool = VectorPool(**fields, vector_floats=machine.vector_floats, vectors=decisions["vectors"])
    return Choice(pool, "", origin, workload)
