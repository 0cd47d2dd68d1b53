"""Rewrite comparisons and products of booleans with and, or, not: TVM generates no code for the former on booleans."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax
from tvm.relax.op import logical_and, logical_not, logical_or, logical_xor

from dance_tvm.ir.graph import dtype_of, emit, is_tensor, rewrite

LOGIC: dict[str, Callable[[relax.Expr, relax.Expr], relax.Expr]] = {
    "equal": lambda a, b: logical_not(logical_xor(a, b)),
    "not_equal": logical_xor,
    "less": lambda a, b: logical_and(logical_not(a), b),
    "less_equal": lambda a, b: logical_or(logical_not(a), b),
    "greater": lambda a, b: logical_and(a, logical_not(b)),
    "greater_equal": lambda a, b: logical_or(a, logical_not(b)),
    "multiply": logical_and,
    "minimum": logical_and,
    "maximum": logical_or,
}
#: The largest and the least over an axis, found among bytes.
REDUCTIONS = {"max", "min"}


@tvm.transform.module_pass(opt_level=0, name="BooleanLogic")
class BooleanLogic:
    """Rewrite such operators of ``main`` where their operands are booleans."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        return relax.transform.Normalize()(rewrite(mod, _visit))


def _visit(
    builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
) -> relax.Expr | None:
    if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
        return None
    name = value.op.name.removeprefix("relax.")
    if name not in LOGIC.keys() | REDUCTIONS or not is_tensor(value.args[0]) or dtype_of(value.args[0]) != "bool":
        return None
    if name in LOGIC:
        return emit(builder, LOGIC[name](*value.args), var.name)
    found = builder.emit(relax.Call(value.op, [builder.emit(relax.op.astype(value.args[0], "int8"))], value.attrs))
    return emit(builder, relax.op.astype(found, "bool"), var.name)
