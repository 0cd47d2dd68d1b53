"""Name Relax variables after the source network's layers, so that tables and errors speak the user's language."""

from __future__ import annotations

from typing import Any

from tvm import relax

# The operators that are what a layer is about; what else the layer needs (a bias, a reshape) is named after it.
_MAIN_OPERATORS = ("conv", "matmul", "einsum", "pool", "norm", "softmax", "resize")


class NamingBuilder:
    """A ``relax.BlockBuilder`` that names what it emits after the layer at work.

    The layer's main operator gets the layer's own name, every other one ``layer.operator``; repetitions are numbered.
    """

    def __init__(self) -> None:
        self._builder = relax.BlockBuilder()
        self._taken: dict[str, int] = {}
        self._layer = ""
        self._only = False

    def enter(self, layer: str, *, only: bool) -> None:
        """What follows belongs to ``layer``; with ``only`` its first operator is the layer, main operator or not."""
        self._layer, self._only = layer, only

    def emit(self, expr: relax.Expr, name_hint: str = "") -> relax.Var:
        """As ``BlockBuilder.emit``; the name is the layer's, whatever ``name_hint`` says."""
        expr = self._builder.normalize(_in_bounds(expr))
        if not self._layer:
            return self._builder.emit(expr, name_hint)
        make = relax.DataflowVar if self._builder.current_block_is_dataflow() else relax.Var
        var = make(self._unique(self._name(expr)), expr.ty)
        self._builder.emit_normalized(relax.VarBinding(var, expr))
        return var

    def _name(self, expr: relax.Expr) -> str:
        operator = operator_name(expr)
        if self._only or any(part in operator for part in _MAIN_OPERATORS):
            self._only = False
            return self._layer
        return f"{self._layer}.{operator}"

    def _unique(self, name: str) -> str:
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return self._unique(f"{name}_{count}") if count else name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)


def _in_bounds(expr: relax.Expr) -> relax.Expr:
    """``expr``, or a ``take`` as the sources mean it: negative positions count from the end, none reads elsewhere."""
    if isinstance(expr, relax.Call) and operator_name(expr) == "take" and expr.attrs.mode == "fast":
        return relax.op.take(expr.args[0], expr.args[1], expr.attrs.axis, mode="wrap")
    return expr


def operator_name(expr: relax.Expr) -> str:
    """``conv3d`` for a call of ``relax.nn.conv3d``; ``output`` for a part of a tuple."""
    if isinstance(expr, relax.Call):
        return str(getattr(expr.op, "name", "call")).rpartition(".")[2]
    return "output" if isinstance(expr, relax.TupleGetItem) else type(expr).__name__.lower()
