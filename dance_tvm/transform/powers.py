"""Small whole powers as products: what PyTorch computes for a cube, and quicker than ``pow``.

TVM advises the same, and prints its advice whenever a pass meets such a power.
"""

from __future__ import annotations

from functools import cache

import tvm
from tvm import relax, te

from dance_tvm.ir.graph import constant, dtype_of
from dance_tvm.schedules.emit import Expr

#: Above, the roundings of a product add up to more than those of ``pow``.
_MOST = 8
_OVER_TVMS = 11  # the level of TVM's own is 10, and the highest counts
_own = tvm.ir.Op.get("relax.power").get_attr("FLegalize")


def _legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    base, exponent = call.args[0], constant(call.args[1])
    if exponent is None or exponent.ndim or constant(base) is not None or not dtype_of(base).startswith("float"):
        return _own(builder, call)
    whole = int(exponent) if exponent in range(3, _MOST + 1) else 0
    if not whole:
        return _own(builder, call)

    def power(x: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *index: _raised(x(*index), whole), name="T_power")

    return builder.call_te(power, base, primfunc_name_hint="power")


def _raised(value: Expr, exponent: int) -> Expr:
    """``value`` to a whole power, by squares."""
    if exponent == 1:
        return value
    half = _raised(value, exponent // 2)
    return half * half * value if exponent % 2 else half * half


@cache
def legalize_powers() -> None:
    """Legalize ``relax.power`` so in this process, in TVM's own passes too."""
    tvm.ir.register_op_attr("relax.power", "FLegalize", _legalize, level=_OVER_TVMS)
