"""Lowering for GPUs: the masks, lists and sites of :mod:`.lower_windows`, with kernels for blocks of threads."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.schedules.channel_plan import channel_list_shape
from dance_tvm.schedules.gpu.channel_plan import plan_channels
from dance_tvm.schedules.gpu.conv3d_direct import FEW_ROWS, DirectConv, LinearConv, conv3d_direct, linear
from dance_tvm.schedules.gpu.conv3d_gather import BlockConv, conv3d_gather
from dance_tvm.schedules.gpu.conv3d_kgs import GroupConv, conv3d_kgs, plan_columns
from dance_tvm.schedules.gpu.mask_window import grow
from dance_tvm.schedules.gpu.pool3d import BlockPool, pool3d
from dance_tvm.schedules.gpu.row_plan import BlockPlan, block_plan, plan_rows
from dance_tvm.schedules.gpu.spaces import choose_tile, groups_cost
from dance_tvm.schedules.gpu.tiles import BlockTile, Gpu

from .graph import shape_of
from .kernel_groups import GROUP_CHANNELS, KernelGroups, choose_kernel_groups
from .layers import LayerInfo
from .lower_windows import Lowering
from .masks import Expression, Grown, Live
from .sites import Site
from .windows import window_of

#: Filters of a kernel group that a block of threads can take.
GROUP_FILTERS = (16, 32, 8)
#: Output channels of a convolution group under which a tile would stay nearly empty.
FEW_CHANNELS = 8


@dataclass
class GpuLowering(Lowering):
    """As :class:`.lower_windows.Lowering`; ``machine`` is a GPU."""

    machine: Gpu  # type: ignore[assignment]
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

    # -- lists -------------------------------------------------------------------------------------------------------

    def _new_field(self, expression: Expression) -> relax.Expr:
        if not isinstance(expression, Grown):
            return super()._new_field(expression)
        emit = self.builder.emit
        shape = tuple(expression.inner.shape[:4])
        inner = emit(relax.op.reshape(self._field(expression.inner), list(shape)))
        func = grow(expression.window, shape, expression.forward)  # type: ignore[arg-type]
        grown = self._kernel(func, [inner], [expression.shape[:4]], "float32")
        return emit(relax.op.reshape(grown, list(expression.shape)))

    def _channels(self, expression: Expression | None, samples: int, channels: int) -> list[relax.Expr]:
        if expression is None:
            return []
        key = ("channels", expression, samples, channels)
        if key not in self.planned:
            mask = self._mask(expression, (samples, channels), (samples, 1, 1, 1, channels))
            func = plan_channels(samples, channels)
            self.planned[key] = [self._kernel(func, [mask], [channel_list_shape(samples, channels)], "int32")]
        return self.planned[key]

    def _rows(self, plan: BlockPlan, masks: list[relax.Expr], identity: Hashable) -> list[relax.Expr]:  # type: ignore[override]
        return self._several(
            ("rows", plan, identity),
            plan_rows(plan),
            [*masks, *(relax.const(table) for table in plan.tables.values())],
            list(plan.shapes.values()),
        )

    def _several(self, key: Hashable, func: Any, args: list[relax.Expr], shapes: list[Any]) -> list[relax.Expr]:
        """The outputs of a planner, planned once for each key."""
        if key not in self.planned:
            lists = self._kernel(func, args, shapes, "int32")
            self.planned[key] = [self.builder.emit(relax.TupleGetItem(lists, i)) for i in range(len(shapes))]
        return self.planned[key]

    # -- kernels -----------------------------------------------------------------------------------------------------

    def _site(self, site: Site) -> relax.Expr:
        window = site.window
        alive = Live() if site.linear else self.liveness.alive_in(site.data)
        wanted = self.sites.wanted(site)
        live_in = alive.channels if site.groups == 1 else None
        samples = window.batch if window.batch > 1 and (live_in or wanted.channels) else 1
        conv = self._conv(site, alive, wanted, samples)
        plan = conv.plan
        data = self._stored(self._emit(site.data), (window.batch, *window.size, site.channels_in))
        masks = self._frames(alive.frames, window.batch, window.size[0])
        out_frames = self._frames(wanted.frames, window.batch, window.out[0])
        positions = []
        if plan.positions is not None and wanted.positions is not None:
            shape = (*plan.positions, *window.out[1:])
            positions = [self._mask(wanted.positions, shape, (*shape, 1))]
        lists = self._rows(plan, [*masks, *out_frames, *positions], (alive.frames, wanted.frames, wanted.positions))
        if isinstance(conv, GroupConv):
            args = self._column_arguments(site, conv, live_in, wanted.channels, lists)
        else:
            args = self._list_arguments(site, conv, live_in, wanted.channels, lists)
        if conv.zero_dead:
            args += [*out_frames, *positions]
        out_shape = (window.batch, *window.out, site.channels_out)
        if site.residual is not None:
            args.append(self._stored(self._emit(site.residual), out_shape))
        self.layers.append(self._describe(site, conv, alive, wanted, ""))  # type: ignore[arg-type]
        result = self._kernel(_emitted(conv), [data, *args], [out_shape], conv.dtype)
        return self._seen(result, shape_of(site.end))

    def _list_arguments(
        self,
        site: Site,
        conv: BlockConv,
        live_in: Expression | None,
        live_out: Expression | None,
        lists: list[relax.Expr],
    ) -> list[relax.Expr]:
        """Weights, bias, taps and lists of a gathered convolution."""
        samples = conv.plan.samples
        channels = [
            self._channels(live_in, samples, site.channels_in),
            self._channels(live_out, samples, site.channels_out),
        ]
        self._count(conv, lists, channels)  # type: ignore[arg-type]
        if site.start not in self.constants:
            packed = [conv.pack_weights(site.weight), conv.pack_bias(_bias_of(site)), conv.plan.tap_entries]
            self.constants[site.start] = [relax.const(array) for array in packed]
        return [*self.constants[site.start], *lists, *channels[0], *channels[1]]

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
        starts = relax.const(groups.column_ptr[None])
        columns: list[relax.Expr] = [starts, relax.const(conv.static_columns(groups.columns, groups.column_ptr))]
        if live_in is not None:
            mask = self._mask(live_in, (samples, conv.channels_in), (samples, 1, 1, 1, conv.channels_in))
            shapes = [*conv.column_shapes.values(), (samples, 1)]
            columns = self._several(("columns", site.start, live_in), plan_columns(conv), [mask, *columns], shapes)[:2]
        self._count_columns(conv, lists, columns[0])  # type: ignore[arg-type]
        packed = [conv.pack_columns(groups.weights), conv.pack_bias(_bias_of(site)), conv.plan.tap_entries]
        args = [*(relax.const(array) for array in packed), *lists, *columns]
        if live_out is not None:
            args.append(self._mask(live_out, (samples, conv.channels_out), (samples, 1, 1, 1, conv.channels_out)))
        return args

    def _conv(self, site: Site, alive: Live, wanted: Live, samples: int) -> BlockConv:
        """The kernel of a site: its tile, its row plan and the lists it walks."""
        window = site.window
        groups = self._kernel_groups(site)
        kind, tile = self._tile(site, alive, wanted, samples, groups)
        positions = None if wanted.positions is None else tuple(wanted.positions.shape[:2])
        plan = block_plan(
            window, tile.mr, samples, alive.frames is not None, wanted.frames is not None,
            positions,  # type: ignore[arg-type]
        )  # fmt: skip
        zero = ("all" if self.sites.needs_zeros(site.end) else "rows") if wanted.axes else ""
        more: dict[str, Any] = {"columns": len(groups.columns)} if groups is not None else {}
        return kind(
            window,
            site.channels_in,
            site.channels_out,
            site.groups,
            tile,
            plan,
            live_in=alive.channels is not None and site.groups == 1,
            live_out=wanted.channels is not None,
            residual=site.residual is not None,
            activation=site.activation,
            zero_dead=zero,
            dtype=self.dtype,
            **more,
        )

    def _tile(
        self, site: Site, alive: Live, wanted: Live, samples: int, groups: KernelGroups | None
    ) -> tuple[type[BlockConv], BlockTile]:
        """The kind of kernel and its tile."""
        window, rows = site.window, site.window.positions_out // samples
        self.tuned = ""
        if groups is not None:
            tile, _ = choose_tile(self._workload(site, alive, wanted), self.machine, nr=groups.gm)
            return GroupConv, tile
        if window.taps == 1 and site.groups == 1 and rows <= FEW_ROWS and window.size == window.out:
            return LinearConv, BlockTile(rows, 0, 0, 0, 0)
        if site.groups > 1 and site.channels_out // site.groups < FEW_CHANNELS:
            return DirectConv, BlockTile(32, 0, 0, 0, 0)
        tile, self.tuned = choose_tile(self._workload(site, alive, wanted), self.machine, self.tuning)
        return BlockConv, tile

    def _kernel_groups(self, site: Site) -> KernelGroups | None:
        if not self.sparsity or site.linear or site.groups > 1:
            return None
        if site.start not in self.groups:
            sizes = [(gm, gn) for gm in GROUP_FILTERS for gn in GROUP_CHANNELS]
            cost = groups_cost(self.machine, site.window)
            self.groups[site.start] = choose_kernel_groups(site.weight, sizes, cost)
        groups = self.groups[site.start]
        return None if groups.scheme == "dense" else groups

    def _pool(self, var: relax.Var) -> relax.Expr:
        call, window = self.graph.call(var), window_of(self.graph, var)
        assert window is not None
        source = call.args[0]
        alive = self.liveness.alive_in(source)
        wanted = self.liveness.read[var].early(self.liveness.before[var])
        channels = shape_of(source)[-1]
        pool = BlockPool(
            window,
            channels,
            "max" if "max" in self.graph.op(var) else "avg",
            1,
            bool(call.attrs.count_include_pad),
            in_frames=alive.frames is not None,
            out_frames=wanted.frames is not None,
            zero_dead=self.sites.needs_zeros(var),
            dtype=self.dtype,
        )
        data = self._stored(self._emit(source), (window.batch, *window.size, channels))
        masks = self._frames(alive.frames, window.batch, window.size[0])
        masks += self._frames(wanted.frames, window.batch, window.out[0])
        shape = (window.batch, *window.out, channels)
        result = self._kernel(pool3d(pool), [data, *masks], [shape], pool.dtype)
        skips = [f"output {axis}" for axis in wanted.axes if axis == "frames"]
        self.layers.append(LayerInfo(name=var.name, kind="pool3d", kernel=pool.name, macs=0, skips=skips))
        return self._seen(result, shape_of(var))


def _emitted(conv: BlockConv) -> Any:
    if isinstance(conv, LinearConv):
        return linear(conv)
    if isinstance(conv, DirectConv):
        return conv3d_direct(conv)
    return conv3d_kgs(conv) if isinstance(conv, GroupConv) else conv3d_gather(conv)


def _bias_of(site: Site) -> np.ndarray:
    return (np.zeros(site.channels_out) if site.bias is None else site.bias).astype("float32")
