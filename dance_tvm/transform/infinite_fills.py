"""Write tensors filled with infinity or NaN as broadcast constants: TVM's own legalization fails at them."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import constant, dtype_of, emit, literal, rewrite, shape_of

_FILLS = ("relax.full", "relax.full_like")


@tvm.transform.module_pass(opt_level=0, name="InfiniteFills")
class InfiniteFills:
    """Rewrite such fills of ``main``."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        return rewrite(mod, _visit)


def _visit(
    builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
) -> relax.Expr | None:
    if not isinstance(value, relax.Call) or getattr(value.op, "name", "") not in _FILLS:
        return None
    number = constant(value.args[1])
    if number is None or np.isfinite(number):
        return None
    filled = builder.normalize(value)
    return emit(builder, relax.op.broadcast_to(literal(number.astype(dtype_of(filled))), shape_of(filled)), var.name)
