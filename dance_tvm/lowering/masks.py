"""Masks as tensors: expressions of liveness emitted where a kernel first needs them, each once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
from tvm import relax

from dance_tvm.ir.graph import Shape, dtype_of, shape_of
from dance_tvm.liveness.expressions import Both, Either, Expression, Factor, Grown, Joined, Part, nodes
from dance_tvm.schedules.kernel import Operand
from dance_tvm.schedules.mask_window import GrownMask

from .calls import call_kernel


@dataclass
class Masks:
    """``emit``: the new value of a variable of the graph; ``grown``: the machine's kernel that grows masks."""

    builder: relax.BlockBuilder
    emit: Callable[[relax.Var], relax.Expr]
    grown: type[GrownMask]
    threads: int
    made: dict[Hashable, relax.Expr] = field(default_factory=dict)

    def seen(self, expression: Expression, operand: Operand) -> relax.Expr:
        """The mask as ``operand`` takes it."""
        key = (expression, operand.shape, operand.field)
        if key not in self.made:
            value = self._field(expression)
            if shape_of(value) != operand.field:
                value = self.builder.emit(relax.op.broadcast_to(value, list(operand.field)))
            self.made[key] = self.builder.emit(relax.op.reshape(value, list(operand.shape)))
        return self.made[key]

    def _field(self, expression: Expression) -> relax.Expr:
        """``expression`` as a float32 tensor (N, T, H, W, C), extents 1 where it does not vary."""
        for node in nodes(expression, lambda node: node not in self.made):
            if node not in self.made:
                self.made[node] = self._new_field(node)
        return self.made[expression]

    def _new_field(self, expression: Expression) -> relax.Expr:
        emit = self.builder.emit
        if isinstance(expression, Factor):
            value = self.emit(expression.var)
            if dtype_of(value) != "float32":
                value = emit(relax.op.astype(value, "float32"))
            return emit(relax.op.reshape(value, list(expression.shape)))
        if isinstance(expression, Grown):
            batch, frames, height, width, _ = expression.inner.shape
            kernel = self.grown(expression.window, (batch, frames, height, width), expression.forward)
            inner = emit(relax.op.reshape(self._field(expression.inner), list(kernel.field)))
            grown = call_kernel(self.builder, kernel, {"mask": inner}, self.threads)
            return emit(relax.op.reshape(grown, list(expression.shape)))
        if isinstance(expression, Part):
            inner = self._field(expression.inner)
            return emit(relax.op.strided_slice(inner, [4], [expression.begin], [expression.end]))
        if isinstance(expression, Joined):
            return emit(relax.op.concat([self._part(*part, expression) for part in expression.parts], 4))
        assert isinstance(expression, Both | Either)
        left, right = self._field(expression.left), self._field(expression.right)
        union = isinstance(expression, Either)
        return emit((relax.op.maximum if union else relax.op.multiply)(left, right))

    def _part(self, part: Expression | None, channels: int, whole: Joined) -> relax.Expr:
        """One part of ``whole``, of which None leaves all channels, as ``whole`` varies but for its channels."""
        shape: Shape = (*whole.shape[:-1], channels)
        if part is None:
            return relax.const(np.ones(shape, "float32"))
        value = self._field(part)
        return value if part.shape == shape else self.builder.emit(relax.op.broadcast_to(value, list(shape)))
