"""Read ONNX files: the model, what goes in and comes out, and the file itself as the source that imports equal.

ONNX Runtime runs the file, or ONNX's own reference, slowly, where that cannot.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.interface import Arrays, TensorSpec, usual_meaning
from dance_tvm.frontend.torch_program import first_line
from dance_tvm.models.network_inputs import require_shape

OLDEST_OPSET = 6

# Networks with more numbers, or more operators, take ONNX's reference long.
SMALL, SMALL_NODES = 1 << 20, 256

Shapes = Mapping[str, Sequence[int]]

_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def load(path: Path) -> Any:
    """The model, its sparse weights made dense. Raises DanceError for damaged and foreign files."""
    try:
        model = onnx.load(str(path))
        if all(_has_shape(value) for value in model.graph.output):  # the checker wants what every reader infers
            onnx.checker.check_model(str(path))
    except FileNotFoundError as problem:
        raise DanceError(f"{path} keeps its weights in another file, which is missing: {problem}") from None
    except Exception as problem:
        raise DanceError(f"{path} is not an ONNX model, or is damaged: {first_line(problem)[:200]}") from None
    if not model.graph.output:
        raise DanceError(f"{path} is not an ONNX model, or is damaged: its graph returns nothing")
    _require_readable(model, path)
    for sparse in model.graph.sparse_initializer:
        model.graph.initializer.append(numpy_helper.from_array(dense(sparse), sparse.values.name))
    del model.graph.sparse_initializer[:]
    return model


def _require_readable(model: Any, path: Path) -> None:
    """Raise DanceError, naming what it is, for tensors and names that ONNX's checker accepts but nothing can read."""
    for tensor in _messages(model, onnx.TensorProto):
        try:
            if tensor.data_type != onnx.TensorProto.STRING:
                numpy_helper.to_array(tensor)
        except Exception:
            raise DanceError(
                f"{path} is damaged: its tensor {tensor.name!r} does not have as many numbers as it declares"
            ) from None
    for node in _messages(model, onnx.NodeProto):
        texts = (node.name, node.op_type, node.domain, *node.input, *node.output)
        if not all(isinstance(text, str) for text in texts):
            raise DanceError(f"{path} is damaged: a name in it is not text")


def opsets_of(model: Any, path: Path) -> dict[str, int]:
    """Versions of the operator sets by domain ('' is ONNX's own)."""
    versions = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
    version = versions.setdefault("", 1 if len(versions) == 0 else OLDEST_OPSET)
    if version < OLDEST_OPSET:
        raise DanceError(f"{path} has opset {version}: export the network with opset {OLDEST_OPSET} or later")
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise DanceError(
            f"{path} has opset {version} and the installed onnx package knows {newest}: install a newer one, or "
            "export the network with an older opset"
        )
    return versions


def true_inputs(graph: Any) -> list[Any]:
    """Inputs that are not weights (old files list both)."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def input_specs(graph: Any, shapes: Shapes, batch: int | None = None) -> list[TensorSpec]:
    """What the network takes; ``shapes`` fixes what the file leaves open. Raises DanceError where it stays open."""
    values = true_inputs(graph)
    dtypes = {value.name: dtype_name(value) for value in values}
    declared = {value.name: _dims(value, shapes) for value in values}
    fixed = require_shape(declared, shapes, batch)
    return [TensorSpec(name, shape, dtypes[name], usual_meaning(shape, dtypes[name])) for name, shape in fixed.items()]


def _dims(value: Any, shapes: Shapes) -> list[int | str]:
    """The dimensions of an input, names where they are open."""
    if not _has_shape(value):
        return [f"dim_{at}" for at in range(len(shapes.get(value.name, range(5))))]
    dims = enumerate(value.type.tensor_type.shape.dim)
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"dim_{at}" for at, dim in dims]


def dtype_name(value: Any) -> str:
    """The dtype of an input or output. Raises DanceError for types that no array has, as strings."""
    _require_tensor(value)
    kind = value.type.tensor_type.elem_type
    known = kind in onnx.TensorProto.DataType.values() and kind
    name = onnx.TensorProto.DataType.Name(kind).lower() if known else "of no type"
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    if dtype not in _DTYPES:
        raise DanceError(f"{value.name!r} of the network holds {name}s: export it with numbers in and out")
    return dtype


_DTYPES = {
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *("float16", "bfloat16", "float32", "float64", "bool"),
}


def _require_tensor(value: Any) -> None:
    if not value.type.HasField("tensor_type"):
        raise DanceError(f"{value.name!r} of the network is not a tensor: export it with tensors in and out")


def _has_shape(value: Any) -> bool:
    return not value.type.HasField("tensor_type") or value.type.tensor_type.HasField("shape")


def dense(sparse: Any) -> np.ndarray:
    """A sparse tensor with its zeros."""
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    array = np.zeros(tuple(sparse.dims), values.dtype)
    if places.ndim == 1:
        array.reshape(-1)[places] = values
    else:
        array[tuple(places.T)] = values
    return array


def sha256(path: Path) -> str:
    """The file's bytes, and those of the weights that it keeps elsewhere."""
    digest = hashlib.sha256()
    weights = _messages(onnx.load(str(path), load_external_data=False), onnx.TensorProto)  # those of branches too
    files = {entry.value for tensor in weights for entry in tensor.external_data if entry.key == "location"}
    for file in (path, *(path.parent / name for name in sorted(files))):
        with file.open("rb") as opened:
            while part := opened.read(1 << 24):  # external weights may be larger than memory is free
                digest.update(part)
    return digest.hexdigest()


