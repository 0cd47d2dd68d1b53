"""Replace sums of weighted rows, which is what a read at points of a grid is written as, by a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, dtype_of, emit, is_tensor, replace_each, shape_of, substitute
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.cpu.weighted_rows import WeightedRows
from dance_tvm.schedules.emit import FLOAT, INT

from .calls import call_kernel

#: Inputs of one output: as many as a point in a clip has corners.
MOST_TAPS = 8
#: Fewer outputs are left to the functions of joined small operators.
FEWEST_ELEMENTS = 4096


@tvm.transform.module_pass(opt_level=0, name="LowerPoints")
class LowerPoints:
    """Sums of ``take(x, places, 0) · weights`` with weights that are one for all channels become one call of a kernel.

    TVM joins all that places and weights are made of with the sum, and computes them anew for each vector of channels.
    """

    def __init__(self, machine: Machine, threads: int) -> None:
        self.machine, self.threads = machine, threads

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        found = {var: terms for var in graph.order if (terms := _terms(graph, var)) is not None}
        inner = {part for terms in found.values() for part in terms.sums}
        return replace_each(mod, {var: terms for var, terms in found.items() if var not in inner}, self._call)

    def _call(
        self, builder: relax.BlockBuilder, var: relax.Var, terms: _Terms, new: dict[relax.Var, relax.Expr]
    ) -> relax.Expr:
        """The call of the kernel; factors of a weight are multiplied before it."""
        *extents, channels = shape_of(var)
        rows, points = shape_of(terms.source)[0], math.prod(extents)
        args = {"x": substitute(terms.source, new)}
        for tap, (places, factors) in enumerate(terms.taps):
            weight: relax.Expr = substitute(factors[0], new)
            for factor in factors[1:]:
                weight = emit(builder, relax.op.multiply(weight, substitute(factor, new)))
            args[f"weights_{tap}"] = emit(builder, relax.op.reshape(weight, [points]))
            place = emit(builder, relax.op.astype(substitute(places, new), INT))
            args[f"places_{tap}"] = emit(builder, relax.op.reshape(place, [points]))
        kernel = WeightedRows(rows, points, channels, len(terms.taps), self.machine.vector_floats)
        return emit(builder, relax.op.reshape(call_kernel(builder, kernel, args, self.threads), shape_of(var)))


@dataclass(frozen=True)
class _Terms:
    """Rows of ``source``: of each tap its places, and factors of its weight. ``sums`` are parts of the sum."""

    source: relax.Expr
    taps: list[tuple[relax.Expr, list[relax.Expr]]]
    sums: list[relax.Var]


def _terms(graph: Graph, var: relax.Var) -> _Terms | None:
    """``var`` as a sum of weighted rows that nothing else reads in parts."""
    if graph.op(var) != "add" or not is_tensor(var) or dtype_of(var) != FLOAT:
        return None
    if math.prod(shape_of(var)) < FEWEST_ELEMENTS:
        return None
    taps, sums, sources = list[tuple[relax.Expr, list[relax.Expr]]](), list[relax.Var](), list[relax.Expr]()
    waiting = [var]
    while waiting:
        each = waiting.pop()
        if each is not var and (len(graph.readers[each]) != 1 or each in graph.outputs):
            return None
        if graph.op(each) == "add":
            both = graph.call(each).args
            if not all(isinstance(arg, relax.Var) and shape_of(arg) == shape_of(var) for arg in both):
                return None
            sums += [each] * (each is not var)
            waiting += [both[1], both[0]]
        elif (term := _term(graph, each)) is not None and len(taps) < MOST_TAPS:
            sources.append(term[0])
            taps.append(term[1:])
        else:
            return None
    return _Terms(sources[0], taps, sums) if all(other.same_as(sources[0]) for other in sources) else None


def _term(graph: Graph, var: relax.Var) -> tuple[relax.Expr, relax.Expr, list[relax.Expr]] | None:
    """The source, places and factors of ``take(source, places, 0) · factor · …``."""
    shape, factors = shape_of(var), list[relax.Expr]()
    while graph.op(var) == "multiply":
        left, right = graph.call(var).args
        if not isinstance(left, relax.Var) or shape_of(left) != shape or shape_of(right) != (*shape[:-1], 1):
            return None
        factors.append(right)
        var = left
    if graph.op(var) != "take" or not factors:
        return None
    source, places = graph.call(var).args
    axis, mode = graph.call(var).attrs.axis, str(graph.call(var).attrs.mode)
    if len(shape_of(source)) != 2 or axis is None or int(axis) != 0 or shape_of(places) != shape[:-1]:
        return None
    if mode != "wrap":  # as sources mean places, and the kernel
        return None
    return source, places, factors[::-1]
