"""Inputs and outputs in half precision where the source has them in float32 (`build --io float16`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import tvm
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.ir.graph import Graph, dtype_of, emit, shape_of, substitute
from dance_tvm.schedules.emit import FLOAT, HALF

from .interface import Arrays, Imported, TensorSpec


def with_half_io(imported: Imported) -> Imported:
    """``imported`` with each float32 input and output in half precision.

    Its reference raises DanceError where an output is beyond half precision: else an infinity would pass for right.
    """

    def reference(arrays: Arrays) -> Arrays:
        answers = imported.reference(_widened(arrays))
        return {spec.name: _narrowed(answers[spec.name], spec) for spec in imported.outputs}

    def exact(arrays: Arrays) -> Sequence[np.ndarray] | None:
        return imported.exact(_widened(arrays)) if imported.exact else None

    return replace(
        imported,
        mod=_converted(imported.mod),
        inputs=[_half(spec) for spec in imported.inputs],
        outputs=[_half(spec) for spec in imported.outputs],
        reference=reference,
        exact=exact if imported.exact else None,
    )


def _half(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype=HALF) if spec.dtype == FLOAT else spec


def _widened(arrays: Arrays) -> Arrays:
    return {name: array.astype(FLOAT) if array.dtype == HALF else array for name, array in arrays.items()}


def _narrowed(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    if spec.dtype != FLOAT:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(HALF)
    if np.isinf(half).sum() > np.isinf(array).sum():
        size = np.abs(array[np.isfinite(array)]).max()
        raise DanceError(f"output {spec.name} reaches {size:.3g}, half precision ends at 65504: leave --io out")
    return half


def _converted(mod: tvm.IRModule) -> tvm.IRModule:
    """``mod`` with conversions behind the parameters of ``main`` and before its results."""
    graph = Graph.of(mod["main"])
    others = {name: function for name, function in mod.functions_items() if name.name_hint != "main"}
    builder = relax.BlockBuilder(tvm.IRModule(others))
    params = [
        relax.Var(each.name, relax.TensorType(shape_of(each), HALF) if dtype_of(each) == FLOAT else each.ty)
        for each in graph.params
    ]
    with builder.function("main", params, attrs=dict(mod["main"].attrs or {})):
        with builder.dataflow():
            new: dict[relax.Var, relax.Expr] = {}
            for old, param in zip(graph.params, params, strict=True):
                new[old] = builder.emit(relax.op.astype(param, FLOAT)) if dtype_of(param) != dtype_of(old) else param
            for var in graph.order:
                new[var] = emit(builder, substitute(graph.value[var], new), var.name)
            result = new[graph.output]
            values = [builder.emit(relax.TupleGetItem(result, at)) for at in range(len(graph.output.ty.fields))]
            halves = [builder.emit(relax.op.astype(each, HALF)) if dtype_of(each) == FLOAT else each for each in values]
            output = builder.emit_output(relax.Tuple(halves))
        builder.emit_func_output(output)
    return builder.finalize()
