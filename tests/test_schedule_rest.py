"""Operators without a kernel of their own: whole vectors, no index taken apart, each element computed once."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from dance_tvm.transform.schedule_rest import ScheduleRest

LANES = 8


def _gated(channels: int, rows: int = 6) -> tvm.IRModule:
    """``y · (y + 1)`` with ``y = x · gate``, as one function."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, rows, channels), "float32"))
    gate = relax.Var("gate", relax.TensorType((1, 1, channels), "float32"))
    with builder.function("main", [x, gate]):
        with builder.dataflow():
            y = builder.emit(relax.op.multiply(x, gate))
            more = builder.emit(relax.op.add(y, relax.const(1.0)))
            result = builder.emit_output(relax.op.multiply(y, more))
        builder.emit_func_output(result)
    passes = [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern()]
    passes += [relax.transform.FuseOps(), relax.transform.FuseTIR(), relax.transform.DeadCodeElimination()]
    return tvm.ir.transform.Sequential(passes)(builder.get())


def _scheduled(mod: tvm.IRModule, threads: int = 1) -> tuple[tvm.IRModule, str]:
    mod = ScheduleRest(LANES, threads)(mod)
    (kernel,) = (function for name, function in mod.functions_items() if name.name_hint.startswith("fused"))
    return mod, kernel.script()


@pytest.mark.parametrize("channels", [54, 8, 7, 13, 3])
def test_rows_of_any_length_are_right(channels):
    mod, _ = _scheduled(_gated(channels), threads=2)
    generator = np.random.default_rng(0)
    x = generator.integers(-4, 5, (2, 6, channels)).astype("float32")
    gate = generator.integers(-4, 5, (1, 1, channels)).astype("float32")
    target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
    machine = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
    found = machine["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(gate)).numpy()
    np.testing.assert_array_equal(found, x * gate * (x * gate + 1))


def test_a_row_is_cut_into_vectors_and_no_index_is_taken_apart():
    _, text = _scheduled(_gated(54))
    assert "//" not in text
    assert "%" not in text
    vectors = [line for line in text.splitlines() if "T.vectorized" in line]
    assert len(vectors) == 3, text  # 6 × 8, 4 and 2 lanes


def test_what_two_links_of_a_chain_read_is_computed_in_their_place():
    _, text = _scheduled(_gated(16))
    assert "sblock_alloc_buffer" not in text


def test_large_rows_are_spread_over_threads():
    _, text = _scheduled(_gated(54, rows=400), threads=2)
    assert text.count("T.parallel") == 1
