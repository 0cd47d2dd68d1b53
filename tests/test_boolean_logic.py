"""Operators between booleans: what the pass makes of them, and that they compile and are right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph
from dance_tvm.transform.boolean_logic import LOGIC, boolean_logic
from dance_tvm.transform.schedule_rest import ScheduleRest

NUMPY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    **{name: getattr(np, name) for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")},
    **{"multiply": np.logical_and, "minimum": np.minimum, "maximum": np.maximum},
    **{"max": lambda a, _: a.max(0, keepdims=True), "min": lambda a, _: a.min(0, keepdims=True)},
}


def module(dtype: str) -> tvm.IRModule:
    """All operators, on operands that fill vectors and ones that do not."""
    builder = relax.BlockBuilder()
    a, b = (relax.Var(name, relax.TensorType([6, 11], dtype)) for name in "ab")
    with builder.function("main", [a, b]):
        with builder.dataflow():
            results = [
                builder.emit(getattr(relax.op, name)(*((a, b) if name in LOGIC else (a, [0], True)))) for name in NUMPY
            ]
            output = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(output)
    return builder.finalize()


def test_every_operator_of_the_table_is_tried() -> None:
    assert LOGIC.keys() <= NUMPY.keys()


@pytest.mark.parametrize("fuse", [False, True], ids=["alone", "fused"])
def test_booleans_compare_as_in_numpy(fuse: bool) -> None:
    target = tvm.target.Target({"kind": "llvm"})
    with target:
        mod = relax.transform.LegalizeOps()(boolean_logic(module("bool")))
        if fuse:
            for each in (relax.transform.AnnotateTIROpPattern(), relax.transform.FuseOps(), relax.transform.FuseTIR()):
                mod = each(mod)
        mod = ScheduleRest(8)(mod)
    machine = relax.VirtualMachine(tvm.compile(mod, target=target), tvm.cpu())
    generator = np.random.default_rng(0)
    a, b = (generator.random((6, 11)) > 0.5 for _ in range(2))
    found = machine["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b))
    for (name, expected), one in zip(NUMPY.items(), found, strict=True):
        np.testing.assert_array_equal(one.numpy(), expected(a, b), err_msg=name)


def test_numbers_stay_as_they_are() -> None:
    graph = Graph.of(boolean_logic(module("float32"))["main"])
    assert [name for var in graph.order if (name := graph.op(var))] == list(NUMPY)


def test_an_equality_of_booleans_is_said_in_not_and_xor() -> None:
    graph = Graph.of(boolean_logic(module("bool"))["main"])
    assert [graph.op(var) for var in graph.order[:2]] == ["logical_xor", "logical_not"]
