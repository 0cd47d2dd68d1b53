"""Division of whole numbers that no number ends: by zero it gives 0, and the least number by -1 itself.

A processor's instruction raises a signal there, which ends the process that called the network.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax, te, tirx

from dance_tvm.ir.graph import constant, dtype_of
from dance_tvm.schedules.emit import Expr
from dance_tvm.transform.keep_nan import Legalize, broadcast

Divide = Callable[[Expr, Expr], Expr]


def _guarded(divide: Divide, name: str, *, rest: bool) -> Legalize:
    """``divide`` where its divisor may be any number; ``rest``: it gives the remainder."""
    own: Legalize = tvm.ir.Op.get(name).get_attr("FLegalize")

    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        dtype, divisors = dtype_of(call), constant(call.args[1])
        if "int" not in dtype or (divisors is not None and (divisors > 0).all()):
            return own(builder, call)
        zero, one = tirx.const(0, dtype), tirx.const(1, dtype)
        shape = [int(extent) for extent in call.ty.shape.values]

        def divided(left: te.Tensor, right: te.Tensor) -> te.Tensor:
            def at(*index: Expr) -> Expr:
                a, b = broadcast(left, index), broadcast(right, index)
                turned = b == tirx.const(-1, dtype) if dtype.startswith("int") else tirx.const(False, "bool")
                found = divide(a, tirx.Select(tirx.any(b == zero, turned), one, b))
                found = found if rest else tirx.Select(turned, zero - a, found)
                return tirx.Select(b == zero, zero, found)

            return te.compute(shape, at, name="divided")

        return builder.call_te(divided, *call.args, primfunc_name_hint=name.rpartition(".")[2])

    return legalize


def _floor(divide: Divide) -> Divide:
    """The quotient rounded down, or its rest, of the truncated ``divide``. TVM's own names the rest in the generated
    code, where its analysis of ranges fails on vectors that were booleans."""

    def floored(a: Expr, b: Expr) -> Expr:
        zero, one = (tirx.const(value, str(b.ty.dtype)) for value in (0, 1))
        found, rest = divide(a, b), tirx.truncmod(a, b)
        apart = tirx.any(tirx.all(rest < zero, b > zero), tirx.all(rest > zero, b < zero))
        return tirx.Select(apart, found + b if divide is tirx.truncmod else found - one, found)

    return floored


#: How divisions of whole numbers are legalized, by Relax's name; of others as TVM does.
WHOLE_DIVISION: dict[str, Legalize] = {
    "relax.divide": _guarded(tirx.truncdiv, "relax.divide", rest=False),
    "relax.floor_divide": _guarded(_floor(tirx.truncdiv), "relax.floor_divide", rest=False),
    "relax.floor_mod": _guarded(_floor(tirx.truncmod), "relax.floor_mod", rest=True),
    "relax.mod": _guarded(tirx.truncmod, "relax.mod", rest=True),
}
