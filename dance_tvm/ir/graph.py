"""A Relax function seen as a graph: who defines, who reads; and rewriting it binding by binding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import tvm
from tvm import relax, tirx

Shape = tuple[int, ...]


def is_scheduled(func: tirx.PrimFunc) -> bool:
    """Whether ``func`` has its schedule, so that no pass puts another one on it."""
    return func.attrs is not None and bool(func.attrs.get("tirx.is_scheduled", False))


@dataclass
class Graph:
    """The bindings of one dataflow function, in order, with their readers."""

    params: list[relax.Var]
    order: list[relax.Var]
    value: dict[relax.Var, relax.Expr]
    output: relax.Expr
    readers: dict[relax.Var, list[relax.Var]] = field(default_factory=dict)
    outputs: set[relax.Var] = field(default_factory=set)
    place: dict[relax.Var, int] = field(default_factory=dict)

    @staticmethod
    def of(function: relax.Function) -> Graph:
        """Read ``function``; it must be a straight line of bindings, as dataflow functions are."""
        order: list[relax.Var] = []
        value: dict[relax.Var, relax.Expr] = {}
        for block in function.body.blocks:
            for binding in block.bindings:
                order.append(binding.var)
                value[binding.var] = binding.value
        graph = Graph(list(function.params), order, value, function.body.body)
        for var in [*graph.params, *order]:
            graph.readers[var] = []
        for var in order:
            for read in dict.fromkeys(variables(value[var])):
                graph.readers[read].append(var)
        graph.outputs = _reachable_outputs(graph)
        graph.place = {var: place for place, var in enumerate(order)}
        return graph

    def op(self, expr: relax.Expr) -> str:
        """Name of the operator that defines ``expr``, without ``relax.``; empty if it is no operator call."""
        value = self.value.get(expr) if isinstance(expr, relax.Var) else expr
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            return value.op.name.removeprefix("relax.")
        return ""

    def call(self, var: relax.Var) -> relax.Call:
        """The operator call that defines ``var``."""
        return self.value[var]

    def only_reader(self, var: relax.Var) -> relax.Var | None:
        """The single binding that reads ``var``, unless it is also an output."""
        readers = self.readers[var]
        return readers[0] if len(readers) == 1 and var not in self.outputs else None


def _reachable_outputs(graph: Graph) -> set[relax.Var]:
    """Variables that leave the function, looking through tuples and renames."""
    seen: set[relax.Var] = set()
    stack = variables(graph.output)
    while stack:
        var = stack.pop()
        seen.add(var)
        value = graph.value.get(var)
        if isinstance(value, relax.Tuple | relax.Var):
            stack += variables(value)
    return seen


def variables(expr: relax.Expr) -> list[relax.Var]:
    """Variables that an expression reads directly."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Call):
        return [var for arg in expr.args for var in variables(arg)]
    if isinstance(expr, relax.Tuple):
        return [var for item in expr.fields for var in variables(item)]
    if isinstance(expr, relax.TupleGetItem):
        return variables(expr.tuple_value)
    return []


