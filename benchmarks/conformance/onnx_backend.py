"""ONNX's backend tests of its operators, each built for this machine, run and compared with the standard's answer.

    python -m benchmarks.conformance.onnx_backend [--only PATTERN] [--import-only] [--out FILE]

The cases are those of the node, pytorch-operator, pytorch-converted and simple suites that a network for inference may
hold. The suites pass everything as an input; what shapes are computed from (axes, pads, sizes, ...) is a constant
here, as in networks, and so are dynamic shapes what the case's data say. Results agree within 1e-3 of a value and 1e-5
(half precision within four of its steps, quantized values within one), with NaN and infinities in the same places.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from benchmarks.conformance.pool import outputs, require_equal, run_command, suite_options
from dance_tvm import import_model

RELATIVE, ABSOLUTE = 1e-3, 1e-5
SUITES = ("node", "pytorch-operator", "pytorch-converted", "simple")

_FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_INTEGERS = {
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
}

# Not of networks for inference: losses, random numbers, bits taken for another type.
_LEFT_OUT = re.compile(r".*Loss|Bernoulli|Random.*|Multinomial|BitCast")
_LEFT_OUT_CASES = re.compile(r"test_(cast|sce|nllloss)|.*train")

# Inputs of operators that decide shapes or which elements are read; in networks they are constants.
_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
_CONSTANTS: dict[str, tuple[int, ...]] = {
    **{f"Reduce{name}": (1,) for name in _REDUCTIONS.split()},
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Split", "TopK", "Upsample"), (1,)),
    **dict.fromkeys(("CumSum", "CumProd", "OneHot", "Trilu", "CenterCropPad", "AffineGrid", "SplitToSequence"), (1,)),
    **dict.fromkeys(("Col2Im", "Dropout", "DFT"), (1, 2)),
    **{"Slice": (1, 2, 3, 4), "Pad": (1, 3), "Resize": (1, 2, 3), "Range": (0, 1, 2), "ConstantOfShape": (0,)},
    **{"MaxUnpool": (2,), "Compress": (1,), "Loop": (0, 1), "If": (0,), "STFT": (1, 3), "SequenceAt": (1,)},
}


@functools.cache
def _database() -> dict[str, Any]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for suite in SUITES for case in load_model_tests(kind=suite)}


def _model(case: Any) -> Any:
    return case.model or onnx.load(Path(case.model_dir) / "model.onnx")


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _inputs(graph: Any) -> list[Any]:
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _chosen(name: str, model: Any) -> bool:
    """Whether a case is one of a network for inference: tensors in and out, a float among its inputs."""
    inputs, nodes = _inputs(model.graph), list(_nodes(model.graph))
    values = [*inputs, *model.graph.output]
    if not all(value.type.HasField("tensor_type") for value in values):
        return False
    types = [value.type.tensor_type.elem_type for value in inputs]
    if not all(value.type.tensor_type.elem_type in _FLOATS | _INTEGERS for value in values):
        return False
    standard = all(node.domain in ("", "ai.onnx") and not _LEFT_OUT.fullmatch(node.op_type) for node in nodes)
    return standard and not _LEFT_OUT_CASES.match(name) and any(kind in _FLOATS for kind in types)


def _origin(name: str) -> Any:
    """A case, or the one of which it is the operator taken apart."""
    return _database().get(re.sub(r"_expanded(_ver\d+)?$", "", name)) or _database()[name]


def _operator(name: str) -> str:
    """The operator that a case is about."""
    nodes = _model(_origin(name)).graph.node
    return next((node.op_type for node in nodes if node.op_type != "Constant"), "Constant")


def cases(pattern: str) -> list[tuple[str, str]]:
    """Pairs of a case and its operator."""
    listed = []
    for name, case in _database().items():
        if re.search(pattern, name) and _chosen(name, _model(case)):
            listed.append((name, _operator(name)))
    return listed


def _arrays(case: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs and answers of the case's first data set."""
    if case.data_sets:
        inputs, outputs = case.data_sets[0]
        return [_array(value) for value in inputs], [_array(value) for value in outputs]
    folder = Path(case.model_dir) / "test_data_set_0"

    def read(kind: str) -> list[np.ndarray]:
        count = len(list(folder.glob(f"{kind}_*.pb")))
        tensors = (onnx.load_tensor(folder / f"{kind}_{index}.pb") for index in range(count))
        return [numpy_helper.to_array(tensor) for tensor in tensors]

    return read("input"), read("output")


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def _as_in_a_network(model: Any, origin: Any, arrays: dict[str, np.ndarray]) -> Any:
    """``model`` with what decides shapes in ``origin`` as constants of the values in ``arrays``."""
    model, decided = _copy(model), set()
    for node in _nodes(origin.graph):
        places = _CONSTANTS.get(node.op_type, ())
        decided.update(name for place, name in enumerate(node.input) if place in places and name in arrays)
    if len(decided) == len(arrays):  # nothing else comes in: they are the data
        return model
    kept = [value for value in model.graph.input if value.name not in decided]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(arrays[name], name) for name in sorted(decided))
    return model


def _copy(model: Any) -> Any:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def attempt(case: str, folder: Path, build: bool) -> None:
    """Build, run and compare one case; see ``pool.Attempt``."""
    warnings.simplefilter("ignore")
    entry = _database()[case]
    inputs, wanted = _arrays(entry)
    original = _model(entry)
    given = dict(zip((value.name for value in _inputs(original.graph)), inputs, strict=False))
    model = _as_in_a_network(original, _model(_origin(case)), given)
    path = folder / "case.onnx"
    onnx.save(model, path)
    arrays = {value.name: given[value.name] for value in _inputs(model.graph)}
    shapes = {name: array.shape for name, array in arrays.items()}
    if not build:
        import_model(path, shapes=shapes)
        return
    found = outputs(path, list(arrays.values()), folder, shapes)
    assert len(found) == len(wanted), f"{len(found)} outputs in place of {len(wanted)}"
    steps = any(node.op_type.startswith(("Q", "DynamicQ")) for node in model.graph.node)
    for array, value in zip(found, wanted, strict=True):
        if value.dtype == np.float64:  # computed in float32, where what is larger is infinite
            with np.errstate(over="ignore"):
                value = value.astype(np.float32).astype(np.float64)
        relative, absolute = _tolerance(value, steps)
        require_equal(array, value, relative, absolute)


def _tolerance(value: np.ndarray, steps: bool) -> tuple[float, float]:
    """Relative and absolute; four steps of a half-precision type, one of a quantized one."""
    if steps and value.dtype.kind in "iu":
        return 0.0, 1.0
    if str(value.dtype) in ("float16", "bfloat16"):
        step = float(ml_dtypes.finfo(value.dtype).eps)
        return 4 * step, step
    return RELATIVE, ABSOLUTE


def main() -> int:
    """Run the suite and write what became of each case."""
    chosen = suite_options(__doc__).parse_args()
    packages = ("onnx", "onnxruntime", "apache-tvm")
    return run_command(
        "benchmarks.conformance.onnx_backend", "ONNX backend tests", cases(chosen.only), chosen, packages
    )


if __name__ == "__main__":
    sys.exit(main())
