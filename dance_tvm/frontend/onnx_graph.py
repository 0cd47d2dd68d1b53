"""ONNX graphs to Relax: walked node by node with everything computed that is known now, so that shapes are fixed.

What depends on constants alone is evaluated by ONNX's reference, loops of a known count are unrolled, functions are
entered; the rest is converted by ``onnx_conversions``, by TVM's importer, or as ONNX itself defines it in simpler
operators.
"""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import tvm
from onnx import numpy_helper
from tvm import relax
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map, onnx_input

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend import interpreter, onnx_conversions, onnx_file
from dance_tvm.frontend.check import check_import
from dance_tvm.frontend.interface import Arrays, Imported, TensorSpec, tensor_of
from dance_tvm.frontend.names import NamingBuilder
from dance_tvm.frontend.onnx_conversions import Operator, UnsupportedError
from dance_tvm.frontend.ranges import with_ranges
from dance_tvm.frontend.torch_program import first_line

_CELLS = ("RNN", "GRU", "LSTM")  # one operator for a whole recurrent layer

#: Loops with more rounds than this are not unrolled.
MOST_ROUNDS = 256

#: Constants that depend on constants alone are not computed where they would grow to more elements than this.
MOST_ELEMENTS = 1 << 24

# Computed in float32: what the kernels are made for. Inputs and outputs keep their types.
_OTHER_FLOATS = ("float16", "bfloat16", "float64")

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

# Attributes that later versions of an operator take as inputs: the last version that has them, and their order.
_BECAME_INPUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    **dict.fromkeys(("Squeeze", "Unsqueeze", "ReduceSum"), (12, ("axes",))),
    **{f"Reduce{name}": (17, ("axes",)) for name in _REDUCTIONS},
    **{"Split": (12, ("split",)), "Clip": (10, ("min", "max")), "Pad": (10, ("pads", "value")), "TopK": (9, ("k",))},
    **{"Slice": (9, ("starts", "ends", "axes")), "Upsample": (8, ("scales",))},
}

Value = Any  # an expression, a list of values (a sequence), or None (an optional input that is not there)


def import_onnx(
    path: Path, *, check: bool = True, shapes: onnx_file.Shapes | None = None, batch: int | None = None
) -> Imported:
    """Import an ``.onnx`` file of opset 6 or later; external data may lie beside it.

    ``shapes`` fixes, by input name, what the file leaves open, ``batch`` the first dimension of all. Raises DanceError
    for damaged files, older opsets, shapes that stay open, unsupported operators (named, with their layer) and, with
    ``check``, for results that differ from the source's.
    """
    model = onnx_file.load(path)
    opsets = onnx_file.opsets_of(model, path)
    inputs = onnx_file.input_specs(model.graph, shapes or {}, batch)
    source = onnx_file.Source(path, model)
    importer = _Importer(opsets, source.model.functions)
    mod = importer.run(source.model.graph, inputs, model.graph.output)
    outputs = []
    for index, (value, kind) in enumerate(zip(model.graph.output, mod["main"].ret_ty.fields, strict=True)):
        shape, dtype = tuple(int(n) for n in kind.shape), str(kind.dtype.dtype)
        outputs.append(TensorSpec(value.name, shape, dtype, f"output {index} of the network"))

    def both(arrays: Arrays) -> Arrays:
        interpreter.outputs(mod, arrays)  # ONNX Runtime reads past the end of a few tensors without a word
        return source.run(arrays)

    inputs = with_ranges(inputs, both)
    if check:
        source = _checked(mod, inputs, importer, source)
    return Imported(mod, path.stem, onnx_file.sha256(path), inputs, outputs, source.run)


def _checked(
    mod: tvm.IRModule, inputs: Sequence[TensorSpec], importer: _Importer, source: onnx_file.Source
) -> onnx_file.Source:
    """What ``mod`` equals on random input: ONNX Runtime's ``source``, or the standard's reference where they differ."""
    try:
        check_import(mod, inputs, source.run, lambda arrays: importer.compare_with(source, arrays))
        return source
    except DanceError:
        standard = source.as_the_standard_says()
        if standard is None:
            raise
        with contextlib.suppress(DanceError):
            check_import(mod, inputs, standard.run, lambda _arrays: {})
            return standard
        raise
    except Exception as problem:
        told = first_line(problem)[:200]
        raise DanceError(f"{source.path} imports, and cannot be compared with its source: {told}") from problem


