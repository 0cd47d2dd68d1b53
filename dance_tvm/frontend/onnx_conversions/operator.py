"""A node of an ONNX graph, as conversions see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax


class UnsupportedError(Exception):
    """What keeps an operator from being read, after its name, and what the user can do about it."""

    def __init__(self, reason: str, instead: str = "export the network to .pt2, or without it") -> None:
        super().__init__(f"{reason}: {instead}")


@dataclass
class Operator:
    """A node: its inputs as expressions (None where an optional one is left out) and its attributes."""

    importer: Any
    kind: str
    inputs: list[Any]
    attributes: dict[str, Any]
    outputs: int
    opset: int

    def input(self, index: int) -> Any:
        """An input; None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def known(self, index: int, what: str) -> np.ndarray | None:
        """The value of an input that must be known now; None where it is left out."""
        if (value := self.input(index)) is None:
            return None
        known = self.importer.known(value)
        if known is None:
            raise UnsupportedError(f"has {what} that depend on the input", "make them constants when exporting")
        return known

    def required(self, index: int, what: str) -> np.ndarray:
        """The value of an input that must be there and be known now."""
        if (known := self.known(index, what)) is None:
            raise UnsupportedError(f"lacks {what}", "export the network again")
        return known

    def value(self, index: int) -> np.ndarray | None:
        """The value of an input if it is known now."""
        value = self.input(index)
        return None if value is None else self.importer.known(value)

    def ints(self, name: str, otherwise: Sequence[int] = ()) -> list[int]:
        """A list attribute."""
        return [int(item) for item in self.attributes.get(name, otherwise)]

    def flag(self, name: str, otherwise: int = 0) -> int:
        """An integer attribute."""
        return int(self.attributes.get(name, otherwise))

    def number(self, name: str, otherwise: float) -> float:
        """A float attribute."""
        return float(self.attributes.get(name, otherwise))

    def text(self, name: str, otherwise: str) -> str:
        """A string attribute."""
        value = self.attributes.get(name, otherwise)
        return value.decode() if isinstance(value, bytes) else str(value)

    def emit(self, expr: Any) -> Any:
        """A variable that holds ``expr``."""
        return self.importer.bb.emit(expr)

    def constant(self, array: Any, dtype: str | None = None) -> Any:
        """``array`` as an expression."""
        return self.importer.constant(np.asarray(array, dtype))

    def like(self, number: float, x: Any) -> Any:
        """A number of the type of ``x``."""
        return self.constant(number, dtype_of(x))

    def described(self) -> str:
        """Attributes and the inputs' types in a few words."""
        plain = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in self.attributes.items()
            if isinstance(value, (bytes, int, float, tuple)) and name != "tvm_custom"
        }
        attributes = [f"{name}={value}" for name, value in plain.items()]
        kinds = [f"{dtype_of(x)} {tuple(shape_of(x))}" for x in self.inputs if isinstance(x, relax.Expr)]
        return ", ".join([*attributes, f"of {' and '.join(kinds)}"])


Conversion = Callable[[Operator], Any]


def shape_of(x: Any) -> list[int]:
    """The extents of an expression."""
    return [int(extent) for extent in x.ty.shape]


def dtype_of(x: Any) -> str:
    """The dtype of an expression."""
    return str(x.ty.dtype.dtype)


def equal_parts(extent: int, size: int) -> list[int]:
    """Parts of ``size``, the last one with what is left."""
    return [min(size, extent - start) for start in range(0, extent, size)]


def is_float(x: Any) -> bool:
    """Whether an expression has floating-point elements."""
    return dtype_of(x).startswith("float")


def shaped_like_axis(op: Operator, x: Any, rank: int, axis: int) -> Any:
    """A vector spread along ``axis`` of a tensor of ``rank`` axes; a scalar or a larger tensor as it is."""
    if len(shape_of(x)) != 1 or rank == 1:
        return x
    return op.emit(relax.op.reshape(x, [-1 if at == axis % rank else 1 for at in range(rank)]))
