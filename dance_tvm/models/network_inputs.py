"""What a network's file says of its inputs, read without PyTorch: names, shapes and what is open."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dance_tvm.core.errors import DanceError

#: Dimensions by input; those that are open are names.
Shapes = Mapping[str, Sequence[int | str]]

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


class Declared(NamedTuple):
    """What a file says of its inputs: their shapes, and NumPy's names of the types that are known."""

    shapes: Shapes
    types: dict[str, str]

    @staticmethod
    def of(shapes: Shapes, numbers: Mapping[str, int], types: Mapping[int, str]) -> Declared:
        """Types by the ``numbers`` that the file's format gives them."""
        return Declared(shapes, {name: types[number] for name, number in numbers.items() if number in types})


def declared_inputs(path: Path) -> Declared | None:
    """What the file takes; None where it does not say it in the form that is known here: its reader will say more."""
    try:
        return _of_onnx(path) if path.suffix == ".onnx" else _of_program(path)
    except _UNKNOWN_FORM:
        return None


def _of_program(path: Path) -> Declared | None:
    """The inputs of an exported program, which its archive describes as JSON."""
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if _PROGRAM.search(name)]
        if len(members) != 1:
            return None
        module = json.loads(archive.read(members[0]))["graph_module"]
    taken = [spec["user_input"]["arg"] for spec in module["signature"]["input_specs"] if "user_input" in spec]
    names = [argument["as_tensor"]["name"] for argument in taken if "as_tensor" in argument]
    tensors = {name: module["graph"]["tensor_values"][name] for name in names}
    shapes = {name: [_extent(size) for size in tensor["sizes"]] for name, tensor in tensors.items()}
    return Declared.of(shapes, {name: tensor.get("dtype", 0) for name, tensor in tensors.items()}, _TORCH_TYPES)


def _extent(size: Mapping[str, Any]) -> int | str:
    """An extent, or the symbol that it is. Raises ValueError for what is computed of symbols."""
    if "as_int" in size:
        return int(size["as_int"])
    symbol = _SYMBOL.fullmatch(size["as_expr"]["expr_str"])
    if symbol is None:
        raise ValueError("an extent that is computed of others")
    return symbol[1]


def _of_onnx(path: Path) -> Declared | None:
    """The inputs of an ONNX graph. Raises DanceError for a file that is none."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except OSError:
        raise
    except Exception:  # protobuf's own
        raise DanceError(f"{path} is not an ONNX file, or is truncated: export the network again") from None
    if not graph.output:
        raise DanceError(f"{path} is not an ONNX file, or is empty: export the network again")
    weights = {tensor.name for tensor in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if not all(value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape") for value in inputs):
        return None
    tensors = {value.name: value.type.tensor_type for value in inputs}
    shapes = {name: _dims(tensor.shape.dim) for name, tensor in tensors.items()}
    return Declared.of(shapes, {name: tensor.elem_type for name, tensor in tensors.items()}, _ONNX_TYPES)


def _dims(dims: Any) -> list[int | str]:
    """The dimensions of an ONNX tensor, names where they are open."""
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"dim_{at}" for at, dim in enumerate(dims)]


def require_shape(
    declared: Shapes, shapes: Mapping[str, Sequence[int]], batch: int | None = None
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