class _Importer(ONNXGraphImporter):
    """TVM's importer, told which layer each node belongs to; every node's result gets a variable."""

    _nodes: dict[str, Value]

    def __init__(self, opsets: dict[str, int], functions: Sequence[Any]) -> None:
        super().__init__({}, "float32", keep_params_in_input=False, sanitize=False)
        self.opset = opsets[""]
        self.bb = NamingBuilder()
        self._functions = {(function.domain, function.name): function for function in functions}
        self._layers: dict[str, str] = {}
        self._weights: set[str] = set()
        self._within = ""  # the layer whose function or loop is being walked

    def run(self, graph: Any, specs: Sequence[TensorSpec], declared: Sequence[Any]) -> tvm.IRModule:
        """The graph as a module whose ``main`` takes inputs as ``specs`` tells and returns a tuple as ``declared``."""
        self._weights = {tensor.name for tensor in graph.initializer}
        inputs = [relax.Var(spec.name, relax.TensorType(spec.shape, spec.dtype)) for spec in specs]
        with self.bb.function("main", params=inputs):
            with self.bb.dataflow():
                for var in inputs:
                    self.bb.enter(var.name, only=False)
                    self._nodes[var.name] = self._as_computed(var)
                results, problem = [], None
                try:
                    self._walk(graph)
                    results = [self._result(value) for value in declared]
                except DanceError as refusal:
                    problem = refusal  # TVM's builder wants to be left in order
                returned = self.bb.emit_output(relax.Tuple(results))
            self.bb.emit_func_output(returned)
        if problem is not None:
            raise problem
        mod = relax.transform.CanonicalizeBindings()(self.bb.get())
        return relax.transform.DeadCodeElimination()(mod)

    def compare_with(self, source: onnx_file.Source, arrays: Arrays) -> dict[str, tuple[str, torch.Tensor]]:
        """For each variable that holds a value of the graph: its layer, and the source's value."""
        values = source.run_all(arrays)
        return {
            var.name: (self._layers.get(name, name), tensor_of(_without_other_floats(values[name])))
            for name, var in self._nodes.items()
            if isinstance(var, relax.Var) and isinstance(values.get(name), np.ndarray)
        }

    def constant(self, array: Any) -> relax.Expr:
        """``array`` as an expression."""
        array = _without_other_floats(np.asarray(array))
        return relax.const(array, str(array.dtype))  # without a type, a single integer would become an int32

    def _as_computed(self, value: relax.Expr) -> relax.Expr:
        """``value`` in the type that is computed in."""
        other = str(value.ty.dtype.dtype) in _OTHER_FLOATS
        return self.bb.emit(relax.op.astype(value, "float32")) if other else value

    def _result(self, value: Any) -> relax.Expr:
        """An output of the network, in its declared type."""
        found = self._nodes.get(value.name)
        if not isinstance(found, relax.Expr):
            raise DanceError(f"The output {value.name!r} is not a tensor: export the network with tensors out.")
        declared = onnx_file.dtype_name(value) if value.type.tensor_type.elem_type else ""
        if declared in _OTHER_FLOATS and str(found.ty.dtype.dtype) == "float32":
            self.bb.enter(value.name, only=False)
            return self.bb.emit(relax.op.astype(found, declared))
        return found

    def _walk(self, graph: Any) -> None:
        """Every node of a graph or function, in order."""
        for tensor in getattr(graph, "initializer", ()):
            self._nodes[tensor.name] = self.constant(numpy_helper.to_array(tensor))
        for node in graph.node:
            self._construct(node)

    def _construct(self, node: Any) -> None:
        layer = self._within or layer_of(node, self._weights)
        self.bb.enter(layer, only=True)
        try:
            values = self._values(node)
        except UnsupportedError as problem:
            raise DanceError(f"The operator {node.op_type} of layer {layer!r} {problem}.") from problem
        except DanceError:
            raise
        except Exception as problem:
            told = f"The operator {node.op_type} of layer {layer!r} cannot be read"
            raise DanceError(f"{told}: export the network to .pt2, or without it.") from problem
        if not self._within:
            self._layers.update(dict.fromkeys(node.output, layer))
        for name, value in zip(node.output, values, strict=False):
            if name:
                self._nodes[name] = self._without_elements(value)

    @staticmethod
    def _without_elements(value: Value) -> Value:
        """``value``, as a constant where it holds nothing: there is nothing to compute."""
        if isinstance(value, relax.Var) and isinstance(value.ty, relax.TensorType):
            shape = [int(extent) for extent in value.ty.shape]
            return (
                relax.const(np.empty(shape, str(value.ty.dtype.dtype)), str(value.ty.dtype.dtype))
                if 0 in shape
                else value
            )
        return value

    def _values(self, node: Any) -> Sequence[Value]:
        """What ``node`` computes, one value for each output."""
        missing = next((name for name in node.input if name and name not in self._nodes), None)
        if missing is not None:
            raise UnsupportedError(f"reads {missing!r}, which nothing computes", "export the network again")
        inputs = [self._nodes[name] if name else None for name in node.input]
        layer, self._within = self._within, self._within or layer_of(node, self._weights)
        try:
            special = _SPECIAL.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if special is not None:
                return special(self, node, inputs)
            if (function := self._functions.get((node.domain, node.op_type))) is not None:
                return self._inside(function, node, inputs)
            if any(isinstance(value, list) for value in inputs):
                raise UnsupportedError("is not supported on sequences of tensors")
        finally:
            self._within = layer
        if (folded := self._folded(node, inputs)) is not None:
            return folded
        return self._converted(node, inputs)

    def _converted(self, node: Any, inputs: list[Value]) -> Sequence[Value]:
        kind, opset = node.op_type, self.opset
        if kind in _NEVER_THE_SAME:
            raise UnsupportedError("makes random numbers, which a check cannot compare", "take them in as an input")
        if kind in _OF_ANY_SIZE:
            raise UnsupportedError("has a result whose size depends on the input's values")
        attributes = attributes_of(node)
        if opset < 7 and attributes.pop("broadcast", 0):
            inputs = self._as_broadcast(inputs, attributes.pop("axis", None))
        if kind in _BECAME_INPUTS and opset <= _BECAME_INPUTS[kind][0]:
            inputs = [*inputs, *(self._input_of(attributes.pop(name, None)) for name in _BECAME_INPUTS[kind][1])]
            opset = onnx.defs.onnx_opset_version()
        operator = Operator(self, kind, inputs, attributes, len(node.output), opset)
        if (conversion := onnx_conversions.CONVERSIONS.get(kind)) is not None:
            try:
                return self._emitted(conversion(operator))
            except (UnsupportedError, DanceError):
                raise
            except Exception as problem:
                raise UnsupportedError(f"is not supported in this form ({operator.described()})") from problem
        body = self._definition(node, inputs)
        if kind not in _get_convert_map() or (body is not None and kind in onnx_conversions.BY_DEFINITION):
            if body is None:
                raise UnsupportedError("is not supported", _instead(kind))
            return self._inside(body, node, inputs, _defaults(node, self.opset))
        try:
            # TVM's importer prints what it fails on before it raises.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = self._emitted(self._convert_operator(kind, onnx_input(inputs), attributes, opset))
        except Exception as problem:
            if body is not None:
                return self._inside(body, node, inputs, _defaults(node, self.opset))
            raise UnsupportedError(f"is not supported in this form ({operator.described()})") from problem
        if len(found) < sum(map(bool, node.output)):
            raise UnsupportedError(f"is not supported with {len(node.output)} outputs")
        return found

    def _as_broadcast(self, inputs: list[Value], axis: int | None) -> list[Value]:
        """Inputs of an operator of opset 6, whose second one begins at ``axis`` of the first."""
        x, y, *rest = inputs
        if axis is None or not y.ty.shape:
            return inputs
        behind = len(x.ty.shape) - axis % len(x.ty.shape) - len(y.ty.shape)
        return [x, self.bb.emit(relax.op.reshape(y, [*(int(n) for n in y.ty.shape), *[1] * behind])), *rest]

    def _input_of(self, attribute: Any) -> relax.Expr | None:
        """An attribute as the input that it became."""
        if attribute is None:
            return None
        array = np.asarray(attribute)
        return self.constant(array.astype("float32" if array.dtype.kind == "f" else "int64"))

    def _emitted(self, value: Any) -> list[Value]:
        """The parts of ``value``, each in a variable of its own: an expression used twice would be computed twice."""
        if isinstance(value, (list, tuple)):
            return [part for each in value for part in (self._emitted(each) if each is not None else [None])]
        value = self.bb.normalize(value)
        if isinstance(value, relax.Tuple):
            return [part for field in value.fields for part in self._emitted(field)]
        var = self.bb.emit(value) if isinstance(value, (relax.Call, relax.TupleGetItem)) else value
        if isinstance(var.ty, relax.TupleType):
            return [self.bb.emit(relax.TupleGetItem(var, index)) for index in range(len(var.ty.fields))]
        if not isinstance(var.ty, relax.TensorType) or not isinstance(var.ty.shape, relax.ShapeExpr):
            raise UnsupportedError("has a result whose shape depends on the input's values")
        if not all(isinstance(extent, (int, tvm.tirx.IntImm)) for extent in var.ty.shape):
            raise UnsupportedError("has a result whose shape depends on the input's values")
        return [var]

    def known(self, value: Value) -> np.ndarray | None:
        """The value of an input that is known now."""
        return value.value.numpy() if isinstance(value, tvm.ir.expr.GenericConst) else None

    def _folded(self, node: Any, inputs: list[Value]) -> list[Value] | None:
        """The results of a node that reads constants alone; None where something else comes in, or grows large."""
        arrays = [self.known(value) for value in inputs]
        if not arrays or node.domain not in ("", "ai.onnx") or node.op_type in _NEVER_THE_SAME:
            return None
        if any(array is None and value is not None for array, value in zip(arrays, inputs, strict=True)):
            return None
        feeds = {name: array for name, array in zip(node.input, arrays, strict=True) if array is not None}
        try:
            results = _evaluated(node, feeds, self.opset)
        except Exception:
            return None  # the reference lacks a few forms that can be compiled
        most = max([MOST_ELEMENTS, *(array.size for array in feeds.values())])
        if not all(isinstance(result, np.ndarray) and result.size <= most for result in results):
            return None
        return [self.constant(result) for result in results]

    def _definition(self, node: Any, inputs: list[Value]) -> Any:
        """The function in simpler operators that the standard gives for a node; None where it gives none."""
        try:
            schema: Any = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        except onnx.defs.SchemaError:
            return None
        if schema.has_function:
            usable = [version for version in schema.function_opset_versions if version <= self.opset]
            return _function(schema.get_function_with_opset_version(max(usable))) if usable else schema.function_body
        if not schema.has_context_dependent_function:
            return None
        usable = [version for version in schema.context_dependent_function_opset_versions if version <= self.opset]
        if not usable:
            return None
        types = [_type_of(value).SerializeToString() for value in inputs]
        try:
            body = schema.get_context_dependent_function_with_opset_version(
                max(usable), node.SerializeToString(), types
            )
        except Exception:
            return None  # the standard gives none in this form
        return _function(body)

    def _inside(self, function: Any, node: Any, inputs: list[Value], defaults: Sequence[Any] = ()) -> list[Value]:
        """What ``function``, a local one or the standard's, computes for ``node``."""
        attributes = {attribute.name: attribute for attribute in [*defaults, *function.attribute_proto]}
        attributes.update({attribute.name: attribute for attribute in node.attribute})
        outer, opset, within = self._nodes, self.opset, self._within
        self._nodes = dict(zip_longest(function.input, inputs[: len(function.input)]))
        self.opset = next((entry.version for entry in function.opset_import if entry.domain in ("", "ai.onnx")), opset)
        self._within = within or layer_of(node, self._weights)
        try:
            for inner in function.node:
                self._construct(_with_attributes(inner, attributes))
            return [self._nodes.get(name) for name in function.output]
        finally:
            self._nodes, self.opset, self._within = outer, opset, within

    def branch(self, graph: Any, values: Sequence[Value] = ()) -> list[Value]:
        """What a graph inside of a node computes of ``values``; it sees what is around it."""
        outer = self._nodes
        self._nodes = {**outer, **dict(zip((value.name for value in graph.input), values, strict=False))}
        try:
            self._walk(graph)
            return [self._nodes[value.name] for value in graph.output]
        finally:
            self._nodes = outer


