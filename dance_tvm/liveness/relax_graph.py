"""Liveness of a Relax function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from tvm import relax, tirx

from dance_tvm.ir.graph import Graph, constant, dtype_of, is_tensor, shape_of
from dance_tvm.ir.windows import window_of

from .analysis import Liveness
from .expressions import Shape
from .rules import Operation


def liveness_of(graph: Graph) -> Liveness:
    """What is zero and what is read in ``graph``, whose activations have channels innermost."""
    return Liveness.of(RelaxView(graph))


class RelaxView:
    """A ``Graph`` as the analysis sees it: keys are its variables and constants."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.params, self.order = graph.params, graph.order
        self.outputs, self.readers = graph.outputs, graph.readers
        self._operations: dict[relax.Var, Operation | None] = {}

    def operation(self, key: relax.Expr) -> Operation | None:
        """The operation whose result ``key`` is; an item of a tuple is what the tuple's operation makes."""
        if key not in self._operations:
            self._operations[key] = self._operation(key)
        return self._operations[key]

    def shape(self, key: relax.Expr) -> Shape | None:
        """Static shape of a tensor."""
        return shape_of(key) if is_tensor(key) else None

    def dtype(self, key: relax.Expr) -> str:
        """Type of a tensor's elements."""
        return dtype_of(key) if is_tensor(key) else ""

    def constant(self, key: relax.Expr) -> NDArray[Any] | None:
        """The value of a constant."""
        return constant(key)

    def _operation(self, key: relax.Expr) -> Operation | None:
        made = self._maker(key)
        name = self.graph.op(made)
        if not name or not is_tensor(key):
            return None
        call = self.graph.value[made]
        operands = tuple(operand for arg in call.args for operand in self._tensors(arg))
        return Operation(
            name,
            operands,
            shape_of(key),
            tuple(self.shape(operand) for operand in operands),
            tuple(constant(operand) for operand in operands),
            dtype_of(key),
            window_of(self.graph, key),
            _numbers(name, call, len(shape_of(key))),
        )

    def _maker(self, key: relax.Expr) -> relax.Expr:
        """The variable whose call makes ``key``: ``key`` itself but for an item of a tuple that an operator returns."""
        value = self.graph.value.get(key)
        if not isinstance(value, relax.TupleGetItem) or not isinstance(value.tuple_value, relax.Var):
            return key
        return value.tuple_value

    def _tensors(self, arg: relax.Expr) -> list[relax.Expr]:
        """The tensors that an argument is made of: itself, or a tuple's items; other arguments are none."""
        if isinstance(arg, relax.Var) and isinstance(self.graph.value.get(arg), relax.Tuple):
            arg = self.graph.value[arg]
        items = arg.fields if isinstance(arg, relax.Tuple) else [arg]
        return [item for item in items if isinstance(item.ty, relax.TensorType)]


def _numbers(name: str, call: relax.Call, rank: int) -> Mapping[str, float]:
    """The attributes that rules ask for."""
    if name == "clip":
        return {"low": _number(call.args[1]), "high": _number(call.args[2])}
    if name == "concat":
        return {"axis": 0 if call.attrs.axis is None else int(call.attrs.axis) % rank}
    if name == "one_hot":
        return {"on": _number(call.args[1]), "off": _number(call.args[2])}
    if name in ("zeros", "zeros_like"):
        return {"fill": 0}
    if name in ("ones", "ones_like"):
        return {"fill": 1}
    if name in ("full", "full_like"):
        fill = constant(call.args[-1])
        return {} if fill is None else {"fill": float(fill)}
    return {}


def _number(value: relax.Expr) -> float:
    """A number that is known when compiled; NaN, which no rule allows for, where it is not."""
    inner = value.value if hasattr(value, "value") else value
    return float(inner) if isinstance(inner, int | float | tirx.IntImm | tirx.FloatImm) else float("nan")
