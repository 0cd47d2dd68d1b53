"""Give functions that were fused of many operators names that a file may have.

A fused function is called after all its operators. Compilers of GPU code keep a kernel's binary in a file or a folder
of the kernel's name, and PoCL aborts the process where that is too long for one.
"""

from __future__ import annotations

import hashlib

import tvm
from tvm import relax, tirx

#: A file's name has at most 255 bytes, of which compilers take some for endings of their own.
LONGEST = 100


@tvm.transform.module_pass(opt_level=0, name="ShortNames")
class ShortNames:
    """Rename kernels with long names: the beginning, and a hash of all of it."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rename in ``mod``."""
        renamed: dict[tvm.ir.GlobalVar, tvm.ir.GlobalVar] = {}
        for name, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and len(name.name_hint) > LONGEST:
                renamed[name] = tvm.ir.GlobalVar(short_name(name.name_hint))
                relax.expr._update_type(renamed[name], name.ty)
        if not renamed:
            return mod
        caller = _Caller(renamed)
        functions = {}
        for name, func in mod.functions_items():
            if isinstance(func, relax.Function):
                functions[name] = caller.visit_expr(func)
            elif name in renamed and "global_symbol" in (func.attrs or {}):
                functions[renamed[name]] = func.with_attr("global_symbol", renamed[name].name_hint)
            else:
                functions[renamed.get(name, name)] = func
        return tvm.IRModule(functions, mod.attrs)


@relax.expr_functor.mutator
class _Caller(relax.PyExprMutator):
    """Calls functions by their new names."""

    def __init__(self, renamed: dict[tvm.ir.GlobalVar, tvm.ir.GlobalVar]) -> None:
        super().__init__()
        self.renamed = renamed

    def visit_global_var_(self, op: tvm.ir.GlobalVar) -> tvm.ir.GlobalVar:
        return self.renamed.get(op, op)


def short_name(name: str) -> str:
    """``name`` cut to ``LONGEST`` characters, the last of them a hash of all of it."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: LONGEST - len(digest) - 1]}_{digest}"