class Source:
    """The ONNX file itself as a function; half precision is computed in float32, as the compiled network does."""

    def __init__(self, path: Path, model: Any) -> None:
        self.path, self.model = path, in_float32(model)
        self.names = [value.name for value in model.graph.output]
        kinds = [value.type.tensor_type.elem_type for value in model.graph.output]
        self._half = [onnx.helper.tensor_dtype_to_np_dtype(kind) if kind in _HALF else None for kind in kinds]
        self._given = str(path) if self.model is model else None
        self._runner: Any = None
        self._openers = [_in_onnx_runtime, _in_reference]

    def run(self, arrays: Arrays) -> Arrays:
        """Outputs by name. Raises DanceError where nothing here can run the file on these arrays."""
        arrays = {name: _in_float32(array) for name, array in arrays.items()}
        whole = any(array.dtype.kind in "iu" for array in arrays.values())
        problems = []
        for opened in [None] if self._runner is not None else self._openers:
            runner = None
            try:
                runner = self._runner if opened is None else opened(self.model, self._given)
                results = runner.run(self.names, arrays)
            except Exception as problem:
                problems.append(first_line(problem))
                if whole and runner is not None and type(problem).__name__ == "InvalidArgument":
                    break  # an index or a length out of range, which the reference may not look at
                continue
            self._runner = runner
            return {
                name: np.asarray(result) if half is None else np.asarray(result).astype(half)
                for name, result, half in zip(self.names, results, self._half, strict=True)
            }
        raise DanceError(
            f"{self.path} can be run neither by ONNX Runtime nor by ONNX's reference, so nothing shows whether its "
            f"import is right: {problems[0][:200]}"
        )

    def as_the_standard_says(self) -> Source | None:
        """The file run by ONNX's reference; None where that would take long, as its convolutions do."""
        numbers = sum(math.prod(tensor.dims) for tensor in self.model.graph.initializer)
        sizes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in true_inputs(self.model.graph)]
        if numbers + sum(math.prod(size) for size in sizes) > SMALL or len(self.model.graph.node) > SMALL_NODES:
            return None
        source = Source(self.path, self.model)
        source.names, source._half, source._openers = self.names, self._half, [_in_reference]
        return source

    def run_all(self, arrays: Arrays) -> Arrays:
        """Every value that the graph computes."""
        arrays = {name: _in_float32(array) for name, array in arrays.items()}
        everything = onnx.ModelProto()
        everything.CopyFrom(self.model)
        names = [name for node in everything.graph.node for name in node.output if name]
        known = set(self.names)
        everything.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        for opened in self._openers:
            try:
                return dict(zip(names, opened(everything, None).run(names, arrays), strict=True))
            except Exception:
                continue
        return {}


def in_float32(model: Any) -> Any:
    """``model`` with float32 in place of half precision throughout; the same object where it holds none."""
    return _with_floats(model, _HALF, onnx.TensorProto.FLOAT)


def in_float64(model: Any) -> Any:
    """``model`` with float64 in place of every other float type throughout."""
    return _with_floats(model, (*_HALF, onnx.TensorProto.FLOAT), onnx.TensorProto.DOUBLE)


def _with_floats(model: Any, replaced: Sequence[int], kept: int) -> Any:
    """``model`` with the type ``kept`` in place of those ``replaced``; the same object where it holds none of them."""
    if not any(message.elem_type in replaced for message in _messages(model, onnx.TypeProto.Tensor)) and not any(
        tensor.data_type in replaced for tensor in _messages(model, onnx.TensorProto)
    ):
        return model
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kept)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for kind in _messages(changed, onnx.TypeProto.Tensor):
        if kind.elem_type in replaced:
            kind.elem_type = kept
    for tensor in _messages(changed, onnx.TensorProto):
        if tensor.data_type in replaced:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for attribute in _messages(changed, onnx.AttributeProto):
        if attribute.name in ("to", "dtype", "output_dtype", "stash_type") and attribute.i in replaced:
            attribute.i = kept
    return changed


def _messages(message: Any, kind: type) -> Iterator[Any]:
    """Every message of a kind inside of another."""
    if isinstance(message, kind):
        yield message
    if isinstance(message, onnx.TensorProto):  # holds numbers, and many
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part, kind)


def _in_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if str(array.dtype) in ("float16", "bfloat16") else array


def _in_onnx_runtime(model: Any, path: str | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path or model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _in_reference(model: Any, _path: str | None) -> Any:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model)
