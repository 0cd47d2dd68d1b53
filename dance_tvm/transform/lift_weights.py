"""Take large constants out of the code: they become parameters that the artifact keeps in a file of their own."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import substitute

#: Networks whose constants take more bytes than this keep them beside the code, where they can be mapped and shared.
INLINE_BYTES = 16 << 20
#: Constants smaller than this always stay inline.
SMALL_BYTES = 4096


@tvm.transform.module_pass(opt_level=0, name="LiftWeights")
class LiftWeights:
    """Add a parameter for each large constant of ``main`` after its inputs; ``weights`` receives the values.

    Other functions take the same parameters, so that one call signature serves all.
    """

    def __init__(self) -> None:
        self.weights: dict[str, np.ndarray] = {}

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every Relax function, if there is enough to lift."""
        large = _large_constants(mod["main"])
        if sum(value.nbytes for _, value in large) <= INLINE_BYTES:
            return mod
        names = [f"weight_{index:03d}" for index in range(len(large))]
        self.weights = {name: value for name, (_, value) in zip(names, large, strict=True)}
        updated = tvm.IRModule(dict(mod.functions_items()))
        for gvar, function in mod.functions_items():
            if isinstance(function, relax.Function):
                updated[gvar] = _lift(function, large, names)
        return updated


def _constants(expr: relax.Expr) -> list[tvm.ir.GenericConst]:
    if isinstance(expr, tvm.ir.GenericConst):
        return [expr]
    if isinstance(expr, relax.Call):
        return [constant for arg in expr.args for constant in _constants(arg)]
    if isinstance(expr, relax.Tuple):
        return [constant for item in expr.fields for constant in _constants(item)]
    return []


def _large_constants(function: relax.Function) -> list[tuple[relax.Expr, np.ndarray]]:
    found: dict[tvm.ir.GenericConst, np.ndarray] = {}
    for block in function.body.blocks:
        for binding in block.bindings:
            for constant in _constants(binding.value):
                value = constant.value.numpy()
                if value.nbytes >= SMALL_BYTES:
                    found.setdefault(constant, value)
    return list(found.items())


def _lift(function: relax.Function, large: list[tuple[relax.Expr, np.ndarray]], names: list[str]) -> relax.Function:
    params = [relax.Var(name, constant.ty) for name, (constant, _) in zip(names, large, strict=True)]
    replacement = {constant: param for (constant, _), param in zip(large, params, strict=True)}
    blocks = []
    for block in function.body.blocks:
        bindings = [relax.VarBinding(binding.var, substitute(binding.value, replacement)) for binding in block.bindings]
        blocks.append(
            relax.DataflowBlock(bindings) if isinstance(block, relax.DataflowBlock) else relax.BindingBlock(bindings)
        )
    body = relax.SeqExpr(blocks, function.body.body)
    attrs = dict(function.attrs) if function.attrs else {}
    attrs["num_input"] = len(function.params)
    lifted = relax.Function([*function.params, *params], body, function.ret_ty, function.is_pure)
    return lifted.with_attrs(attrs)
