"""Write small whole powers as products: what PyTorch computes for a cube, and quicker than ``pow``.

TVM advises the same, and prints its advice whenever one of its passes meets such a power.
"""

from __future__ import annotations

import tvm
from tvm import relax

from dance_tvm.ir.graph import constant, dtype_of, emit, rewrite
from dance_tvm.liveness.rules import MOST_FACTORS


@tvm.transform.module_pass(opt_level=0, name="WholePowers")
class WholePowers:
    """Rewrite powers of floats in ``main`` whose exponent is a constant of 3 to 8.

    Above, the roundings of a product add up to more than those of ``pow``.
    """

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        return rewrite(mod, _visit)


def _visit(
    builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
) -> relax.Expr | None:
    if not isinstance(value, relax.Call) or value.op != tvm.ir.Op.get("relax.power"):
        return None
    base, exponent = value.args[0], constant(value.args[1])
    if exponent is None or exponent.ndim or exponent not in range(3, MOST_FACTORS + 1) or "float" not in dtype_of(base):
        return None
    return emit(builder, _raised(builder, base, int(exponent)), var.name)


def _raised(builder: relax.BlockBuilder, base: relax.Expr, exponent: int) -> relax.Expr:
    """``base`` to a whole power, by squares."""
    if exponent == 1:
        return base
    half = builder.emit(_raised(builder, base, exponent // 2))
    square = relax.op.multiply(half, half)
    return relax.op.multiply(builder.emit(square), base) if exponent % 2 else square
