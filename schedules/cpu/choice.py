"""Which kernel of a processor a layer gets, and of which sizes: those of a record, or the defaults.

A kernel family declares its decisions once (``Kernel.space``). The defaults, a tuned record and the tuner's candidates
are all the same mapping from a decision's name to a small integer, which ``Kernel.sized`` turns into a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from ..convolution import LayerKernel
from ..kernel import Kernel
from ..layer import UNLIMITED, Choice, Layer, Limits
from ..pool import Pool
from ..space import Space
from ..workload import (
    DEPTHWISE,
    GATHER,
    KERNEL_GROUPS,
    LINE,
    PLANAR,
    POINTWISE,
    POOL,
    TRANSPOSED,
    WINOGRAD,
    Decisions,
    Workload,
)
from .conv3d_gather import GatherConv
from .conv3d_kgs import KernelGroupConv
from .conv3d_line import LineConv
from .conv3d_planar import PlanarConv
from .conv3d_transposed import TransposedConv
from .depthwise import DepthwiseConv, why_no_depthwise
from .depthwise_tiles import DepthwiseTile, depthwise
from .either_choice import either
from .line_tiles import FEW_CHANNELS, line, listing_seconds
from .planar_tiles import PlanarTile, planar
from .pointwise import PointwiseConv
from .pointwise_tiles import PointwiseTile, is_pointwise, leaves_caches, pointwise, reads_far
from .pool3d import VectorPool
from .row_plan import RowPlan
from .row_space import is_dense
from .row_tiles import RowTile
from .tiles import Machine, Tile
from .transposed_tiles import first_tile, transposed
from .winograd import WinogradConv
from .winograd_choice import choose, trades, transformed, why_no_winograd
from .winograd_columns import WinogradColumns
from .winograd_space import within

K = TypeVar("K", bound=Kernel)

#: Measured gain from which records turn a choice between direct and Winograd: the two were not measured in turns.
WORTH_SWITCHING = 1.05
#: Axes along which the convolution along lines leaves outputs out, where it would be taken without masks as well.
MASKS_OF_LINES = ("out_frames", "positions")


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


def decide(space: Space, log: TuningLog | None) -> tuple[Decisions, str]:
    """The decisions for a space's workload and where they come from: a record, or the defaults (an empty origin)."""
    advice = log.advise(space.workload) if log is not None else None
    if advice is not None and set(advice.decisions) == set(space.names):
        decisions = space.normal(advice.decisions)
        if space.allows(decisions):
            return decisions, advice.origin
    return space.default(), ""


def settled(kernel: K, machine: Any, workload: Workload, log: TuningLog | None) -> Choice[K]:
    """``kernel`` with the sizes that ``decide`` gives for ``workload`` on a machine of its kind."""
    space = kernel.space(machine, workload)
    assert space is not None, f"{kernel.name} has nothing to decide"
    decisions, origin = decide(space, log)
    return Choice(kernel.sized(decisions), "", origin, workload)


