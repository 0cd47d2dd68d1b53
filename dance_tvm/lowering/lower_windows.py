"""Replace convolutions, linear layers and pools by kernels that walk index lists, and plan the lists.

Sites are found (:mod:`.sites`), a kernel is chosen for each (:mod:`.choose_kernel`), its lists are planned
(:mod:`.plan_lists`) and its call is emitted, in the order of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax

from dance_tvm.artifact.layers import LayerInfo
from dance_tvm.ir.graph import Graph, Shape, dtype_of, emit, shape_of, substitute, variables
from dance_tvm.ir.windows import POOLS, is_planar_pool, padding_behind, planar_window_of, window_of, zero_padded
from dance_tvm.liveness.analysis import Liveness
from dance_tvm.liveness.expressions import Expression
from dance_tvm.liveness.relax_graph import liveness_of
from dance_tvm.schedules.convolution import LayerKernel
from dance_tvm.schedules.cpu.carry_frames import Carry
from dance_tvm.schedules.cpu.choice import TuningLog
from dance_tvm.schedules.cpu.pointwise_tiles import is_pointwise
from dance_tvm.schedules.cpu.pool_planar import PlanarPool
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.emit import FLOAT, HALF
from dance_tvm.schedules.geometry import added
from dance_tvm.schedules.gpu.tiles import Gpu
from dance_tvm.schedules.layer import Limits
from dance_tvm.schedules.preparation import Source
from dance_tvm.schedules.workload import LISTS, POOL, TYPICAL_DENSITY, Workload

from .calls import call_kernel
from .carries import Chain, find_chains
from .choose_kernel import Chooser, GroupCost, Memory, masks_of
from .describe_layers import describe, why_dense
from .gates import absorb_gates
from .half_range import HalfRange
from .lowered import LayerCall
from .masks import Masks
from .plan_lists import Given, Lists, Values, counted
from .pools import absorb_pools
from .registry import kernels_of
from .sample_lists import SampleLists
from .share_memory import shared_out
from .sites import Site, Sites

#: The function beside ``main`` that runs the planning alone. It takes what ``main`` takes and returns int32 (rows, 4):
#: for every convolution and linear layer, in the order of ``Lowered.layers``, its number, and how many pairs of output
#: row and tap, input channels and output channels one call works on: the product of the three is the
#: multiply-accumulates executed. A layer whose channel lists differ by clip has a row for each clip.
COUNTS = "counts"


@dataclass(frozen=True)
class Windows:
    """A module whose convolutions, linear layers and pools are calls of kernels, and how it came about.

    ``layers``: the decisions, in order of execution. By the name of a layer, ``calls``: the call of its kernel;
    ``workloads``: what its kernel's sizes were chosen for; ``limits``: those of its memory. ``sources``: what packed
    weights were made of, by their digest.
    """

    mod: tvm.IRModule
    layers: list[LayerInfo]
    calls: dict[str, LayerCall]
    workloads: dict[str, Workload]
    sources: dict[bytes, Source]
    limits: dict[str, Limits]


def lower_windows(
    mod: tvm.IRModule,
    machine: Machine | Gpu,
    *,
    sparsity: bool = True,
    threads: int = 1,
    tuning: TuningLog | None = None,
    algorithm: str = "direct",
    group: tuple[int, int] | None = None,
    group_cost: GroupCost | None = None,
    dtype: str = "float32",
    memory: Memory = "fast",
    largest: Mapping[str, float] | None = None,
) -> Windows:
    """Lower every site of ``main``; kernels store activations and weights as ``dtype``, but for layers that the
    ``largest`` magnitudes of variables, by their names, leave to float32."""
    graph = Graph.of(mod["main"])
    liveness = liveness_of(graph)
    cpu = isinstance(machine, Machine)
    lists = SampleLists(machine, threads, algorithm, dtype) if isinstance(machine, Machine) else None
    sites = Sites.of(graph, liveness, lists, pools_skip=cpu)
    chains = find_chains(graph, liveness, sites) if cpu else []
    used = threads if cpu else 1
    chooser = Chooser(machine, sites, used, dtype, algorithm, sparsity, tuning, group, group_cost, memory)
    if cpu and dtype == HALF:
        chooser.half_range = HalfRange(graph, largest or {})
    if cpu:
        absorb_gates(graph, sites, lambda site: is_pointwise(chooser.layer(site)))
    if isinstance(machine, Machine):
        absorb_pools(graph, sites, chooser, partial(shared_out, chooser, machine))
    lowering = _Lowering(mod, graph, liveness, sites, chooser, {chain.end: chain for chain in chains}, threads)
    mod = relax.transform.DeadCodeElimination()(lowering.run())
    limits = {start.name: found for start, found in chooser.limits.items()}
    return Windows(mod, lowering.layers, lowering.calls, lowering.workloads, lowering.lists.sources, limits)


@dataclass
class _Lowering:
    """One walk over the graph. Bindings are emitted in order, and masks as soon as a kernel needs them."""

    mod: tvm.IRModule
    graph: Graph
    liveness: Liveness
    sites: Sites
    chooser: Chooser
    chains: dict[relax.Var, Chain]
    threads: int
    layers: list[LayerInfo] = field(default_factory=list)
    calls: dict[str, LayerCall] = field(default_factory=dict)
    workloads: dict[str, Workload] = field(default_factory=dict)
    new: dict[relax.Var, relax.Expr] = field(default_factory=dict)
    counts: list[relax.Expr] = field(default_factory=list)
    viewed: dict[relax.Expr, relax.Expr] = field(default_factory=dict)
    #: Values that were stored as ``chooser.dtype``, by what the graph sees of them in float32.
    stored: dict[relax.Expr, relax.Expr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        others = {gvar: func for gvar, func in self.mod.functions_items() if gvar.name_hint != "main"}
        self.builder = relax.BlockBuilder(tvm.IRModule(others))
        machine = self.chooser.machine
        self.kernels = kernels_of(machine)
        self.masks = Masks(self.builder, self._emit, self.kernels.grown_mask, self.threads)
        self.lists = Lists(self.builder, self.masks, now=isinstance(machine, Machine))

    def run(self) -> tvm.IRModule:
        """Emit the network with kernels in the place of sites, and the counts of what they will execute beside it.

        Both are one walk: the functions have the same bindings, and each loses those that its result does not need.
        """
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

    def _count(self, kernel: LayerKernel, values: Values) -> None:
        """Remember how to read what the kernel will execute; samples of a batch are added up by the reader."""
        samples = kernel.samples
        layer = relax.const(np.full((samples, 1), len(self.counts), "int32"))
        columns = [layer, *(counted(self.builder, count, samples, values) for count in kernel.work())]
        self.counts.append(self.builder.emit(relax.op.concat(columns, 1)))

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
        elif self.graph.op(var) in POOLS and (planar := self._planar_pool(var)) is not None:
            self.new[var] = planar
        else:
            for read in variables(self.graph.value[var]):
                self._emit(read)
            value = substitute(self.graph.value[var], self.new)
            self.new[var] = emit(self.builder, value, var.name)
        return self.new[var]

    # -- how values are stored ---------------------------------------------------------------------------------------

    def _stored(self, value: relax.Expr, shape: Shape, dtype: str) -> relax.Expr:
        """``value`` as a kernel reads it: stored as ``dtype``, seen as ``shape``."""
        if dtype == FLOAT:
            return self._as_video(value, shape)
        source = self.viewed.get(value, value)
        if source not in self.stored:
            self.stored[source] = self.builder.emit(relax.op.astype(source, dtype))
        return self._as_video(self.stored[source], shape)

    def _seen(self, value: relax.Expr, shape: Shape) -> relax.Expr:
        """What a kernel stored as the graph sees it: float32, of ``shape``."""
        if dtype_of(value) == FLOAT:
            return self._as_video(value, shape)
        full = self.builder.emit(relax.op.astype(value, FLOAT))
        self.stored[full] = value
        return self._as_video(full, shape)

    def _as_video(self, value: relax.Expr, shape: Shape) -> relax.Expr:
        """``value`` seen as ``shape``. Two views in a row would be joined into a copy, so there is never a second."""
        value = self.viewed.get(value, value)
        if shape_of(value) == shape:
            return value
        view = self.builder.emit(relax.op.reshape(value, list(shape)))
        self.viewed[view] = value
        return view

    # -- kernels -----------------------------------------------------------------------------------------------------

    def _site(self, site: Site) -> relax.Expr:
        alive, wanted = self.sites.alive(site), self.sites.wanted(site)
        choice, dtype = self.chooser.choose(site), self.chooser.dtype_of(site)
        kernel = choice.kernel
        if choice.workload is not None:
            self.workloads[site.start.name] = choice.workload
        residual, gate = site.residual, site.gate
        given = Given(
            self._stored(self._emit(site.data), kernel.x_shape, dtype),
            masks_of(site, alive, wanted),
            self.chooser.weights(site),
            None if residual is None else lambda: self._stored(self._emit(residual), kernel.y_shape, dtype),
            None if gate is None else lambda: self._as_video(self._emit(gate), (site.window.batch, site.channels_in)),
        )
        values = self.lists.of(kernel, given)
        self._count(kernel, values)
        args = self.lists.arguments(kernel, given, values)
        groups, why = self.chooser.groups.get(site.start), why_dense(site, self.graph, self.liveness)
        self.layers.append(describe(site, choice, alive, wanted, groups, why))
        called = call_kernel(self.builder, kernel, args, self.threads)
        self.calls[site.start.name] = LayerCall(called.name, site.end.name)
        return self._seen(called, shape_of(site.end))

    def _chain(self, chain: Chain) -> relax.Expr:
        """A chain over frames; its masks beside the layers' are small tensors."""
        total, height, width, channels = shape_of(chain.end)
        masks: dict[str, Expression | None] = {}
        for name, live in (("fresh", chain.fresh), ("taken", chain.taken), ("kept", chain.kept)):
            masks |= {f"{name}_{axis}": getattr(live, axis) for axis in live.axes}
        fresh, taken, kept = (tuple(live.axes) for live in (chain.fresh, chain.taken, chain.kept))
        machine, before, dtype = self.chooser.machine, chain.before, self.chooser.dtype_of_pool(chain.source)
        assert isinstance(machine, Machine)
        machine = machine.storing(dtype)
        sizes = (chain.frames, total // chain.frames, height, width, channels, machine.vector_floats)
        kernel = Carry(*sizes, fresh, taken, kept, before is not None, dtype)
        given = Given(
            self._stored(self._emit(chain.source), kernel.shape, dtype),
            masks,
            None,
            None
            if before is None
            else lambda: self._stored(self._emit(before), (kernel.count, *kernel.shape[1:]), dtype),
        )
        args = self.lists.arguments(kernel, given, {})
        return self._seen(call_kernel(self.builder, kernel, args, self.threads), kernel.shape)

    def _planar_pool(self, var: relax.Var) -> relax.Expr | None:
        """A pool whose tensors have channels first; None where there is no kernel for it."""
        window, data, machine = planar_window_of(self.graph, var), self.graph.call(var).args[0], self.chooser.machine
        if window is None or not isinstance(machine, Machine) or not is_planar_pool(self.graph, var):
            return None
        kernel = PlanarPool(window, shape_of(data)[1], "max", vector_floats=machine.vector_floats)
        self.layers.append(LayerInfo(name=var.name, kind="pool3d", kernel=kernel.name, macs=0, skips=[]))
        x = self._as_video(self._emit(data), kernel.operands()[0].shape)
        called = call_kernel(self.builder, kernel, {"x": x}, self.threads)
        self.calls[var.name] = LayerCall(called.name, var.name)
        return self._as_video(called, shape_of(var))

    def _pool(self, var: relax.Var) -> relax.Expr:
        call, window = self.graph.call(var), window_of(self.graph, var)
        assert window is not None
        source, counted = call.args[0], ((0, 0, 0), (0, 0, 0))
        if call.attrs.count_include_pad:
            counted = (window.padding, padding_behind(self.graph, var))
        if "avg" in self.graph.op(var) and (padded := zero_padded(self.graph, source)) is not None:
            source, window = padded.source, padded.inside(window)
            counted = (added(counted[0], padded.before), added(counted[1], padded.behind))
        alive, wanted = self.liveness.alive_in(source), self.liveness.wanted(var)
        read = alive.positions if self.sites.may_hold_anything(source) else None  # else they are stored as zeros
        computed = wanted.positions if self.sites.pools_skip else None
        channels = shape_of(source)[-1]
        fields: dict[str, Any] = {
            "window": window,
            "channels": channels,
            "pooling": "max" if "max" in self.graph.op(var) else "avg",
            "counted": counted,
            "in_frames": alive.frames is not None,
            "out_frames": wanted.frames is not None,
            "zero_dead": self.sites.needs_zeros(var),
            "in_positions": None if read is None else read.shape[:2],
            "positions": None if computed is None else computed.shape[:2],
            "dtype": self.chooser.dtype_of_pool(source),
        }
        choice = self.kernels.pool(self._pool_workload(fields), fields, self.chooser.machine, self.chooser.log)
        if choice.workload is not None:
            self.workloads[var.name] = choice.workload
        data = self._stored(self._emit(source), (window.batch, *window.size, channels), fields["dtype"])
        masks = {"in_frames": alive.frames, "out_frames": wanted.frames, "in_positions": read, "positions": computed}
        args = self.lists.arguments(choice.kernel, Given(data, masks), {})
        thinned = {"frames": wanted.frames, "positions": computed}
        skips = [f"output {axis}" for axis, mask in thinned.items() if mask is not None]
        name, tuned = choice.kernel.name, choice.origin
        self.layers.append(LayerInfo(name=var.name, kind="pool3d", kernel=name, macs=0, skips=skips, tuned=tuned))
        called = call_kernel(self.builder, choice.kernel, args, self.threads)
        self.calls[var.name] = LayerCall(called.name, var.name)
        return self._seen(called, shape_of(var))

    def _pool_workload(self, fields: dict[str, Any]) -> Workload:
        """What the sizes of a pool depend on."""
        lists = tuple(axis for axis in LISTS if fields.get(axis))
        channels, chooser = fields["channels"], self.chooser
        return Workload(
            fields["window"],
            channels,
            channels,
            channels,
            lists,
            threads=chooser.threads,
            density=TYPICAL_DENSITY if lists else 1.0,
            family=POOL,
            dtype=fields["dtype"],
            pooling=fields["pooling"],
        )
