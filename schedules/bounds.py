"""A value or a bound, whichever is larger or smaller, NaN where the value is: one instruction of Arm processors, which
x86's of that kind is not, for it makes the bound of NaN.

Kernels say ``dance.larger`` and ``dance.smaller``. TVM keeps them whole until it lowers a function for its processor.
"""

from __future__ import annotations

import tvm
from tvm import tirx

from . import operators

#: LLVM's functions, by ours.
NAMES = {"larger": "maximum", "smaller": "minimum"}


def larger(x: tirx.Expr, bound: tirx.Expr) -> tirx.Expr:
    """``x`` where it is not below ``bound``, else that."""
    return operators.call("larger", [x, bound], x.ty)


def smaller(x: tirx.Expr, bound: tirx.Expr) -> tirx.Expr:
    """``x`` where it is not above ``bound``, else that."""
    return operators.call("smaller", [x, bound], x.ty)


def _compared(call: tvm.ir.Call) -> tirx.Expr:
    """Any processor's: a comparison with NaN is false."""
    x, bound = call.args
    beyond = x < bound if operators.name_of(call.op) == "larger" else x > bound
    return tirx.Select(beyond, bound, x)


def _instruction(call: tvm.ir.Call) -> tirx.Expr:
    """Arm's FMAX and FMIN."""
    name = NAMES[operators.name_of(call.op)]
    return tirx.call_llvm_pure_intrin(call.ty.dtype, f"llvm.{name}", *call.args)


for _name in NAMES:
    operators.define(
        _name,
        f"the {_name} of a value and a bound, NaN where the value is",
        {"default": _compared, "llvm.aarch64": _instruction},
    )
