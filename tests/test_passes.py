"""What each Relax pass makes of a module, written out before and after; and what it leaves as it is.

Arrays stand as parameters in the script and are bound as constants before the pass runs. Names of variables and second
names of one value (CanonicalizeBindings) don't count.
"""
# ruff: noqa: N805  functions of TVMScript are no methods

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from dance_tvm.core.errors import DanceError
from dance_tvm.ir.graph import Graph, is_scheduled
from dance_tvm.ir.reasons import Reasons
from dance_tvm.transform import lift_weights
from dance_tvm.transform.boolean_logic import boolean_logic
from dance_tvm.transform.channels_last import ChannelsLast
from dance_tvm.transform.compute_empty import ComputeEmpty
from dance_tvm.transform.fold_batch_norm import FoldBatchNorm
from dance_tvm.transform.fold_lists import FoldLists
from dance_tvm.transform.fold_patches import FoldPatches
from dance_tvm.transform.gpu_rest import ScheduleRestForGpu
from dance_tvm.transform.infinite_fills import infinite_fills
from dance_tvm.transform.lift_weights import LiftWeights
from dance_tvm.transform.narrow_channels import NarrowChannels
from dance_tvm.transform.norms_before_concat import NormsBeforeConcat
from dance_tvm.transform.norms_by_clip import NormsByClip
from dance_tvm.transform.schedule_rest import ScheduleRest
from dance_tvm.transform.spread_transposed import SpreadTransposed
from dance_tvm.transform.unsigned_signs import unsigned_signs
from dance_tvm.transform.vector_math import VectorMath
from dance_tvm.transform.whole_pools import WholePools
from dance_tvm.transform.whole_powers import whole_powers
from dance_tvm.transform.widen_sequences import WidenSequences

Arrays = Mapping[str, np.ndarray]


def bound(mod: tvm.IRModule, arrays: Arrays | None = None) -> tvm.IRModule:
    """``mod`` with arrays in the place of the parameters of ``main`` of their names."""
    return relax.transform.BindParams("main", dict(arrays))(mod) if arrays else mod


def becomes(rewrite: tvm.transform.Pass, before: tvm.IRModule, after: tvm.IRModule) -> None:
    tidy = relax.transform.CanonicalizeBindings()
    tvm.ir.assert_structural_equal(tidy(rewrite(before)), tidy(after), map_free_vars=True)


def stays(rewrite: tvm.transform.Pass, mod: tvm.IRModule) -> None:
    becomes(rewrite, mod, mod)


def declines(make: Callable[[Reasons], tvm.transform.Pass], mod: tvm.IRModule, why: str) -> None:
    """What ``make`` makes leaves ``mod`` as it is, and says why of one operator."""
    reasons = Reasons()
    stays(make(reasons), mod)
    assert [line.partition(": ")[2] for line in reasons] == [why]


# -- boolean_logic ----------------------------------------------------------------------------------------------------


def test_truth_values_are_compared_by_logic() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(a: R.Tensor((4,), "bool"), b: R.Tensor((4,), "bool")) -> R.Tensor((), "bool"):
            with R.dataflow():
                c = R.less(a, b)
                d = R.max(c)
                R.output(d)
            return d

    @I.ir_module
    class After:
        @R.function
        def main(a: R.Tensor((4,), "bool"), b: R.Tensor((4,), "bool")) -> R.Tensor((), "bool"):
            with R.dataflow():
                n = R.logical_not(a)
                c = R.logical_and(n, b)
                e = R.astype(c, "int8")
                f = R.max(e)
                d = R.astype(f, "bool")
                R.output(d)
            return d

    becomes(boolean_logic, Before, After)


def test_numbers_are_compared_as_they_are() -> None:
    @I.ir_module
    class Numbers:
        @R.function
        def main(a: R.Tensor((4,), "float32"), b: R.Tensor((4,), "float32")) -> R.Tensor((4,), "bool"):
            with R.dataflow():
                c = R.less(a, b)
                R.output(c)
            return c

    stays(boolean_logic, Numbers)


# -- WholePools -------------------------------------------------------------------------------------------------------


