"""ATen operators that reduce axes, as Relax operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from tvm import relax

from dance_tvm.frontend.torch_values import (
    Conversion,
    Importer,
    Operator,
    arguments,
    cast,
    dtype_of,
    name_of,
    shape_of,
)


def _axes(argument: Any) -> list[int] | None:
    if argument is None or argument == []:
        return None
    return [argument] if isinstance(argument, int) else list(argument)


def _reduction(operator: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        value, *rest = importer.retrieve_args(node)
        axes = _axes(rest[0]) if rest else None
        keep = bool(rest[1]) if len(rest) > 1 else bool(node.kwargs.get("keepdim", False))
        expected = node.meta["val"]
        if isinstance(expected, torch.Tensor):
            value = cast(importer, value, name_of(expected.dtype))
        if not shape_of(value):
            return value
        return importer.block_builder.emit(operator(value, axes, keep))

    return convert


def _any(node: fx.Node, importer: Importer) -> relax.Expr:
    value, *rest = importer.retrieve_args(node)
    axes = _axes(rest[0]) if rest else None
    keep = bool(rest[1]) if len(rest) > 1 else False
    if not shape_of(value):
        return cast(importer, value, "bool")
    hits = cast(importer, cast(importer, value, "bool"), "int32")
    found = importer.block_builder.emit(relax.op.max(hits, axes, keep))
    return cast(importer, found, "bool")


def _variance_of(node: fx.Node, importer: Importer) -> tuple[relax.Expr, relax.Expr]:
    """Variance with PyTorch's correction, and mean."""
    value, *rest = importer.retrieve_args(node)
    axes = _axes(rest[0] if rest else None) or list(range(len(shape_of(value))))
    given: Any = node.kwargs.get("correction")
    correction = 1 if given is None else int(given)
    keep = bool(node.kwargs.get("keepdim", False))
    emit = importer.block_builder.emit
    count = math.prod(shape_of(value)[axis] for axis in axes)
    scale = relax.const(count / max(0, count - correction) if count > correction else math.inf, dtype_of(value))
    variance = emit(relax.op.multiply(emit(relax.op.variance(value, axes, keep)), scale))
    return variance, emit(relax.op.mean(value, axes, keep))


def _variance(node: fx.Node, importer: Importer) -> relax.Expr:
    return _variance_of(node, importer)[0]


def _deviation(node: fx.Node, importer: Importer) -> relax.Expr:
    return importer.block_builder.emit(relax.op.sqrt(_variance_of(node, importer)[0]))


def _variance_and_mean(node: fx.Node, importer: Importer) -> relax.Expr:
    return importer.block_builder.emit(relax.Tuple(list(_variance_of(node, importer))))


def _argument_of(operator: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        given = arguments(node)
        x, axis, keep = importer.env[node.args[0]], given.get("dim"), bool(given.get("keepdim", False))
        if not shape_of(x):
            return relax.const(0, "int64")
        return importer.block_builder.emit(operator(x, axis, keep))

    return convert


def _bucketize(node: fx.Node, importer: Importer) -> relax.Expr:
    """How many boundaries lie below each value; NaN lies above all."""
    given = arguments(node)
    emit, dtype = importer.block_builder.emit, name_of(node.meta["val"].dtype)
    x, bounds = importer.retrieve_args(node)[:2]
    x = cast(importer, x, dtype_of(bounds))
    beyond = relax.op.greater if given.get("right") else relax.op.greater_equal
    above = emit(beyond(bounds, emit(relax.op.expand_dims(x, len(shape_of(x))))))
    return emit(relax.op.sum(cast(importer, emit(relax.op.logical_not(above)), dtype), [-1]))


def _extreme_with_index(value_of: Operator, index_of: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        value, axis, *rest = importer.retrieve_args(node)
        keep, emit = bool(rest and rest[0]), importer.block_builder.emit
        if not shape_of(value):
            return emit(relax.Tuple([value, relax.const(0, "int64")]))
        ordered = cast(importer, value, "uint8") if dtype_of(value) == "bool" else value
        return emit(relax.Tuple([emit(value_of(value, [axis], keep)), emit(index_of(ordered, axis, keep))]))

    return convert


REDUCTIONS: dict[str, Conversion] = {
    "amax.default": _reduction(relax.op.max),
    "amin.default": _reduction(relax.op.min),
    "sum.default": _reduction(relax.op.sum),
    "sum.dim_IntList": _reduction(relax.op.sum),
    "prod.default": _reduction(relax.op.prod),
    "prod.dim_int": _reduction(relax.op.prod),
    "mean.default": _reduction(relax.op.mean),
    "mean.dim": _reduction(relax.op.mean),
    "argmax.default": _argument_of(relax.op.argmax),
    "argmin.default": _argument_of(relax.op.argmin),
    "bucketize.Tensor": _bucketize,
    "max.default": _reduction(relax.op.max),
    "min.default": _reduction(relax.op.min),
    "any.default": _any,
    "any.dim": _any,
    "any.dims": _any,
    "max.dim": _extreme_with_index(relax.op.max, relax.op.argmax),
    "min.dim": _extreme_with_index(relax.op.min, relax.op.argmin),
    "var.correction": _variance,
    "std.correction": _deviation,
    "var_mean.correction": _variance_and_mean,
}
