"""Integer arithmetic on constants is done when compiled; everything else stays."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.script import relax as R

from dance_tvm.transform.fold_lists import FoldLists

LIST = np.arange(12, dtype="int32").reshape(3, 4)


def module(build, *params: relax.Var) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    with builder.function("main", list(params)):
        with builder.dataflow():
            output = builder.emit_output(build(builder.emit, relax.op))
        builder.emit_func_output(output)
    return builder.finalize()


def operators(mod: tvm.IRModule) -> list[str]:
    values = [binding.value for block in mod["main"].body.blocks for binding in block.bindings]
    return [value.op.name for value in values if isinstance(value, relax.Call)]


def run(mod: tvm.IRModule, *arrays: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(mod, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    return machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def chain(emit, op) -> relax.Expr:
    """Each operator once: of rows 0 to 2, the last column, twice another, a half of one, and ones."""
    last = emit(op.strided_slice(relax.const(LIST), [1], [3], [4]))
    corner = emit(op.reshape(emit(op.strided_slice(relax.const(LIST), [0, 1], [1, 2], [2, 3])), [1]))
    wide = emit(op.broadcast_to(corner, [3, 1]))
    half = emit(op.floor_divide(emit(op.add(last, wide)), relax.const(np.full((3, 1), -2, "int32"))))
    return emit(op.concat([emit(op.multiply(last, wide)), half, relax.const(np.ones((3, 1), "int32"))], 1))


def test_a_chain_of_constants_becomes_one():
    x = relax.Var("x", R.Tensor((3, 3), "int32"))
    mod = module(lambda emit, op: emit(op.add(x, chain(emit, op))), x)
    folded = FoldLists()(mod)
    assert operators(folded) == ["relax.add"]
    given = np.full((3, 3), 5, "int32")
    expected = np.stack([LIST[:, 3] * 6, (LIST[:, 3] + 6) // -2, np.ones(3)], 1) + 5
    np.testing.assert_array_equal(run(folded, given), expected)
    np.testing.assert_array_equal(run(mod, given), expected)


def test_what_reads_tuples_keeps_its_type():
    x = relax.Var("x", R.Tensor((3, 4), "int32"))

    def halves(emit, op) -> relax.Expr:
        known = emit(op.strided_slice(relax.const(LIST), [1], [0], [2]))
        parts = emit(op.split(x, 2, 1))
        return emit(op.add(emit(relax.TupleGetItem(emit(relax.Tuple([known, emit(parts[1])])), 1)), known))

    mod = module(halves, x)
    np.testing.assert_array_equal(run(FoldLists()(mod), LIST), LIST[:, 2:] + LIST[:, :2])


def test_a_result_that_is_known_stays_a_result():
    folded = FoldLists()(module(chain))
    assert operators(folded) == []
    assert [int(extent) for extent in folded["main"].ret_ty.shape.values] == [3, 3]


def test_inputs_floats_and_other_operators_stay():
    x = relax.Var("x", R.Tensor((3, 4), "int32"))
    real = relax.const(LIST.astype("float32"))
    builds = [
        (lambda emit, op: emit(op.strided_slice(x, [1], [3], [4])), (x,)),
        (lambda emit, op: emit(op.add(real, real)), ()),
        (lambda emit, op: emit(op.max(relax.const(LIST), 1)), ()),
        (lambda emit, op: emit(op.strided_slice(relax.const(LIST), [1], [0], [4], [2])), ()),
    ]
    for build, params in builds:
        mod = module(build, *params)
        assert operators(FoldLists()(mod)) == operators(mod)