def test_pools_over_whole_clips_are_means() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 8, 4, 6, 6), "float32")) -> R.Tensor((1, 8, 1, 1, 1), "float32"):
            with R.dataflow():
                a = R.nn.adaptive_avg_pool3d(x, [2, 3, 3])
                b = R.nn.avg_pool3d(a, [2, 3, 3])
                R.output(b)
            return b

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1, 8, 4, 6, 6), "float32")) -> R.Tensor((1, 8, 1, 1, 1), "float32"):
            with R.dataflow():
                a = R.nn.avg_pool3d(x, [2, 2, 2], [2, 2, 2])
                b = R.mean(a, [2, 3, 4], True)
                R.output(b)
            return b

    becomes(WholePools(Reasons()), Before, After)


def test_pools_with_padding_or_windows_of_two_sizes_stay() -> None:
    @I.ir_module
    class Pools:
        @R.function
        def main(x: R.Tensor((1, 8, 4, 7, 7), "float32")) -> R.Tensor((1, 8, 1, 1, 1), "float32"):
            with R.dataflow():
                a = R.nn.adaptive_avg_pool3d(x, [2, 3, 3])  # windows of two and of three positions
                b = R.nn.avg_pool3d(a, [2, 3, 3], [3, 4, 4], [1, 1, 1])
                R.output(b)
            return b

    why = "an adaptive pool: (4, 7, 7) does not divide into (2, 3, 3) windows of one size"
    declines(WholePools, Pools, why)


# -- NormsByClip ------------------------------------------------------------------------------------------------------


@I.ir_module
class NormOfView:
    @R.function
    def main(
        x: R.Tensor((2, 3, 4, 4, 4), "float32"), gamma: R.Tensor((6,), "float32"), beta: R.Tensor((6,), "float32")
    ) -> R.Tensor((2, 3, 4, 4, 4), "float32"):
        with R.dataflow():
            a = R.reshape(x, (1, 6, 4, 4, 4))
            b = R.nn.instance_norm(a, gamma, beta, 1, [0, 2, 3, 4])
            c = R.reshape(b, (2, 3, 4, 4, 4))
            R.output(c)
        return c


def test_a_norm_of_clips_as_channels_is_one_by_clip() -> None:
    @I.ir_module
    class After:
        @R.function
        def main(
            x: R.Tensor((2, 3, 4, 4, 4), "float32"), gamma: R.Tensor((3,), "float32"), beta: R.Tensor((3,), "float32")
        ) -> R.Tensor((2, 3, 4, 4, 4), "float32"):
            with R.dataflow():
                c = R.nn.instance_norm(x, gamma, beta, 1, [2, 3, 4])
                R.output(c)
            return c

    once = {name: np.float32([1, 2, 3]) for name in ("gamma", "beta")}
    becomes(
        NormsByClip(Reasons()),
        bound(NormOfView, {name: np.tile(each, 2) for name, each in once.items()}),
        bound(After, once),
    )


def test_a_norm_whose_parameters_differ_by_clip_stays() -> None:
    by_clip = bound(NormOfView, {name: np.arange(6, dtype="float32") for name in ("gamma", "beta")})
    declines(NormsByClip, by_clip, "a norm of clips seen as channels: its parameters differ from clip to clip")


# -- FoldBatchNorm ----------------------------------------------------------------------------------------------------

NORM = {
    "weight": np.ones((2, 1, 1, 1, 1), "float32"),
    "gamma": np.float32([2, 3]),
    "beta": np.float32([5, 7]),
    "mean": np.float32([1, 1]),
    "variance": np.float32([4, 9]),
}


@I.ir_module
class ConvolutionAndNorm:
    @R.function
    def main(
        x: R.Tensor((1, 1, 2, 2, 2), "float32"),
        weight: R.Tensor((2, 1, 1, 1, 1), "float32"),
        gamma: R.Tensor((2,), "float32"),
        beta: R.Tensor((2,), "float32"),
        mean: R.Tensor((2,), "float32"),
        variance: R.Tensor((2,), "float32"),
    ) -> R.Tensor((1, 2, 2, 2, 2), "float32"):
        with R.dataflow():
            a = R.nn.conv3d(x, weight)
            b = R.nn.batch_norm(a, gamma, beta, mean, variance, 1, 0.0, True, True, 0.1, False)
            c = b[0]
            R.output(c)
        return c


