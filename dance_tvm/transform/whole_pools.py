"""Turn average pools over whole clips into means, and adaptive pools whose windows are all alike into ordinary ones."""

from __future__ import annotations

import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, emit, rewrite, shape_of
from dance_tvm.ir.reasons import Reasons

AVERAGES = {f"nn.avg_pool{rank}d" for rank in (1, 2, 3)}
ADAPTIVE = {f"nn.adaptive_avg_pool{rank}d" for rank in (1, 2, 3)}


@tvm.transform.module_pass(opt_level=0, name="WholePools")
class WholePools:
    """Turn average pools, channels first, into the operators that have the better kernels."""

    def __init__(self, reasons: Reasons) -> None:
        self.reasons = reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])

        def visit(
            builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr | None:
            name = graph.op(var)
            if name not in AVERAGES | ADAPTIVE:
                return None
            size, out = shape_of(value.args[0])[2:], shape_of(var)[2:]
            if name in AVERAGES:
                whole = tuple(map(int, value.attrs.pool_size)) == size and not any(map(int, value.attrs.padding))
            else:
                whole = all(extent == 1 for extent in out)
            if whole:
                return emit(builder, relax.op.mean(value.args[0], list(range(2, 2 + len(size))), True), var.name)
            if name in ADAPTIVE and all(extent % parts == 0 for extent, parts in zip(size, out, strict=True)):
                pool = getattr(relax.op.nn, name.removeprefix("nn.adaptive_"))
                window = [extent // parts for extent, parts in zip(size, out, strict=True)]
                return emit(builder, pool(value.args[0], window, window), var.name)
            if name in ADAPTIVE:
                self.reasons.add(var, f"an adaptive pool: {size} does not divide into {out} windows of one size")
            return None

        return rewrite(mod, visit)