def attributes_of(node: Any) -> dict[str, Any]:
    """Attributes by name; strings stay bytes, lists are tuples."""
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {
        name: value if isinstance(value, (bytes, str, int, float)) or hasattr(value, "DESCRIPTOR") else tuple(value)
        for name, value in values.items()
    }


def _without_other_floats(array: np.ndarray) -> np.ndarray:
    if str(array.dtype) in _OTHER_FLOATS or str(array.dtype).startswith("float8"):
        return array.astype(np.float32)
    return array.astype(np.int8) if str(array.dtype) == "int4" else array


def _type_of(value: Value) -> Any:
    if value is None:
        return onnx.TypeProto()
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(str(value.ty.dtype.dtype)))
    return onnx.helper.make_tensor_type_proto(dtype, [int(extent) for extent in value.ty.shape])


def _function(body: Any) -> Any:
    function = onnx.FunctionProto.FromString(body) if isinstance(body, bytes) else body
    return function if function.node else None


def _defaults(node: Any, opset: int) -> list[Any]:
    """The attributes that the standard gives an operator where the node gives none."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    given = [(name, attribute.default_value) for name, attribute in schema.attributes.items()]
    return [default for _name, default in given if default.name]


def _with_attributes(node: Any, attributes: dict[str, Any]) -> Any:
    """A function's node with the attributes of the call in place of their names."""
    bound = onnx.NodeProto()
    bound.CopyFrom(node)
    del bound.attribute[:]
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name in attributes:
                given = bound.attribute.add()
                given.CopyFrom(attributes[attribute.ref_attr_name])
                given.name = attribute.name
            continue
        kept = bound.attribute.add()
        kept.CopyFrom(attribute)
        if attribute.HasField("g"):
            del kept.g.node[:]
            kept.g.node.extend(_with_attributes(inner, attributes) for inner in attribute.g.node)
    return bound