def substitute(expr: relax.Expr, new: Mapping[relax.Expr, relax.Expr]) -> relax.Expr:
    """``expr`` with its variables (and constants, where ``new`` has any) replaced."""
    if isinstance(expr, relax.Var | tvm.ir.GenericConst):
        return new.get(expr, expr)
    if isinstance(expr, relax.Call):
        return relax.Call(expr.op, [substitute(arg, new) for arg in expr.args], expr.attrs, expr.ty_args)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([substitute(item, new) for item in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(expr.tuple_value, new), expr.index)
    return expr


def shape_of(expr: relax.Expr) -> Shape:
    """Static shape of a tensor expression."""
    return tuple(int(extent) for extent in expr.ty.shape.values)


def dtype_of(expr: relax.Expr) -> str:
    """Element type of a tensor expression."""
    return str(expr.ty.dtype)


def is_tensor(expr: relax.Expr) -> bool:
    """Whether the expression is one tensor of known shape."""
    return isinstance(expr.ty, relax.TensorType) and isinstance(expr.ty.shape, relax.ShapeExpr)


def literal(array: np.ndarray) -> relax.Expr:
    """``array`` as a constant of its own type; Relax by itself narrows 64 bits to 32."""
    return relax.const(array, str(array.dtype))


def constant(expr: relax.Expr) -> np.ndarray | None:
    """The value of a constant, else None."""
    return expr.value.numpy() if isinstance(expr, tvm.ir.GenericConst) else None


def lies_along(values: Shape, shape: Shape, axis: int) -> bool:
    """Whether a tensor of shape ``values``, broadcast beside one of ``shape``, differs along ``axis`` alone and has an
    element for each index there."""
    aligned = (1,) * (len(shape) - len(values)) + values
    others = [extent for at, extent in enumerate(aligned) if at != axis % len(shape)]
    return len(aligned) == len(shape) and aligned[axis] == shape[axis] and all(extent == 1 for extent in others)


def value_of(expr: relax.Expr) -> np.ndarray:
    """The value of what is known to be a constant."""
    value = constant(expr)
    assert value is not None, f"{expr} is no constant"
    return value


Visit = Callable[[relax.BlockBuilder, relax.Var, relax.Expr, "dict[relax.Var, relax.Expr]"], "relax.Expr | None"]


def rewrite(mod: tvm.IRModule, visit: Visit) -> tvm.IRModule:
    """Emit ``main`` again; ``visit(builder, var, value, new)`` returns what replaces a binding, None to keep it.

    ``value`` has its variables already replaced; ``new`` maps old variables to new expressions.
    """
    graph = Graph.of(mod["main"])
    others = {name: function for name, function in mod.functions_items() if name.name_hint != "main"}
    builder = relax.BlockBuilder(tvm.IRModule(others))
    params = [relax.Var(param.name, param.ty) for param in graph.params]
    new: dict[relax.Var, relax.Expr] = dict(zip(graph.params, params, strict=True))
    with builder.function("main", params, attrs=dict(mod["main"].attrs or {})):
        with builder.dataflow():
            for var in graph.order:
                value = substitute(graph.value[var], new)
                replaced = visit(builder, var, value, new)
                new[var] = emit(builder, value, var.name) if replaced is None else replaced
            result = builder.emit_output(substitute(graph.output, new))
        builder.emit_func_output(result)
    return builder.finalize()


Rule = Callable[[relax.BlockBuilder, relax.Var, relax.Call], "relax.Expr | None"]


def operator_pass(*operators: str) -> Callable[[Rule], tvm.transform.Pass]:
    """Make a pass of a rule for calls of ``operators`` in ``main``, named without ``relax.``: ``rule(builder, var,
    call)`` returns what takes the place of the call that defines ``var``, None to keep it."""
    names = {f"relax.{operator}" for operator in operators}

    def pass_of(rule: Rule) -> tvm.transform.Pass:
        def visit(
            builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr | None:
            asked = isinstance(value, relax.Call) and getattr(value.op, "name", "") in names
            found = rule(builder, var, value) if asked else None
            return None if found is None else emit(builder, found, var.name)

        def run(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
            return relax.transform.Normalize()(rewrite(mod, visit))

        return tvm.transform.module_pass(run, opt_level=0, name=rule.__name__)

    return pass_of


T = TypeVar("T")


def replace_each(
    mod: tvm.IRModule,
    found: Mapping[relax.Var, T],
    make: Callable[[relax.BlockBuilder, relax.Var, T, dict[relax.Var, relax.Expr]], relax.Expr],
) -> tvm.IRModule:
    """``mod`` with ``make(builder, var, found[var], new)`` in the place of each binding ``found``, and without what
    is no longer read; ``new`` as in :func:`rewrite`."""
    if not found:
        return mod

    def visit(
        builder: relax.BlockBuilder, var: relax.Var, _value: relax.Expr, new: dict[relax.Var, relax.Expr]
    ) -> relax.Expr | None:
        return make(builder, var, found[var], new) if var in found else None

    return relax.transform.DeadCodeElimination()(rewrite(mod, visit))


def emit(builder: relax.BlockBuilder, value: relax.Expr, name: str = "") -> relax.Expr:
    """Bind ``value`` to a new variable unless it already is one; a layer's dotted ``name`` keeps its dots."""
    if isinstance(value, relax.Var):
        return value
    if "." not in name:
        return builder.emit(value, name_hint=name)
    plain = name.replace(".", "_")
    number = builder.get_unique_name(plain).removeprefix(plain)
    return emit_as(builder, value, f"{name}_{number}" if number else name)


def emit_as(builder: relax.BlockBuilder, value: relax.Expr, name: str) -> relax.Var:
    """Bind ``value`` to a new variable of this very name, be there another: one that is about to go, say."""
    value = builder.normalize(value)
    make = relax.DataflowVar if builder.current_block_is_dataflow() else relax.Var
    var = make(name, value.ty)
    builder.emit_normalized(relax.VarBinding(var, value))
    return var
