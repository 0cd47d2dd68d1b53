"""Write tensors filled with infinity or NaN as broadcast constants: TVM's own legalization fails at them."""

from __future__ import annotations

import numpy as np
from tvm import relax

from dance_tvm.ir.graph import constant, dtype_of, literal, operator_pass, shape_of


@operator_pass("full", "full_like")
def infinite_fills(builder: relax.BlockBuilder, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
    """Rewrite such fills."""
    number = constant(call.args[1])
    if number is None or np.isfinite(number):
        return None
    filled = builder.normalize(call)
    return relax.op.broadcast_to(literal(number.astype(dtype_of(filled))), shape_of(filled))
