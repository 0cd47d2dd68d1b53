"""What the interpreter's kernels take and give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dance_tvm.core.errors import DanceError

Value = Any  # a tensor, a tuple of values, a shape (tuple of int), a scalar, or a dtype's name
#: A function of an operator's arguments and attributes.
Kernel = Callable[[list[Value], Any], Value]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint64": torch.uint64,
    "uint32": torch.uint32,
    "uint16": torch.uint16,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def dtype_named(name: Any) -> torch.dtype:
    """PyTorch's type for one of Relax; raises DanceError where it has none."""
    text = _plain(name)
    if text not in DTYPES:
        raise DanceError(f"the interpreter does not know the dtype {text}")
    return DTYPES[text]


def is_float(name: Any) -> bool:
    """Whether a type of Relax is one of floats."""
    found = DTYPES.get(_plain(name))
    return found is not None and found.is_floating_point


def _plain(name: Any) -> str:
    return str(name).removeprefix("T.").strip("\"'")


def dtype_or(name: Any, otherwise: torch.Tensor) -> torch.dtype:
    """The type that is named, else that of a tensor."""
    return otherwise.dtype if name is None else dtype_named(name)


def ints(array: Any) -> list[int]:
    """An attribute's numbers."""
    return [int(item) for item in array]


def axis_of(attrs: Any) -> int | None:
    """The axis that is named; None for all."""
    return None if attrs.axis is None else int(attrs.axis)


def on_tensors(function: Callable[..., Any]) -> Kernel:
    """A function of the arguments alone."""
    return lambda args, attrs: function(*args)
