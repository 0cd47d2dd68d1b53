"""Where a network's weights live: inside the library when they are small, in a file beside it when they are large."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

# Weights inside the library pass through LLVM as one long array, at several times their size in memory and seconds
# per hundred megabytes; a safetensors file is written and read as it is. Up to here the library alone is handier.
INLINE_LIMIT_BYTES = 16 * 2**20

# Biases, scales and index lists stay in the library even of a large network.
SMALLEST_LIFTED_BYTES = 4096


def place_weights(
    mod: tvm.IRModule, weights: Mapping[str, np.ndarray], limit_bytes: int = INLINE_LIMIT_BYTES
) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Bind all weights into ``main`` if they take at most ``limit_bytes``, else make the large ones its parameters.

    ``weights`` are those that are parameters of ``main`` already. Returns the module and its weights in the order of
    the parameters that follow the inputs.
    """
    if weight_bytes(mod) + sum(array.nbytes for array in weights.values()) <= limit_bytes:
        return (relax.transform.BindParams("main", dict(weights))(mod) if weights else mod), {}
    mod, lifted = _Lifter(mod).lift()
    weights = {**weights, **lifted}
    order = [param.name for param in mod["main"].params if param.name in weights]
    return mod, {name: weights[name] for name in order}


def weight_bytes(mod: tvm.IRModule) -> int:
    """Bytes of the constants inside ``main``."""
    total = 0

    def visit(node: tvm.ir.Expr) -> None:
        nonlocal total
        if isinstance(node, GenericConst):
            total += node.value.numpy().nbytes

    relax.analysis.post_order_visit(mod["main"], visit)
    return total


@mutator
class _Lifter(PyExprMutator):
    """Turns the large constants of ``main`` into parameters that follow those it has."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod = mod
        self.lifted: list[relax.Var] = []
        self.arrays: dict[str, np.ndarray] = {}

    def lift(self) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
        main = self.mod["main"]
        inputs = main.attrs["num_input"] if main.attrs and "num_input" in main.attrs else len(main.params)
        body = self.visit_expr(main.body)
        changed = relax.Function([*main.params, *self.lifted], body, main.ret_ty, main.is_pure, main.attrs)
        self.builder_.update_func(self.mod.get_global_var("main"), changed.with_attr("num_input", inputs))
        return self.builder_.get(), self.arrays

    def visit_generic_const_(self, constant: GenericConst) -> tvm.ir.Expr:
        array = constant.value.numpy()
        if array.nbytes < SMALLEST_LIFTED_BYTES:
            return constant
        name = f"weight_{len(self.lifted):04d}"
        variable = relax.Var(name, constant.ty)
        self.lifted.append(variable)
        self.arrays[name] = array
        return variable
