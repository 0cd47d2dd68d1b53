"""Choose kernel-group sizes by measurement, as RT3D does: offline, on the device, with synthesised layers (section 3).

Representative convolutions are pruned at random in every candidate group and timed by ``measure``, next to the dense
layer; ``group_log`` keeps the results. Two questions are answered from them: which group to train with
(``best_group``), and what a layer that somebody pruned will cost in each group (``measured_cost``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from dance_tvm.core.errors import DanceError
from dance_tvm.liveness.kernel_groups import CANDIDATES, KernelGroups, lane_cost
from dance_tvm.machines.target import Target
from dance_tvm.schedules.kernel_columns import random_columns

Dtype = Literal["float32", "float16"]

# Groups this close to the fastest are equally fast: the smallest of them leaves pruning the most freedom.
EQUALLY_FAST = 1.05


@dataclass(frozen=True)
class SynthesisedLayer:
    """A convolution of stride 1 that keeps its size: channels in and out, kernel (KT, KH, KW), input (T, H, W)."""

    channels_in: int
    channels_out: int
    kernel: tuple[int, int, int]
    size: tuple[int, int, int]

    @property
    def positions(self) -> int:
        """Output positions of one clip."""
        return math.prod(self.size)

    def weight(self, gm: int, gn: int, rate: float, scheme: Literal["vanilla", "kgs"] = "kgs") -> NDArray[np.float32]:
        """Random (M, N, *kernel) weights of which 1 / ``rate`` of the ``gm`` x ``gn`` units are kept, evenly chosen."""
        channels, taps = (self.channels_in, self.channels_out), math.prod(self.kernel)
        live = random_columns(channels, taps, (gm, gn), 1 / rate, whole=scheme == "vanilla").live
        spread = live.repeat(gm, axis=0).repeat(gn, axis=1)[: self.channels_out, : self.channels_in]
        random = np.random.default_rng([gm, gn, *channels])
        values = random.standard_normal((self.channels_out, self.channels_in, taps)) / math.sqrt(
            self.channels_in * taps
        )
        return (values * spread).astype(np.float32).reshape(self.channels_out, self.channels_in, *self.kernel)


# One layer of each kind that C3D, R(2+1)D and S3D are made of, where most of their multiply-accumulates are, at half
# the channels, so that a measurement ends in seconds.
SYNTHESISED = (
    SynthesisedLayer(64, 64, (3, 3, 3), (8, 28, 28)),
    SynthesisedLayer(128, 128, (3, 3, 3), (4, 14, 14)),
    SynthesisedLayer(64, 144, (1, 3, 3), (8, 28, 28)),
    SynthesisedLayer(144, 64, (3, 1, 1), (8, 28, 28)),
    SynthesisedLayer(128, 128, (1, 1, 1), (8, 28, 28)),
)


class GroupMeasurement(BaseModel):
    """One line of the log. ``scheme`` "dense" is the same layer unpruned, measured in the same run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["kernel_group"] = "kernel_group"
    fingerprint: str
    device: str
    threads: int
    dtype: Dtype = "float32"
    channels_in: int
    channels_out: int
    kernel: tuple[int, int, int]
    size: tuple[int, int, int]
    scheme: Literal["dense", "vanilla", "kgs"]
    gm: int
    gn: int
    rate: float
    seconds: float

    @property
    def layer(self) -> SynthesisedLayer:
        """The layer that was measured."""
        return SynthesisedLayer(self.channels_in, self.channels_out, self.kernel, self.size)


# Seconds of one call of the layer with these weights; the group says which kernel to use, None the dense one.
Measure = Callable[[SynthesisedLayer, NDArray[np.float32], tuple[int, int] | None], float]


def lanes_of(target: Target, dtype: Dtype = "float32") -> int:
    """How many filters a group must have, or a multiple of them."""
    return 1 if target.gpu else target.vector.floats * (2 if dtype == "float16" else 1)


def require_fitting(target: Target, candidates: Iterable[tuple[int, int]], dtype: Dtype = "float32") -> None:
    """Raise DanceError for groups whose filters do not fill the target's vectors."""
    lanes = lanes_of(target, dtype)
    for gm, gn in candidates:
        if gm % lanes:
            raise DanceError(
                f"groups of {gm}x{gn} do not fit {target.name}: its vectors take {lanes} filters, or multiples of that"
            )


def measure_groups(
    measure: Measure,
    *,
    fingerprint: str,
    device: str,
    threads: int,
    layers: Sequence[SynthesisedLayer] = SYNTHESISED,
    candidates: Iterable[tuple[int, int]] = CANDIDATES,
    rate: float = 3.0,
    dtype: Dtype = "float32",
) -> list[GroupMeasurement]:
    """Time every layer dense and in every candidate group, one layer after the other."""
    candidates = tuple(candidates)
    found = []
    for layer in layers:
        about = {"fingerprint": fingerprint, "device": device, "threads": threads, "dtype": dtype, **layer.__dict__}
        dense = layer.weight(1, 1, 1.0)
        seconds = measure(layer, dense, None)
        found.append(GroupMeasurement(**about, scheme="dense", gm=1, gn=1, rate=1.0, seconds=seconds))
        for gm, gn in candidates:
            seconds = measure(layer, layer.weight(gm, gn, rate), (gm, gn))
            found.append(GroupMeasurement(**about, scheme="kgs", gm=gm, gn=gn, rate=rate, seconds=seconds))
    return found


def efficiencies(measurements: Iterable[GroupMeasurement]) -> dict[tuple[int, int], float]:
    """For each group size the share of the rate that became speed: the geometric mean over the layers.

    speed-up over the dense layer of the same device and threads, divided by the rate; 1 is a perfect kernel.
    """
    measurements = list(measurements)

    def place(entry: GroupMeasurement) -> tuple[object, ...]:
        return (entry.device, entry.threads, entry.dtype, entry.layer)

    dense = {place(entry): entry.seconds for entry in measurements if entry.scheme == "dense"}
    logs: dict[tuple[int, int], list[float]] = defaultdict(list)
    for entry in measurements:
        if entry.scheme != "dense" and place(entry) in dense:
            logs[entry.gm, entry.gn].append(math.log(dense[place(entry)] / entry.seconds / entry.rate))
    return {group: math.exp(sum(values) / len(values)) for group, values in logs.items()}


def best_group(measurements: Iterable[GroupMeasurement]) -> tuple[int, int]:
    """The group to prune in: the smallest (filters times channels) of those as good as the fastest.

    Raises DanceError where no group was measured next to its dense layer.
    """
    found = efficiencies(measurements)
    if not found:
        raise DanceError("no kernel group was measured for this target; measure with `dance-tvm groups` first")
    best = max(found.values())
    fast = [group for group, efficiency in found.items() if efficiency * EQUALLY_FAST >= best]
    return min(fast, key=lambda group: (group[0] * group[1], group))


def measured_cost(
    measurements: Iterable[GroupMeasurement], vector: int, excess: Callable[[int], float] | None = None
) -> Callable[[KernelGroups], float]:
    """A cost for ``choose_kernel_groups``: live weights over the efficiency measured for the group.

    Groups that were not measured, and everything where nothing was, cost what ``lane_cost`` says.
    """
    found = efficiencies(measurements)
    modelled = lane_cost(vector, excess=excess)
    if not found:
        return modelled

    def cost(groups: KernelGroups) -> float:
        if groups.scheme in ("dense", "filter") or (groups.gm, groups.gn) not in found:
            return modelled(groups)
        return groups.live_weights / found[groups.gm, groups.gn]

    return cost
