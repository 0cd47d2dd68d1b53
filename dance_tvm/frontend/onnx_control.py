"""Nodes of ONNX that are read with the importer's help: constants, shapes, branches, loops, sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import numpy_helper
from tvm import relax

from dance_tvm.frontend import onnx_file
from dance_tvm.frontend.onnx_conversions.operator import UnsupportedError, equal_parts
from dance_tvm.frontend.onnx_nodes import Value, attributes_of

#: Loops with more rounds than this are not unrolled.
MOST_ROUNDS = 256


class Importer(Protocol):
    """What these nodes ask of the importer that meets them."""

    bb: relax.BlockBuilder
    opset: int

    def constant(self, array: Any) -> relax.Expr:
        """``array`` as an expression."""

    def known(self, value: Value) -> np.ndarray | None:
        """The value of an input that is known now."""

    def branch(self, graph: Any, values: Sequence[Value] = ()) -> list[Value]:
        """What a graph inside of a node computes of ``values``."""


#: What a node computes of its inputs, one value for each output.
Special = Callable[[Importer, Any, list[Value]], Sequence[Value]]


def _constant_node(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    (attribute,) = node.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return [importer.constant(numpy_helper.to_array(value))]
    if attribute.name == "sparse_value":
        return [importer.constant(onnx_file.dense(value))]
    if attribute.name.startswith("value_string"):
        raise UnsupportedError("holds text, which no tensor of a compiled network can")
    return [importer.constant(np.asarray(value, "float32" if attribute.name.startswith("value_float") else "int64"))]


def _shape(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    if isinstance(inputs[0], list):
        raise UnsupportedError("is not supported on sequences of tensors")
    shape = np.array([int(extent) for extent in inputs[0].ty.shape], np.int64)
    attributes = attributes_of(node)
    return [importer.constant(shape[attributes.get("start", 0) : attributes.get("end", len(shape))])]


def _size(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    return [importer.constant(np.array(np.prod([int(extent) for extent in inputs[0].ty.shape]), np.int64))]


def _identity(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    return [inputs[0]]


def _if(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    """The branch that is taken; both, and a choice between their results, where that is not known now."""
    attributes = attributes_of(node)
    taken = importer.known(inputs[0])
    if taken is not None:
        return importer.branch(attributes["then_branch" if taken.item() else "else_branch"])
    chosen = []
    for one, other in zip(*(importer.branch(attributes[name]) for name in ("then_branch", "else_branch")), strict=True):
        same = all(isinstance(value, relax.Expr) for value in (one, other)) and _like(one) == _like(other)
        if not same:
            raise UnsupportedError("has branches whose results differ in shape or type and depends on the input")
        chosen.append(importer.bb.emit(relax.op.where(inputs[0], one, other)))
    return chosen


def _like(value: relax.Expr) -> tuple[tuple[int, ...], str]:
    return tuple(int(extent) for extent in value.ty.shape), str(value.ty.dtype.dtype)


def _loop(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    """The rounds one after another, where their number is known now."""
    body = attributes_of(node)["body"]
    count, condition = (None if value is None else importer.known(value) for value in inputs[:2])
    if any(known is None and value is not None for known, value in zip((count, condition), inputs[:2], strict=True)):
        raise UnsupportedError(
            "runs a number of rounds that depends on the input", "export the network with a fixed number"
        )
    carried, going, rounds = list(inputs[2:]), condition is None or bool(condition.item()), 0
    collected: list[list[Value]] = [[] for _ in range(len(body.output) - 1 - len(carried))]
    while going and (count is None or rounds < int(count.item())):
        if rounds == MOST_ROUNDS:
            raise UnsupportedError(f"runs more than {MOST_ROUNDS} rounds", "export the network without the loop")
        index, again = importer.constant(np.array(rounds, np.int64)), importer.constant(np.array(True))
        goes_on, *results = importer.branch(body, [index, again, *carried])
        known = importer.known(goes_on)
        if known is None:
            raise UnsupportedError("ends when the input says so", "export the network with a fixed number of rounds")
        going, rounds = bool(known.item()), rounds + 1
        carried = results[: len(carried)]
        for parts, part in zip(collected, results[len(carried) :], strict=True):
            parts.append(part)
    if rounds == 0 and collected:
        raise UnsupportedError("collects the results of no rounds")
    return [*carried, *(_stacked(importer, parts, 0) for parts in collected)]


def _stacked(importer: Importer, parts: Sequence[Value], axis: int) -> relax.Expr:
    rows = [importer.bb.emit(relax.op.expand_dims(part, axis)) for part in parts]
    return rows[0] if len(rows) == 1 else importer.bb.emit(relax.op.concat(rows, axis))


def _scan(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    """The rounds over the slices of the scanned inputs, one after another."""
    if importer.opset < 9:
        raise UnsupportedError("is not supported in opset 8", "export the network with a later opset")
    attributes = attributes_of(node)
    body, scanned = attributes["body"], attributes["num_scan_inputs"]
    carried, series = list(inputs[: len(inputs) - scanned]), inputs[len(inputs) - scanned :]
    collected: list[list[Value]] = [[] for _ in range(len(body.output) - len(carried))]
    given = attributes.get("scan_input_axes", [0] * scanned)
    axes = [axis % len(x.ty.shape) for axis, x in zip(given, series, strict=True)]
    backwards = attributes.get("scan_input_directions", [0] * scanned)
    rounds = int(series[0].ty.shape[axes[0]])
    if rounds > MOST_ROUNDS:
        raise UnsupportedError(f"runs more than {MOST_ROUNDS} rounds", "export the network without the loop")
    for index in range(rounds):
        slices = [
            importer.bb.emit(relax.op.take(x, relax.const(rounds - 1 - index if back else index, "int64"), axis))
            for x, axis, back in zip(series, axes, backwards, strict=True)
        ]
        results = importer.branch(body, [*carried, *slices])
        carried = results[: len(carried)]
        for parts, part in zip(collected, results[len(carried) :], strict=True):
            parts.append(part)
    out_axes = attributes.get("scan_output_axes", [0] * len(collected))
    out_backwards = attributes.get("scan_output_directions", [0] * len(collected))
    stacked = [
        _stacked(importer, parts[::-1] if back else parts, axis)
        for parts, axis, back in zip(collected, out_axes, out_backwards, strict=True)
    ]
    return [*carried, *stacked]


def _index(importer: Importer, value: Value, otherwise: int) -> int:
    if value is None:
        return otherwise
    known = importer.known(value)
    if known is None:
        raise UnsupportedError("picks from a sequence by an index that depends on the input")
    return int(known.item())


def _sequence_at(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    return [inputs[0][_index(importer, inputs[1], 0)]]


def _sequence_insert(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    sequence = list(inputs[0])
    sequence.insert(_index(importer, inputs[2] if len(inputs) > 2 else None, len(sequence)), inputs[1])
    return [sequence]


def _sequence_erase(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    sequence = list(inputs[0])
    del sequence[_index(importer, inputs[1] if len(inputs) > 1 else None, -1)]
    return [sequence]


def _split_to_sequence(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    attributes = attributes_of(node)
    x = inputs[0]
    axis = attributes.get("axis", 0) % len(x.ty.shape)
    extent = int(x.ty.shape[axis])
    split = importer.known(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else np.array(1)
    if split is None:
        raise UnsupportedError("splits into parts whose sizes depend on the input")
    sizes = split.tolist() if split.ndim else equal_parts(extent, int(split.item()))
    ends = np.cumsum(sizes)
    parts = [
        importer.bb.emit(relax.op.strided_slice(x, [axis], [int(end - size)], [int(end)]))
        for end, size in zip(ends, sizes, strict=True)
    ]
    if len(inputs) < 2 and not attributes.get("keepdims", 1):
        parts = [importer.bb.emit(relax.op.squeeze(part, [axis])) for part in parts]
    return [parts]


def _concat_from_sequence(importer: Importer, node: Any, inputs: list[Value]) -> list[Value]:
    attributes = attributes_of(node)
    if attributes.get("new_axis", 0):
        return [_stacked(importer, inputs[0], attributes["axis"])]
    return [importer.bb.emit(relax.op.concat(inputs[0], attributes["axis"]))]


SPECIAL: dict[str, Special] = {
    "Constant": _constant_node,
    "Identity": _identity,
    "Shape": _shape,
    "Size": _size,
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
    "SequenceConstruct": lambda importer, node, inputs: [list(inputs)],
    "SequenceEmpty": lambda importer, node, inputs: [[]],
    "SequenceAt": _sequence_at,
    "SequenceInsert": _sequence_insert,
    "SequenceErase": _sequence_erase,
    "SequenceLength": lambda importer, node, inputs: [importer.constant(np.array(len(inputs[0]), np.int64))],
    "SplitToSequence": _split_to_sequence,
    "ConcatFromSequence": _concat_from_sequence,
    "Optional": lambda importer, node, inputs: [inputs[0] if inputs else None],
    "OptionalGetElement": _identity,
    "OptionalHasElement": lambda importer, node, inputs: [
        importer.constant(np.array(bool(inputs) and inputs[0] is not None))
    ],
}
