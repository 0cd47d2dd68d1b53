"""ONNX graphs to Relax: walked node by node with everything computed that is known now, so that shapes are fixed.

What depends only on constants is evaluated by ONNX's reference, loops of a known count are unrolled, functions are
entered; the rest is converted by ``onnx_conversions``, by TVM's importer, or as ONNX itself defines it in simpler
operators.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Sequence
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
from dance_tvm.frontend.onnx_control import SPECIAL
from dance_tvm.frontend.onnx_conversions.operator import Operator, UnsupportedError
from dance_tvm.frontend.onnx_exact import exact
from dance_tvm.frontend.onnx_nodes import (
    OTHER_FLOATS,
    Value,
    attributes_of,
    defaults_of,
    evaluated,
    function_of,
    layer_of,
    type_of,
    with_attributes,
    without_other_floats,
)
from dance_tvm.frontend.ranges import with_ranges
from dance_tvm.frontend.torch_program import first_line

#: Constants that depend only on constants are not computed where they would grow to more elements than this.
MOST_ELEMENTS = 1 << 24

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

# Attributes that later versions of an operator take as inputs: the last version that has them, and their order.
_BECAME_INPUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    **dict.fromkeys(("Squeeze", "Unsqueeze", "ReduceSum"), (12, ("axes",))),
    **{f"Reduce{name}": (17, ("axes",)) for name in _REDUCTIONS},
    **{"Split": (12, ("split",)), "Clip": (10, ("min", "max")), "Pad": (10, ("pads", "value")), "TopK": (9, ("k",))},
    **{"Slice": (9, ("starts", "ends", "axes")), "Upsample": (8, ("scales",))},
}


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
    importer = _Importer(opsets, source.model.functions, model.producer_name)
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
    exactly = functools.partial(exact, source.model)
    return Imported(mod, path.stem, onnx_file.sha256(path), inputs, outputs, source.run, exactly)


def _checked(
    mod: tvm.IRModule, inputs: Sequence[TensorSpec], importer: _Importer, source: onnx_file.Source
) -> onnx_file.Source:
    """What ``mod`` equals on random input: ONNX Runtime's ``source``, or the standard's reference where they differ."""
    try:
        exactly = functools.partial(exact, source.model)
        check_import(mod, inputs, source.run, lambda arrays: importer.compare_with(source, arrays), exactly)
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
        reason = first_line(problem)[:200]
        raise DanceError(f"{source.path} imports, and cannot be compared with its source: {reason}") from problem


class _Importer(ONNXGraphImporter):
    """TVM's importer, which names what it emits after the layer of each node; every node's result gets a variable."""

    _nodes: dict[str, Value]

    def __init__(self, opsets: dict[str, int], functions: Sequence[Any], producer: str) -> None:
        super().__init__({}, "float32", keep_params_in_input=False, sanitize=False)
        self.opset, self.producer = opsets[""], producer
        self.bb = NamingBuilder()
        self._functions = {(function.domain, function.name): function for function in functions}
        self._layers: dict[str, str] = {}
        self._weights: set[str] = set()
        self._within = ""  # the layer whose function or loop is being walked

    def run(self, graph: Any, specs: Sequence[TensorSpec], declared: Sequence[Any]) -> tvm.IRModule:
        """The graph as a module whose ``main`` takes inputs as ``specs`` says and returns a tuple as ``declared``."""
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
            var.name: (self._layers.get(name, name), tensor_of(without_other_floats(values[name])))
            for name, var in self._nodes.items()
            if isinstance(var, relax.Var) and isinstance(values.get(name), np.ndarray)
        }

    def constant(self, array: Any) -> relax.Expr:
        """``array`` as an expression."""
        array = without_other_floats(np.asarray(array))
        return relax.const(array, str(array.dtype))  # without a type, a single integer would become an int32

    def _as_computed(self, value: relax.Expr) -> relax.Expr:
        """``value`` in the type that is computed in."""
        other = str(value.ty.dtype.dtype) in OTHER_FLOATS
        return self.bb.emit(relax.op.astype(value, "float32")) if other else value

    def _result(self, value: Any) -> relax.Expr:
        """An output of the network, in its declared type."""
        found = self._nodes.get(value.name)
        if not isinstance(found, relax.Expr):
            raise DanceError(f"the output {value.name!r} is not a tensor: export the network with tensors out")
        declared = onnx_file.dtype_name(value) if value.type.tensor_type.elem_type else ""
        if declared in OTHER_FLOATS and str(found.ty.dtype.dtype) == "float32":
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
            raise DanceError(f"the operator {node.op_type} of layer {layer!r} {problem}") from problem
        except DanceError:
            raise
        except Exception as problem:
            failure = f"the operator {node.op_type} of layer {layer!r} cannot be read"
            raise DanceError(f"{failure}: export the network to .pt2, or without it") from problem
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
            special = SPECIAL.get(node.op_type) if node.domain in ("", "ai.onnx") else None
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
                otherwise = "export the network to .pt2, or take it out of what is exported"
                raise UnsupportedError("is not supported", otherwise)
            return self._inside(body, node, inputs, defaults_of(node, self.opset))
        try:
            # TVM's importer prints what it fails on before it raises.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = self._emitted(self._convert_operator(kind, onnx_input(inputs), attributes, opset))
        except Exception as problem:
            if body is not None:
                return self._inside(body, node, inputs, defaults_of(node, self.opset))
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
        """The results of a node that reads only constants; None where something else comes in, or grows large."""
        arrays = [self.known(value) for value in inputs]
        if not arrays or node.domain not in ("", "ai.onnx") or node.op_type in _NEVER_THE_SAME:
            return None
        if any(array is None and value is not None for array, value in zip(arrays, inputs, strict=True)):
            return None
        feeds = {name: array for name, array in zip(node.input, arrays, strict=True) if array is not None}
        try:
            results = evaluated(node, feeds, self.opset)
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
            return function_of(schema.get_function_with_opset_version(max(usable))) if usable else schema.function_body
        if not schema.has_context_dependent_function:
            return None
        usable = [version for version in schema.context_dependent_function_opset_versions if version <= self.opset]
        if not usable:
            return None
        types = [type_of(value).SerializeToString() for value in inputs]
        try:
            body = schema.get_context_dependent_function_with_opset_version(
                max(usable), node.SerializeToString(), types
            )
        except Exception:
            return None  # the standard gives none in this form
        return function_of(body)

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
                self._construct(with_attributes(inner, attributes))
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


# Results that change with each call.
_NEVER_THE_SAME = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")


# Results whose shape no kernel knows before it runs.
_OF_ANY_SIZE = ("NonMaxSuppression", "NonZero", "Unique", "Range")
