"""Products of matrices."""

from __future__ import annotations

from typing import Any

from tvm import relax

from dance_tvm.frontend.onnx_conversions.operator import Conversion, Operator


def _einsum(op: Operator) -> Any:
    equation = op.text("equation", "").replace(" ", "")
    return relax.op.einsum(tuple(op.inputs), equation)


def _gemm(op: Operator) -> Any:
    a, b, c = op.input(0), op.input(1), op.input(2)
    a = op.emit(relax.op.permute_dims(a)) if op.flag("transA") else a
    b = op.emit(relax.op.permute_dims(b)) if op.flag("transB") else b
    y = op.emit(relax.op.matmul(a, b))
    if (alpha := op.number("alpha", 1.0)) != 1.0:
        y = op.emit(relax.op.multiply(y, op.like(alpha, y)))
    if c is None:
        return y
    if (beta := op.number("beta", 1.0)) != 1.0:
        c = op.emit(relax.op.multiply(c, op.like(beta, c)))
    return relax.op.add(y, c)


CONVERSIONS: dict[str, Conversion] = {
    "Einsum": _einsum,
    "Gemm": _gemm,
}
