"""ONNX graphs to Relax: TVM's importer with layer names, one-sentence errors, and operators where it emits loops.

ONNX Runtime (or ONNX's own reference, slowly) is the source that the import is checked against.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
import tvm
from tvm import relax
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map, get_constant

from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.frontend.check import check_import
from dance_tvm.frontend.interface import Arrays, Imported, TensorSpec, require_shape, usual_meaning
from dance_tvm.frontend.names import NamingBuilder
from dance_tvm.frontend.torch_program import first_line

OLDEST_OPSET = 17

_CELLS = ("RNN", "GRU", "LSTM")  # one operator for a whole recurrent layer


def import_onnx(path: Path, *, check: bool = True, shapes: Mapping[str, Sequence[int]] | None = None) -> Imported:
    """Import an ``.onnx`` file of opset 17 or later with fixed shapes; external data may lie beside it.

    Raises DanceError for damaged files, older opsets, dynamic shapes, unsupported operators (named, with their layer)
    and, with ``check``, for results that differ from the source's.
    """
    model = _load(path)
    _fix_shapes(model.graph, shapes or {})
    inputs = [_spec(value, is_input=True) for value in _true_inputs(model.graph)]
    source = _Source(path, model)
    importer = _Importer(_opset(model, path))
    mod = importer.run(_folded(model).graph)
    outputs = [_spec(value, is_input=False) for value in model.graph.output]
    outputs = [
        TensorSpec(
            spec.name, tuple(int(n) for n in kind.shape), str(kind.dtype.dtype), f"output {index} of the network"
        )
        for index, (spec, kind) in enumerate(zip(outputs, mod["main"].ret_ty.fields, strict=True))
    ]
    if check:
        arrays = random_inputs(inputs)
        check_import(mod, arrays, source.run(arrays), lambda: importer.compare_with(source, arrays))
    return Imported(mod, path.stem, _sha256(path), inputs, outputs, source.run)


def _load(path: Path) -> Any:
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(str(path))
    except FileNotFoundError as problem:
        raise DanceError(f"{path} keeps its weights in another file, which is missing: {problem}") from None
    except Exception as problem:
        raise DanceError(f"{path} is not an ONNX model, or is damaged: {first_line(problem)[:200]}") from None
    if not model.graph.node:
        raise DanceError(f"{path} is not an ONNX model, or is damaged: it holds no operators.")
    return model


def _opset(model: Any, path: Path) -> int:
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    version = versions.get("ai.onnx", 0)
    if version < OLDEST_OPSET:
        raise DanceError(f"{path} has opset {version}: export the network with opset {OLDEST_OPSET} or later.")
    return version


def _true_inputs(graph: Any) -> list[Any]:
    """Inputs that are not weights (old files list both)."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _fix_shapes(graph: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write ``shapes`` into the inputs that leave dimensions open."""
    values = {value.name: value.type.tensor_type.shape.dim for value in _true_inputs(graph)}
    declared = {name: [dim.dim_value or dim.dim_param or "?" for dim in dims] for name, dims in values.items()}
    for name, shape in require_shape(declared, shapes).items():
        for dim, extent in zip(values[name], shape, strict=True):
            dim.dim_value = extent


def _spec(value: Any, *, is_input: bool) -> TensorSpec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise DanceError(f"{value.name!r} of the network is not a tensor: export it with tensors in and out.")
    shape = tuple(dim.dim_value for dim in kind.shape.dim)
    if is_input and not all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in kind.shape.dim):
        told = ", ".join(dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim)
        raise DanceError(
            f"Input {value.name!r} has a dynamic shape ({told}): export the network with fixed shapes, one artifact "
            "for each."
        )
    dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    return TensorSpec(value.name, shape, dtype, usual_meaning(shape, dtype) if is_input else "")


def _folded(model: Any) -> Any:
    """``model`` with what depends on constants and fixed shapes computed, as older exporters leave it to the reader."""
    try:
        import onnxscript.optimizer

        folded = onnxscript.optimizer.optimize(model, onnx_shape_inference=True)
    except Exception:
        # Only a convenience: TVM's importer folds most of the same.
        return model
    # The optimizer renames the nodes that it rewrites; what they compute keeps its name.
    sources = {name: node for node in model.graph.node for name in node.output}
    for node in folded.graph.node:
        source = next((sources[name] for name in node.output if name in sources), None)
        if source is not None and source.op_type == node.op_type:
            node.name = source.name
            del node.metadata_props[:]
            node.metadata_props.extend(source.metadata_props)
    return folded


