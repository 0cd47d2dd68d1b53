"""A value or a bound, whichever is larger or smaller, NaN where the value is: one instruction of Arm processors, which
x86's of that kind is not, for it makes the bound of NaN.

Kernels say ``dance.larger`` and ``dance.smaller``. TVM keeps them whole until it lowers a function for its processor.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.ir import _ffi_api

from .vector_code import PURE

#: LLVM's functions, by ours.
NAMES = {"larger": "maximum", "smaller": "minimum"}


def larger(x: tirx.Expr, bound: tirx.Expr) -> tirx.Expr:
    """``x`` where it is not below ``bound``, else that."""
    return tvm.ir.Call(tvm.ir.Op.get("dance.larger"), [x, bound], ret_ty=x.ty)


def smaller(x: tirx.Expr, bound: tirx.Expr) -> tirx.Expr:
    """``x`` where it is not above ``bound``, else that."""
    return tvm.ir.Call(tvm.ir.Op.get("dance.smaller"), [x, bound], ret_ty=x.ty)


def _compared(call: tvm.ir.Call) -> tirx.Expr:
    """Any processor's: a comparison with NaN is false."""
    x, bound = call.args
    beyond = x < bound if call.op.name == "dance.larger" else x > bound
    return tirx.Select(beyond, bound, x)


def _instruction(call: tvm.ir.Call) -> tirx.Expr:
    """Arm's FMAX and FMIN."""
    name = NAMES[str(call.op.name).removeprefix("dance.")]
    return tirx.call_llvm_pure_intrin(call.ty.dtype, f"llvm.{name}", *call.args)


def _register() -> None:
    for name in NAMES:
        _ffi_api.RegisterOp(f"dance.{name}", f"the {name} of a value and a bound, NaN where the value is")
        tvm.ir.register_op_attr(f"dance.{name}", "TCallEffectKind", PURE)
        tvm.ir.register_op_attr(f"dance.{name}", "TVectorizable", True)
        tvm.ir.register_op_attr(f"dance.{name}", "TScriptPrinterName", f"dance.{name}")
        tirx.op.register_intrin_lowering(f"dance.{name}", target="default", f=_compared, level=99)
        tirx.op.register_intrin_lowering(f"dance.{name}", target="llvm.aarch64", f=_instruction, level=99)


_register()
