"""Transposed convolutions for which there is no kernel become ordinary ones over their input spread out by zeros."""

from __future__ import annotations

import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, emit, rewrite
from dance_tvm.ir.transposed import TRANSPOSED, over_zeros, takes_kernel


@tvm.transform.module_pass(opt_level=0, name="SpreadTransposed")
class SpreadTransposed:
    """``conv_transpose(x, W)`` becomes ``conv(spread(x), W turned)``: for GPUs and half precision. Channels first."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        found = {var for var in graph.order if graph.op(var) in TRANSPOSED and takes_kernel(graph.call(var))}

        def visit(
            builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr | None:
            return emit(builder, over_zeros(builder, value), var.name) if var in found else None

        return rewrite(mod, visit) if found else mod
