"""Operators of our own in TIR, named ``dance.…``, which TVM keeps whole until it lowers a function for its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tvm
from tvm import tirx
from tvm.ir import _ffi_api

PREFIX = "dance."
#: tirx's CallEffectKind of what only gives a value, and of what may do anything.
_PURE, _OPAQUE = 1, 4
#: Above the rules of TVM, whose level is 10.
_LEVEL = 99


def define(
    name: str, description: str, lowerings: Mapping[str, Callable[[tvm.ir.Call], tirx.Expr]], pure: bool = True
) -> None:
    """Define the operator ``dance.NAME``.

    ``lowerings`` has a rule for each kind of target ("llvm.aarch64" comes before "llvm", and "default" is any), which
    TVM asks after loops have become vectors. ``pure``: the operator only gives a value, lane by lane.
    """
    _ffi_api.RegisterOp(PREFIX + name, description)
    tvm.ir.register_op_attr(PREFIX + name, "TScriptPrinterName", PREFIX + name)
    tvm.ir.register_op_attr(PREFIX + name, "TCallEffectKind", _PURE if pure else _OPAQUE)
    if pure:
        tvm.ir.register_op_attr(PREFIX + name, "TVectorizable", True)
    for target, lower in lowerings.items():
        tirx.op.register_intrin_lowering(PREFIX + name, target=target, f=lower, level=_LEVEL)


def call(name: str, args: list[tirx.Expr], result: tvm.ir.Type | str) -> tvm.ir.Call:
    """A call of ``dance.NAME``."""
    return tvm.ir.Call(tvm.ir.Op.get(PREFIX + name), args, ret_ty=result)


def name_of(operator: object) -> str:
    """The name of one of these operators without ``dance.``; "" for any other."""
    name = str(getattr(operator, "name", ""))
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
