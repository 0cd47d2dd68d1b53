"""Activations as exported networks write them: chains of elementwise operators that a kernel applies in one go."""

from __future__ import annotations

import math
from typing import NamedTuple

from tvm import relax

from dance_tvm.ir.graph import Graph, constant, dtype_of, is_tensor, shape_of


class ActivationChain(NamedTuple):
    """``name`` as :data:`~..schedules.emit.ACTIVATIONS` has it; ``bindings`` in order, the last one is the result."""

    name: str
    bindings: list[relax.Var]


def activation_behind(graph: Graph, var: relax.Var) -> ActivationChain | None:
    """The chain that makes an activation of ``var``, where nothing else reads ``var`` or what lies between."""
    if var in graph.outputs or not is_tensor(var) or dtype_of(var) != "float32":
        return None
    readers = graph.readers[var]
    if len(readers) == 1:
        return _clipped(graph, readers[0]) or _hard_sigmoid(graph, readers[0])
    if len(readers) != 2:
        return None
    return _gated(graph, var, *readers) or _gated(graph, var, *reversed(readers))


def _gated(graph: Graph, var: relax.Var, inner: relax.Var, outer: relax.Var) -> ActivationChain | None:
    """``var`` times a function of itself: SiLU, Hardswish."""
    if graph.op(inner) == "sigmoid":
        return ActivationChain("silu", [inner, outer]) if _is_product(graph, outer, var, inner) else None
    clipped = _clipped_sum(graph, inner)
    if not clipped or not _is_product(graph, outer, var, clipped[-1]):
        return None
    end = graph.only_reader(outer)
    return ActivationChain("hardswish", [*clipped, outer, end]) if _is_sixth(graph, end) else None


def _is_product(graph: Graph, var: relax.Var, left: relax.Var, right: relax.Var) -> bool:
    if graph.op(var) != "multiply" or graph.only_reader(right) is None or shape_of(var) != shape_of(left):
        return False
    args = list(graph.call(var).args)
    return any(a.same_as(left) and b.same_as(right) for a, b in (args, args[::-1]))


def _clipped(graph: Graph, var: relax.Var) -> ActivationChain | None:
    """ReLU6, which is exported as one clip."""
    return ActivationChain("relu6", [var]) if _bounds(graph, var) == (0.0, 6.0) else None


def _hard_sigmoid(graph: Graph, var: relax.Var) -> ActivationChain | None:
    clipped = _clipped_sum(graph, var)
    end = graph.only_reader(clipped[-1]) if clipped else None
    return ActivationChain("hardsigmoid", [*clipped, end]) if end is not None and _is_sixth(graph, end) else None


def _clipped_sum(graph: Graph, var: relax.Var) -> list[relax.Var]:
    """The bindings from ``x + 3`` on, clipped to between 0 and 6 in one step or two; none where it is not that."""
    if graph.op(var) != "add" or _number(graph, var) != 3.0:
        return []
    found, low, high = [var], -math.inf, math.inf
    while (low, high) != (0.0, 6.0):
        reader = graph.only_reader(found[-1])
        bounds = None if reader is None else _bounds(graph, reader)
        if reader is None or bounds is None or len(found) > 2:
            return []
        found.append(reader)
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return found


def _is_sixth(graph: Graph, var: relax.Var | None) -> bool:
    return var is not None and graph.op(var) == "divide" and _number(graph, var) == 6.0


def _bounds(graph: Graph, var: relax.Var) -> tuple[float, float] | None:
    """Between which numbers ``var`` is clipped."""
    if graph.op(var) in ("maximum", "minimum"):
        number = _number(graph, var)
        if number is None:
            return None
        return (number, math.inf) if graph.op(var) == "maximum" else (-math.inf, number)
    if graph.op(var) != "clip":
        return None
    low, high = (_value(arg) for arg in graph.call(var).args[1:3])
    return None if low is None or high is None else (low, high)


def _value(expr: relax.Expr) -> float | None:
    """A number that a call holds as an attribute."""
    inner = getattr(expr, "value", None)
    value = inner if isinstance(inner, int | float) else getattr(inner, "value", None)
    return float(value) if isinstance(value, int | float) else None


def _number(graph: Graph, var: relax.Var) -> float | None:
    """The number that is the second operand of ``var``."""
    value = constant(graph.call(var).args[1])
    return float(value.reshape(())) if value is not None and value.size == 1 else None