def test_a_norm_goes_into_the_convolution_before_it() -> None:
    @I.ir_module
    class After:
        @R.function
        def main(
            x: R.Tensor((1, 1, 2, 2, 2), "float32"),
            weight: R.Tensor((2, 1, 1, 1, 1), "float32"),
            shift: R.Tensor((1, 2, 1, 1, 1), "float32"),
        ) -> R.Tensor((1, 2, 2, 2, 2), "float32"):
            with R.dataflow():
                a = R.nn.conv3d(x, weight)
                c = R.add(a, shift)
                R.output(c)
            return c

    arrays = {"weight": NORM["weight"], "shift": np.float32([4, 6]).reshape(1, 2, 1, 1, 1)}
    becomes(FoldBatchNorm(Reasons()), bound(ConvolutionAndNorm, NORM), bound(After, arrays))


def test_a_norm_whose_parameters_are_computed_stays() -> None:
    computed = bound(ConvolutionAndNorm, {name: NORM[name] for name in ("weight", "gamma", "beta")})
    declines(FoldBatchNorm, computed, "a batch norm of its own: its parameters are not constant")


def test_a_norm_beside_another_reader_is_a_product_and_a_sum() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 1, 2, 2, 2), "float32"),
            weight: R.Tensor((2, 1, 1, 1, 1), "float32"),
            gamma: R.Tensor((2,), "float32"),
            beta: R.Tensor((2,), "float32"),
            mean: R.Tensor((2,), "float32"),
            variance: R.Tensor((2,), "float32"),
        ) -> R.Tensor((1, 2, 2, 2, 2), "float32"):
            with R.dataflow():
                a = R.nn.conv3d(x, weight)
                b = R.nn.batch_norm(a, gamma, beta, mean, variance, 1, 0.0, True, True, 0.1, False)
                c = b[0]
                d = R.add(a, c)
                R.output(d)
            return d

    reasons = Reasons()
    after = FoldBatchNorm(reasons)(bound(Before, NORM))
    operators = [Graph.of(after["main"]).op(var) for var in Graph.of(after["main"]).order]
    assert operators[:4] == ["nn.conv3d", "multiply", "add", "add"]
    assert list(reasons) == ["c: a batch norm apart from convolutions: what it normalises has other readers"]


# -- NarrowChannels ---------------------------------------------------------------------------------------------------


@I.ir_module
class TwoConvolutions:
    @R.function
    def main(
        x: R.Tensor((1, 2, 2, 2, 2), "float32"),
        first: R.Tensor((3, 2, 1, 1, 1), "float32"),
        second: R.Tensor((2, 3, 1, 1, 1), "float32"),
    ) -> R.Tensor((1, 2, 2, 2, 2), "float32"):
        with R.dataflow():
            a = R.nn.conv3d(x, first)
            b = R.nn.relu(a)
            c = R.nn.conv3d(b, second)
            R.output(c)
        return c


def test_channels_that_nobody_reads_are_taken_out() -> None:
    @I.ir_module
    class After:
        @R.function
        def main(
            x: R.Tensor((1, 2, 2, 2, 2), "float32"),
            first: R.Tensor((2, 2, 1, 1, 1), "float32"),
            second: R.Tensor((2, 2, 1, 1, 1), "float32"),
        ) -> R.Tensor((1, 2, 2, 2, 2), "float32"):
            with R.dataflow():
                a = R.nn.conv3d(x, first)
                b = R.nn.relu(a)
                c = R.nn.conv3d(b, second)
                R.output(c)
            return c

    first, second = (np.arange(1, 7, dtype="float32").reshape(shape) for shape in ((3, 2, 1, 1, 1), (2, 3, 1, 1, 1)))
    second[:, 1] = 0
    narrow = NarrowChannels(Reasons())
    small = {"first": first[[0, 2]], "second": second[:, [0, 2]].copy()}
    becomes(narrow, bound(TwoConvolutions, {"first": first, "second": second}), bound(After, small))
    assert list(narrow.reasons) == [
        "a: filter, 1.50x fewer MACs: 1 of 3 filters and 0 of 2 input channels are taken out",
        "c: filter, 1.50x fewer MACs: 0 of 2 filters and 1 of 3 input channels are taken out",
    ]


