"""What a network's file says of its inputs, read without PyTorch: names, shapes and what is open."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dance_tvm.core.errors import DanceError

#: Dimensions by input; those that are open are names.
Declared = Mapping[str, Sequence[int | str]]

_PROGRAM = re.compile(r"(^|/)models/[^/]+\.json$")
#: What reading a file raises that has another form than is known here, or is torn.
_UNKNOWN_FORM = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError,
    ValueError, LookupError, TypeError, AttributeError, RuntimeError,
)  # fmt: skip

#: Types by their numbers, in exported programs (torch._export.serde.schema.ScalarType) and in ONNX (TensorProto).
_TORCH_TYPES = {1: "uint8", 2: "int8", 4: "int32", 5: "int64", 7: "float32", 8: "float64", 12: "bool"}
_ONNX_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 11: "float64"}

_SYMBOL = re.compile(r"Symbol\('(\w+)'[^()']*\)")


def declared_inputs(path: Path) -> Declared | None:
    """What the file takes; None where it does not say it in the form that is known here: its reader will say more."""
    try:
        return _of_onnx(path) if path.suffix == ".onnx" else _of_program(path)
    except _UNKNOWN_FORM:
        return None


def declared_types(path: Path) -> dict[str, str]:
    """NumPy's name of each input's type, as far as the file says it in the form that is known here."""
    try:
        if path.suffix == ".onnx":
            known = {value.name: _ONNX_TYPES.get(value.type.tensor_type.elem_type) for value in _graph(path).input}
        else:
            known = {name: _TORCH_TYPES.get(facts["dtype"]) for name, facts in (_tensors(path) or {}).items()}
    except _UNKNOWN_FORM:
        return {}
    return {name: dtype for name, dtype in known.items() if dtype is not None}


def _of_program(path: Path) -> Declared | None:
    """The inputs of an exported program."""
    found = _tensors(path)
    return None if found is None else {name: [_extent(size) for size in each["sizes"]] for name, each in found.items()}


def _tensors(path: Path) -> dict[str, Any] | None:
    """What an exported program says of its inputs, as JSON in its archive."""
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if _PROGRAM.search(name)]
        if len(members) != 1:
            return None
        module = json.loads(archive.read(members[0]))["graph_module"]
    taken = [spec["user_input"]["arg"] for spec in module["signature"]["input_specs"] if "user_input" in spec]
    names = [argument["as_tensor"]["name"] for argument in taken if "as_tensor" in argument]
    return {name: module["graph"]["tensor_values"][name] for name in names}


def _extent(size: Mapping[str, Any]) -> int | str:
    """An extent, or the symbol that it is. Raises ValueError for what is computed of symbols."""
    if "as_int" in size:
        return int(size["as_int"])
    symbol = _SYMBOL.fullmatch(size["as_expr"]["expr_str"])
    if symbol is None:
        raise ValueError("an extent that is computed of others")
    return symbol[1]


def _graph(path: Path) -> Any:
    """The graph of an ONNX file. Raises DanceError for a file that is none."""
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False).graph
    except OSError:
        raise
    except Exception:  # protobuf's own
        raise DanceError(f"{path} is no ONNX file, or is truncated: export the network again") from None


def _of_onnx(path: Path) -> Declared | None:
    """The inputs of an ONNX graph. Raises DanceError for a file that is none."""
    graph = _graph(path)
    if not graph.output:
        raise DanceError(f"{path} is no ONNX file, or is empty: export the network again")
    weights = {tensor.name for tensor in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if not all(value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape") for value in inputs):
        return None
    return {value.name: _dims(value.type.tensor_type.shape.dim) for value in inputs}


def _dims(dims: Any) -> list[int | str]:
    """The dimensions of an ONNX tensor, names where they are open."""
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"dim_{at}" for at, dim in enumerate(dims)]


def require_shape(
    declared: Declared, shapes: Mapping[str, Sequence[int]], batch: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of each input: ``declared``, its open dimensions (names) as ``shapes`` gives them; ``batch``
    is the first dimension of all others, where it is open or has that extent.

    Raises DanceError for an unknown input, for a shape that does not fit, and where an open one is not given.
    """
    unknown = sorted(set(shapes) - set(declared))
    if unknown:
        raise DanceError(f"the network has no input {unknown[0]!r}: it takes {', '.join(declared)}")
    chosen = {}
    for name, dims in declared.items():
        given = tuple(shapes.get(name, [n for n in _batched(name, dims, batch) if isinstance(n, int)]))
        sizes = ", ".join(map(str, dims))
        if len(given) == len(dims) and all(
            isinstance(n, str) or n == extent for n, extent in zip(dims, given, strict=True)
        ):
            chosen[name] = given
        elif name in shapes:
            is_open = any(isinstance(n, str) for n in dims)
            instead = "give its fixed dimensions as they are" if is_open else "leave --shape out"
            raise DanceError(
                f"input {name!r} has the shape ({sizes}), which {'x'.join(map(str, given))} does not fit: {instead}, "
                "or export the network with those dimensions open"
            )
        else:
            example = "x".join(str(n) if isinstance(n, int) else "1" for n in dims)
            raise DanceError(
                f"input {name!r} has a dynamic shape ({sizes}): fix it with --shape {name}={example} "
                f"(import_model: shapes={{{name!r}: ...}}), one artifact for each shape"
            )
    return chosen


def _batched(name: str, dims: Sequence[int | str], batch: int | None) -> Sequence[int | str]:
    """The dimensions with ``batch`` as the first. Raises DanceError where another is fixed."""
    if batch is None or not dims:
        return dims
    if isinstance(dims[0], int) and dims[0] != batch:
        raise DanceError(
            f"input {name!r} is fixed to a batch of {dims[0]}: export the network with an open batch "
            f"(`dance-tvm export --open-batch`), or leave --batch {batch} out"
        )
    return [batch, *dims[1:]]