def _evaluated(node: Any, feeds: dict[str, np.ndarray], opset: int) -> list[Any]:
    """A node's results on arrays, by ONNX's reference."""
    from onnx.reference import ReferenceEvaluator

    inputs = [onnx.ValueInfoProto(name=name) for name in feeds]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = onnx.helper.make_graph([node], "node", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    found = iter(ReferenceEvaluator(model).run(None, feeds))
    return [np.asarray(next(found)) if name else np.zeros(0) for name in node.output]


# Results that change with each call.
_NEVER_THE_SAME = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")


# Results whose shape no kernel knows before it runs.
_OF_ANY_SIZE = ("NonMaxSuppression", "NonZero", "Unique", "Range")


def _instead(kind: str) -> str:
    """What to do about an operator that cannot be read."""
    if kind in _CELLS:
        return "export the network to .pt2: there it is made of simple operators"
    return "export the network to .pt2, or take it out of what is exported"


Special = Callable[[_Importer, Any, list[Value]], Sequence[Value]]


def _constant_node(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
    (attribute,) = node.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return [importer.constant(numpy_helper.to_array(value))]
    if attribute.name == "sparse_value":
        return [importer.constant(onnx_file.dense(value))]
    if attribute.name.startswith("value_string"):
        raise UnsupportedError("holds text, which no tensor of a compiled network can")
    return [importer.constant(np.asarray(value, "float32" if attribute.name.startswith("value_float") else "int64"))]


def _shape(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
    if isinstance(inputs[0], list):
        raise UnsupportedError("is not supported on sequences of tensors")
    shape = np.array([int(extent) for extent in inputs[0].ty.shape], np.int64)
    attributes = attributes_of(node)
    return [importer.constant(shape[attributes.get("start", 0) : attributes.get("end", len(shape))])]


def _size(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
    return [importer.constant(np.array(np.prod([int(extent) for extent in inputs[0].ty.shape]), np.int64))]


def _identity(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
    return [inputs[0]]


def _if(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
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


def _loop(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
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


def _stacked(importer: _Importer, parts: Sequence[Value], axis: int) -> relax.Expr:
    rows = [importer.bb.emit(relax.op.expand_dims(part, axis)) for part in parts]
    return rows[0] if len(rows) == 1 else importer.bb.emit(relax.op.concat(rows, axis))


def _scan(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
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


def _index(importer: _Importer, value: Value, otherwise: int) -> int:
    if value is None:
        return otherwise
    known = importer.known(value)
    if known is None:
        raise UnsupportedError("picks from a sequence by an index that depends on the input")
    return int(known.item())


def _sequence_at(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
    return [inputs[0][_index(importer, inputs[1], 0)]]


def _sequence_insert(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
    sequence = list(inputs[0])
    sequence.insert(_index(importer, inputs[2] if len(inputs) > 2 else None, len(sequence)), inputs[1])
    return [sequence]


def _sequence_erase(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
    sequence = list(inputs[0])
    del sequence[_index(importer, inputs[1] if len(inputs) > 1 else None, -1)]
    return [sequence]


def _split_to_sequence(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
    attributes = attributes_of(node)
    x = inputs[0]
    axis = attributes.get("axis", 0) % len(x.ty.shape)
    extent = int(x.ty.shape[axis])
    split = importer.known(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else np.array(1)
    if split is None:
        raise UnsupportedError("splits into parts whose sizes depend on the input")
    sizes = split.tolist() if split.ndim else onnx_conversions.equal_parts(extent, int(split.item()))
    ends = np.cumsum(sizes)
    parts = [
        importer.bb.emit(relax.op.strided_slice(x, [axis], [int(end - size)], [int(end)]))
        for end, size in zip(ends, sizes, strict=True)
    ]
    if len(inputs) < 2 and not attributes.get("keepdims", 1):
        parts = [importer.bb.emit(relax.op.squeeze(part, [axis])) for part in parts]
    return [parts]


def _concat_from_sequence(importer: _Importer, node: Any, inputs: list[Value]) -> list[Value]:
    attributes = attributes_of(node)
    if attributes.get("new_axis", 0):
        return [_stacked(importer, inputs[0], attributes["axis"])]
    return [importer.bb.emit(relax.op.concat(inputs[0], attributes["axis"]))]


_SPECIAL: dict[str, Special] = {
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


def layer_of(node: Any, weights: set[str]) -> str:
    """The layer's name in the source network: from its weight's name, PyTorch's scopes, or the node's own name."""
    if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and len(node.input) > 1:
        layer, dot, rest = node.input[1].partition(".weight")
        if node.input[1] in weights and dot and (not rest or not rest[0].isalnum()):
            return layer
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
    if scopes:
        *modules, last = ast.literal_eval(scopes)
        module = modules[-1] if modules else ""
        kinds = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.class_hierarchy"), "[]")
        leaf = "torch.nn.modules" in "".join(ast.literal_eval(kinds)[-2:-1])
        return module if leaf or not last else f"{module}.{last}".strip(".")
    return joined(node.name) or (node.output[0] if node.output else node.op_type)


def joined(name: str) -> str:
    """``/layer1/layer1.0/conv1/Conv``, as PyTorch's older exporter writes it, as ``layer1.0.conv1``."""
    *path, operator = name.strip("/").split("/")
    if not path:
        return operator
    joined = ""
    for part in path:
        joined = part if not joined or part.startswith(f"{joined}.") else f"{joined}.{part}"
    return joined if operator in ("Conv", "ConvTranspose", "Gemm", "MatMul") else f"{joined}.{operator}"
