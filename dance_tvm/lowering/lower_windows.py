"""Replace convolutions, linear layers and pools by kernels that walk index lists, and plan the lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tvm
from tvm import relax

from dance_tvm.artifact.layers import LayerInfo
from dance_tvm.ir.graph import Graph, Shape, dtype_of, shape_of, substitute, variables
from dance_tvm.ir.windows import POOLS, padding_behind, window_of, zero_padded
from dance_tvm.liveness.analysis import Liveness
from dance_tvm.liveness.expressions import Both, Either, Expression, Factor, Grown, Joined, Live, Part, nodes
from dance_tvm.liveness.kernel_groups import KernelGroups, choose_kernel_groups, fitting_groups, lane_cost
from dance_tvm.liveness.relax_graph import liveness_of
from dance_tvm.schedules.convolution import Convolution
from dance_tvm.schedules.cpu.carry_frames import Carry, carry_frames
from dance_tvm.schedules.cpu.channel_plan import plan_channels
from dance_tvm.schedules.cpu.compact_channels import compact_channels
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv, conv3d_gather
from dance_tvm.schedules.cpu.conv3d_kgs import KernelGroupConv, balanced_order, conv3d_kgs, plan_columns
from dance_tvm.schedules.cpu.depthwise import DepthwiseConv, depthwise3d, why_no_depthwise
from dance_tvm.schedules.cpu.depthwise_tiles import default_tile as depthwise_tile
from dance_tvm.schedules.cpu.mask_window import Field, grow_backward, grow_forward
from dance_tvm.schedules.cpu.pool3d import Pool, pool3d
from dance_tvm.schedules.cpu.row_plan import plan_rows
from dance_tvm.schedules.cpu.spaces import PoolSpace, TuningLog, choose_kernel, choose_tile, decide
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.cpu.winograd import WinogradConv, conv3d_winograd, mask_arguments
from dance_tvm.schedules.cpu.winograd_plan import LISTS, WinogradPlan, plan_winograd
from dance_tvm.schedules.emit import one_thread
from dance_tvm.schedules.geometry import Window, added
from dance_tvm.schedules.gpu.conv3d_kgs import GroupConv
from dance_tvm.schedules.gpu.tiles import Gpu
from dance_tvm.schedules.plans import RowPlan, channel_list_shape
from dance_tvm.schedules.preparation import Source, array_digest
from dance_tvm.schedules.workload import POOL, TYPICAL_DENSITY, Workload

from .carries import Chain, find_chains
from .sample_lists import SampleLists, positions_of_input
from .sites import Site, Sites

#: Share of zero weights from which on a layer's report says why they are not skipped.
WORTH_TELLING = 0.01

#: Lists that no mask thins are planned when compiled up to this many entries; longer ones in every call: rather a
#: thousandth of the time of so large a layer than megabytes in the artifact.
MOST_CONSTANT_LISTS = 1 << 18

#: How many times its weights a layer's transformed ones may take, and the bytes of weights from which on that counts.
#: 2.4 lets through tiles of two along every axis, or of three along two; 1 no transform at all.
Memory = Literal["small", "balanced", "fast"]
MOST_GROWTH: dict[Memory, tuple[float, int]] = {
    "small": (1.0, 1 << 18),
    "balanced": (2.4, 1 << 20),
    "fast": (math.inf, 0),
}

#: The function beside ``main`` that runs the planning alone. It takes what ``main`` takes and returns int32 (rows, 4):
#: for every convolution and linear layer, in the order of ``Lowered.layers``, its number, and how many pairs of output
#: row and tap, input channels and output channels one call works on: the product of the three is the
#: multiply-accumulates executed. A layer whose channel lists differ by clip has a row for each clip.
COUNTS = "counts"


@tvm.transform.module_pass(opt_level=0, name="LowerWindows")
class LowerWindows:
    """Lower every site of ``main``; ``layers`` receives what was decided, in order of execution, ``workloads`` what the
    sizes of a layer's kernel were chosen for, ``sources`` what packed weights were made of."""

    def __init__(
        self,
        machine: Machine | Gpu,
        sparsity: bool = True,
        threads: int = 1,
        tuning: TuningLog | None = None,
        convolution: str = "direct",
        lowering: Callable[..., Lowering] | None = None,
        group_cost: Callable[[KernelGroups], float] | None = None,
        memory: Memory = "fast",
    ) -> None:
        self.memory = memory
        self.group_cost = group_cost
        self.lowering: Callable[..., Lowering] = lowering or Lowering
        self.machine = machine
        self.threads = threads
        self.tuning = tuning
        self.sparsity = sparsity
        self.convolution = convolution
        self.layers: list[LayerInfo] = []
        self.workloads: dict[str, Workload] = {}
        self.sources: dict[bytes, Source] = {}

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        liveness = liveness_of(graph)
        lists = None
        if isinstance(self.machine, Machine):
            lists = SampleLists(self.machine, self.threads, self.convolution)
        sites = Sites.of(graph, liveness, lists, pools_skip=isinstance(self.machine, Machine))
        chains = find_chains(graph, liveness, sites) if isinstance(self.machine, Machine) else []
        lowering = self.lowering(
            mod,
            graph,
            liveness,
            sites,
            self.machine,
            self.threads,
            self.tuning,
            sparsity=self.sparsity,
            convolution=self.convolution,
            group_cost=self.group_cost,
            memory=self.memory,
            chains={chain.end: chain for chain in chains},
        )
        with one_thread() if self.threads == 1 else nullcontext():
            lowered = lowering.run()
        self.layers.extend(lowering.layers)
        self.workloads.update(lowering.workloads)
        self.sources.update(lowering.sources)
        return relax.transform.DeadCodeElimination()(lowered)


