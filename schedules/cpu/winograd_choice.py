"""Direct or Winograd: the prediction of the cost model, for layers that no tuning log has measured."""

from __future__ import annotations

from dataclasses import fields, replace
from operator import attrgetter

from ..convolution import LayerKernel
from ..layer import UNLIMITED, Choice, Limits
from .conv3d_gather import GatherConv
from .conv3d_kgs import KernelGroupConv
from .tiles import Machine
from .winograd import WinogradConv
from .winograd_columns import WinogradColumns
from .winograd_inputs import InputTiles, WinogradInputs, why_no_input_tiles
from .winograd_plan import WinogradPlan
from .winograd_space import NEVER_SLOWER, best, options, why_no_tiles, within


def why_no_winograd(conv: GatherConv) -> str:
    """Why no Winograd kernel can compute ``conv``; empty if one can."""
    reason = why_no_tiles(conv.window, conv.groups, skips_positions=False)
    return why_no_input_tiles(conv) if not reason and conv.plan.in_positions is not None else reason


def transformed(conv: GatherConv) -> WinogradConv:
    """The Winograd kernel in the place of ``conv``, of the smallest tiles.

    Where frames have nothing to do with one another, and masks do not name them, each is a clip of its own in the plan:
    a chunk need not hold all frames of a place then. Under a mask of the input's positions, tiles are of the input.
    """
    window, plan = conv.window, conv.plan
    apart = window.frames_apart and plan.samples == 1 and not plan.masks
    height, width = (min(2, window.out[axis]) if window.kernel[axis] > 1 else 1 for axis in (1, 2))
    masks = (plan.samples, plan.in_frames, plan.out_frames, plan.positions)
    layer = (conv.live_in, conv.live_out, conv.residual, conv.activation, conv.zero_dead, conv.dtype)
    if plan.in_positions is not None:
        of_inputs = InputTiles(window, (1, height, width), plan.mr, 1, *masks, plan.in_positions)
        return WinogradInputs(window, conv.channels_in, conv.channels_out, 1, conv.tile, of_inputs, *layer)
    tiled = WinogradPlan(window.by_frame if apart else window, (1, height, width), plan.mr, 1, *masks)
    return WinogradConv(window, conv.channels_in, conv.channels_out, 1, conv.tile, tiled, *layer)


def over_columns(conv: GatherConv) -> WinogradColumns | None:
    """The Winograd kernel over the weight columns of ``conv``, of the smallest tiles; None where it has none, or masks
    thin its channels or what it reads."""
    if not isinstance(conv, KernelGroupConv) or conv.nonzero is None:
        return None
    plan = conv.plan
    if why_no_winograd(conv) or conv.live_in or conv.live_out or plan.in_frames or plan.in_positions is not None:
        return None
    dense = transformed(conv)
    layer = {each.name: getattr(dense, each.name) for each in fields(WinogradConv)}
    return WinogradColumns(**layer, nonzero=conv.nonzero, run=conv.run)


def _forms(conv: GatherConv, anew: bool) -> list[WinogradConv]:
    """The Winograd kernels that can compute ``conv``: a dense one, the same with weights transformed ``anew`` in every
    call where no masks thin it, and one over its weight columns where it has any."""
    dense, columns = transformed(conv), over_columns(conv)
    found = [dense, *([replace(dense, anew=True)] if anew and dense.expected == [1.0] else [])]
    return found if columns is None else [*found, columns]


def choose(
    conv: GatherConv, machine: Machine, threads: int, algorithm: str = "auto", limits: Limits = UNLIMITED
) -> Choice[LayerKernel]:
    """``conv`` itself or the Winograd kernel within ``limits`` predicted to be faster; ``algorithm`` is auto, direct or
    winograd."""
    if algorithm == "direct":
        return Choice(conv, "")
    if reason := why_no_winograd(conv):
        return Choice(conv, f"direct: {reason}" if algorithm == "winograd" else "")
    forms = _forms(conv, limits.anew)
    fitting = [found for form in forms if (found := best(form, machine, threads, limits=limits)) is not None]
    if not fitting:
        return Choice(conv, "direct: no tile's transformed inputs fit the memory allowed")
    found = min(fitting, key=lambda each: each.predict(machine, threads))
    direct, other = conv.predict(machine, threads), found.predict(machine, threads)
    kind = "kernel groups" if isinstance(conv, KernelGroupConv) else "direct"
    times = f"{1e3 * other:.2g} ms predicted, {kind} {1e3 * direct:.2g} ms"
    if algorithm == "auto" and other > direct:
        dense = found.predict(machine, threads, [1.0])
        if conv.predict(machine, threads, [1.0]) <= NEVER_SLOWER * dense:
            return Choice(conv, f"{kind}: Winograd {times}")
        times += ", but more where masks leave everything"
    made = ", weights transformed in every call" if found.anew else ""
    return Choice(found, f"{times}; scratch {found.memory_bytes / 2**20:.0f} MiB{made}")


def trades(conv: GatherConv, machine: Machine, threads: int, limits: Limits) -> list[tuple[float, float]]:
    """How far weights may grow within ``limits``, and the predicted seconds that this buys: those of ``conv`` itself,
    which keeps them as they are, or of a Winograd kernel that transforms them anew in every call, then of each that is
    faster than all with fewer weights."""
    least = {1.0: conv.predict(machine, threads)}
    forms = [] if why_no_winograd(conv) else _forms(conv, limits.anew)
    offered = [option for form in forms for option in options(form, machine)]
    fitting = [option for option in offered if within(option, limits)]
    for option in sorted(fitting, key=attrgetter("growth")):
        seconds = option.predict(machine, threads)
        if seconds < min(least.values()):
            least[option.growth] = seconds
    return list(least.items())
