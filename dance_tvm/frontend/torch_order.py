"""ATen operators that order values: NaN counts as the largest, equal values stay in the order in which they stood."""

from __future__ import annotations

from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_values import Conversion, Importer, arguments, cast, dtype_of, shape_of


def _ordered(importer: Importer, x: relax.Expr, axis: int, kept: int, descending: bool = False) -> list[relax.Expr]:
    """The first ``kept`` values of each line along ``axis``, and their places."""
    both = importer.block_builder.emit(relax.op.topk(x, kept, axis, "both", descending, "int64"))
    return [importer.block_builder.emit(relax.TupleGetItem(both, part)) for part in (0, 1)]


def _scalar(importer: Importer, x: relax.Expr) -> relax.Expr:
    """A scalar and its place."""
    return importer.block_builder.emit(relax.Tuple([x, relax.const(0, "int64")]))


def _sort(node: fx.Node, importer: Importer) -> relax.Expr:
    given, x = arguments(node), importer.env[node.args[0]]
    if not shape_of(x):
        return _scalar(importer, x)
    axis = int(given.get("dim", -1)) % len(shape_of(x))
    if shape_of(x)[axis] == 0:
        return importer.block_builder.emit(relax.Tuple([x, cast(importer, x, "int64")]))
    parts = _ordered(importer, x, axis, shape_of(x)[axis], bool(given.get("descending", False)))
    return importer.block_builder.emit(relax.Tuple(parts))


def _argsort(node: fx.Node, importer: Importer) -> relax.Expr:
    given, x = arguments(node), importer.env[node.args[0]]
    if not shape_of(x):
        return relax.const(0, "int64")
    descending = bool(given.get("descending", False))
    return importer.block_builder.emit(relax.op.argsort(x, int(given.get("dim", -1)), descending, "int64"))


def _topk(node: fx.Node, importer: Importer) -> relax.Expr:
    given, x = arguments(node), importer.env[node.args[0]]
    if not given.get("sorted", True):
        raise DanceError("with sorted=False the order of the result is not defined: export it with sorted=True")
    kept, largest = int(given["k"]), bool(given.get("largest", True))
    if kept == 0:
        values = relax.op.zeros(list(node.meta["val"][0].shape), dtype_of(x))
        places = relax.op.zeros(list(node.meta["val"][1].shape), "int64")
        return importer.block_builder.emit(relax.Tuple([values, places]))
    if not shape_of(x):
        return _scalar(importer, x)
    return importer.block_builder.emit(
        relax.Tuple(_ordered(importer, x, int(given.get("dim", -1)) % len(shape_of(x)), kept, largest))
    )


def _kth_value(node: fx.Node, importer: Importer) -> relax.Expr:
    given, x = arguments(node), importer.env[node.args[0]]
    if not shape_of(x):
        return _scalar(importer, x)
    axis = int(given.get("dim", -1)) % len(shape_of(x))
    parts = [_last(importer, part, axis) for part in _ordered(importer, x, axis, int(given["k"]))]
    return _reduced(importer, parts, axis, bool(given.get("keepdim", False)))


def _median(ignore_nan: bool) -> Conversion:
    """The lower of the two middle values, with its place where an axis is given."""

    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        given, x, emit = arguments(node), importer.env[node.args[0]], importer.block_builder.emit
        whole = given.get("dim") is None
        if not shape_of(x):
            return x if whole else _scalar(importer, x)
        x = emit(relax.op.reshape(x, [-1])) if whole else x
        axis = 0 if whole else int(given["dim"]) % len(shape_of(x))
        find = _middle_of_numbers if ignore_nan and dtype_of(x).startswith("float") else _middle
        parts = find(importer, x, axis)
        if whole:
            return emit(relax.op.squeeze(parts[0], [0]))
        return _reduced(importer, parts, axis, bool(given.get("keepdim", False)))

    return convert


def _middle(importer: Importer, x: relax.Expr, axis: int) -> list[relax.Expr]:
    """The middle value of each line, and its place; NaN, and where the first stands, of lines that have one."""
    emit = importer.block_builder.emit
    kept = (shape_of(x)[axis] + 1) // 2
    parts = [_last(importer, part, axis) for part in _ordered(importer, x, axis, kept)]
    if not dtype_of(x).startswith("float"):
        return parts
    largest = emit(relax.op.max(x, [axis], True))
    undefined = emit(relax.op.not_equal(largest, largest))
    nan = [largest, emit(relax.op.argmax(x, axis, True))]
    return [emit(relax.op.where(undefined, each, part)) for each, part in zip(nan, parts, strict=True)]


def _middle_of_numbers(importer: Importer, x: relax.Expr, axis: int) -> list[relax.Expr]:
    """The middle of what are numbers, and its place."""
    emit = importer.block_builder.emit
    counted = cast(importer, emit(relax.op.equal(x, x)), "int64")
    below = emit(relax.op.subtract(emit(relax.op.sum(counted, [axis], True)), relax.const(1, "int64")))
    at = emit(relax.op.maximum(emit(relax.op.floor_divide(below, relax.const(2, "int64"))), relax.const(0, "int64")))
    return [emit(relax.op.gather_elements(part, at, axis)) for part in _ordered(importer, x, axis, shape_of(x)[axis])]


def _last(importer: Importer, x: relax.Expr, axis: int) -> relax.Expr:
    """The last of each line, whose axis stays."""
    extent = shape_of(x)[axis]
    return importer.block_builder.emit(relax.op.strided_slice(x, [axis], [extent - 1], [extent]))


def _reduced(importer: Importer, parts: list[relax.Expr], axis: int, keep: bool) -> relax.Expr:
    """``parts`` as a tuple, without the axis unless it is kept."""
    emit = importer.block_builder.emit
    return emit(relax.Tuple(parts if keep else [emit(relax.op.squeeze(part, [axis])) for part in parts]))


ORDER: dict[str, Conversion] = {
    "sort.default": _sort,
    "sort.stable": _sort,
    "argsort.default": _argsort,
    "argsort.stable": _argsort,
    "topk.default": _topk,
    "kthvalue.default": _kth_value,
    "median.default": _median(ignore_nan=False),
    "median.dim": _median(ignore_nan=False),
    "nanmedian.default": _median(ignore_nan=True),
    "nanmedian.dim": _median(ignore_nan=True),
}