def _sha256(path: Path) -> str:
    """The file's bytes, and those of the weights that it keeps elsewhere."""
    digest = hashlib.sha256(path.read_bytes())
    weights = onnx.load(str(path), load_external_data=False).graph.initializer
    files = {entry.value for tensor in weights for entry in tensor.external_data if entry.key == "location"}
    for name in sorted(files):
        digest.update((path.parent / name).read_bytes())
    return digest.hexdigest()


class _Source:
    """The ONNX file itself, run by ONNX Runtime where it is installed."""

    def __init__(self, path: Path, model: Any) -> None:
        self.path, self.model = path, model
        self.names = [value.name for value in model.graph.output]
        self._session: Any = None

    def run(self, arrays: Arrays) -> Arrays:
        if self._session is None:
            self._session = self._open(self.model, str(self.path))
        return dict(zip(self.names, self._session.run(self.names, arrays), strict=True))

    def run_all(self, arrays: Arrays) -> Arrays:
        """Every value that the graph computes."""
        everything = onnx.ModelProto()
        everything.CopyFrom(self.model)
        names = [name for node in everything.graph.node for name in node.output if name]
        known = set(self.names)
        everything.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        session = self._open(everything, everything.SerializeToString())
        return dict(zip(names, session.run(names, arrays), strict=True))

    @staticmethod
    def _open(model: Any, source: str | bytes) -> Any:
        try:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception:
            # Not installed, or older than the file: ONNX's own reference is slow and knows every version.
            from onnx.reference import ReferenceEvaluator

            return ReferenceEvaluator(model)


class _Importer(ONNXGraphImporter):
    """TVM's importer, told which layer each node belongs to; every node's result gets a variable."""

    _nodes: dict[str, Any]

    def __init__(self, opset: int) -> None:
        super().__init__({}, "float32", keep_params_in_input=False, sanitize=False)
        self.opset = opset
        self.bb = NamingBuilder()
        self._layers: dict[str, str] = {}

    def run(self, graph: Any) -> tvm.IRModule:
        """The graph as a module whose ``main`` returns a tuple."""
        self._parse_graph_initializers(graph)
        self._parse_graph_input(graph)
        self._check_for_unsupported_ops(graph)
        weights = {tensor.name for tensor in graph.initializer}
        inputs = [value for name, value in self._inputs.items() if name not in weights]
        with self.bb.function("main", params=inputs):
            with self.bb.dataflow():
                for node in graph.node:
                    self._construct(node, weights)
                results = self.bb.emit_output(relax.Tuple([self._nodes[value.name] for value in graph.output]))
            self.bb.emit_func_output(results)
        mod = relax.transform.CanonicalizeBindings()(self.bb.get())
        return relax.transform.DeadCodeElimination()(mod)

    def compare_with(self, source: _Source, arrays: Arrays) -> dict[str, tuple[str, torch.Tensor]]:
        """For each variable that holds a value of the graph: its layer, and the source's value."""
        values = source.run_all(arrays)
        return {
            var.name: (self._layers.get(name, name), torch.from_numpy(np.array(values[name])))
            for name, var in self._nodes.items()
            if isinstance(var, relax.Var) and name in values
        }

    def _check_for_unsupported_ops(self, graph: Any) -> None:
        known = {*_get_convert_map(), *_CONVERSIONS, "Constant"}
        for node in graph.node:
            if node.op_type not in known:
                told = f"The operator {node.op_type} of layer {_layer(node, set())!r} is not supported."
                hint = " Export the network to .pt2: there it is made of simple operators."
                raise DanceError(told + (hint if node.op_type in _CELLS else ""))

    def _construct(self, node: Any, weights: set[str]) -> None:
        layer = _layer(node, weights)
        self._layers.update(dict.fromkeys(node.output, layer))
        self.bb.enter(layer, only=True)
        try:
            # TVM's importer prints what it fails on before it raises.
            with contextlib.redirect_stdout(io.StringIO()):
                self._construct_nodes(SimpleNamespace(node=[node]))
        except Exception as problem:
            raise DanceError(
                f"The operator {node.op_type} of layer {layer!r} is not supported in this form: {first_line(problem)}"
            ) from problem

    def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
        if op_name in _CONVERSIONS:
            value = self.bb.normalize(_CONVERSIONS[op_name](self, list(inputs), attrs))
        else:
            value = super()._convert_operator(op_name, inputs, attrs, opset)
        # A variable of its own: an expression used twice would be computed twice.
        return self.bb.emit(value) if isinstance(value, relax.Call) else value

    def constant(self, value: Any) -> np.ndarray | None:
        """The value of an input that is known now."""
        found = get_constant(value, [self._nodes, self._params])
        return found.value.numpy() if isinstance(found, tvm.ir.expr.GenericConst) else None


