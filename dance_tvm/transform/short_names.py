"""Cut names of fused functions to a length that files can have: GPU drivers keep compiled kernels under them."""

from __future__ import annotations

import hashlib

import tvm
from tvm import relax

#: Longest name of a function. What is put before and behind it, such as ``_kernel_1.bin``, has to fit in the 255 bytes
#: of a file's name with it.
LONGEST_NAME = 120
DIGEST = 8


@tvm.transform.module_pass(opt_level=0, name="ShortNames")
class ShortNames:
    """A name longer than :data:`LONGEST_NAME` keeps its beginning, and a digest of all of it tells it from others."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rename functions and the calls of them."""
        functions = dict(mod.functions_items())
        new = {gvar: _renamed(gvar) for gvar in functions if len(gvar.name_hint) > LONGEST_NAME}
        if not new:
            return mod
        renamed = {}
        for gvar, func in functions.items():
            if isinstance(func, relax.Function):
                func = _calling(func, new)
            elif gvar in new and func.attrs is not None and "global_symbol" in func.attrs:
                func = func.with_attr("global_symbol", new[gvar].name_hint)
            renamed[new.get(gvar, gvar)] = func
        return tvm.IRModule(renamed, attrs=mod.attrs)


def _renamed(gvar: tvm.ir.GlobalVar) -> tvm.ir.GlobalVar:
    name = gvar.name_hint
    digest = hashlib.sha256(name.encode()).hexdigest()[:DIGEST]
    short = tvm.ir.GlobalVar(f"{name[: LONGEST_NAME - DIGEST - 1]}_{digest}")
    relax.expr._update_type(short, gvar.ty)
    return short


def _calling(func: relax.Function, new: dict[tvm.ir.GlobalVar, tvm.ir.GlobalVar]) -> relax.Function:
    """``func`` with the functions that it calls under their new names."""
    blocks = []
    for block in func.body.blocks:
        bindings = []
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call):
                args = [new.get(arg, arg) if isinstance(arg, tvm.ir.GlobalVar) else arg for arg in value.args]
                value = relax.Call(value.op, args, value.attrs, value.ty_args)
                relax.expr._update_type(value, binding.value.ty)
            bindings.append(relax.VarBinding(binding.var, value))
        blocks.append(type(block)(bindings))
    body = relax.SeqExpr(blocks, func.body.body)
    relax.expr._update_type(body, func.body.ty)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)
