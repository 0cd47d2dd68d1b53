"""Activations as exported networks write them: elementwise operators that a kernel applies to its result in one go."""

from __future__ import annotations

from typing import NamedTuple

import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, dtype_of, is_tensor, shape_of
from dance_tvm.schedules.emit import ACTIVATIONS
from dance_tvm.schedules.epilogue import STEPS, step_text

#: Steps of one program: more than any activation of PyTorch takes.
MOST_STEPS = 16

#: Programs that are an activation with a name.
SYNONYMS = {f"sigmoid(x); multiply({operands})": "silu" for operands in ("x, %0", "%0, x")}


class Chain(NamedTuple):
    """``activation`` as :func:`~..schedules.epilogue.activate` takes it; ``bindings`` in order, the last one is the
    result."""

    activation: str
    bindings: list[relax.Var]


def activation_behind(graph: Graph, var: relax.Var) -> Chain | None:
    """The longest chain of steps behind ``var`` whose last value alone is read by others, and ``var`` by none.

    Steps combine ``var``, each other and numbers. Programs of one step that has a name are that name.
    """
    if var in graph.outputs or not is_tensor(var) or dtype_of(var) != "float32":
        return None
    steps: dict[relax.Var, str] = {}
    names: dict[relax.Expr, str] = {var: "x"}
    best = 0
    for reader in _following(graph, var):
        text = _step(graph, reader, shape_of(var), names)
        if text is None:
            continue
        names[reader] = f"%{len(steps)}"
        steps[reader] = text
        if len(steps) > MOST_STEPS:
            break
        if dtype_of(reader) == "float32" and _is_all_that_is_read(graph, var, steps, reader):
            best = len(steps)
    if not best:
        return None
    program = "; ".join(list(steps.values())[:best])
    name = SYNONYMS.get(program, program.removesuffix("(x)"))
    return Chain(name if name in ACTIVATIONS else program, list(steps)[:best])


def _following(graph: Graph, var: relax.Var) -> list[relax.Var]:
    """What reads ``var``, directly or not, in the order of the network, as far as a program could go."""
    found, waiting = {var}, [var]
    while waiting and len(found) <= 2 * MOST_STEPS:
        for reader in graph.readers[waiting.pop(0)]:
            if reader not in found and graph.op(reader).removeprefix("nn.") in STEPS:
                found.add(reader)
                waiting.append(reader)
    found.remove(var)
    return sorted(found, key=graph.place.__getitem__)


def _is_all_that_is_read(graph: Graph, var: relax.Var, steps: dict[relax.Var, str], last: relax.Var) -> bool:
    """Whether nobody but the steps reads ``var`` and the steps, the last one apart."""
    inner = [var, *(step for step in steps if not step.same_as(last))]
    return all(each not in graph.outputs and all(reader in steps for reader in graph.readers[each]) for each in inner)


def _step(graph: Graph, var: relax.Var, shape: tuple[int, ...], names: dict[relax.Expr, str]) -> str | None:
    """``var`` as a step over what has a name; None where it is none."""
    name = graph.op(var).removeprefix("nn.")
    if name not in STEPS or not is_tensor(var) or shape_of(var) != shape or dtype_of(var) not in ("float32", "bool"):
        return None
    call = graph.call(var)
    operands: list[str | float | None] = [names.get(arg, _number(arg)) for arg in call.args]
    if name == "leakyrelu":
        operands.append(float(call.attrs.alpha))
    known = [operand for operand in operands if operand is not None]
    return step_text(name, known) if len(known) == len(operands) else None


def _number(expr: relax.Expr) -> float | None:
    """A float32 constant of one element, or a number that a call holds as an attribute."""
    value = constant(expr)
    if value is not None:
        return float(value.reshape(())) if value.size == 1 and value.dtype == "float32" else None
    inner = getattr(expr, "value", None)
    held = inner if isinstance(inner, int | float) else getattr(inner, "value", None)
    return float(held) if isinstance(held, int | float) and not isinstance(expr, tvm.ir.GenericConst) else None