def test_channels_that_are_read_stay() -> None:
    ones = {"first": np.ones((3, 2, 1, 1, 1), "float32"), "second": np.ones((2, 3, 1, 1, 1), "float32")}
    stays(NarrowChannels(Reasons()), bound(TwoConvolutions, ones))


# -- SpreadTransposed -------------------------------------------------------------------------------------------------


def test_a_transposed_convolution_is_one_over_its_input_spread_out() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 3, 4, 5), "float32"), w: R.Tensor((3, 2, 2, 3), "float32")):
            with R.dataflow():
                y = R.nn.conv2d_transpose(x, w, strides=[1, 2], padding=[0, 1, 0, 1])
                R.output(y)
            return y

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1, 3, 4, 5), "float32"), turned: R.Tensor((2, 3, 2, 3), "float32")):
            with R.dataflow():
                apart = R.expand_dims(x, axis=[4])
                zeros = R.nn.pad(apart, pad_width=[0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
                spread = R.reshape(zeros, R.shape([1, 3, 4, 10]))
                y = R.nn.conv2d(spread, turned, padding=[1, 1, 1, 0])
                R.output(y)
            return y

    w = np.arange(36, dtype="float32").reshape(3, 2, 2, 3)
    turned = np.ascontiguousarray(w.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1])
    becomes(SpreadTransposed(Reasons()), bound(Before, {"w": w}), bound(After, {"turned": turned}))


def test_a_transposed_convolution_of_groups_stays() -> None:
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor((1, 4, 4, 5), "float32"), w: R.Tensor((4, 2, 2, 3), "float32")):
            with R.dataflow():
                y = R.nn.conv2d_transpose(x, w, strides=[2, 2], groups=2)
                R.output(y)
            return y

    grouped = bound(Module, {"w": np.ones((4, 2, 2, 3), "float32")})
    why = "TVM's own transposed convolution: it has groups, or its input is neither a picture nor a clip"
    declines(SpreadTransposed, grouped, why)


# -- FoldPatches ------------------------------------------------------------------------------------------------------


def test_a_convolution_over_patches_of_the_input_is_a_product() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 3, 20, 32), "float32"), w: R.Tensor((5, 3, 10, 16), "float32")) -> R.Tensor(
            (2, 5, 2, 2), "float32"
        ):
            with R.dataflow():
                y = R.nn.conv2d(x, w, strides=[10, 16])
                R.output(y)
            return y

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((2, 3, 20, 32), "float32"), w: R.Tensor((480, 5), "float32")) -> R.Tensor(
            (2, 5, 2, 2), "float32"
        ):
            with R.dataflow():
                apart = R.reshape(x, (2, 3, 2, 10, 2, 16))
                moved = R.permute_dims(apart, [0, 2, 4, 1, 3, 5])
                rows = R.reshape(moved, (2, 2, 2, 480))
                y = R.matmul(rows, w)
                z = R.permute_dims(y, [0, 3, 1, 2])
                R.output(z)
            return z

    weight = np.arange(2400, dtype="float32").reshape(5, 3, 10, 16)
    becomes(
        FoldPatches(Reasons()),
        bound(Before, {"w": weight + 1}),
        bound(After, {"w": (weight + 1).reshape(5, 480).T.copy()}),
    )
    pruned = bound(Before, {"w": weight % 2})
    declines(FoldPatches, pruned, "no product of patches: a convolution leaves out the zeros among its weights")


def test_windows_that_overlap_or_lie_inside_the_network_stay_convolutions() -> None:
    @I.ir_module
    class Overlapping:
        @R.function
        def main(x: R.Tensor((1, 3, 20, 36), "float32"), w: R.Tensor((5, 3, 10, 16), "float32")) -> R.Tensor(
            (1, 5, 2, 3), "float32"
        ):
            with R.dataflow():
                y = R.nn.conv2d(x, w, strides=[10, 10])
                R.output(y)
            return y

    @I.ir_module
    class Inside:
        @R.function
        def main(x: R.Tensor((1, 3, 20, 32), "float32"), w: R.Tensor((5, 3, 10, 16), "float32")) -> R.Tensor(
            (1, 5, 2, 2), "float32"
        ):
            with R.dataflow():
                a = R.nn.relu(x)
                y = R.nn.conv2d(a, w, strides=[10, 16])
                R.output(y)
            return y

    for module in (Overlapping, Inside):
        stays(FoldPatches(Reasons()), bound(module, {"w": np.ones((5, 3, 10, 16), "float32")}))


