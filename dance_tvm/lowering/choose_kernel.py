"""Which kernel a site gets: what is asked of it, and what its weights leave out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from tvm import relax

from dance_tvm.liveness.expressions import Expression, Live
from dance_tvm.liveness.kernel_groups import (
    GROUP_CHANNELS,
    KernelGroups,
    choose_kernel_groups,
    fitting_groups,
    groups_of_size,
    lane_cost,
)
from dance_tvm.schedules.convolution import LayerKernel
from dance_tvm.schedules.cpu.choice import TuningLog
from dance_tvm.schedules.cpu.pooled import pooled
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.emit import FLOAT
from dance_tvm.schedules.gpu.choice import groups_cost
from dance_tvm.schedules.gpu.tiles import Gpu
from dance_tvm.schedules.kernel import Weights
from dance_tvm.schedules.kernel_columns import Nonzero
from dance_tvm.schedules.layer import UNLIMITED, Choice, Layer, Limits

from .half_range import HalfRange
from .registry import choose
from .sample_lists import positions_of_input
from .sites import PoolBehind, Site, Sites

#: Filters of a kernel group that a block of threads can take.
BLOCK_GROUP_FILTERS = (16, 32, 8)

#: What memory the kernels of a network may take (:mod:`.share_memory`).
Memory = Literal["small", "balanced", "fast"]

#: What kernel groups cost on a machine, as kernels see it that multiply what a layer stores.
GroupCost = Callable[[Machine], Callable[[KernelGroups], float]]


@dataclass
class Chooser:
    """Chooses the kernel of each site for a machine.

    ``algorithm`` is auto, direct or winograd. With ``sparsity``, zero weights may be left out in groups: of the size
    ``group``, else of the size that ``group_cost``, or the default cost, makes cheapest. ``limits``: of a site's
    memory, by its ``start``.
    """

    machine: Machine | Gpu
    sites: Sites
    threads: int
    dtype: str
    algorithm: str
    sparsity: bool
    log: TuningLog | None
    group: tuple[int, int] | None = None
    group_cost: GroupCost | None = None
    memory: Memory = "fast"
    half_range: HalfRange | None = None
    limits: Mapping[relax.Var, Limits] = field(default_factory=dict)
    groups: dict[relax.Var, KernelGroups] = field(default_factory=dict)
    nonzero: dict[relax.Var, Nonzero] = field(default_factory=dict)

    def choose(self, site: Site) -> Choice[LayerKernel]:
        """The kernel of a site."""
        choice, behind = choose(self.layer(site), self.machine, self.algorithm, self.log), ""
        if site.pool is not None:
            kernel = self._pooled(choice.kernel, site.pool)
            assert kernel is not None, f"{choice.kernel.name} was found to have a kernel with a pool behind it"
            choice, behind = replace(choice, kernel=kernel), f"{site.pool.end.name} behind it in one kernel"
        reasons = [self.why_whole(site), choice.reason, behind]
        return replace(choice, reason="; ".join(filter(None, reasons)))

    def pooled(self, site: Site, behind: PoolBehind) -> LayerKernel | None:
        """The kernel of a site that ends behind a max pool, of this window, or None where there is none."""
        return self._pooled(choose(self.layer(site), self.machine, self.algorithm, self.log).kernel, behind)

    def _pooled(self, kernel: LayerKernel, behind: PoolBehind) -> LayerKernel | None:
        assert isinstance(self.machine, Machine)
        zeros = "" if behind.together and not self.sites.liveness.wanted(behind.end).axes else self._zeros(behind.end)
        return pooled(kernel, behind.window.kernel, zeros, self.machine, behind.together)

    def why_whole(self, site: Site) -> str:
        """Why a site's kernel stores float32 where others store half precision."""
        return "" if self.half_range is None else self.half_range.why_whole(site)

    def dtype_of(self, site: Site) -> str:
        """How a site's kernel stores activations and weights."""
        return FLOAT if self.why_whole(site) else self.dtype

    def dtype_of_pool(self, data: relax.Var) -> str:
        """How a pool of ``data`` stores activations."""
        whole = self.half_range is not None and self.half_range.why_not(data, "what it reads")
        return FLOAT if whole else self.dtype

    def layer(self, site: Site) -> Layer:
        """What is asked of the site's kernel."""
        alive, wanted, groups = self.sites.alive(site), self.sites.wanted(site), self.kernel_groups(site)
        return Layer(
            window=site.window,
            channels_in=site.channels_in,
            channels_out=site.channels_out,
            groups=site.groups,
            in_frames=alive.frames is not None,
            out_frames=wanted.frames is not None,
            positions=None if wanted.positions is None else (wanted.positions.shape[0], wanted.positions.shape[1]),
            in_positions=positions_of_input(site, alive) if site.lists.positions else None,
            live_in=alive.channels is not None and site.groups == 1,
            live_out=wanted.channels is not None,
            residual=site.residual is not None,
            activation=site.activation,
            zero_dead=self._zeros(site.end) if wanted.axes else "",
            threads=self.threads,
            dtype=self.dtype_of(site),
            group=(1, 1) if groups is None else (groups.gm, groups.gn),
            columns=None if groups is None else len(groups.columns),
            kept=1.0 if groups is None else groups.kept,
            nonzero=None if groups is None else self._nonzero(site),
            memory=self.limits.get(site.start, UNLIMITED),
            gate=site.gate is not None,
            before=site.before,
            spread=site.spread,
            planar=site.planar,
        )

    def _nonzero(self, site: Site) -> Nonzero:
        """Which weights the site has, made once: kernels know it by identity."""
        if site.start not in self.nonzero:
            self.nonzero[site.start] = Nonzero.of(site.weight)
        return self.nonzero[site.start]

    def weights(self, site: Site) -> Weights:
        """What the site's kernel packs."""
        bias = np.zeros(site.channels_out) if site.bias is None else site.bias
        groups = self.kernel_groups(site)
        columns = () if groups is None else (groups.listed, groups.weights)
        return Weights(_unsigned_zeros(site.weight), bias.astype("float32"), *columns)

    def kernel_groups(self, site: Site) -> KernelGroups | None:
        """The zero columns of the site's weights, if skipping them pays."""
        if not self.sparsity or site.whole or site.groups > 1 or self.group == (1, 1):
            return None
        if site.start not in self.groups:
            self.groups[site.start] = (
                groups_of_size(site.weight, *self.group)
                if self.group
                else choose_kernel_groups(site.weight, *self._group_options(site))
            )
        groups = self.groups[site.start]
        return None if groups.scheme == "dense" else groups

    def _group_options(self, site: Site) -> tuple[list[tuple[int, int]], Callable[[KernelGroups], float]]:
        """Sizes of kernel groups that kernels can take, and what groups cost."""
        machine = self.machine
        if isinstance(machine, Gpu):
            sizes = [(gm, gn) for gm in BLOCK_GROUP_FILTERS for gn in GROUP_CHANNELS]
            return sizes, groups_cost(machine, site.window)
        stored = machine.storing(self.dtype_of(site))
        cost = self.group_cost(stored) if self.group_cost else lane_cost(stored.vector_floats)
        return fitting_groups(stored.vector_floats), cost

    def _zeros(self, end: relax.Var) -> str:
        """What a kernel that ends in ``end`` sets to zero of what it leaves out."""
        if self.sites.needs_zeros(end):
            return "all"
        return "rows" if self.sites.needs_zero_positions(end) else ""


def _unsigned_zeros(weight: np.ndarray) -> np.ndarray:
    """Without negative zeros, which take room where weights are stored: pruning by a mask leaves them for every second
    weight that it removes."""
    return weight + 0 if np.any((weight == 0) & np.signbit(weight)) else weight


def masks_of(site: Site, alive: Live, wanted: Live) -> dict[str, Expression | None]:
    """The site's masks by the axes that they thin."""
    return {
        "in_frames": alive.frames,
        "out_frames": wanted.frames,
        "positions": wanted.positions,
        "in_positions": alive.positions,
        "in_channels": alive.channels if site.groups == 1 else None,
        "out_channels": wanted.channels,
    }
