"""Write what takes numbers of a type without a sign below zero as what wraps around to the same numbers.

TVM legalizes ``-x`` and ``sign(x)`` with the number −1 and folds differences of numbers, which its unsigned types
cannot have. PyTorch wraps around: −1 is the largest number of the type.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from dance_tvm.ir.graph import constant, dtype_of, literal, operator_pass


@operator_pass("negative", "sign", "subtract")
def unsigned_signs(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
    """Rewrite ``-x``, ``sign(x)`` and ``x - number`` of unsigned integers."""
    if not dtype_of(var).startswith("uint"):
        return None
    x, one = call.args[0], literal(np.ones((), dtype_of(var)))
    if call.op.name == "relax.negative":
        return relax.op.add(builder.emit(relax.op.bitwise_not(x)), one)
    if call.op.name == "relax.sign":
        return relax.op.minimum(x, one)
    number = constant(call.args[1])
    if number is None:
        return None
    wrapped = (~number.astype(np.uint64) + np.uint64(1)).astype(number.dtype)
    return relax.op.add(x, literal(wrapped))