# -- ChannelsLast -----------------------------------------------------------------------------------------------------


def test_channels_are_innermost_between_the_networks_edges() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 2, 4, 4, 4), "float32"), weight: R.Tensor((3, 2, 1, 1, 1), "float32")) -> R.Tensor(
            (1, 3, 2, 2, 2), "float32"
        ):
            with R.dataflow():
                a = R.nn.conv3d(x, weight)
                b = R.nn.relu(a)
                c = R.nn.max_pool3d(b, [2, 2, 2], [2, 2, 2])
                R.output(c)
            return c

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1, 2, 4, 4, 4), "float32"), weight: R.Tensor((3, 2, 1, 1, 1), "float32")) -> R.Tensor(
            (1, 3, 2, 2, 2), "float32"
        ):
            with R.dataflow():
                y = R.permute_dims(x, [0, 2, 3, 4, 1])
                a = R.nn.conv3d(y, weight, data_layout="NDHWC", kernel_layout="OIDHW", out_layout="NDHWC")
                b = R.nn.relu(a)
                p = R.nn.max_pool3d(b, [2, 2, 2], [2, 2, 2], layout="NDHWC", out_layout="NDHWC")
                c = R.permute_dims(p, [0, 4, 1, 2, 3])
                R.output(c)
            return c

    becomes(
        tvm.transform.Sequential([ChannelsLast(Reasons()), relax.transform.DeadCodeElimination()]),
        Before,
        relax.transform.CanonicalizeBindings()(After),
    )


def test_parts_with_kernels_for_channels_first_keep_it_and_others_do_not() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 2, 4, 8, 16), "float32"),
            a: R.Tensor((3, 2, 1, 1, 1), "float32"),
            b: R.Tensor((4, 3, 3, 1, 1), "float32"),
        ) -> R.Tensor((1, 4, 4, 8, 16), "float32"):
            with R.dataflow():
                y = R.nn.conv3d(x, a)
                z = R.nn.relu(y)
                flat = R.reshape(z, (1536,))
                sines = R.sin(flat)
                w = R.reshape(sines, (1, 3, 4, 8, 16))
                c = R.nn.conv3d(w, b, padding=[1, 0, 0])
                R.output(c)
            return c

    @I.ir_module
    class After:
        @R.function
        def main(
            x: R.Tensor((1, 2, 4, 8, 16), "float32"),
            a: R.Tensor((3, 2, 1, 1, 1), "float32"),
            b: R.Tensor((4, 3, 3, 1, 1), "float32"),
        ) -> R.Tensor((1, 4, 4, 8, 16), "float32"):
            with R.dataflow():
                y = R.nn.conv3d(x, a)
                z = R.nn.relu(y)
                flat = R.reshape(z, (1536,))
                sines = R.sin(flat)
                w = R.reshape(sines, (1, 3, 4, 8, 16))
                last = R.permute_dims(w, [0, 2, 3, 4, 1])
                d = R.nn.conv3d(
                    last, b, padding=[1, 0, 0], data_layout="NDHWC", kernel_layout="OIDHW", out_layout="NDHWC"
                )
                c = R.permute_dims(d, [0, 4, 1, 2, 3])
                R.output(c)
            return c

    weights = {"a": np.ones((3, 2, 1, 1, 1), "float32"), "b": np.ones((4, 3, 3, 1, 1), "float32")}
    becomes(
        tvm.transform.Sequential([ChannelsLast(Reasons(), planar=True), relax.transform.DeadCodeElimination()]),
        bound(Before, weights),
        relax.transform.CanonicalizeBindings()(bound(After, weights)),
    )


def test_a_part_with_an_operator_for_channels_innermost_alone_says_which() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 2, 4, 8, 16), "float32"),
            a: R.Tensor((3, 2, 1, 1, 1), "float32"),
            b: R.Tensor((4, 3, 3, 1, 1), "float32"),
        ) -> R.Tensor((1, 4, 4, 8, 16), "float32"):
            with R.dataflow():
                y = R.nn.conv3d(x, a)
                z = R.nn.relu(y)
                c = R.nn.conv3d(z, b, padding=[1, 0, 0])
                R.output(c)
            return c

    reasons = Reasons()
    weights = {"a": np.ones((3, 2, 1, 1, 1), "float32"), "b": np.ones((4, 3, 3, 1, 1), "float32")}
    after = ChannelsLast(reasons, planar=True)(bound(Before, weights))
    assert "NCDHW" not in after.script()
    assert list(reasons) == ["y: channels innermost: c, which shares its layout, has no kernel for others"]


