"""What a node of an ONNX file says: its attributes, its layer, and its results by ONNX's own reference."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import onnx

Value = Any  # an expression, a list of values (a sequence), or None (an optional input that is not there)

# Computed in float32: what the kernels are made for. Inputs and outputs keep their types.
OTHER_FLOATS = ("float16", "bfloat16", "float64")


def attributes_of(node: Any) -> dict[str, Any]:
    """Attributes by name; strings stay bytes, lists are tuples."""
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {
        name: value if isinstance(value, (bytes, str, int, float)) or hasattr(value, "DESCRIPTOR") else tuple(value)
        for name, value in values.items()
    }


def without_other_floats(array: np.ndarray) -> np.ndarray:
    """``array`` as it is computed with: other floats as float32, int4 as int8."""
    if str(array.dtype) in OTHER_FLOATS or str(array.dtype).startswith("float8"):
        return array.astype(np.float32)
    return array.astype(np.int8) if str(array.dtype) == "int4" else array


def type_of(value: Value) -> Any:
    """The type of a value as ONNX writes it."""
    if value is None:
        return onnx.TypeProto()
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(str(value.ty.dtype.dtype)))
    return onnx.helper.make_tensor_type_proto(dtype, [int(extent) for extent in value.ty.shape])


def function_of(body: Any) -> Any:
    """A function of the standard, from its bytes or as it is; None where it has no nodes."""
    function = onnx.FunctionProto.FromString(body) if isinstance(body, bytes) else body
    return function if function.node else None


def defaults_of(node: Any, opset: int) -> list[Any]:
    """The attributes that the standard gives an operator where the node gives none."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    given = [(name, attribute.default_value) for name, attribute in schema.attributes.items()]
    return [default for _name, default in given if default.name]


def with_attributes(node: Any, attributes: dict[str, Any]) -> Any:
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
            kept.g.node.extend(with_attributes(inner, attributes) for inner in attribute.g.node)
    return bound


def evaluated(node: Any, feeds: dict[str, np.ndarray], opset: int) -> list[Any]:
    """A node's results on arrays, by ONNX's reference."""
    from onnx.reference import ReferenceEvaluator

    inputs = [onnx.ValueInfoProto(name=name) for name in feeds]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = onnx.helper.make_graph([node], "node", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    found = iter(ReferenceEvaluator(model).run(None, feeds))
    return [np.asarray(next(found)) if name else np.zeros(0) for name in node.output]


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
