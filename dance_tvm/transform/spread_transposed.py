"""Transposed convolutions for which there is no kernel become ordinary ones over their input spread out by zeros."""

from __future__ import annotations

import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, emit, rewrite
from dance_tvm.ir.reasons import Reasons
from dance_tvm.ir.transposed import TRANSPOSED, over_zeros, why_no_kernel


@tvm.transform.module_pass(opt_level=0, name="SpreadTransposed")
class SpreadTransposed:
    """``conv_transpose(x, W)`` becomes ``conv(spread(x), W turned)``: for GPUs and half precision. Channels first."""

    def __init__(self, reasons: Reasons) -> None:
        self.reasons = reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        found = set()
        for var in graph.order:
            if graph.op(var) not in TRANSPOSED:
                continue
            if why := why_no_kernel(graph.call(var)):
                self.reasons.add(var, f"TVM's own transposed convolution: {why}")
            else:
                found.add(var)

        def visit(
            builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr | None:
            return emit(builder, over_zeros(builder, value), var.name) if var in found else None

        return rewrite(mod, visit) if found else mod