def test_what_no_window_makes_keeps_its_layout() -> None:
    @I.ir_module
    class Elementwise:
        @R.function
        def main(x: R.Tensor((1, 2, 4, 4, 4), "float32")) -> R.Tensor((1, 2, 4, 4, 4), "float32"):
            with R.dataflow():
                a = R.nn.relu(x)
                b = R.add(a, x)
                R.output(b)
            return b

    stays(ChannelsLast(Reasons()), Elementwise)


# -- FoldLists, ComputeEmpty, LiftWeights -----------------------------------------------------------------------------


def test_integer_arithmetic_on_constants_is_done_and_on_floats_left() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((2,), "int32"), known: R.Tensor((4,), "int32"), floats: R.Tensor((2,), "float32")
        ) -> R.Tuple(R.Tensor((2,), "int32"), R.Tensor((2,), "float32")):
            with R.dataflow():
                a = R.add(known, known)
                b = R.strided_slice(a, [0], [1], [3])
                c = R.add(x, b)
                d = R.add(floats, floats)
                e = (c, d)
                R.output(e)
            return e

    @I.ir_module
    class After:
        @R.function
        def main(
            x: R.Tensor((2,), "int32"), known: R.Tensor((2,), "int32"), floats: R.Tensor((2,), "float32")
        ) -> R.Tuple(R.Tensor((2,), "int32"), R.Tensor((2,), "float32")):
            with R.dataflow():
                c = R.add(x, known)
                d = R.add(floats, floats)
                e = (c, d)
                R.output(e)
            return e

    floats = np.float32([1, 2])
    before = bound(Before, {"known": np.int32([1, 2, 3, 4]), "floats": floats})
    becomes(FoldLists(), before, bound(After, {"known": np.int32([4, 6]), "floats": floats}))


@I.ir_module
class AddsConstant:
    @R.function
    def main(x: R.Tensor((1,), "float32"), known: R.Tensor((64,), "float32")) -> R.Tensor((64,), "float32"):
        with R.dataflow():
            a = R.add(x, known)
            R.output(a)
        return a


def test_constants_without_elements_are_computed() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2,), "float32"), empty: R.Tensor((0,), "float32")) -> R.Tuple(
            R.Tensor((2,), "float32"), R.Tensor((0,), "float32")
        ):
            with R.dataflow():
                a = (x, empty)
                R.output(a)
            return a

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((2,), "float32")) -> R.Tuple(R.Tensor((2,), "float32"), R.Tensor((0,), "float32")):
            with R.dataflow():
                zeros = R.zeros(R.shape([0]), "float32")
                a = (x, zeros)
                R.output(a)
            return a

    becomes(ComputeEmpty(), bound(Before, {"empty": np.zeros(0, "float32")}), After)
    stays(ComputeEmpty(), bound(AddsConstant, {"known": np.zeros(64, "float32")}))


def test_large_constants_become_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1,), "float32"), weight_000: R.Tensor((64,), "float32")) -> R.Tensor((64,), "float32"):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                a = R.add(x, weight_000)
                R.output(a)
            return a

    known = np.arange(64, dtype="float32")
    mod = bound(AddsConstant, {"known": known})
    stays(LiftWeights(), mod)
    monkeypatch.setattr(lift_weights, "INLINE_BYTES", 200)
    monkeypatch.setattr(lift_weights, "SMALL_BYTES", 100)
    lift = LiftWeights()
    becomes(lift, mod, After)
    np.testing.assert_array_equal(lift.weights["weight_000"], known)


# -- functions of TVM's -----------------------------------------------------------------------------------------------


