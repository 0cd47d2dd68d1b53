"""Keep values in half precision between kernels that store them so, and widen them only where they are read.

Each reader of a widened value gets a conversion of its own, so that it is fused into the reader and the float32 tensor
is never stored; what moves values about moves them as they are stored; and where one reader rounds a value to half
precision, the others read the rounded one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, dtype_of, emit, is_tensor, rewrite, substitute, variables
from dance_tvm.schedules.emit import FLOAT, HALF

#: Operators that change no value.
MOVES = {"reshape", "permute_dims", "squeeze", "expand_dims", "strided_slice", "concat", "flatten"}


@tvm.transform.module_pass(opt_level=0, name="StoreHalves")
class StoreHalves:
    """Rewrite ``main`` where it converts between float32 and half precision."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        if not any(narrows(graph, var) or widens(graph, var) for var in graph.order):
            return mod
        return relax.transform.DeadCodeElimination()(rewrite(mod, _Halves(graph).visit))


def narrows(graph: Graph, var: relax.Var) -> bool:
    """Whether ``var`` is a float32 value rounded to half precision."""
    return _converts(graph, var, FLOAT, HALF)


def widens(graph: Graph, var: relax.Var) -> bool:
    """Whether ``var`` is a value in half precision as float32."""
    return _converts(graph, var, HALF, FLOAT)


def _converts(graph: Graph, var: relax.Var, before: str, behind: str) -> bool:
    if graph.op(var) != "astype" or not is_tensor(var) or dtype_of(var) != behind:
        return False
    source = graph.call(var).args[0]
    return isinstance(source, relax.Var) and dtype_of(source) == before


@dataclass
class _Halves:
    graph: Graph
    #: What holds each float32 value of the old graph in half precision.
    stored: dict[relax.Var, relax.Expr] = field(default_factory=dict)
    #: What reshaped values are views of: two views in a row would be joined into a copy.
    viewed: dict[relax.Expr, relax.Expr] = field(default_factory=dict)

    def visit(
        self, builder: relax.BlockBuilder, var: relax.Var, _value: relax.Expr, new: dict[relax.Var, relax.Expr]
    ) -> relax.Expr | None:
        graph, value = self.graph, self.graph.value[var]
        if narrows(graph, var):
            return self.stored.get(graph.call(var).args[0])
        if widens(graph, var):
            self.stored[var] = new[graph.call(var).args[0]]
            return None
        read = variables(value)
        if graph.op(var) in MOVES and (parts := self._parts(value)) is not None:
            self.stored[var] = self._moved(builder, var, value, parts)
            return emit(builder, relax.op.astype(self.stored[var], FLOAT), var.name)
        own = {each: builder.emit(relax.op.astype(self.stored[each], FLOAT)) for each in read if each in self.stored}
        result = emit(builder, substitute(value, {**new, **own}), var.name)
        if any(narrows(graph, reader) for reader in graph.readers[var]):
            self.stored[var] = builder.emit(relax.op.astype(result, HALF))
        return result

    def _parts(self, move: relax.Call) -> dict[relax.Expr, relax.Expr] | None:
        """What holds each operand of a move in half precision; None where something is not held so. Constants that it
        holds exactly are, as the zeros before a shift."""
        operands = move.args[0].fields if isinstance(move.args[0], relax.Tuple) else move.args[:1]
        found: dict[relax.Expr, relax.Expr] = {}
        for operand in operands:
            array = constant(operand)
            if array is not None and array.dtype == FLOAT and np.array_equal(array, array.astype(HALF)):
                found[operand] = relax.const(array.astype(HALF))
            elif operand in self.stored:
                found[operand] = self.stored[operand]
            else:
                return None
        return found if self.stored.keys() & found.keys() else None

    def _moved(
        self, builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, parts: dict[relax.Expr, relax.Expr]
    ) -> relax.Expr:
        """The move ``value`` done to what is stored."""
        source = substitute(value, parts)
        if self.graph.op(var) != "reshape":
            return emit(builder, source, var.name)
        of = self.viewed.get(source.args[0], source.args[0])
        view = emit(builder, relax.Call(source.op, [of, *source.args[1:]], source.attrs), var.name)
        self.viewed[view] = of
        return view
