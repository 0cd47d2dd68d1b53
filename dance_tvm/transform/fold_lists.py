"""Evaluate integer arithmetic on constants: lists and counts of layers that no mask thins are known when compiled.

TVM's own FoldConstant compiles a function for each operator; these are a handful of small arrays for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import literal, substitute


def _slice(data: np.ndarray, axes: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> np.ndarray:
    places = [slice(None)] * data.ndim
    for axis, first, last in zip(axes, begin, end, strict=True):
        places[axis] = slice(first, last)
    return data[tuple(places)]


#: What is evaluated, on arrays and lists of numbers in the order of the operator's arguments.
_OPERATORS: dict[str, Callable[..., np.ndarray]] = {
    "relax.add": np.add,
    "relax.multiply": np.multiply,
    "relax.floor_divide": np.floor_divide,
    "relax.reshape": np.reshape,
    "relax.broadcast_to": np.broadcast_to,
    "relax.strided_slice": _slice,
}


@tvm.transform.module_pass(opt_level=0, name="FoldLists")
class FoldLists:
    """Replaces integer operators that read only constants by constants."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Fold every Relax function of ``mod``."""
        functions = {gvar: func for gvar, func in mod.functions_items() if isinstance(func, relax.Function)}
        return tvm.IRModule(
            {**dict(mod.functions_items()), **{gvar: _folded(func) for gvar, func in functions.items()}},
            attrs=mod.attrs,
        )


def _folded(func: relax.Function) -> relax.Function:
    known: dict[relax.Expr, relax.Expr] = {}
    blocks = []
    for block in func.body.blocks:
        bindings = []
        for binding in block.bindings:
            if not isinstance(binding, relax.VarBinding):
                bindings.append(binding)
                continue
            value = _replaced(binding.value, known)
            result = _evaluated(value)
            if result is not None:
                value = literal(result)
                if isinstance(binding.var, relax.DataflowVar):
                    known[binding.var] = value
                    continue
            bindings.append(relax.VarBinding(binding.var, value))
        blocks.append(type(block)(bindings))
    body = relax.SeqExpr(blocks, func.body.body)
    relax.expr._update_type(body, func.body.ty)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)


def _replaced(value: relax.Expr, known: dict[relax.Expr, relax.Expr]) -> relax.Expr:
    """``value`` with the constants in it that took the place of variables."""
    new = substitute(value, known) if known else value
    if new is not value and isinstance(new, relax.Call):  # types of tuples and their items follow by themselves
        relax.expr._update_type(new, value.ty)
    return new


def _evaluated(value: relax.Expr) -> np.ndarray | None:
    """The constant that ``value`` is; None for what is no integer, or not known."""
    if not isinstance(value, relax.Call) or not isinstance(value.ty, relax.TensorType):
        return None
    dtype, name = str(value.ty.dtype), getattr(value.op, "name", "")
    if dtype not in ("int32", "int64"):
        return None
    if name == "relax.concat":
        fields = value.args[0].fields if isinstance(value.args[0], relax.Tuple) else [value.args[0]]
        parts = [part for part in map(_number, fields) if isinstance(part, np.ndarray)]
        return np.concatenate(parts, int(value.attrs.axis or 0)) if len(parts) == len(fields) else None
    if name not in _OPERATORS or (name == "relax.strided_slice" and len(value.args) > 4):
        return None
    operands = [_number(argument) for argument in value.args]
    if any(operand is None for operand in operands):
        return None
    return np.ascontiguousarray(_OPERATORS[name](*operands), dtype)


def _number(value: relax.Expr) -> np.ndarray | list[int] | None:
    if isinstance(value, tvm.ir.GenericConst):
        array: np.ndarray = value.value.numpy()
        return array if array.dtype.kind == "i" else None
    if isinstance(value, relax.ShapeExpr):
        return _numbers(value.values)
    if isinstance(value, relax.Tuple):
        return _numbers(getattr(field, "value", field) for field in value.fields)
    return None


def _numbers(values: Iterable[Any]) -> list[int] | None:
    try:
        return [int(value) for value in values]
    except (TypeError, ValueError):
        return None  # known only in a call