@I.ir_module
class Exponential:
    @T.prim_func(s_tir=True)
    def exponential(x: T.Buffer((4, 64), "float32"), y: T.Buffer((4, 64), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i, j in T.grid(4, 64):
            with T.sblock("exp"):
                vi, vj = T.axis.remap("SS", [i, j])
                y[vi, vj] = T.exp(x[vi, vj])


def test_the_rest_is_scheduled_by_the_vector_and_what_is_scheduled_stays() -> None:
    scheduled = ScheduleRest(16, 1)(Exponential)
    script = scheduled["exponential"].script()
    assert is_scheduled(scheduled["exponential"])
    assert not is_scheduled(Exponential["exponential"]), "a pass leaves what it is given as it was"
    assert re.search(r"T\.vectorized\((64|32|16)\)", script), script
    assert "T.parallel" not in script
    stays(ScheduleRest(16, 1), scheduled)


def test_elementary_functions_are_written_out_and_other_functions_stay() -> None:
    written = VectorMath()(Exponential)
    assert "T.dance.exp(x" in written["exponential"].script()
    assert "T.exp(x" in Exponential["exponential"].script(), "a pass leaves what it is given as it was"
    stays(VectorMath(), written)


def test_the_rest_is_bound_to_threads_or_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_53", "max_threads_per_block": 1024, "thread_warp_size": 32})
    with target:
        script = ScheduleRestForGpu()(Exponential)["exponential"].script()
        assert "blockIdx.x" in script
        assert "threadIdx.x" in script
        assert not is_scheduled(Exponential["exponential"]), "a pass leaves what it is given as it was"
        monkeypatch.setattr(tvm.s_tir.dlight, "ApplyDefaultSchedule", lambda *_rules: lambda mod: mod)
        with pytest.raises(DanceError, match="exponential has no GPU schedule: build this network for a CPU target"):
            ScheduleRestForGpu().transform_module(Exponential, None)


# -- NormsBeforeConcat ------------------------------------------------------------------------------------------------


def test_what_is_behind_a_concatenation_of_convolutions_goes_to_its_parts() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 3, 2, 4, 4)), w: R.Tensor((2, 3, 1, 1, 1)), v: R.Tensor((4, 3, 1, 1, 1))) -> R.Tensor(
            (1, 6, 2, 4, 4)
        ):
            with R.dataflow():
                a = R.nn.conv3d(x, w)
                b = R.nn.conv3d(x, v)
                c = R.concat((a, b), axis=1)
                d = R.nn.relu(c)
                e = R.sigmoid(d)
                R.output(e)
            return e

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1, 3, 2, 4, 4)), w: R.Tensor((2, 3, 1, 1, 1)), v: R.Tensor((4, 3, 1, 1, 1))) -> R.Tensor(
            (1, 6, 2, 4, 4)
        ):
            with R.dataflow():
                a = R.nn.conv3d(x, w)
                b = R.nn.conv3d(x, v)
                c = R.nn.relu(a)
                d = R.sigmoid(c)
                e = R.nn.relu(b)
                f = R.sigmoid(e)
                g = R.concat((d, f), axis=1)
                R.output(g)
            return g

    @I.ir_module
    class Read:
        @R.function
        def main(x: R.Tensor((1, 3, 2, 4, 4)), w: R.Tensor((2, 3, 1, 1, 1))) -> R.Tensor((1, 5, 2, 4, 4)):
            with R.dataflow():
                a = R.nn.conv3d(x, w)
                c = R.concat((a, x), axis=1)
                d = R.nn.relu(c)
                R.output(d)
            return d

    becomes(NormsBeforeConcat(Reasons()), Before, After)
    why = "behind a concatenation, where it stays: x is not a convolution's result that it alone reads"
    declines(NormsBeforeConcat, Read, why)


# -- whole_powers -----------------------------------------------------------------------------------------------------


def test_a_fifth_power_is_a_product_by_squares() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
            with R.dataflow():
                y = R.power(x, R.const(5.0, "float32"))
                R.output(y)
            return y

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
            with R.dataflow():
                second = R.multiply(x, x)
                fourth = R.multiply(second, second)
                y = R.multiply(fourth, x)
                R.output(y)
            return y

    becomes(whole_powers, Before, After)


@pytest.mark.parametrize(("dtype", "exponent"), [("float32", 2.5), ("float32", 9.0), ("int32", 3)])
def test_other_powers_stay(dtype: str, exponent: float) -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([4], dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.power(x, relax.const(exponent, dtype)))
        builder.emit_func_output(y)
    stays(whole_powers, builder.finalize())


