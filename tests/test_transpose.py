"""Changes of layout: the kernel against NumPy, and which functions of a network become one."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from convolutions import compiled, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from dance_tvm.schedules.cpu.transpose import Transpose, transpose
from dance_tvm.transform.schedule_rest import ScheduleRest


@pytest.mark.parametrize(
    ("shape", "order", "expected"),
    [
        ((1, 64, 4, 5, 6), (0, 2, 3, 4, 1), Transpose(1, 64, 120)),
        ((2, 4, 5, 6, 64), (0, 4, 1, 2, 3), Transpose(2, 120, 64)),
        ((7, 9), (1, 0), Transpose(1, 7, 9)),
        ((1, 64, 4, 1, 6), (0, 2, 3, 4, 1), Transpose(1, 64, 24)),
        ((2, 1, 4, 5, 6), (0, 2, 3, 4, 1), None),  # one channel: nothing moves
        ((2, 3, 4), (2, 1, 0), None),  # three runs change places
        ((3, 2, 4), (1, 0, 2), None),  # what is side by side stays side by side
    ],
)
def test_axes_that_move_together_are_one(
    shape: tuple[int, ...], order: tuple[int, ...], expected: Transpose | None
) -> None:
    assert Transpose.of(shape, order) == expected


def agrees(plan: Transpose, vector_floats: int, dtypes: tuple[str, str]) -> None:
    """The kernel against NumPy, on whole numbers that half precision holds."""
    shape = (plan.batch, plan.rows, plan.columns)
    x = (np.arange(np.prod(shape)) % 2047).astype(dtypes[0]).reshape(shape)
    y = tensor(np.full((plan.batch, plan.columns, plan.rows), np.nan, dtypes[1]))
    compiled(transpose(plan, x.shape, y.shape, vector_floats, dtypes=dtypes))(tensor(x), y)
    np.testing.assert_array_equal(y.numpy(), x.transpose(0, 2, 1))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 4, 8]))
def test_it_equals_numpy(batch: int, rows: int, columns: int, vector_floats: int) -> None:
    agrees(Transpose(batch, rows, columns), vector_floats, ("float32", "float32"))


@pytest.mark.parametrize("rows", [2, 3, 4])
@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float32"), ("float32", "float32")])
def test_few_channels_are_interleaved_and_converted(rows: int, dtypes: tuple[str, str]) -> None:
    agrees(Transpose(2, rows, 41), 4, dtypes)
    agrees(Transpose(1, 19, rows), 4, dtypes)


def test_lines_are_turned_and_converted() -> None:
    agrees(Transpose(2, 20, 33), 4, ("float32", "float16"))


def scheduled(
    shape: tuple[int, ...], order: tuple[int, ...], dtype: str, doubled: bool, stored: str = "", threads: int = 2
) -> tuple[str, tvm.IRModule]:
    """``permute_dims`` and, where asked for, a doubling or a conversion fused to it, after the pass."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            moved = builder.emit(relax.op.permute_dims(x, order))
            if stored:
                moved = builder.emit(relax.op.astype(moved, stored))
            output = builder.emit_output(relax.op.add(moved, moved) if doubled else moved)
        builder.emit_func_output(output)
    passes = [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern(), relax.transform.FuseOps()]
    mod = tvm.transform.Sequential([*passes, relax.transform.FuseTIR(), ScheduleRest(8, threads)])(builder.get())
    (func,) = (func for name, func in mod.functions_items() if name.name_hint != "main")
    return str(func), mod


LAST = (0, 2, 3, 4, 1)


@pytest.mark.parametrize(
    ("shape", "order", "dtype", "doubled", "tiled"),
    [
        pytest.param((1, 20, 4, 16, 16), LAST, "float32", False, True, id="channels last"),
        pytest.param((1, 20, 4, 3, 3), LAST, "float32", False, False, id="small"),
        pytest.param((1, 3, 16, 32, 32), LAST, "float32", False, True, id="three channels"),
        pytest.param((1, 5, 16, 32, 32), LAST, "float32", False, False, id="five channels"),
        pytest.param((1, 20, 4, 16, 16), LAST, "uint8", False, False, id="bytes"),
        pytest.param((1, 20, 4, 16, 16), LAST, "float32", True, False, id="with arithmetic"),
        pytest.param((40, 20, 40), (1, 0, 2), "float32", False, False, id="rows keep together"),
    ],
)
def test_large_moves_of_floats_are_tiled(
    shape: tuple[int, ...], order: tuple[int, ...], dtype: str, doubled: bool, tiled: bool
) -> None:
    text, mod = scheduled(shape, order, dtype, doubled)
    assert ("Shuffle" in text) == tiled, "vectors that are turned in registers"
    kernels = [func for gvar, func in mod.functions_items() if gvar.name_hint != "main"]
    assert not any("global_symbol" in func.attrs for func in kernels), "a copy would stand under the same symbol"
    built = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    x = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    np.testing.assert_array_equal(built["main"](tensor(x)).numpy(), x.transpose(order) * (1 + doubled))


def test_axes_of_extent_one_may_come_and_go() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([2, 20, 1024], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            picture = builder.emit(relax.op.expand_dims(x, 2))
            moved = builder.emit(relax.op.permute_dims(picture, [0, 2, 3, 1]))
            output = builder.emit_output(relax.op.reshape(moved, [2, 1, 1, 1024, 20]))
        builder.emit_func_output(output)
    passes = [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern(), relax.transform.FuseOps()]
    mod = tvm.transform.Sequential([*passes, relax.transform.FuseTIR(), ScheduleRest(8, 1)])(builder.get())
    assert "Shuffle" in mod.script()
    built = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    values = np.random.default_rng(0).random((2, 20, 1024), "float32")
    np.testing.assert_array_equal(built["main"](tensor(values)).numpy()[:, 0, 0], values.transpose(0, 2, 1))


def test_a_conversion_behind_a_move_is_part_of_it() -> None:
    text, _ = scheduled((1, 3, 4, 64, 64), LAST, "float32", False, "float16")
    assert "Shuffle" in text
    assert "float16x16" in text


def test_one_thread_asks_for_no_other() -> None:
    shape = (1, 20, 4, 16, 16)
    assert "T.parallel" in scheduled(shape, LAST, "float32", False)[0]
    assert "T.parallel" not in scheduled(shape, LAST, "float32", False, threads=1)[0]
