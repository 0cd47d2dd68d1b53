"""What a kernel is chosen for: all that its speed depends on, and nothing that changes from build to build."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from .geometry import GroupedChannels, Triple, Window
from .kernel_columns import Columns, random_columns
from .spread import Spread

#: Axes that index lists thin; ``positions`` are those of the output.
LISTS = ("in_frames", "out_frames", "positions", "in_channels", "out_channels", "in_positions")
#: Density that a build assumes of masks that it knows nothing about.
TYPICAL_DENSITY = 0.5
#: Kernel families, each with a space and a log of its own.
GATHER, WINOGRAD, KERNEL_GROUPS, POOL = "conv3d_gather", "conv3d_winograd", "conv3d_kgs", "pool3d"
POINTWISE, LINE = "conv3d_pointwise", "conv3d_line"
DEPTHWISE, TRANSPOSED, PLANAR = "depthwise3d", "conv3d_transposed", "conv3d_planar"
FAMILIES = (GATHER, WINOGRAD, KERNEL_GROUPS, POOL, POINTWISE, LINE, DEPTHWISE, TRANSPOSED, PLANAR)
#: Sizes that were chosen, by name.
Decisions = dict[str, int]
#: Shares of kept weight columns that differ by less are one: a record is to serve networks pruned alike.
KEPT_STEP = 1 / 16


@dataclass(frozen=True)
class Workload(GroupedChannels):
    """A kernel to choose sizes for.

    ``lists`` names the axes of ``LISTS`` that index lists thin; ``density`` is the share of each of them that is
    alive (1.0 where there are none). Kernel groups have ``group`` filters × input channels and keep the share ``kept``
    of their weight columns; which ones is left open. A pool is ``pooling`` ("max" or "avg") over as many convolution
    groups as there are channels. A transposed convolution's window slides over its input, ``spread`` out by zeros.
    """

    window: Window
    channels_in: int
    channels_out: int
    groups: int = 1
    lists: tuple[str, ...] = ()
    residual: bool = False
    activation: str = ""
    threads: int = 1
    density: float = 1.0
    family: str = GATHER
    dtype: str = "float32"
    group: tuple[int, int] = (1, 1)
    kept: float = 1.0
    pooling: str = ""
    spread: Triple | None = None

    @property
    def samples(self) -> int:
        """Clips whose channel lists differ: the batch where channels are listed, else 1."""
        return self.window.batch if {"in_channels", "out_channels"} & set(self.lists) else 1

    @property
    def work(self) -> float:
        """Multiply-accumulates (of pools: values combined) expected at the workload's density, padding left out."""
        seen = self.window if self.spread is None else Spread(self.window, self.spread)
        dense = seen.tap_positions * self.depth * self.channels_out
        return dense * self.kept * self.density ** len(self.lists)

    @property
    def weight_bytes(self) -> int:
        """Of the layer's own weights, in float32."""
        return 4 * self.window.taps * self.depth * self.channels_out

    def at(self, density: float) -> Workload:
        """The same kernel at another density; a kernel without lists has only one."""
        return replace(self, density=density if self.lists else 1.0)

    def grouped(self, group: tuple[int, int], columns: float) -> Workload:
        """The same layer by kernel groups that keep the share ``columns`` of their columns."""
        kept = min(1.0, max(KEPT_STEP, round(columns / KEPT_STEP) * KEPT_STEP))
        return replace(self, family=KERNEL_GROUPS, group=group, kept=kept)

    @property
    def winograd(self) -> Workload:
        """The same layer by Winograd's algorithm, which multiplies zero weights as well."""
        return replace(self, family=WINOGRAD, group=(1, 1), kept=1.0)

    @property
    def direct(self) -> Workload:
        """The same layer, dense, by the gathered convolution."""
        return replace(self, family=GATHER, group=(1, 1), kept=1.0)

    def columns(self) -> Columns:
        """Weight columns of the workload's share, made up."""
        return random_columns((self.channels_in, self.channels_out), self.window.taps, self.group, self.kept)

    def facts(self) -> dict[str, Any]:
        """JSON-ready description without what is as usual, the inverse of ``Workload.of``."""
        usual = {part.name: part.default for part in fields(self)}
        values = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return json.loads(json.dumps(values))

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Workload:
        """The workload that ``facts`` describes. Raises KeyError, TypeError or ValueError where they describe none."""
        window = Window(**_with_tuples(facts["window"]))
        return Workload(window, **_with_tuples({key: value for key, value in facts.items() if key != "window"}))

    @cached_property
    def identity(self) -> str:
        """Sixteen hexadecimal digits, the same for the same workload."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def kernel_identity(self) -> str:
        """The same for all densities of a kernel."""
        return replace(self, density=1.0).identity

    def distance(self, other: Workload) -> float:
        """How unlike two workloads are for the choice of sizes, in doublings of what differs; inf: not comparable.

        Channels decide the register tile and the cache blocks, so they weigh most; rows matter where they are few.
        """
        same = ("family", "threads", "activation", "dtype", "pooling", "spread")
        if any(getattr(self, name) != getattr(other, name) for name in same) or (self.groups > 1) != (other.groups > 1):
            return math.inf
        if self.group[0] != other.group[0]:  # the filters of a kernel group are the tile's output channels
            return math.inf
        far = 2.0 * _doublings(self.depth, other.depth) + 2.0 * _doublings(self.group_out, other.group_out)
        far += 0.5 * _doublings(self.window.positions_out, other.window.positions_out)
        far += 1.0 * _doublings(self.window.taps, other.window.taps) + 0.5 * _doublings(self.density, other.density)
        far += 1.0 * _doublings(self.kept, other.kept) + 0.25 * (self.group[1] != other.group[1])
        far += 1.0 * (self.window.kernel != other.window.kernel) + 0.5 * (self.window.stride != other.window.stride)
        return far + 4.0 * len(set(self.lists) ^ set(other.lists)) + 0.25 * (self.residual != other.residual)


def _with_tuples(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}


def _doublings(a: float, b: float) -> float:
    return abs(math.log2(a / b))
