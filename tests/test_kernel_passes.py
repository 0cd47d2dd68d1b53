"""What the passes that call kernels make of a module, side by side with the module they should give; and what they
leave as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import tvm
from test_passes import becomes, declines, stays
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from dance_tvm.ir.graph import literal
from dance_tvm.ir.reasons import Reasons
from dance_tvm.lowering.calls import call_kernel
from dance_tvm.lowering.lower_attention import LowerAttention
from dance_tvm.lowering.lower_norms import LowerNorms
from dance_tvm.lowering.lower_resampling import LowerResampling
from dance_tvm.lowering.lower_sorts import LowerSorts
from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.attention import Attention
from dance_tvm.schedules.cpu.copies import Piece, copies
from dance_tvm.schedules.cpu.moments import VectorReduction
from dance_tvm.schedules.cpu.norm import Norm
from dance_tvm.schedules.cpu.product import Placed, Product, tile_for
from dance_tvm.schedules.cpu.resample import Resample, tables
from dance_tvm.schedules.cpu.sort import MergeSort
from dance_tvm.schedules.kernel import Kernel
from dance_tvm.schedules.strided import Strided
from dance_tvm.transform.fold_pads import FoldPads
from dance_tvm.transform.join_copies import JoinCopies
from dance_tvm.transform.join_small import JoinSmall
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
    becomes(LowerNorms(MACHINE, 1, Reasons()), before, module(called(mean, "x"), (3, 40)))
    stays(LowerNorms(MACHINE, 1, Reasons()), module(chain(lambda x: op.sum(x, [1])), (3, 40), dtype="int32"))


def test_products_of_variables() -> None:
    shapes = ((2, 6, 8), (2, 8, 16))
    left, right, result = (
        Placed((2, rows, columns), Strided(((2, rows * columns),), columns, 1, 0))
        for rows, columns in ((6, 8), (8, 16), (6, 16))
    )
    product = Product(2, 6, 8, 16, left, right, result, tile_for(MACHINE, 2, 6, 1), 1.0)
    before = module(chain(op.matmul), *shapes)
    becomes(LowerAttention(MACHINE, 1, Reasons()), before, module(called(product, "a", "b"), *shapes))
    half = module(chain(op.matmul), *shapes, dtype="float16")
    declines(partial(LowerAttention, MACHINE, 1), half, "TVM's own product: it is not float32, or empty")


def attention(heads: int, queries: int, keys: int, depth: int, width: int) -> Attention:
    """A kernel whose operands lie one head behind the other, keys as rows that the product reads as columns."""
    q, v, y = (
        Placed((heads, rows, columns), Strided(((heads, rows * columns),), columns, 1, 0))
        for rows, columns in ((queries, depth), (keys, width), (queries, width))
    )
    k = Placed((heads, keys, depth), Strided(((heads, keys * depth),), 1, depth, 0))
    return Attention(heads, queries, keys, depth, width, q, k, v, y, tile_for(MACHINE, heads, queries, 1), 0.5)


def test_whole_attention() -> None:
    shapes = ((2, 6, 8), (2, 10, 8), (2, 10, 16))

    def scores(axis: int) -> Emit:
        def emit(builder: relax.BlockBuilder, q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Expr:
            product = builder.emit(op.matmul(q, builder.emit(op.permute_dims(k, [0, 2, 1]))))
            scaled = builder.emit(op.multiply(product, relax.const(0.5, "float32")))
            return builder.emit(op.matmul(builder.emit(op.nn.softmax(scaled, axis)), v))

        return emit

    after = module(called(attention(2, 6, 10, 8, 16), "q", "k", "v"), *shapes)
    becomes(LowerAttention(MACHINE, 1, Reasons()), module(scores(-1), *shapes), after)

    def of_one(builder: relax.BlockBuilder, q: relax.Var, v: relax.Var) -> relax.Expr:
        return builder.emit(op.matmul(builder.emit(op.nn.softmax(q, -1)), v))

    reasons = Reasons()
    LowerAttention(MACHINE, 1, reasons)(module(of_one, (2, 6, 10), (2, 10, 16)))
    (line,) = reasons
    assert line.endswith("attention in parts: its scores are no scaled product of two variables with biases")


def test_a_norm_takes_the_residual_and_the_activation_behind_it() -> None:
    shape, gamma, beta = (3, 40), np.arange(40, dtype="float32"), np.ones(40, "float32")

    def norm(builder: relax.BlockBuilder, x: relax.Var, *scale: relax.Expr) -> relax.Expr:
        return builder.emit(op.nn.layer_norm(x, *scale, axes=[1], epsilon=1e-5))

    def before(builder: relax.BlockBuilder, x: relax.Var, residual: relax.Var) -> relax.Expr:
        total = builder.emit(op.add(norm(builder, x, relax.const(gamma), relax.const(beta)), residual))
        return builder.emit(op.nn.relu(total))

    def after(builder: relax.BlockBuilder, x: relax.Var, residual: relax.Var) -> relax.Expr:
        kernel = Norm(shape, 3, 1, 40, 40, 1e-5, FLOATS, 1, "lanes", 40, True, True, "relu")
        values = {"x": x, "gamma": relax.const(gamma), "beta": relax.const(beta), "residual": residual}
        return call_kernel(builder, kernel, values, 1)

    becomes(LowerNorms(MACHINE, 1, Reasons()), module(before, shape, shape), module(after, shape, shape))

    reasons = Reasons()
    given = LowerNorms(MACHINE, 1, reasons)(module(norm, shape, (40,), (40,)))
    assert [line.partition(": ")[2] for line in reasons] == ["a norm in parts: its scale or shift is not constant"]
    assert not any("kernel" in gvar.name_hint and "norm" in gvar.name_hint for gvar in given.get_global_vars())


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

    becomes(LowerResampling(MACHINE, 1, Reasons()), module(take(twice), shape), module(after, shape))
    small = module(take(twice), (1, 8, 8, 4))
    declines(partial(LowerResampling, MACHINE, 1), small, "resampled in parts: fewer than 4096 elements")
    stays(LowerResampling(MACHINE, 1, Reasons()), module(take(np.array(3)), shape))  # one frame


def test_pieces_of_a_result() -> None:
    pieces = [Piece.whole((16, 40), 0), Piece.whole((16, 24), 1).shifted([0, 40])]
    shapes = ((16, 40), (16, 24))

    def after(builder: relax.BlockBuilder, *read: relax.Var) -> relax.Expr:
        func = copies(pieces, shapes, (16, 64), FLOATS, 1).without_attr("global_symbol")
        function = builder.add_func(func.with_attr("tirx.is_scheduled", True), "copy_pieces")
        return builder.emit(relax.call_tir(function, list(read), relax.TensorType((16, 64), "float32")))

    def joined(axis: int) -> Emit:
        return chain(lambda *parts: op.concat(list(parts), axis))

    becomes(JoinCopies(FLOATS, 1, Reasons()), module(joined(1), *shapes), module(after, *shapes))
    small = module(joined(1), (4, 40), (4, 24))
    declines(partial(JoinCopies, FLOATS, 1), small, "pieces copied by TVM's own kernel: fewer than 512 elements")


def test_zeros_around_the_input_of_a_convolution() -> None:
    weight = relax.const(np.ones((3, 2, 3, 3), "float32"))
    padded = [lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 1]), lambda x: op.nn.conv2d(x, weight, padding=[1, 0, 0, 0])]
    after = module(chain(lambda x: op.nn.conv2d(x, weight, padding=[2, 0, 2, 1])), (1, 2, 6, 6))
    becomes(FoldPads(Reasons()), module(chain(*padded), (1, 2, 6, 6)), after)
    ones = [lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 1], pad_value=1.0), padded[1]]
    why = "the padding before it stays a copy: it is 1, and a convolution pads with zeros"
    declines(FoldPads, module(chain(*ones), (1, 2, 6, 6)), why)


def test_values_are_moved_as_they_are_stored() -> None:
    wide, half = (lambda x: op.astype(x, "float32")), (lambda x: op.astype(x, "float16"))
    moved = [wide, lambda x: op.permute_dims(x, [1, 0]), half]
    after = module(chain(lambda x: op.permute_dims(x, [1, 0])), (4, 6), dtype="float16")
    becomes(StoreHalves(), module(chain(*moved), (4, 6), dtype="float16"), after)
    stays(StoreHalves(), module(chain(lambda x: op.permute_dims(x, [1, 0])), (4, 6)))


# ruff: noqa: N805  functions of TVMScript are no methods


@I.ir_module
class TwoSmallCalls:
    @T.prim_func(s_tir=True, private=True)
    def twice(x: T.Buffer((T.int64(4),), "float32"), y: T.Buffer((T.int64(4),), "float32")) -> None:
        T.func_attr({"tirx.is_scheduled": True})
        for i in range(T.int64(4)):
            with T.sblock("twice"):
                at = T.axis.spatial(T.int64(4), i)
                y[at] = x[at] + x[at]

    @T.prim_func(s_tir=True, private=True)
    def square(x: T.Buffer((T.int64(4),), "float32"), y: T.Buffer((T.int64(4),), "float32")) -> None:
        T.func_attr({"tirx.is_scheduled": True})
        for i in range(T.int64(4)):
            with T.sblock("square"):
                at = T.axis.spatial(T.int64(4), i)
                y[at] = x[at] * x[at]

    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        cls = TwoSmallCalls
        with R.dataflow():
            a = R.call_tir(cls.twice, (x,), out_ty=R.Tensor((4,), "float32"))
            b = R.call_tir(cls.square, (a,), out_ty=R.Tensor((4,), "float32"))
            R.output(b)
        return b


def test_small_calls_become_one() -> None:
    @I.ir_module
    class After:
        @T.prim_func(s_tir=True, private=True)
        def small_operators(x: T.Buffer((T.int64(4),), "float32"), y: T.Buffer((T.int64(4),), "float32")) -> None:
            T.func_attr({
                "dance.kernel": '{"kind": "other", "parts": []}', "tirx.is_scheduled": True, "tirx.noalias": True
            })  # fmt: skip
            between = T.sblock_alloc_buffer((T.int64(4),))
            for i in range(T.int64(4)):
                with T.sblock("twice"):
                    at = T.axis.spatial(T.int64(4), i)
                    between[at] = x[at] + x[at]
            for i in range(T.int64(4)):
                with T.sblock("square"):
                    at = T.axis.spatial(T.int64(4), i)
                    y[at] = between[at] * between[at]

        @R.function
        def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
            cls = After
            with R.dataflow():
                b = R.call_tir(cls.small_operators, (x,), out_ty=R.Tensor((4,), "float32"))
                R.output(b)
            return b

    becomes(JoinSmall(Reasons()), TwoSmallCalls, After)


def test_small_calls_that_read_at_an_offset_stay_apart() -> None:
    @I.ir_module
    class Offset:
        @T.prim_func(s_tir=True, private=True)
        def twice(x: T.handle, y: T.Buffer((T.int64(4),), "float32")) -> None:
            T.func_attr({"tirx.is_scheduled": True})
            offset = T.int64()
            read = T.match_buffer(x, (T.int64(4),), "float32", elem_offset=offset)
            for i in range(T.int64(4)):
                with T.sblock("twice"):
                    at = T.axis.spatial(T.int64(4), i)
                    y[at] = read[at] + read[at]

        @R.function
        def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
            cls = Offset
            with R.dataflow():
                a = R.call_tir(cls.twice, (x,), out_ty=R.Tensor((4,), "float32"))
                b = R.call_tir(cls.twice, (a,), out_ty=R.Tensor((4,), "float32"))
                R.output(b)
            return b

    reasons = Reasons()
    stays(JoinSmall(reasons), Offset)
    why = "a small call of its own: its kernel reads at an offset or stride that a caller gives"
    assert list(reasons) == [f"a: {why}", f"b: {why}"]
