"""Units in which a convolution's kernels leave work out, and the time that this is predicted to save.

A Winograd kernel computes whole tiles of outputs: a mask that leaves a part of a tile alive saves nothing there. A
direct kernel lists single rows. Both read channels by the vector. So each kernel has units, and masks that keep or
leave whole units thin it most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import mean

from ..geometry import Triple
from ..kernel import Kernel
from ..layer import UNLIMITED, Layer, Limits
from ..workload import Workload
from .choice import settled_direct
from .tiles import Machine
from .winograd_choice import transformed, why_no_winograd
from .winograd_space import NEVER_SLOWER, options, within

#: Axes of activations that masks thin, and the lists that both sides of a convolution then walk.
AXES = {
    "frames": ("in_frames", "out_frames"),
    "channels": ("in_channels", "out_channels"),
    "positions": ("positions",),
}
#: What a direct kernel computes at once: single positions.
DIRECT: Triple = (1, 1, 1)
#: Shares of live units of one axis for which times are predicted.
SHARES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Serving:
    """A kernel that could serve a layer: its units, and its seconds at each of ``SHARES`` where one axis is thinned.

    ``units`` has frames, channels, and rows and columns of positions.
    """

    kernel: str
    units: tuple[int, int, tuple[int, int]]
    seconds: dict[str, tuple[float, ...]]

    @property
    def dense_seconds(self) -> float:
        """Seconds with nothing left out: those of the axis whose lists cost least."""
        return min(times[0] for times in self.seconds.values())

    @property
    def expected(self) -> float:
        """Mean seconds over the axes, each at half of its units and at all."""
        return mean(times[SHARES.index(share)] for times in self.seconds.values() for share in (1.0, 0.5))


def servings(workload: Workload, machine: Machine, limits: Limits = UNLIMITED) -> list[Serving]:
    """Every kernel that could serve the convolution, masked along one axis: that of the least expected time first.

    Those that are slow where nothing is left out come last: a build does not choose them (``NEVER_SLOWER``), and
    those beyond ``limits`` are left out.
    """
    kernels = {axis: _candidates(_masked(workload, lists), machine, limits) for axis, lists in AXES.items()}
    tiles = set.intersection(*(set(candidates) for candidates in kernels.values()))

    def serving(m: Triple) -> Serving:
        multiplying = machine.storing(workload.dtype) if m == DIRECT else machine  # Winograd multiplies in float32
        channels = min(multiplying.vector_floats, workload.channels_out)
        seconds = {
            axis: tuple(min(_seconds(conv, machine, workload.threads, share) for conv in of[m]) for share in SHARES)
            for axis, of in kernels.items()
        }
        return Serving("direct" if m == DIRECT else f"winograd_{m[0]}x{m[1]}x{m[2]}", (m[0], channels, m[1:]), seconds)

    found = [serving(tile) for tile in sorted(tiles)]
    bound = NEVER_SLOWER * min(each.dense_seconds for each in found)
    return sorted(found, key=lambda each: (each.dense_seconds > bound, each.expected))


def _masked(workload: Workload, lists: tuple[str, ...]) -> Workload:
    """The layer, dense, with ``lists``; grouped convolutions read all their channels."""
    kept = tuple(each for each in lists if workload.groups == 1 or each != "in_channels")
    return replace(workload.direct, lists=kept)


def _candidates(workload: Workload, machine: Machine, limits: Limits) -> dict[Triple, list[Kernel]]:
    """The kernels that could serve the layer, by the tile of outputs that each computes at once."""
    direct = settled_direct(Layer.of(workload), machine).kernel
    found: dict[Triple, list[Kernel]] = {DIRECT: [direct]}
    if not why_no_winograd(direct):
        for conv in (option for option in options(transformed(direct), machine) if within(option, limits)):
            found.setdefault(conv.plan.m, []).append(conv)
    return found


def _seconds(kernel: Kernel, machine: Machine, threads: int, share: float) -> float:
    """Predicted time where masks leave ``share`` of the units of each axis that the kernel lists."""
    seconds = kernel.predict(machine, threads, [share], whole_units=True)
    assert seconds is not None
    return seconds
