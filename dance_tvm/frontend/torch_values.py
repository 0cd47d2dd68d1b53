"""What conversions of ATen operators share: shapes and types of Relax values, arguments by name, casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax

Importer = Any  # TVM's BaseFXGraphImporter: env maps nodes to Relax values, block_builder emits them
Conversion = Callable[[fx.Node, Importer], Any]
Operator = Callable[..., relax.Expr]  # one of Relax


def shape_of(value: relax.Expr) -> list[int]:
    """Static shape of a tensor."""
    return [int(extent) for extent in value.ty.shape]


def dtype_of(value: relax.Expr) -> str:
    """Element type of a tensor."""
    return str(value.ty.dtype.dtype)


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def constant(array: np.ndarray) -> relax.Expr:
    """``array`` in its own type; left alone, Relax narrows 64 bits to 32."""
    return relax.const(array, str(array.dtype))


def constant_of(value: relax.Expr) -> np.ndarray | None:
    """The value of a constant; None for what is computed."""
    return value.value.numpy() if isinstance(value, tvm.ir.expr.GenericConst) else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of the operator's schema, those that were given."""
    operator: Any = node.target
    names = [argument.name for argument in operator._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def cast(importer: Importer, value: Any, dtype: str) -> relax.Expr:
    """``value``, a tensor or a Python number, as a tensor of ``dtype``; what an integer type lacks wraps around."""
    if isinstance(value, int) and not isinstance(value, bool) and "int" in dtype:
        return constant(np.array(value).astype(dtype))
    if not isinstance(value, relax.Expr):
        return relax.const(value, dtype)
    return value if dtype_of(value) == dtype else importer.block_builder.emit(relax.op.astype(value, dtype))
