"""Batch norms and activations behind a concatenation of convolutions go to its parts, where they are folded and fused.

A cell of branches ends in ``activation(norm(concat(a, b, …)))``: two more passes over all that the branches have made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, emit, literal, replace_each, shape_of, substitute, value_of
from dance_tvm.ir.reasons import Reasons
from dance_tvm.ir.windows import CONVOLUTIONS
from dance_tvm.liveness.rules import UNARY


@tvm.transform.module_pass(opt_level=0, name="NormsBeforeConcat")
class NormsBeforeConcat:
    """Rewrite ``main``. Channels first; before :class:`~.fold_batch_norm.FoldBatchNorm`."""

    def __init__(self, reasons: Reasons) -> None:
        self.reasons = reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        found = [chain for var in graph.order if (chain := _chain_behind(graph, var, self.reasons)) is not None]
        chains = {chain.steps[-1]: chain for chain in found}

        def make(
            builder: relax.BlockBuilder, var: relax.Var, chain: _Chain, new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr:
            parts, first = [], 0
            for part in chain.parts:
                channels = shape_of(part)[1]
                value = substitute(part, new)
                for step in chain.steps:
                    value = builder.emit(_on_part(graph, step, value, slice(first, first + channels)))
                parts.append(value)
                first += channels
            return emit(builder, relax.op.concat(parts, 1), var.name)

        return replace_each(mod, chains, make)


@dataclass(frozen=True)
class _Chain:
    """What is concatenated, and the results of what happens to all of it one after the other."""

    parts: Sequence[relax.Var]
    steps: list[relax.Var]


def _chain_behind(graph: Graph, var: relax.Var, reasons: Reasons) -> _Chain | None:
    """What stands behind ``var``, a concatenation of convolutions along the channels; None where nothing does."""
    if graph.op(var) != "concat" or not isinstance(graph.call(var).args[0], relax.Tuple):
        return None
    parts = list(graph.call(var).args[0].fields)
    steps: list[relax.Var] = []
    while (step := _step_behind(graph, steps[-1] if steps else var)) is not None:
        steps.append(step)
    if steps and (why := _refusal(graph, var, parts)):
        reasons.add(steps[0], f"behind a concatenation, where it stays: {why}")
        return None
    return _Chain(parts, steps) if steps else None


def _refusal(graph: Graph, var: relax.Var, parts: Sequence[relax.Expr]) -> str:
    """Why what stands behind ``var`` cannot go to its ``parts``; empty where it can."""
    if int(graph.call(var).attrs.axis) % len(shape_of(var)) != 1:
        return "it joins other axes than the channels"
    if len(set(parts)) < len(parts):
        return "it takes a part twice"
    other = [part for part in parts if not _is_convolution(graph, part)]
    name = other[0].name if other and isinstance(other[0], relax.Var) else "a constant"
    return f"{name} is not a convolution's result that it alone reads" if other else ""


def _is_convolution(graph: Graph, part: relax.Expr) -> bool:
    """Whether ``part`` is read once and made by a convolution, with or without a bias."""
    if not isinstance(part, relax.Var) or graph.only_reader(part) is None:
        return False
    if graph.op(part) == "add" and constant(graph.call(part).args[1]) is not None:
        part = graph.call(part).args[0]
        return graph.op(part) in CONVOLUTIONS and graph.only_reader(part) is not None
    return graph.op(part) in CONVOLUTIONS


def _step_behind(graph: Graph, var: relax.Var) -> relax.Var | None:
    """What alone reads ``var`` and treats each element, or each channel, by itself."""
    reader = graph.only_reader(var)
    if reader is None:
        return None
    if graph.op(reader) == "nn.batch_norm":
        call, chosen = graph.call(reader), graph.only_reader(reader)
        known = call.args[0].same_as(var) and all(constant(arg) is not None for arg in call.args[1:])
        taken = chosen is not None and isinstance(graph.value[chosen], relax.TupleGetItem)
        along = int(call.attrs.axis) % len(shape_of(var)) == 1
        return chosen if known and taken and along and graph.value[chosen].index == 0 else None
    return reader if graph.op(reader) in UNARY and shape_of(reader) == shape_of(var) else None


def _on_part(graph: Graph, step: relax.Var, part: relax.Expr, channels: slice) -> relax.Expr:
    """What ``step`` makes of one part, of those ``channels`` of the whole."""
    value = graph.value[step]
    norm = graph.call(value.tuple_value) if isinstance(value, relax.TupleGetItem) else None
    if norm is None:
        return relax.Call(value.op, [part, *value.args[1:]], value.attrs, value.ty_args)
    parameters = [literal(value_of(arg)[channels]) for arg in norm.args[1:]]
    return relax.TupleGetItem(relax.Call(norm.op, [part, *parameters], norm.attrs), 0)