def _layer(node: Any, weights: set[str]) -> str:
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
    return _joined(node.name) or (node.output[0] if node.output else node.op_type)


def _joined(name: str) -> str:
    """``/layer1/layer1.0/conv1/Conv``, as PyTorch's older exporter writes it, as ``layer1.0.conv1``."""
    *path, operator = name.strip("/").split("/")
    if not path:
        return operator
    joined = ""
    for part in path:
        joined = part if not joined or part.startswith(f"{joined}.") else f"{joined}.{part}"
    return joined if operator in ("Conv", "ConvTranspose", "Gemm", "MatMul") else f"{joined}.{operator}"


Conversion = Callable[[_Importer, list[Any], dict[str, Any]], relax.Expr]


def _pad(importer: _Importer, inputs: list[Any], attrs: dict[str, Any]) -> relax.Expr:
    """Padding as a graph operator; negative amounts cut."""
    x = inputs[0]
    shape = [int(extent) for extent in x.ty.shape]
    amounts = importer.constant(inputs[1])
    value = importer.constant(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else np.array(0.0)
    axes = importer.constant(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else np.arange(len(shape))
    if amounts is None or value is None or axes is None:
        raise DanceError("the amounts of padding depend on the input")
    width = [0] * (2 * len(shape))
    begin, end = [0] * len(shape), list(shape)
    for axis, before, after in zip(axes, *np.split(amounts, 2), strict=True):
        width[2 * axis], width[2 * axis + 1] = max(0, int(before)), max(0, int(after))
        begin[axis], end[axis] = max(0, -int(before)), shape[axis] - max(0, -int(after))
    if begin != [0] * len(shape) or end != shape:
        x = importer.bb.emit(relax.op.strided_slice(x, list(range(len(shape))), begin, end))
    mode = {"edge": "replicate", "wrap": "circular"}.get(name := attrs.get("mode", b"constant").decode(), name)
    return relax.op.nn.pad(x, width, pad_mode=mode, pad_value=float(value.item()))


def _clip(importer: _Importer, inputs: list[Any], attrs: dict[str, Any]) -> relax.Expr:
    x, low, high = [*inputs, None, None][:3]
    known = [None if bound is None else importer.constant(bound) for bound in (low, high)]
    if known[0] is not None and known[1] is not None and str(x.ty.dtype.dtype).startswith("float"):
        return relax.op.clip(x, float(known[0].item()), float(known[1].item()))
    for bound, operator in ((low, relax.op.maximum), (high, relax.op.minimum)):
        x = x if bound is None else importer.bb.emit(operator(x, bound))
    return x


def _tile(importer: _Importer, inputs: list[Any], attrs: dict[str, Any]) -> relax.Expr:
    repeats = importer.constant(inputs[1])
    if repeats is None:
        raise DanceError("the number of repeats depends on the input")
    return relax.op.tile(inputs[0], [int(count) for count in repeats])


def _einsum(importer: _Importer, inputs: list[Any], attrs: dict[str, Any]) -> relax.Expr:
    return relax.op.einsum(tuple(inputs), attrs["equation"].decode())


def _celu(importer: _Importer, inputs: list[Any], attrs: dict[str, Any]) -> relax.Expr:
    x, emit = inputs[0], importer.bb.emit
    alpha, one = (relax.const(float(v), "float32") for v in (attrs.get("alpha", 1.0), 1.0))
    below = emit(relax.op.divide(emit(relax.op.minimum(x, relax.const(0.0, "float32"))), alpha))
    below = emit(relax.op.multiply(alpha, emit(relax.op.subtract(emit(relax.op.exp(below)), one))))
    return relax.op.add(emit(relax.op.nn.relu(x)), below)


_CONVERSIONS: dict[str, Conversion] = {"Pad": _pad, "Clip": _clip, "Tile": _tile, "Einsum": _einsum, "Celu": _celu}
