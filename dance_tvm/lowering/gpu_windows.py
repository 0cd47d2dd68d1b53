"""Lowering for GPUs: the masks, lists and sites of :mod:`.lower_windows`, with kernels for blocks of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tvm import relax, tirx

from dance_tvm.ir.graph import shape_of
from dance_tvm.liveness.expressions import Expression, Live
from dance_tvm.liveness.kernel_groups import GROUP_CHANNELS, KernelGroups
from dance_tvm.schedules.cpu.mask_window import Field
from dance_tvm.schedules.cpu.winograd_plan import WinogradPlan
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.gpu.channel_plan import plan_channels
from dance_tvm.schedules.gpu.conv3d_direct import DirectConv, LinearConv, conv3d_direct, is_few_rows, linear
from dance_tvm.schedules.gpu.conv3d_gather import BlockConv, conv3d_gather
from dance_tvm.schedules.gpu.conv3d_kgs import GroupConv, conv3d_kgs, plan_columns
from dance_tvm.schedules.gpu.mask_window import grow
from dance_tvm.schedules.gpu.pool3d import BlockPool, pool3d
from dance_tvm.schedules.gpu.row_plan import BlockPlan, block_plan, plan_rows
from dance_tvm.schedules.gpu.spaces import choose_block_tile, groups_cost
from dance_tvm.schedules.gpu.tiles import BlockTile, Gpu
from dance_tvm.schedules.plans import RowPlan
from dance_tvm.schedules.workload import Workload

from .lower_windows import Lowering, bias_of
from .sites import Site

#: Filters of a kernel group that a block of threads can take.
GROUP_FILTERS = (16, 32, 8)
#: Output channels of a convolution group under which a tile would stay nearly empty.
FEW_CHANNELS = 8


@dataclass
class GpuLowering(Lowering):
    """As :class:`.lower_windows.Lowering`; ``machine`` is a GPU."""

    machine: Gpu  # type: ignore[assignment]  # what reads a Machine is overridden
    dtype: str = "float32"
    #: Values that were stored as ``dtype``, by what the graph sees of them in float32.
    stored: dict[relax.Expr, relax.Expr] = field(default_factory=dict)

    def _stored(self, value: relax.Expr, shape: Any) -> relax.Expr:
        """``value`` as kernels read it: stored as ``dtype``, seen as ``shape``."""
        if self.dtype == "float32":
            return self._as_video(value, shape)
        source = self.viewed.get(value, value)
        if source not in self.stored:
            self.stored[source] = self.builder.emit(relax.op.astype(source, self.dtype))
        return self._as_video(self.stored[source], shape)

    def _seen(self, value: relax.Expr, shape: Any) -> relax.Expr:
        """What a kernel stored as the graph sees it: float32, of ``shape``."""
        if self.dtype == "float32":
            return self._as_video(value, shape)
        full = self.builder.emit(relax.op.astype(value, "float32"))
        self.stored[full] = value
        return self._as_video(full, shape)

    # -- what depends on the kind of machine -------------------------------------------------------------------------

    def _grow(self, window: Window, field4: Field, forward: bool) -> tirx.PrimFunc:
        return grow(window, field4, forward)

    def _channel_planner(self, samples: int, channels: int) -> tirx.PrimFunc:
        return plan_channels(samples, channels)

    def _row_planner(self, plan: RowPlan | WinogradPlan) -> tirx.PrimFunc:
        assert isinstance(plan, BlockPlan)
        return plan_rows(plan)

    def _pool_kernel(self, layer: str, fields: dict[str, Any]) -> tuple[str, tirx.PrimFunc]:
        self.tuned = ""
        pool = BlockPool(**fields, vector_floats=1, dtype=self.dtype)
        return pool.name, pool3d(pool)

    def _group_options(self, site: Site) -> tuple[list[tuple[int, int]], Callable[[KernelGroups], float]]:
        return [(gm, gn) for gm in GROUP_FILTERS for gn in GROUP_CHANNELS], groups_cost(self.machine, site.window)

    # -- kernels -----------------------------------------------------------------------------------------------------

    def _site(self, site: Site) -> relax.Expr:
        window = site.window
        alive, wanted = self.sites.alive(site), self.sites.wanted(site)
        live_in = alive.channels if site.groups == 1 else None
        samples = window.batch if window.batch > 1 and (live_in or wanted.channels) else 1
        conv = self._conv(site, alive, wanted, samples)
        plan = conv.plan
        data = self._stored(self._emit(site.data), (window.batch, *window.size, site.channels_in))
        masks, lists = self._masks_and_lists(plan, alive, wanted)
        if isinstance(conv, GroupConv):
            args = [data, *self._column_arguments(site, conv, live_in, wanted.channels, lists)]
        else:
            args = [data, *self._gather_arguments(site, conv, live_in, wanted.channels, lists)]
        if conv.zero_dead:
            args += [*masks["out_frames"], *masks["positions"]]
        out_shape = (window.batch, *window.out, site.channels_out)
        if site.residual is not None:
            args.append(self._stored(self._emit(site.residual), out_shape))
        self.layers.append(self._describe(site, conv, alive, wanted, ""))
        result = self._kernel(_emitted(conv), args, [out_shape], conv.dtype)
        return self._seen(result, shape_of(site.end))

    def _column_arguments(
        self,
        site: Site,
        conv: GroupConv,
        live_in: Expression | None,
        live_out: Expression | None,
        lists: list[relax.Expr],
    ) -> list[relax.Expr]:
        """Weights, bias, taps and lists of a convolution with kernel groups."""
        groups, samples = self.groups[site.start], conv.plan.samples
        starts = relax.const(conv.static_starts(groups.column_ptr))
        columns: list[relax.Expr] = [starts, relax.const(conv.static_columns(groups.columns, groups.column_ptr))]
        if live_in is not None:
            mask = self._mask(live_in, (samples, conv.channels_in), (samples, 1, 1, 1, conv.channels_in))
            shapes = [*conv.column_shapes.values(), (samples, 1)]
            columns = self._several(("columns", site.start, live_in), plan_columns(conv), [mask, *columns], shapes)[:2]
        self._count_columns(conv, lists, columns[0])
        packed = [conv.pack_columns(groups.weights), conv.pack_bias(bias_of(site)), conv.plan.tap_entries]
        args = [*(relax.const(array) for array in packed), *lists, *columns]
        if live_out is not None:
            args.append(self._mask(live_out, (samples, conv.channels_out), (samples, 1, 1, 1, conv.channels_out)))
        return args

    def _conv(self, site: Site, alive: Live, wanted: Live, samples: int) -> BlockConv:
        """The kernel of a site: its tile, its row plan and the lists it walks."""
        groups = self._kernel_groups(site)
        kind, tile = self._tile(site, alive, wanted, samples, groups)
        plan = block_plan(site.window, tile.mr, samples, *self._given(alive, wanted))
        more: dict[str, Any] = {"columns": len(groups.columns)} if groups is not None else {}
        return kind(tile=tile, plan=plan, dtype=self.dtype, **self._fields(site, alive, wanted), **more)

    def _workload(self, site: Site, alive: Live, wanted: Live) -> Workload:
        return replace(super()._workload(site, alive, wanted), threads=1, dtype=self.dtype)

    def _tile(
        self, site: Site, alive: Live, wanted: Live, samples: int, groups: KernelGroups | None
    ) -> tuple[type[BlockConv], BlockTile]:
        """The kind of kernel and its tile."""
        window = site.window
        self.tuned = ""
        if groups is None and is_few_rows(window, site.groups, samples):
            return LinearConv, BlockTile(window.positions_out // samples, 0, 0, 0, 0)
        if site.groups > 1 and site.channels_out // site.groups < FEW_CHANNELS:
            return DirectConv, BlockTile(32, 0, 0, 0, 0)
        workload = self.workloads[site.start.name] = self._workload(site, alive, wanted)
        tile, self.tuned = choose_block_tile(workload, self.machine, self.tuning)
        return BlockConv if groups is None else GroupConv, tile


def _emitted(conv: BlockConv) -> Any:
    if isinstance(conv, LinearConv):
        return linear(conv)
    if isinstance(conv, DirectConv):
        return conv3d_direct(conv)
    return conv3d_kgs(conv) if isinstance(conv, GroupConv) else conv3d_gather(conv)
