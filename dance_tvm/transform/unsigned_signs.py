"""Write what takes numbers of a type without a sign below zero as what wraps around to the same numbers.

TVM legalizes ``-x`` and ``sign(x)`` with the number −1 and folds differences of numbers, which its unsigned types
cannot have. PyTorch wraps around: −1 is the largest number of the type.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import constant, dtype_of, emit, literal, rewrite


@tvm.transform.module_pass(opt_level=0, name="UnsignedSigns")
class UnsignedSigns:
    """Rewrite ``-x``, ``sign(x)`` and ``x - number`` of unsigned integers in ``main``."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        return rewrite(mod, _visit)


def _visit(
    builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
) -> relax.Expr | None:
    name = getattr(value.op, "name", "") if isinstance(value, relax.Call) else ""
    if name not in ("relax.negative", "relax.sign", "relax.subtract") or not dtype_of(var).startswith("uint"):
        return None
    x, one = value.args[0], literal(np.ones((), dtype_of(var)))
    if name == "relax.negative":
        return emit(builder, relax.op.add(builder.emit(relax.op.bitwise_not(x)), one), var.name)
    if name == "relax.sign":
        return emit(builder, relax.op.minimum(x, one), var.name)
    number = constant(value.args[1])
    if number is None:
        return None
    wrapped = (~number.astype(np.uint64) + np.uint64(1)).astype(number.dtype)
    return emit(builder, relax.op.add(x, literal(wrapped)), var.name)
