"""Compute empty constants instead of storing them: TVM's executable cannot store an array of no bytes."""

from __future__ import annotations

import math

import tvm
from tvm import relax


@tvm.transform.module_pass(opt_level=0, name="ComputeEmpty")
class ComputeEmpty:
    """An empty constant becomes ``zeros`` of its shape."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite the Relax functions that hold one."""
        updated = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
        for gvar, function in mod.functions_items():
            if isinstance(function, relax.Function):
                updated[gvar] = _Rewriter().visit_expr(function)
        return updated


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> relax.Expr:
        shape = [int(extent) for extent in op.ty.shape]
        if math.prod(shape):
            return op
        return self.builder_.emit(relax.op.zeros(shape, str(op.ty.dtype.dtype)))