def direct(layer: Layer, machine: Machine) -> GatherConv:
    """The direct kernel of a layer, of the smallest tile: over its live columns where it is pruned."""
    floats = machine.storing(layer.dtype).vector_floats
    tile = Tile(1, max(1, layer.group[0] // floats), floats, 1, 1, 1)
    dynamic = (layer.samples, *layer.masks, layer.in_positions)
    plan = RowPlan(layer.window, tile.mr, tile.block_tiles, tile.segment_taps, *dynamic)
    if layer.columns is None:
        return GatherConv(**layer.fields, tile=tile, plan=plan)
    fields = {**layer.fields, "columns": layer.columns, "run": layer.run, "threads": layer.threads}
    return KernelGroupConv(**fields, tile=tile, plan=plan, nonzero=layer.nonzero)


def settled_direct(layer: Layer, machine: Machine, log: TuningLog | None = None) -> Choice[GatherConv]:
    """The direct kernel of a layer."""
    return settled(direct(layer, machine), machine, layer.workload, log)


def _line(layer: Layer, machine: Machine) -> LineConv:
    tile = RowTile(1, 1, machine.storing(layer.dtype).vector_floats, 1)
    sizes, behind = (layer.window, layer.channels_in, layer.channels_out), (layer.residual, layer.activation)
    return LineConv(
        *sizes, tile, *behind, layer.out_frames, layer.positions, layer.zero_dead, layer.dtype, layer.groups
    )


def _pointwise(layer: Layer, machine: Machine) -> PointwiseConv:
    tile = PointwiseTile(1, 1, machine.storing(layer.dtype).vector_floats, 1, 1)
    behind, before = (layer.residual, layer.activation), (layer.gate, layer.before)
    sizes, past = (layer.window, layer.channels_in, layer.channels_out), leaves_caches(layer, machine)
    return PointwiseConv(*sizes, tile, *behind, *before, layer.dtype, past, reads_far(layer, machine))


def _depthwise(layer: Layer, machine: Machine) -> DepthwiseConv:
    tile = DepthwiseTile(1, 1, machine.storing(layer.dtype).vector_floats, 1)
    sizes, masks = (layer.window, layer.channels_in, layer.channels_out), (layer.in_frames, layer.out_frames)
    behind = layer.residual, layer.activation, layer.zero_dead == "all", layer.dtype
    return DepthwiseConv(*sizes, tile, *masks, *behind)


def _transposed(layer: Layer, machine: Machine) -> TransposedConv:
    assert layer.spread is not None
    tile = first_tile(machine.storing(layer.dtype), transposed(layer.workload, layer.spread))
    behind = layer.residual, layer.activation, layer.dtype
    return TransposedConv(layer.window, layer.spread, layer.channels_in, layer.channels_out, tile, *behind)


def _planar(layer: Layer, machine: Machine) -> PlanarConv:
    tile = PlanarTile(1, 1, machine.vector_floats, 1, 1)
    return PlanarConv(layer.window, layer.channels_in, layer.channels_out, tile, layer.residual, layer.activation)


def _pool(workload: Workload, machine: Machine) -> VectorPool:
    lists = workload.lists
    return VectorPool(
        workload.window,
        workload.channels_in,
        workload.pooling,  # type: ignore[arg-type]  # a pool's is "max" or "avg"
        in_frames="in_frames" in lists,
        out_frames="out_frames" in lists,
        zero_dead=False,
        vector_floats=machine.storing(workload.dtype).vector_floats,
        in_positions=(workload.window.batch, 1) if "in_positions" in lists else None,
        positions=(workload.window.batch, 1) if "positions" in lists else None,
        dtype=workload.dtype,
    )


#: The kernel of each family for a workload, its sizes still to be decided.
FAMILIES: dict[str, Callable[[Workload, Machine], Kernel]] = {
    GATHER: lambda workload, machine: direct(Layer.of(workload), machine),
    WINOGRAD: lambda workload, machine: transformed(direct(Layer.of(workload.direct), machine)),
    KERNEL_GROUPS: lambda workload, machine: direct(Layer.of(workload), machine),
    POOL: _pool,
    POINTWISE: lambda workload, machine: _pointwise(Layer.of(workload), machine),
    LINE: lambda workload, machine: _line(Layer.of(workload), machine),
    DEPTHWISE: lambda workload, machine: _depthwise(Layer.of(workload), machine),
    TRANSPOSED: lambda workload, machine: _transposed(Layer.of(workload), machine),
    PLANAR: lambda workload, machine: _planar(Layer.of(workload), machine),
}


def kernel_of(workload: Workload, machine: Machine) -> Kernel:
    """The kernel of a workload's family, its sizes still to be decided."""
    return FAMILIES[workload.family](workload, machine)


def direct_or_winograd(
    conv: GatherConv,
    origin: str,
    workload: Workload,
    machine: Machine,
    algorithm: str = "auto",
    log: TuningLog | None = None,
    limits: Limits = UNLIMITED,
) -> Choice[LayerKernel]:
    """``conv`` or Winograd in its place, and the record that chose its sizes ("": the defaults).

    The cost model decides (:func:`~.winograd_choice.choose`), unless the log holds measurements of both for this very
    workload. ``origin`` says where the tile of ``conv`` comes from; ``algorithm`` is auto, direct or winograd,
    ``limits`` are those of ``choose``.
    """
    choice = replace(choose(conv, machine, workload.threads, algorithm, limits), workload=workload)
    default = replace(choice, origin=origin if choice.kernel is conv else "")
    if log is None or algorithm == "direct" or why_no_winograd(conv) or isinstance(choice.kernel, WinogradColumns):
        return default
    other, asked = transformed(conv), workload.winograd
    space, advice = other.space(machine, asked), log.advise(asked)
    decisions = space.normal(advice.decisions) if advice is not None else {}
    if advice is None or not space.allows(decisions):
        return default
    fitted = other.sized(decisions)
    if not within(fitted, limits):
        return default
    tuned: Choice[LayerKernel] = Choice(fitted, choice.reason, advice.origin, workload)
    measured = log.advise(workload)
    if algorithm == "auto" and measured and (measured.workload, advice.workload) == (workload, asked):
        kind = "kernel groups" if workload.family == KERNEL_GROUPS else "direct"
        times = f"{1e3 * advice.seconds:.3g} ms measured, {kind} {1e3 * measured.seconds:.3g} ms"
        if measured.seconds > WORTH_SWITCHING * advice.seconds:
            return replace(tuned, reason=times)
        if advice.seconds > WORTH_SWITCHING * measured.seconds:
            return Choice(conv, f"{kind}: Winograd {times}", origin, workload)
    return default if choice.kernel is conv else tuned


def offer(layer: Layer, machine: Machine, algorithm: str, log: TuningLog | None) -> Choice[LayerKernel]:
    """The direct kernel of a layer, over lists or along lines, or Winograd in its place."""
    found = settled_direct(layer, machine, log)
    conv = found.kernel
    choice = direct_or_winograd(conv, found.origin, layer.workload, machine, algorithm, log, layer.memory)
    few = layer.channels_in <= FEW_CHANNELS and layer.groups == 1
    masks = MASKS_OF_LINES if few else ()
    if not is_dense(layer, *masks):
        return choice if algorithm != "auto" else _with_direct(choice, conv, layer, machine)
    if algorithm == "winograd" and choice.kernel is not conv:
        return choice
    lines, workload = _line(layer, machine), line(layer.workload)
    if algorithm == "direct" and lines.blocks < layer.groups:  # zeros between groups would spread infinity and NaN
        return choice
    if not few:
        listing = listing_seconds(machine.storing(layer.dtype), layer.workload, conv.tile.mr, conv.tile.vectors)
        seconds = settled(lines, machine, workload, None).kernel.predict(machine, layer.threads)
        slower = seconds > conv.predict(machine, layer.threads) + listing
        if choice.kernel is not conv or choice.origin or slower:
            return choice
    return settled(lines, machine, workload, log)


def _with_direct(choice: Choice[LayerKernel], conv: GatherConv, layer: Layer, machine: Machine) -> Choice[LayerKernel]:
    """``choice``, or both kernels in one where thin masks would make ``conv`` the faster one."""
    if not isinstance(choice.kernel, WinogradConv) or layer.columns is not None:
        return choice
    both = either(choice.kernel, conv, machine, layer.threads, layer.memory)
    return choice if both is None else replace(choice, kernel=both)


def memory_trades(layer: Layer, machine: Machine, log: TuningLog | None, limits: Limits) -> list[tuple[float, float]]:
    """What memory buys in a layer (:func:`.winograd_choice.trades`); one entry where there is no choice."""
    few = is_dense(layer, *MASKS_OF_LINES) and layer.channels_in <= FEW_CHANNELS
    if is_pointwise(layer) or layer.groups > 1 or layer.spread is not None or layer.planar or few:
        return [(1.0, 0.0)]
    return trades(settled_direct(layer, machine, log).kernel, machine, layer.threads, limits)


def offer_pointwise(layer: Layer, machine: Machine, _: str, log: TuningLog | None) -> Choice[LayerKernel] | None:
    """The pointwise kernel of a layer that leaves nothing out."""
    if not is_pointwise(layer):
        return None
    return settled(_pointwise(layer, machine), machine, pointwise(layer.workload), log)


def offer_depthwise(layer: Layer, machine: Machine, _wanted: str, log: TuningLog | None) -> Choice[LayerKernel] | None:
    """The depthwise kernel, which leaves out frames and no single positions."""
    if layer.groups == 1 or layer.positions is not None or layer.in_positions is not None:
        return None
    channels = (layer.channels_in, layer.channels_out, layer.groups)
    if why_no_depthwise(layer.window, *channels, machine.storing(layer.dtype).vector_floats):
        return None
    return settled(_depthwise(layer, machine), machine, depthwise(layer.workload), log)


def offer_transposed(layer: Layer, machine: Machine, _wanted: str, log: TuningLog | None) -> Choice[LayerKernel] | None:
    """The kernel of a transposed convolution: over all positions where windows lie side by side, else along lines."""
    if layer.spread is None:
        return None
    return settled(_transposed(layer, machine), machine, transposed(layer.workload, layer.spread), log)


def offer_planar(layer: Layer, machine: Machine, _wanted: str, log: TuningLog | None) -> Choice[LayerKernel] | None:
    """The kernel of a layer with channels first, which leaves nothing out; None for all others."""
    if not layer.planar:
        return None
    return settled(_planar(layer, machine), machine, planar(layer.workload), log)


def offer_pool(workload: Workload, fields: Mapping[str, Any], machine: Machine, log: TuningLog | None) -> Choice[Pool]:
    """The pool of a workload; ``fields`` are those that its sizes do not decide."""
    floats = machine.storing(workload.dtype).vector_floats
    return settled(VectorPool(**fields, vector_floats=floats), machine, workload, log)
