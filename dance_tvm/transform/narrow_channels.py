"""Take out channels that no convolution reads: what filter sparsity leaves is a smaller dense network.

A filter that was pruned with the channel it makes leaves zeros in every weight that reads this channel. Whatever the
channel holds, it need not be made, carried or read: the filter goes, and with it its channel in every operator up to
the convolutions that ignore it. What is left is dense, so it runs as fast as any dense network, Winograd included.

Where what is left still has kernel groups, filters go by whole groups only: one filter less would move all filters
behind it to other places in their groups, and columns that were zero in one group would be halves of two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, emit, is_tensor, literal, rewrite, shape_of, value_of
from dance_tvm.ir.reasons import Reasons
from dance_tvm.ir.windows import CONVOLUTIONS, POOLS
from dance_tvm.liveness.kernel_groups import choose_kernel_groups
from dance_tvm.liveness.rules import PAIRWISE, UNARY

#: Operators that leave each channel to itself; those with values of their own by channel are left out.
BY_ITSELF = UNARY | POOLS


@tvm.transform.module_pass(opt_level=0, name="NarrowChannels")
class NarrowChannels:
    """Rewrite ``main``; ``reasons`` receives what was taken out of each convolution.

    Runs while channels are axis 1. Grouped convolutions, reshapes and everything else that is not channelwise keep the
    channels they read, as outputs do.
    """

    def __init__(self, reasons: Reasons) -> None:
        self.reasons = reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        channels = _Channels(graph)
        channels.follow()
        kept = {var: channels.kept(var) for var in channels.of}
        if all(mask.all() for mask in kept.values()):
            return mod

        def visit(
            builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr | None:
            if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
                return None
            if graph.op(var) in CONVOLUTIONS and (var in kept or graph.call(var).args[0] in kept):
                value = self._convolution(graph, var, value, kept)
            elif var in kept and not kept[var].all():
                args = [_slice(arg, kept[var], len(shape_of(var))) for arg in value.args]
                value = relax.Call(value.op, args, value.attrs, value.ty_args)
            return emit(builder, value, var.name)

        return rewrite(mod, visit)

    def _convolution(
        self, graph: Graph, var: relax.Var, call: relax.Call, kept: dict[relax.Expr, NDArray[np.bool_]]
    ) -> relax.Call:
        """The convolution of the channels that stay."""
        weight = value_of(call.args[1])
        filters = kept.get(var, np.ones(weight.shape[0], bool))
        read = kept.get(graph.call(var).args[0], np.ones(weight.shape[1], bool)) if call.attrs.groups == 1 else None
        if read is None or (filters.all() and read.all()):
            return call
        small = np.ascontiguousarray(weight[filters][:, read])
        rate = weight.size / small.size
        self.reasons.add(
            var,
            f"filter, {rate:.2f}x fewer MACs: {(~filters).sum()} of {len(filters)} filters and "
            f"{(~read).sum()} of {len(read)} input channels are taken out",
        )
        return relax.Call(call.op, [call.args[0], literal(small)], call.attrs, call.ty_args)


def _slice(arg: relax.Expr, kept: NDArray[np.bool_], rank: int) -> relax.Expr:
    """A constant beside activations of ``rank`` axes, without the channels taken out; anything else as it is."""
    value = constant(arg)
    if value is None or value.ndim < rank - 1:
        return arg
    axis = value.ndim - (rank - 1)
    return literal(np.ascontiguousarray(value.compress(kept, axis))) if value.shape[axis] == len(kept) else arg


@dataclass
class _Channels:
    """Which channels of which variables are the same one: sets of channels that stay or go together."""

    graph: Graph
    of: dict[relax.Expr, NDArray[np.int64]] = field(default_factory=dict)
    parent: list[int] = field(default_factory=list)
    needed: set[int] = field(default_factory=set)

    def follow(self) -> None:
        """Walk the graph once; afterwards ``kept`` answers."""
        for var in self.graph.order:
            channels = self._made(var)
            if channels is not None:
                self.of[var] = channels
        for output in self.graph.outputs:
            self._need(output)
        self.roots = np.array([self._root(channel) for channel in range(len(self.parent))], np.int64)
        self.alive = np.zeros(len(self.parent), bool)
        self.alive[self.roots[sorted(self.needed)]] = True
        while self._complete_groups():
            pass
        for channels in self.of.values():
            if not self.alive[self.roots[channels]].any():  # a variable without any channel is none: one stays
                self.alive[self.roots[channels[0]]] = True

    def _complete_groups(self) -> bool:
        """Let the filters of kernel groups stay together; whether any came back."""
        before = self.alive.sum()
        for var, channels in self.of.items():
            alive = self.alive[self.roots[channels]]
            if self.graph.op(var) not in CONVOLUTIONS or alive.all() or not alive.any():
                continue
            weight = value_of(self.graph.call(var).args[1])
            if choose_kernel_groups(weight[alive]).scheme in ("vanilla", "kgs"):
                together = np.arange(len(channels)) // choose_kernel_groups(weight).gm
                self.alive[self.roots[channels[np.isin(together, together[alive])]]] = True
        return bool(self.alive.sum() > before)

    def kept(self, var: relax.Expr) -> NDArray[np.bool_]:
        """Which channels of ``var`` stay."""
        return np.asarray(self.alive[self.roots[self.of[var]]])

    def _made(self, var: relax.Var) -> NDArray[np.int64] | None:
        """The channels of ``var``, None where they are not followed; what an unknown operator reads is needed."""
        graph, name = self.graph, self.graph.op(var)
        if name in CONVOLUTIONS:
            return self._convolution(var)
        known = is_tensor(var) and len(shape_of(var)) in (4, 5)
        if known and name in BY_ITSELF and graph.call(var).args[0] in self.of:
            return self.of[graph.call(var).args[0]]
        if known and name in PAIRWISE:
            return self._pair(var)
        if known and name == "concat" and int(graph.call(var).attrs.axis) == 1:
            items = graph.call(var).args[0]
            fields = list(graph.value[items].fields if isinstance(items, relax.Var) else items.fields)
            if all(item in self.of for item in fields):
                return np.concatenate([self.of[item] for item in fields])
        value = graph.value[var]
        if not isinstance(value, relax.Tuple):  # what reads a tuple decides; concat is the only one that is known
            self._need_all(var)
        return None

    def _convolution(self, var: relax.Var) -> NDArray[np.int64] | None:
        call = self.graph.call(var)
        weight = constant(call.args[1])
        if weight is None or int(call.attrs.groups) != 1:
            self._need_all(var)
            return None
        if call.args[0] in self.of:
            read = (weight != 0).any(axis=(0, *range(2, weight.ndim)))
            self.needed.update(int(channel) for channel in self.of[call.args[0]][read])
        return self._fresh(weight.shape[0])

    def _pair(self, var: relax.Var) -> NDArray[np.int64] | None:
        """Channels of a sum or product: the same on both sides, or those of one side beside something broadcast."""
        shape = shape_of(var)
        followed: list[relax.Expr] = []
        others: list[relax.Expr] = []
        for arg in self.graph.call(var).args:
            (followed if arg in self.of and shape_of(arg) == shape else others).append(arg)
        if not followed or not all(self._broadcast(arg, shape) for arg in others):
            self._need_all(var)
            return None
        if len(followed) == 2:
            for left, right in zip(*(self.of[arg] for arg in followed), strict=True):
                self._join(int(left), int(right))
        return self.of[followed[0]]

    def _broadcast(self, arg: relax.Expr, shape: tuple[int, ...]) -> bool:
        """Whether ``arg`` can go on beside fewer channels: a constant, which is cut, or the same for all channels."""
        own = shape_of(arg)
        if constant(arg) is not None:
            return len(own) <= len(shape)
        return len(own) == len(shape) and own[1] == 1

    def _fresh(self, count: int) -> NDArray[np.int64]:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def _root(self, channel: int) -> int:
        while self.parent[channel] != channel:
            self.parent[channel] = self.parent[self.parent[channel]]
            channel = self.parent[channel]
        return channel

    def _join(self, left: int, right: int) -> None:
        self.parent[self._root(right)] = self._root(left)

    def _need(self, expr: relax.Expr) -> None:
        if expr in self.of:
            self.needed.update(int(channel) for channel in self.of[expr])

    def _need_all(self, var: relax.Var) -> None:
        for read in _reads(self.graph, self.graph.value[var]):
            self._need(read)


def _reads(graph: Graph, value: relax.Expr) -> list[relax.Var]:
    """Variables that ``value`` reads, through tuples."""
    found: list[relax.Var] = []
    for arg in [*value.args] if isinstance(value, relax.Call) else [value]:
        if isinstance(arg, relax.Var):
            inner = graph.value.get(arg)
            found += _reads(graph, inner) if isinstance(inner, relax.Tuple) else [arg]
        elif isinstance(arg, relax.Tuple):
            found += [item for item in arg.fields if isinstance(item, relax.Var)]
        elif isinstance(arg, relax.TupleGetItem) and isinstance(arg.tuple_value, relax.Var):
            found.append(arg.tuple_value)
    return found
