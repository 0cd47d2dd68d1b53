"""What the passes that call kernels make of a module, side by side with the module they should give; and what they
leave as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from test_passes import becomes, stays
from tvm import relax
from tvm.relax import op

from dance_tvm.ir.graph import literal
from dance_tvm.lowering.calls import call_kernel
from dance_tvm.lowering.lower_attention import LowerAttention
from dance_tvm.lowering.lower_norms import LowerNorms
from dance_tvm.lowering.lower_resampling import LowerResampling
from dance_tvm.lowering.lower_sorts import LowerSorts
from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.copies import Piece, copies
from dance_tvm.schedules.cpu.moments import VectorReduction
from dance_tvm.schedules.cpu.product import Placed, Product, tile_for
from dance_tvm.schedules.cpu.resample import Resample, tables
from dance_tvm.schedules.cpu.sort import MergeSort
from dance_tvm.schedules.kernel import Kernel
from dance_tvm.schedules.strided import Strided
from dance_tvm.transform.fold_pads import FoldPads
from dance_tvm.transform.join_copies import JoinCopies
from dance_tvm.transform.store_halves import StoreHalves

MACHINE = machine_of(load_target("snapdragon"))
FLOATS = MACHINE.vector_floats
Emit = Callable[..., relax.Expr]


def module(emit: Emit, *shapes: tuple[int, ...], dtype: str = "float32") -> tvm.IRModule:
    """``main`` of what ``emit`` makes of a builder and parameters of ``shapes``."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{at}", relax.TensorType(shape, dtype)) for at, shape in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            output = builder.emit_output(emit(builder, *params))
        builder.emit_func_output(output)
    return builder.finalize()


def chain(*steps: Callable[..., relax.Expr]) -> Emit:
    """Operators one behind the other; the first takes the parameters."""

    def emit(builder: relax.BlockBuilder, *params: relax.Var) -> relax.Expr:
        value = builder.emit(steps[0](*params))
        for step in steps[1:]:
            value = builder.emit(step(value))
        return value

    return emit


def called(kernel: Kernel, *names: str) -> Emit:
    """A call of ``kernel`` on one thread with the parameters as the operands of these names."""
    return lambda builder, *params: call_kernel(builder, kernel, dict(zip(names, params, strict=True)), 1)


def test_sorts() -> None:
    sort = MergeSort((2, 8), 1, 8, True, "float32", True, "")
    before = module(chain(lambda x: op.sort(x, 1, True)), (2, 8))
    becomes(LowerSorts(MACHINE), before, module(called(sort, "x"), (2, 8)))
    stays(LowerSorts(MACHINE), module(chain(lambda x: op.max(x, 1)), (2, 8)))


def test_reductions() -> None:
    mean = VectorReduction(
        shape=(3, 40), out_shape=(3,), outer=3, reduced=40, inner=1, statistic="mean", squared=False,
        vector_floats=FLOATS, threads=1,
    )  # fmt: skip
    before = module(chain(lambda x: op.mean(x, [1])), (3, 40))
    becomes(LowerNorms(MACHINE), before, module(called(mean, "x"), (3, 40)))
    stays(LowerNorms(MACHINE), module(chain(lambda x: op.sum(x, [1])), (3, 40), dtype="int32"))


def test_products_of_variables() -> None:
    shapes = ((2, 6, 8), (2, 8, 16))
    left, right, result = (
        Placed((2, rows, columns), Strided(((2, rows * columns),), columns, 1, 0))
        for rows, columns in ((6, 8), (8, 16), (6, 16))
    )
    product = Product(2, 6, 8, 16, left, right, result, tile_for(MACHINE, 2, 6, 1), 1.0)
    before = module(chain(op.matmul), *shapes)
    becomes(LowerAttention(MACHINE), before, module(called(product, "a", "b"), *shapes))
    stays(LowerAttention(MACHINE), module(chain(op.matmul), *shapes, dtype="float16"))


def test_resampling() -> None:
    shape, twice = (1, 8, 8, 32), np.arange(16) // 2
    kernel = Resample(1, (1, 8, 8), (1, 16, 8), 32, (1, 1, 1), (False, False, False), FLOATS, True)

    def after(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
        read = {"x": x}
        for axis, places in enumerate((np.zeros(1), twice, np.arange(8))):
            read[f"places_{axis}"] = literal(tables(places.astype("int64")[:, None], np.ones((len(places), 1)))[0])
        return call_kernel(builder, kernel, read, 1)

    def take(places: np.ndarray) -> Emit:
        return chain(lambda x: op.take(x, relax.const(places, "int64"), 1))

    becomes(LowerResampling(MACHINE), module(take(twice), shape), module(after, shape))
    stays(LowerResampling(MACHINE), module(take(twice), (1, 8, 8, 4)))  # small
    stays(LowerResampling(MACHINE), module(take(np.array(3)), shape))  # one frame


def test_pieces_of_a_result() -> None:
    pieces = [Piece.whole((16, 40), 0), Piece.whole((16, 24), 1).shifted([0, 40])]
    shapes = ((16, 40), (16, 24))

    def after(builder: relax.BlockBuilder, *read: relax.Var) -> relax.Expr:
        func = copies(pieces, shapes, (16, 64), FLOATS, 1).without_attr("global_symbol")
        function = builder.add_func(func.with_attr("tirx.is_scheduled", True), "copy_pieces")
        return builder.emit(relax.call_tir(function, list(read), relax.TensorType((16, 64), "float32")))

    def joined(axis: int) -> Emit:
        return chain(lambda *parts: op.concat(list(parts), axis))

    becomes(JoinCopies(FLOATS, 1), module(joined(1), *shapes), module(after, *shapes))
    stays(JoinCopies(FLOATS, 1), module(joined(1), (4, 40), (4, 24)))


def test_zeros_around_the_input_of_a_convolution() -> None:
    weight = relax.const(np.ones((3, 2, 3, 3), "float32"))
    padded = [lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 1]), lambda x: op.nn.conv2d(x, weight, padding=[1, 0, 0, 0])]
    after = module(chain(lambda x: op.nn.conv2d(x, weight, padding=[2, 0, 2, 1])), (1, 2, 6, 6))
    becomes(FoldPads(), module(chain(*padded), (1, 2, 6, 6)), after)
    ones = [lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 1], pad_value=1.0), padded[1]]
    stays(FoldPads(), module(chain(*ones), (1, 2, 6, 6)))


def test_values_are_moved_as_they_are_stored() -> None:
    wide, half = (lambda x: op.astype(x, "float32")), (lambda x: op.astype(x, "float16"))
    moved = [wide, lambda x: op.permute_dims(x, [1, 0]), half]
    after = module(chain(lambda x: op.permute_dims(x, [1, 0])), (4, 6), dtype="float16")
    becomes(StoreHalves(), module(chain(*moved), (4, 6), dtype="float16"), after)
    stays(StoreHalves(), module(chain(lambda x: op.permute_dims(x, [1, 0])), (4, 6)))