@dataclass
class Lowering:
    """One run over the graph. Bindings are emitted in order, and masks as soon as a kernel needs them."""

    mod: tvm.IRModule
    graph: Graph
    liveness: Liveness
    sites: Sites
    machine: Machine
    threads: int
    tuning: TuningLog | None
    tuned: str = ""
    layers: list[LayerInfo] = field(default_factory=list)
    workloads: dict[str, Workload] = field(default_factory=dict)
    new: dict[relax.Var, relax.Expr] = field(default_factory=dict)
    planned: dict[Hashable, list[relax.Expr]] = field(default_factory=dict)
    counts: list[relax.Expr] = field(default_factory=list)
    groups: dict[relax.Var, KernelGroups] = field(default_factory=dict)
    sparsity: bool = True
    convolution: str = "direct"
    constants: dict[relax.Var, list[relax.Expr]] = field(default_factory=dict)
    viewed: dict[relax.Expr, relax.Expr] = field(default_factory=dict)
    group_cost: Callable[[KernelGroups], float] | None = None
    chains: dict[relax.Var, Chain] = field(default_factory=dict)
    #: How activations and weights are stored.
    dtype: str = "float32"
    #: What packed weights were made of, by their digest.
    sources: dict[bytes, Source] = field(default_factory=dict)
    memory: Memory = "fast"

    def run(self) -> tvm.IRModule:
        """Emit the network with kernels in the place of sites, and the counts of what they will execute beside it.

        Both are one walk: the functions have the same bindings, and each loses those that its result does not need.
        """
        others = {gvar: func for gvar, func in self.mod.functions_items() if gvar.name_hint != "main"}
        self.builder = relax.BlockBuilder(tvm.IRModule(others))
        params = [relax.Var(param.name, param.ty) for param in self.graph.params]
        self.new.update(zip(self.graph.params, params, strict=True))
        with self.builder.function("main", params, attrs=dict(self.mod["main"].attrs or {})):
            with self.builder.dataflow():
                for var in self.graph.order:
                    if var not in self.sites.inside:
                        self._emit(var)
                output = self.builder.emit_output(substitute(self.graph.output, self.new))
                self.builder.emit_output(self._all_counts())
            self.builder.emit_func_output(output)
        mod = self.builder.finalize()
        main = mod["main"]
        counts = main.body.blocks[-1].bindings[-1].var
        counting = relax.Function(main.params, relax.SeqExpr(main.body.blocks, counts), counts.ty, attrs=main.attrs)
        mod[COUNTS] = relax.utils.copy_with_new_vars(counting.with_attr("global_symbol", COUNTS))
        return mod

    def _all_counts(self) -> relax.Expr:
        if not self.counts:
            return relax.const(np.zeros((0, 4), "int32"))
        return self.builder.emit(relax.op.concat(self.counts, 0))

    def _count(
        self, conv: Convolution | WinogradConv, lists: list[relax.Expr], channels: list[list[relax.Expr]]
    ) -> None:
        """Remember how to read what the kernel will execute; samples of a batch are added up by the reader."""
        emit, op, samples = self.builder.emit, relax.op, conv.plan.samples
        if isinstance(conv, WinogradConv):
            columns = [emit(op.multiply(lists[-1], relax.const(conv.plan.xi, "int32")))]
        else:
            columns = [emit(op.strided_slice(lists[-1], [1], [3], [4]))]
        for listed, dense in zip(channels, (conv.depth, conv.channels_out), strict=True):
            if listed:
                columns.append(emit(op.strided_slice(listed[0], [1], [0], [1])))
            else:
                columns.append(relax.const(np.full((samples, 1), dense, "int32")))
        joined = emit(op.concat(columns, 1))
        layer = relax.const(np.full((samples, 1), len(self.counts), "int32"))
        self.counts.append(emit(op.concat([layer, joined], 1)))

    def _count_columns(self, conv: KernelGroupConv | GroupConv, lists: list[relax.Expr], starts: relax.Expr) -> None:
        """The same for kernel groups: multiply-adds of a pair are the mean over the taps, output channels are 1."""
        emit, op, samples = self.builder.emit, relax.op, conv.plan.samples
        pairs = emit(op.strided_slice(lists[-1], [1], [3], [4]))
        last = [conv.panels - 1, conv.window.taps]
        total = emit(op.strided_slice(starts, [1, 2], last, [place + 1 for place in last]))
        total = emit(op.broadcast_to(emit(op.reshape(total, [conv.column_samples, 1])), [samples, 1]))
        lanes = relax.const(np.full((samples, 1), conv.tile.nr * conv.run, "int32"))
        taps = relax.const(np.full((samples, 1), conv.window.taps, "int32"))
        work = emit(op.floor_divide(emit(op.multiply(total, lanes)), taps))
        layer = relax.const(np.full((samples, 1), len(self.counts), "int32"))
        self.counts.append(emit(op.concat([layer, pairs, work, relax.const(np.ones((samples, 1), "int32"))], 1)))

    def _emit(self, var: relax.Var) -> relax.Expr:
        """Emit ``var`` and what it reads, unless that has been done."""
        if var in self.new:
            return self.new[var]
        if var in self.sites.aliases:
            self.new[var] = self._emit(self.sites.aliases[var])
        elif var in self.sites.by_end:
            self.new[var] = self._site(self.sites.by_end[var])
        elif var in self.chains:
            self.new[var] = self._chain(self.chains[var])
        elif self.graph.op(var) in POOLS and window_of(self.graph, var) is not None:
            self.new[var] = self._pool(var)
        else:
            for read in variables(self.graph.value[var]):
                self._emit(read)
            value = substitute(self.graph.value[var], self.new)
            self.new[var] = self.builder.emit(value, name_hint=var.name)
        return self.new[var]

    def _kernel(self, func: tvm.tirx.PrimFunc, args: list[relax.Expr], shapes: list[Shape], dtype: str) -> relax.Expr:
        name = str(func.attrs["global_symbol"])
        gvar = self.builder.add_func(func.without_attr("global_symbol"), name)
        types = [relax.TensorType(list(shape), dtype) for shape in shapes]
        return self.builder.emit(relax.call_tir(gvar, args, types[0] if len(types) == 1 else types), name_hint=name)

    # -- masks -------------------------------------------------------------------------------------------------------

    def _field(self, expression: Expression) -> relax.Expr:
        """``expression`` as a float32 tensor (N, T, H, W, C), extents 1 where it does not vary."""
        for node in nodes(expression, lambda node: ("field", node) not in self.planned):
            if ("field", node) not in self.planned:
                self.planned["field", node] = [self._new_field(node)]
        return self.planned["field", expression][0]

    def _new_field(self, expression: Expression) -> relax.Expr:
        emit = self.builder.emit
        if isinstance(expression, Factor):
            value = self._emit(expression.var)
            if dtype_of(value) != "float32":
                value = emit(relax.op.astype(value, "float32"))
            return emit(relax.op.reshape(value, list(expression.shape)))
        if isinstance(expression, Grown):
            batch, frames, height, width, _ = expression.inner.shape
            field4 = (batch, frames, height, width)
            inner = emit(relax.op.reshape(self._field(expression.inner), list(field4)))
            func = self._grow(expression.window, field4, expression.forward)
            grown = self._kernel(func, [inner], [expression.shape[:4]], "float32")
            return emit(relax.op.reshape(grown, list(expression.shape)))
        if isinstance(expression, Part):
            inner = self._field(expression.inner)
            return emit(relax.op.strided_slice(inner, [4], [expression.begin], [expression.end]))
        if isinstance(expression, Joined):
            return emit(relax.op.concat([self._channel_field(*part, expression) for part in expression.parts], 4))
        assert isinstance(expression, Both | Either)
        left, right = self._field(expression.left), self._field(expression.right)
        union = isinstance(expression, Either)
        return emit((relax.op.maximum if union else relax.op.multiply)(left, right))

    def _channel_field(self, part: Expression | None, channels: int, whole: Joined) -> relax.Expr:
        """One part of ``whole``, of which None leaves all channels, as ``whole`` varies but for its channels."""
        shape = (*whole.shape[:-1], channels)
        if part is None:
            return relax.const(np.ones(shape, "float32"))
        value = self._field(part)
        return value if part.shape == shape else self.builder.emit(relax.op.broadcast_to(value, list(shape)))

    def _mask(self, expression: Expression, shape: Shape, full: Shape) -> relax.Expr:
        """The mask broadcast to ``full`` (N, T, H, W, C) and seen as ``shape``."""
        key = ("mask", expression, shape, full)
        if key not in self.planned:
            value = self._field(expression)
            if shape_of(value) != full:
                value = self.builder.emit(relax.op.broadcast_to(value, list(full)))
            self.planned[key] = [self.builder.emit(relax.op.reshape(value, list(shape)))]
        return self.planned[key][0]

    def _frames(self, expression: Expression | None, batch: int, frames: int) -> list[relax.Expr]:
        if expression is None:
            return []
        return [self._mask(expression, (batch, frames), (batch, frames, 1, 1, 1))]

    def _channels(self, expression: Expression | None, samples: int, channels: int) -> list[relax.Expr]:
        """The list of live channels of each sample."""
        if expression is None:
            return []
        key = ("channels", expression, samples, channels)
        if key not in self.planned:
            mask = self._mask(expression, (samples, channels), (samples, 1, 1, 1, channels))
            func = self._channel_planner(samples, channels)
            self.planned[key] = [self._kernel(func, [mask], [channel_list_shape(samples, channels)], "int32")]
        return self.planned[key]

    def _rows(self, plan: RowPlan | WinogradPlan, masks: list[relax.Expr], identity: Hashable) -> list[relax.Expr]:
        """The lists of a plan; layers of the same shape under the same masks share them."""
        key = ("rows", plan, identity)
        if key not in self.planned and not masks and self._plans_now(plan):
            self.planned[key] = [relax.const(array) for array in _planned_now(self._row_planner(plan), plan)]
        args = [*masks, *(relax.const(table) for table in plan.tables.values())]
        return self._several(key, self._row_planner(plan), args, list(plan.shapes.values()))

    def _plans_now(self, plan: RowPlan | WinogradPlan) -> bool:
        """Whether lists that no mask thins become constants; a GPU's planner runs on the GPU alone."""
        entries = sum(math.prod(shape) for shape in plan.shapes.values())
        return isinstance(self.machine, Machine) and entries <= MOST_CONSTANT_LISTS

    def _several(
        self, key: Hashable, func: tvm.tirx.PrimFunc, args: list[relax.Expr], shapes: list[Shape]
    ) -> list[relax.Expr]:
        """The outputs of a planner, planned once for each key."""
        if key not in self.planned:
            lists = self._kernel(func, args, shapes, "int32")
            self.planned[key] = [self.builder.emit(relax.TupleGetItem(lists, i)) for i in range(len(shapes))]
        return self.planned[key]

    # -- what depends on the kind of machine -------------------------------------------------------------------------

    def _grow(self, window: Window, field4: Field, forward: bool) -> tvm.tirx.PrimFunc:
        return (grow_forward if forward else grow_backward)(window, field4)

    def _channel_planner(self, samples: int, channels: int) -> tvm.tirx.PrimFunc:
        return plan_channels(samples, channels)

    def _row_planner(self, plan: RowPlan | WinogradPlan) -> tvm.tirx.PrimFunc:
        return plan_winograd(plan) if isinstance(plan, WinogradPlan) else plan_rows(plan)

    def _pool_kernel(self, layer: str, fields: dict[str, Any]) -> tuple[str, tvm.tirx.PrimFunc]:
        """Name and kernel of the pool called ``layer``."""
        lists = tuple(axis for axis in ("in_frames", "out_frames", "in_positions") if fields.get(axis))
        channels = fields["channels"]
        workload = Workload(
            fields["window"],
            channels,
            channels,
            channels,
            lists,
            threads=self.threads,
            density=TYPICAL_DENSITY if lists else 1.0,
            family=POOL,
            pooling=fields["kind"],
        )
        self.workloads[layer] = workload
        decisions, self.tuned = decide(PoolSpace(self.machine, workload), self.tuning)
        pool = Pool(**fields, vector_floats=self.machine.vector_floats, vectors=decisions["vectors"])
        return pool.name, pool3d(pool)

    def _group_options(self, _site: Site) -> tuple[list[tuple[int, int]], Callable[[KernelGroups], float]]:
        """Sizes of kernel groups that kernels can take, and what groups cost."""
        lanes = self.machine.vector_floats
        return fitting_groups(lanes), self.group_cost or lane_cost(lanes)

    def _stored(self, value: relax.Expr, shape: Shape) -> relax.Expr:
        """``value`` as kernels read it: stored as ``dtype``, seen as ``shape``."""
        return self._as_video(value, shape)

    def _seen(self, value: relax.Expr, shape: Shape) -> relax.Expr:
        """What a kernel stored as the graph sees it: float32, of ``shape``."""
        return self._as_video(value, shape)

    # -- kernels -----------------------------------------------------------------------------------------------------

    def _site(self, site: Site) -> relax.Expr:
        window = site.window
        alive, wanted = self.sites.alive(site), self.sites.wanted(site)
        if self._is_depthwise(site, wanted):
            return self._depthwise(site, Live(alive.frames), wanted)
        live_in = alive.channels if site.groups == 1 else None
        samples = window.batch if window.batch > 1 and (live_in or wanted.channels) else 1
        direct = self._choose(site, alive, wanted, samples)
        workload = self.workloads[site.start.name]
        choice, self.tuned = choose_kernel(
            direct, self.tuned, workload, self.machine, self.convolution, self.tuning, self._most_growth(site)
        )
        conv = choice.conv
        plan = conv.plan
        data = self._as_video(self._emit(site.data), (window.batch, *window.size, site.channels_in))
        masks, lists = self._masks_and_lists(plan, alive, wanted)
        if isinstance(conv, GatherConv) and conv.compact_in:
            data = self._compact(site, data, alive, conv.plan)
        if isinstance(conv, KernelGroupConv):
            args = [data, *self._group_arguments(site, conv, live_in, wanted.channels, lists)]
        else:
            args = [data, *self._gather_arguments(site, conv, live_in, wanted.channels, lists)]
        if isinstance(conv, WinogradConv):
            args += [mask for key in mask_arguments(conv) for mask in masks[key]]
        elif conv.zero_dead:
            args += [*masks["out_frames"], *masks["positions"]]
        out_shape = (window.batch, *window.out, site.channels_out)
        if site.residual is not None:
            args.append(self._as_video(self._emit(site.residual), out_shape))
        self.layers.append(self._describe(site, conv, alive, wanted, choice.reason))
        if isinstance(conv, WinogradConv):
            func = conv3d_winograd(conv)
        else:
            func = conv3d_kgs(conv) if isinstance(conv, KernelGroupConv) else conv3d_gather(conv)
        return self._as_video(self._kernel(func, args, [out_shape], "float32"), shape_of(site.end))

    def _most_growth(self, site: Site) -> float:
        """How many times the site's weights a kernel's may take."""
        most, large = MOST_GROWTH[self.memory]
        return most if site.weight.nbytes > large else math.inf

    def _is_depthwise(self, site: Site, wanted: Live) -> bool:
        """Whether the depthwise kernel computes the site; it leaves out frames, and no single positions."""
        if site.groups == 1 or site.linear or wanted.positions is not None or site.lists.positions:
            return False
        channels = (site.channels_in, site.channels_out, site.groups)
        return not why_no_depthwise(site.window, *channels, self.machine.vector_floats)

    def _depthwise(self, site: Site, alive: Live, wanted: Live) -> relax.Expr:
        """A site whose output channels read one input channel each."""
        window, masked = site.window, bool(alive.frames or wanted.frames)
        conv = DepthwiseConv(
            window,
            site.channels_in,
            site.channels_out,
            depthwise_tile(self.machine, window, site.channels_out, masked, self.threads),
            in_frames=alive.frames is not None,
            out_frames=wanted.frames is not None,
            residual=site.residual is not None,
            activation=site.activation,
            zero_dead=wanted.frames is not None and self.sites.needs_zeros(site.end),
        )
        args = [self._as_video(self._emit(site.data), (window.batch, *window.size, site.channels_in))]
        args += map(relax.const, (conv.pack_weights(site.weight), conv.pack_bias(bias_of(site))))
        plan = RowPlan(window, 1, 1, window.taps, 1, alive.frames is not None, wanted.frames is not None)
        pairs: relax.Expr = relax.const(np.array([[window.tap_positions]], "int32"))
        if masked:  # the lists are planned for their counts alone
            masks, lists = self._masks_and_lists(plan, alive, wanted)
            args += [mask for given in masks.values() for mask in given]
            pairs = self.builder.emit(relax.op.strided_slice(lists[-1], [1], [3], [4]))
        layer, rest = (relax.const(np.array([row], "int32")) for row in ([len(self.counts)], [1, site.channels_out]))
        self.counts.append(self.builder.emit(relax.op.concat([layer, pairs, rest], 1)))
        out_shape = (window.batch, *window.out, site.channels_out)
        if site.residual is not None:
            args.append(self._as_video(self._emit(site.residual), out_shape))
        self.tuned = ""
        self.layers.append(self._describe(site, conv, alive, wanted, ""))
        return self._as_video(self._kernel(depthwise3d(conv), args, [out_shape], "float32"), shape_of(site.end))

    def _masks_and_lists(
        self, plan: RowPlan | WinogradPlan, alive: Live, wanted: Live
    ) -> tuple[dict[str, list[relax.Expr]], list[relax.Expr]]:
        """The masks that a plan takes, by name, each none or one; and its lists."""
        window, in_frames = plan.window, alive.frames if plan.in_frames else None
        masks = {
            "in_frames": self._frames(in_frames, window.batch, window.size[0]),
            "out_frames": self._frames(wanted.frames, window.batch, window.out[0]),
            "positions": [],
        }
        if plan.positions is not None and wanted.positions is not None:
            shape = (*plan.positions, *window.out[1:])
            masks["positions"] = [self._mask(wanted.positions, shape, (*shape, 1))]
        read = alive.positions if isinstance(plan, RowPlan) and plan.in_positions is not None else None
        if read is not None:
            masks["in_positions"] = [self._positions_of_input(read, window)]
        identity = (in_frames, wanted.frames, wanted.positions, read)
        return masks, self._rows(plan, [mask for given in masks.values() for mask in given], identity)

    def _positions_of_input(self, alive: Expression, window: Window) -> relax.Expr:
        """A mask of positions that ``window`` reads: (clips or 1, frames or 1, H, W)."""
        lines = (*alive.shape[:2], *window.size[1:])
        return self._mask(alive, lines, (*lines, 1))

    def _compact(self, site: Site, data: relax.Expr, alive: Live, plan: RowPlan) -> relax.Expr:
        """The site's input with its live channels side by side."""
        window, samples = site.window, plan.samples
        frames = alive.frames if plan.dynamic_taps else None
        key = ("compact", site.data, alive.channels, frames, samples)
        if key not in self.planned:
            func = compact_channels(window, site.channels_in, samples, frames is not None, self.machine.vector_floats)
            args = [data, *self._channels(alive.channels, samples, site.channels_in)]
            args += self._frames(frames, window.batch, window.size[0])
            self.planned[key] = [self._kernel(func, args, [shape_of(data)], "float32")]
        return self.planned[key][0]

    def _gather_arguments(
        self,
        site: Site,
        conv: Convolution | WinogradConv,
        live_in: Expression | None,
        live_out: Expression | None,
        lists: list[relax.Expr],
    ) -> list[relax.Expr]:
        """Weights, bias, taps and lists of a gathered or Winograd convolution."""
        samples = conv.plan.samples
        channels = [
            self._channels(live_in, samples, site.channels_in),
            self._channels(live_out, samples, site.channels_out),
        ]
        self._count(conv, lists, channels)
        if site.start not in self.constants:
            packed = [conv.pack_weights(site.weight), conv.pack_bias(bias_of(site)), conv.plan.tap_entries]
            self.sources[array_digest(packed[0])] = Source(conv.preparation, site.weight)
            self.constants[site.start] = [relax.const(array) for array in packed]
        if isinstance(conv, WinogradConv):
            lists = lists[: len(LISTS)]
        return [*self.constants[site.start], *lists, *channels[0], *channels[1]]

    def _group_arguments(
        self,
        site: Site,
        conv: KernelGroupConv,
        live_in: Expression | None,
        live_out: Expression | None,
        lists: list[relax.Expr],
    ) -> list[relax.Expr]:
        """Weights, bias, taps and lists of a convolution with kernel groups."""
        groups, samples = self.groups[site.start], conv.plan.samples
        weights = np.zeros(conv.weight_shape, "float32")
        weights[: len(groups.weights)] = groups.weights
        columns: list[relax.Expr] = [
            relax.const(conv.static_starts(groups.column_ptr)),
            relax.const(conv.static_columns(groups.columns, groups.column_ptr)),
        ]
        if live_in is not None:
            mask = self._mask(live_in, (samples, conv.channels_in), (samples, 1, 1, 1, conv.channels_in))
            shapes = list(conv.column_shapes.values())
            columns = self._several(("columns", site.start, live_in), plan_columns(conv), [mask, *columns], shapes)
        self._count_columns(conv, lists, columns[0])
        order = balanced_order(np.diff(groups.column_ptr[:, [0, -1]])[:, 0], self.threads)
        args = [relax.const(weights), relax.const(conv.pack_bias(bias_of(site))), relax.const(conv.plan.tap_entries)]
        args += [*lists, *columns, relax.const(order), relax.const(conv.tap_runs)]
        if live_out is not None:
            args.append(self._mask(live_out, (samples, conv.channels_out), (samples, 1, 1, 1, conv.channels_out)))
        return args

    def _workload(self, site: Site, alive: Live, wanted: Live) -> Workload:
        """What the choice of the site's tile depends on."""
        listed = {
            "in_frames": alive.frames,
            "out_frames": wanted.frames,
            "positions": wanted.positions,
            "in_channels": alive.channels if site.groups == 1 else None,
            "out_channels": wanted.channels,
            "in_positions": alive.positions if site.lists.positions else None,
        }
        lists = tuple(axis for axis, mask in listed.items() if mask is not None)
        workload = Workload(
            site.window,
            site.channels_in,
            site.channels_out,
            site.groups,
            lists,
            residual=site.residual is not None,
            activation=site.activation,
            threads=self.threads,
            density=TYPICAL_DENSITY if lists else 1.0,
        )
        groups = self._kernel_groups(site)
        return workload if groups is None else workload.grouped((groups.gm, groups.gn), groups.kept)

    def _choose(self, site: Site, alive: Live, wanted: Live, samples: int) -> GatherConv:
        """The kernel of a site: its tile, its row plan and the lists it walks."""
        workload = self.workloads[site.start.name] = self._workload(site, alive, wanted)
        tile, self.tuned = choose_tile(workload, self.machine, self.tuning)
        dynamic = (*self._given(alive, wanted), positions_of_input(site, alive) if site.lists.positions else None)
        plan = RowPlan(site.window, tile.mr, tile.block_tiles, tile.segment_taps, samples, *dynamic)
        fields = {"tile": tile, "plan": plan, **self._fields(site, alive, wanted)}
        groups = self._kernel_groups(site)
        if groups is None:
            return GatherConv(**fields)
        run = 1 if alive.channels is not None else groups.run
        return KernelGroupConv(**fields, columns=len(groups.columns), run=run)

    def _fields(self, site: Site, alive: Live, wanted: Live) -> dict[str, Any]:
        """The fields of a site's kernel that do not depend on its tile."""
        return {
            "window": site.window,
            "channels_in": site.channels_in,
            "channels_out": site.channels_out,
            "groups": site.groups,
            "live_in": alive.channels is not None and site.groups == 1,
            "live_out": wanted.channels is not None,
            "residual": site.residual is not None,
            "activation": site.activation,
            "zero_dead": self._zeros(site.end) if wanted.axes else "",
        }

    def _zeros(self, end: relax.Var) -> str:
        """What a kernel that ends in ``end`` sets to zero of what it leaves out."""
        if self.sites.needs_zeros(end):
            return "all"
        return "rows" if self.sites.needs_zero_positions(end) else ""

    def _given(self, alive: Live, wanted: Live) -> tuple[bool, bool, tuple[int, int] | None]:
        """Which masks a row plan is given: frames read, frames wanted, and clips and frames of wanted positions."""
        at = wanted.positions
        positions = None if at is None else (at.shape[0], at.shape[1])
        return alive.frames is not None, wanted.frames is not None, positions

    def _kernel_groups(self, site: Site) -> KernelGroups | None:
        """The zero columns of the site's weights, if skipping them pays."""
        if not self.sparsity or site.linear or site.groups > 1:
            return None
        if site.start not in self.groups:
            self.groups[site.start] = choose_kernel_groups(site.weight, *self._group_options(site))
        groups = self.groups[site.start]
        return None if groups.scheme == "dense" else groups

    def _as_video(self, value: relax.Expr, shape: Shape) -> relax.Expr:
        """``value`` seen as ``shape``. Two views in a row would be joined into a copy, so there is never a second."""
        value = self.viewed.get(value, value)
        if shape_of(value) == shape:
            return value
        view = self.builder.emit(relax.op.reshape(value, list(shape)))
        self.viewed[view] = value
        return view

    def _describe(
        self, site: Site, conv: Convolution | WinogradConv | DepthwiseConv, alive: Live, wanted: Live, why: str
    ) -> LayerInfo:
        skips = [f"input {axis}" for axis in alive.axes if axis != "positions" or site.lists.positions]
        skips += [f"output {axis}" for axis in wanted.axes]
        groups = self.groups.get(site.start)
        if isinstance(conv, KernelGroupConv):
            skips.append("weight columns")
        reason = "" if skips else self._why_dense(site)
        if groups is not None and (groups.scheme != "dense" or groups.zeros >= WORTH_TELLING):
            reason = "; ".join(part for part in (reason, str(groups)) if part)
        if site.unlisted:
            why = f"its {' and '.join(site.unlisted)} channels differ by sample, and listing them would not pay; {why}"
        reason = "; ".join(part for part in (reason, why) if part)
        kind = "linear" if site.linear else "conv3d"
        return LayerInfo(
            name=site.start.name,
            kind=kind,
            kernel=conv.name,
            macs=site.macs,
            skips=skips,
            reason=reason,
            tuned=self.tuned,
            scratch_bytes=conv.scratch_bytes if isinstance(conv, WinogradConv) else 0,
        )

    def _why_dense(self, site: Site) -> str:
        refused = self.liveness.masks.refused
        for var in [site.end, site.data]:
            for reader in [*self.graph.readers.get(var, []), var]:
                if self.graph.op(reader) == "multiply":
                    for arg in self.graph.call(reader).args:
                        if arg in refused:
                            return refused[arg]
        return "no mask reaches it"

    def _chain(self, chain: Chain) -> relax.Expr:
        """A chain over frames; its masks beside the layers' are small tensors."""
        total, height, width, channels = shape_of(chain.end)
        masks, axes = [], []
        for live in (chain.fresh, chain.taken, chain.kept):
            if live.positions is not None:
                masks.append(self._mask(live.positions, (total, height, width), (total, 1, height, width, 1)))
            if live.channels is not None:
                masks.append(self._mask(live.channels, (total, channels), (total, 1, 1, 1, channels)))
            axes.append(tuple(axis for axis in live.axes if axis != "frames"))
        fresh, taken, kept = axes
        count, floats = total // chain.frames, self.machine.vector_floats
        carry = Carry(
            chain.frames, count, height, width, channels, floats, fresh, taken, kept, chain.before is not None
        )
        args = [self._emit(chain.source), *masks]
        if chain.before is not None:
            args.append(self._emit(chain.before))
        return self._kernel(carry_frames(carry), args, [shape_of(chain.end)], "float32")

    def _pool(self, var: relax.Var) -> relax.Expr:
        call, window = self.graph.call(var), window_of(self.graph, var)
        assert window is not None
        source, counted = call.args[0], ((0, 0, 0), (0, 0, 0))
        if call.attrs.count_include_pad:
            counted = (window.padding, padding_behind(self.graph, var))
        if "avg" in self.graph.op(var) and (padded := zero_padded(self.graph, source)) is not None:
            source, window = padded.source, padded.inside(window)
            counted = (added(counted[0], padded.before), added(counted[1], padded.behind))
        alive = self.liveness.alive_in(source)
        wanted = self.liveness.wanted(var)
        channels = shape_of(source)[-1]
        fields = {
            "window": window,
            "channels": channels,
            "kind": "max" if "max" in self.graph.op(var) else "avg",
            "counted": counted,
            "in_frames": alive.frames is not None,
            "out_frames": wanted.frames is not None,
            "zero_dead": self.sites.needs_zeros(var),
        }
        read = alive.positions if source in self.sites.aliases else None  # else they are stored as zeros
        if read is not None:
            fields["in_positions"] = read.shape[:2]
        name, func = self._pool_kernel(var.name, fields)
        data = self._stored(self._emit(source), (window.batch, *window.size, channels))
        masks = self._frames(alive.frames, window.batch, window.size[0])
        masks += self._frames(wanted.frames, window.batch, window.out[0])
        if read is not None:
            masks.append(self._positions_of_input(read, window))
        result = self._kernel(func, [data, *masks], [(window.batch, *window.out, channels)], self.dtype)
        skips = [f"output {axis}" for axis in wanted.axes if axis == "frames"]
        self.layers.append(LayerInfo(name=var.name, kind="pool3d", kernel=name, macs=0, skips=skips, tuned=self.tuned))
        return self._seen(result, shape_of(var))


def bias_of(site: Site) -> np.ndarray:
    """float32 (C_out,): the site's bias, zeros where it has none."""
    bias = np.zeros(site.channels_out) if site.bias is None else site.bias
    return bias.astype("float32")


def _planned_now(planner: tvm.tirx.PrimFunc, plan: RowPlan | WinogradPlan) -> list[np.ndarray]:
    """The lists of a plan that no mask thins, which are the same in every call."""
    module = tvm.IRModule({"plan": planner.with_attr("global_symbol", "plan")})
    run = tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "opt-level": 0}))  # it runs once
    lists = [tvm.runtime.tensor(np.zeros(shape, "int32")) for shape in plan.shapes.values()]
    run["plan"](*(tvm.runtime.tensor(table) for table in plan.tables.values()), *lists)
    return [array.numpy() for array in lists]
