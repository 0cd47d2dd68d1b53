"""Rewrite comparisons and products of booleans with and, or, not: TVM generates no code for the former on booleans."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax
from tvm.relax.op import logical_and, logical_not, logical_or, logical_xor

from dance_tvm.ir.graph import dtype_of, is_tensor, operator_pass

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


@operator_pass(*LOGIC, *REDUCTIONS)
def boolean_logic(builder: relax.BlockBuilder, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
    """Rewrite such operators where their operands are booleans."""
    name = call.op.name.removeprefix("relax.")
    if not is_tensor(call.args[0]) or dtype_of(call.args[0]) != "bool":
        return None
    if name in LOGIC:
        return LOGIC[name](*call.args)
    found = builder.emit(relax.Call(call.op, [builder.emit(relax.op.astype(call.args[0], "int8"))], call.attrs))
    return relax.op.astype(found, "bool")