# -- unsigned_signs ---------------------------------------------------------------------------------------------------


def test_bytes_wrap_around_without_numbers_below_zero() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((4,), "uint8")) -> R.Tensor((4,), "uint8"):
            with R.dataflow():
                minus = R.negative(x)
                sign = R.sign(minus)
                y = R.subtract(sign, R.const(3, "uint8"))
                R.output(y)
            return y

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((4,), "uint8")) -> R.Tensor((4,), "uint8"):
            with R.dataflow():
                bits = R.bitwise_not(x)
                minus = R.add(bits, R.const(1, "uint8"))
                sign = R.minimum(minus, R.const(1, "uint8"))
                y = R.add(sign, R.const(253, "uint8"))
                R.output(y)
            return y

    becomes(unsigned_signs, Before, After)


def test_numbers_with_a_sign_keep_it() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([4], "int8"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.negative(x))
        builder.emit_func_output(y)
    stays(unsigned_signs, builder.finalize())


# -- infinite_fills ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.inf, 2.0])
def test_an_infinite_fill_is_a_broadcast_constant(number: float) -> None:
    def filled(of: Callable[[relax.Expr, relax.Var], relax.Expr]) -> tvm.IRModule:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType([2, 3], "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                y = builder.emit_output(of(relax.const(np.float32(number)), x))
            builder.emit_func_output(y)
        return builder.finalize()

    before = filled(lambda value, x: relax.op.full_like(x, value))
    after = filled(lambda value, _x: relax.op.broadcast_to(value, (2, 3)))
    becomes(infinite_fills, before, before if np.isfinite(number) else after)


# -- WidenSequences ---------------------------------------------------------------------------------------------------


def test_sequences_are_pictures_of_one_row_from_convolution_to_result() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 2, 9), "float32"), w: R.Tensor((4, 2, 3), "float32"), b: R.Tensor((1, 4, 1), "float32")
        ) -> R.Tensor((1, 4), "float32"):
            with R.dataflow():
                conv = R.nn.conv1d(x, w, strides=[2], padding=[1, 1])
                shifted = R.nn.relu(R.add(conv, b))
                y = R.mean(shifted, axis=[2])
                R.output(y)
            return y

    @I.ir_module
    class After:
        @R.function
        def main(
            x: R.Tensor((1, 2, 9), "float32"),
            w: R.Tensor((4, 2, 1, 3), "float32"),
            b: R.Tensor((1, 4, 1, 1), "float32"),
        ) -> R.Tensor((1, 4), "float32"):
            with R.dataflow():
                picture = R.expand_dims(x, axis=[2])
                conv = R.nn.conv2d(picture, w, strides=[1, 2], padding=[0, 1, 0, 1])
                shifted = R.nn.relu(R.add(conv, b))
                y = R.mean(shifted, axis=[2, 3])
                R.output(y)
            return y

    w, b = np.arange(24, dtype="float32").reshape(4, 2, 3), np.ones((1, 4, 1), "float32")
    given = {"w": w, "b": b}, {"w": w[:, :, None], "b": b[:, :, None]}
    becomes(WidenSequences(), bound(Before, given[0]), bound(After, given[1]))


def test_tensors_of_three_axes_without_a_convolution_stay() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 2, 9], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.permute_dims(builder.emit(relax.op.nn.relu(x)), [0, 2, 1]))
        builder.emit_func_output(y)
    stays(WidenSequences(), builder.finalize())


def test_a_sequence_beside_what_has_more_axes_is_one() -> None:
    builder = relax.BlockBuilder()
    x, z = (
        relax.Var("x", relax.TensorType([2, 3, 8], "float32")),
        relax.Var("z", relax.TensorType([6, 2, 4, 8], "float32")),
    )
    with builder.function("main", [x, z]):
        with builder.dataflow():
            conv = builder.emit(relax.op.nn.conv1d(x, relax.const(np.ones((4, 3, 3), "float32")), padding=[1, 1]))
            y = builder.emit_output(relax.op.maximum(z, conv))
        builder.emit_func_output(y)
    graph = Graph.of(WidenSequences()(builder.finalize())["main"])
    (larger,) = (graph.call(var) for var in graph.order if graph.op(var) == "maximum")
    assert [len(arg.ty.shape) for arg in larger.args] == [4, 3]
