"""Write small whole powers as products: what PyTorch computes for a cube, and quicker than ``pow``.

TVM advises the same, and prints its advice whenever one of its passes meets such a power.
"""

from __future__ import annotations

from tvm import relax

from dance_tvm.ir.graph import constant, dtype_of, operator_pass
from dance_tvm.liveness.rules import MOST_FACTORS


@operator_pass("power")
def whole_powers(builder: relax.BlockBuilder, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
    """Rewrite powers of floats whose exponent is a constant of 3 to 8.

    Above, the roundings of a product add up to more than those of ``pow``.
    """
    base, exponent = call.args[0], constant(call.args[1])
    if exponent is None or exponent.ndim or exponent not in range(3, MOST_FACTORS + 1) or "float" not in dtype_of(base):
        return None
    return _raised(builder, base, int(exponent))


def _raised(builder: relax.BlockBuilder, base: relax.Expr, exponent: int) -> relax.Expr:
    """``base`` to a whole power, by squares."""
    if exponent == 1:
        return base
    half = builder.emit(_raised(builder, base, exponent // 2))
    square = relax.op.multiply(half, half)
    return relax.op.multiply(builder.emit(square), base) if exponent % 2 else square
