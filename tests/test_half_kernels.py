"""Kernels in half precision: small integers stay exact in them, on every kind of list, and the ends of the range are
what IEEE says.

A processor without half precision computes each step in float32 and rounds it: slow, and the same values.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from convolutions import call
from test_conv3d_gather import DENSE, IN_POSITIONS, GatherCase, check

from benchmarks.arm_model import kernel_code, loops_of
from dance_tvm.liveness.kernel_groups import find_kernel_groups
from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.carry_frames import Carry
from dance_tvm.schedules.cpu.choice import settled_direct
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.depthwise import DepthwiseConv, DepthwiseTile
from dance_tvm.schedules.cpu.pool3d import VectorPool
from dance_tvm.schedules.cpu.row_plan import RowPlan
from dance_tvm.schedules.cpu.tiles import HALF_TERMS, Machine, Tile, default_tile
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.kernel import Weights
from dance_tvm.schedules.layer import Layer

HALF = "float16"
CASES = [DENSE[8], DENSE[11], DENSE[12], IN_POSITIONS[5], IN_POSITIONS[6]]
#: The largest number, the least normal one, the least of all, and what is none.
EDGES = np.array([65504, -65504, 2.0**-14, 2.0**-24, -(2.0**-24), np.inf, -np.inf, np.nan], HALF)
NEON = Machine(4, 32, 65536, 524288, False)


@pytest.mark.parametrize("case", CASES, ids=["residual", "depth blocks", "kernel groups", "all lists", "positions"])
def test_a_convolution_of_small_integers_is_exact(case: GatherCase) -> None:
    check(replace(case, dtype=HALF))


def test_sums_go_to_single_precision_before_half_loses_their_units() -> None:
    """8,192 ones: half precision alone would stay at 2,048."""
    window, depth = Window(1, (2, 4, 4), (1, 1, 1), (2, 4, 4)), 256
    tile = default_tile(NEON.storing(HALF), window, depth, 8)
    assert min(tile.depth_block, depth) * tile.segment_taps <= HALF_TERMS
    plan = RowPlan(window, tile.mr, tile.block_tiles, tile.segment_taps)
    conv = GatherConv(window, depth, 8, 1, tile, plan, dtype=HALF)
    weights = Weights(np.ones((8, depth, 2, 4, 4), "float32"), np.zeros(8, "float32"))
    found, _ = call(conv, np.ones((1, 2, 4, 4, depth)), weights=weights)
    assert found.dtype == HALF
    assert np.all(found == 8192)


@pytest.mark.parametrize("run", [8, 4])
def test_sums_of_kernel_groups_go_to_single_precision_too(run: int) -> None:
    """Up to 1,296 threes over several runs of taps: half precision alone would lose units from 2,048 on. Runs that fill
    no vector are loaded as what they are."""
    window = Window(1, (3, 4, 4), (3, 4, 4), (3, 3, 3), padding=(1, 1, 1))
    layer = Layer(window, 48, 16, group=(16, run), columns=48 * 27, dtype=HALF)
    conv = settled_direct(layer, NEON).kernel
    assert (conv.tile.nr, conv.tile.step) == (16, run)
    weight = np.full((16, 48, 3, 3, 3), 3.0, "float32")
    groups = find_kernel_groups(weight, 16, run)
    weights = Weights(weight, np.zeros(16, "float32"), groups.listed, groups.weights)
    found, _ = call(conv, np.ones((1, 3, 4, 4, 48)), weights=weights)
    taps = np.einsum("t,h,w->thw", [2, 3, 2], [2, 3, 3, 2], [2, 3, 3, 2])
    assert np.array_equal(found[0], np.repeat(144 * taps[..., None], 16, axis=3))


@pytest.mark.parametrize("densities", [None, [1.0]], ids=["masks as expected", "nothing left out"])
def test_the_model_of_time_knows_that_half_precision_is_faster(densities) -> None:
    layer = Layer(Window(1, (4, 14, 14), (4, 14, 14), (3, 3, 3), padding=(1, 1, 1)), 64, 64)
    whole, half = (
        settled_direct(each, NEON).kernel.predict(NEON, 1, densities) for each in (layer, replace(layer, dtype=HALF))
    )
    assert half < 0.6 * whole


def test_a_tile_takes_few_instructions_beside_its_multiply_adds() -> None:
    """In half precision on Arm: of the loop over taps an addition for each row, of that over tiles what puts each sum
    back, eight instructions."""
    layer = Layer(Window(1, (4, 14, 14), (4, 14, 14), (3, 3, 3), padding=(1, 1, 1)), 64, 64, dtype=HALF)
    kernel = settled_direct(layer, machine_of(load_target("snapdragon"))).kernel
    rows, vectors = kernel.tile.mr, kernel.tile.vectors
    channels, taps, tiles, *_ = (len(loop.lines) for loop in loops_of(kernel_code(layer, "snapdragon")[1]))
    assert taps - channels <= rows + 10
    assert tiles - taps <= 8 * rows * vectors + 12


def test_sums_and_inputs_of_a_pointwise_layer_stay_in_their_registers() -> None:
    """Nothing moves from register to register, or to the stack, where 16 registers alone may hold inputs."""
    layer = Layer(Window(1, (4, 10, 10), (4, 10, 10), (1, 1, 1)), 96, 216, activation="relu", dtype=HALF)
    code = kernel_code(layer, "snapdragon")[1]
    products = max(loops_of(code), key=lambda loop: loop.multiplies / len(loop.lines)).lines
    assert not [line for line in products if line.startswith("mov\tv") or "[sp" in line]
    assert "fmax" in code, "a rectifier is one instruction"
    assert "fcmlt" not in code


def test_activations_take_no_registers_from_sums() -> None:
    """The loop over products is about as long before a SiLU as before nothing, and results are right to rounding."""
    window = Window(1, (2, 3, 5), (2, 3, 5), (1, 1, 1))
    layer = Layer(window, 96, 92, activation="silu", residual=True, dtype=HALF)
    shortest = [
        min(len(loop.lines) for loop in loops_of(kernel_code(each, "snapdragon")[1]) if loop.multiplies > 100)
        for each in (layer, replace(layer, activation=""))
    ]
    assert shortest[0] <= 1.05 * shortest[1]
    rng = np.random.default_rng(0)
    weights = Weights(rng.integers(-2, 3, (92, 96, 1, 1, 1)).astype("float32") / 16, rng.normal(size=92).astype(HALF))
    x, residual = (rng.integers(-8, 9, (1, 2, 3, 5, size)) / 4 for size in (96, 92))
    found, _ = call(settled_direct(layer, NEON).kernel, x, weights=weights, residual=residual)
    exact = x @ weights.weight[:, :, 0, 0, 0].T.astype("float64") + weights.bias.astype("float64") + residual
    np.testing.assert_allclose(found, exact / (1 + np.exp(-exact)), rtol=2e-3, atol=1e-6)


def test_what_a_kernel_passes_on_is_what_ieee_says() -> None:
    window = Window(1, (1, 1, 8), (1, 1, 8), (1, 1, 1))
    conv = GatherConv(window, 1, 8, 1, Tile(1, 1, 8, 1, 8, 1), RowPlan(window, 1, 8, 1), dtype=HALF)
    weights = Weights(np.ones((8, 1, 1, 1, 1), "float32"), np.zeros(8, "float32"))
    x = EDGES.reshape(1, 1, 1, 8, 1)
    found, _ = call(conv, x, weights=weights)
    np.testing.assert_array_equal(found, np.broadcast_to(x, found.shape))
    pool = VectorPool(window, 1, "max", vector_floats=8, dtype=HALF)
    np.testing.assert_array_equal(call(pool, x)[0], x)


#: Layers that add up two values: side by side, in two channels, of each channel apart.
PAIRS = {
    "direct": Layer(Window(64, (1, 1, 2), (1, 1, 1), (1, 1, 2)), 1, 8, dtype=HALF),
    "pointwise": Layer(Window(64, (1, 1, 1), (1, 1, 1), (1, 1, 1)), 2, 8, dtype=HALF),
    "depthwise": Layer(Window(64, (1, 1, 2), (1, 1, 1), (1, 1, 2)), 8, 8, 8, dtype=HALF),
}


@pytest.mark.parametrize("factor", [-1.0, 2.0**-10])
@pytest.mark.parametrize("name", PAIRS)
def test_any_two_values_at_the_edge_of_the_range_add_up_as_ieee_says(name: str, factor: float) -> None:
    """The first of each pair and ``factor`` times the second, no product beyond the range, whether fused or not; sums
    beyond it are infinite."""
    layer, pairs = PAIRS[name], np.stack([EDGES.repeat(8), np.tile(EDGES, 8)], 1)
    conv = settled_direct(layer, NEON).kernel
    weight = np.ones((8, 1, 1, 1, 2), "float32") * np.array([1, factor], "float32")
    shape = (8, 2, 1, 1, 1) if name == "pointwise" else weight.shape
    x = np.broadcast_to(pairs.reshape(64, *layer.window.size, -1), conv.x_shape)
    found, _ = call(conv, x, weights=Weights(weight.reshape(shape), np.zeros(8, "float32")))
    with np.errstate(over="ignore", invalid="ignore"):
        first, second = pairs.astype("float64").T
        expected = (first + factor * second).astype(HALF)
    np.testing.assert_array_equal(found, np.broadcast_to(expected.reshape(64, 1, 1, 1, 1), found.shape))


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_pools_of_any_two_values_at_the_edge_of_the_range(pooling: str) -> None:
    pairs = np.stack([EDGES.repeat(8), np.tile(EDGES, 8)], 1)
    pool = VectorPool(Window(64, (1, 1, 2), (1, 1, 1), (1, 1, 2)), 1, pooling, vector_floats=8, dtype=HALF)
    found, _ = call(pool, pairs.reshape(64, 1, 1, 2, 1))
    with np.errstate(invalid="ignore"):
        first, second = pairs.astype("float64").T
        expected = np.maximum(first, second) if pooling == "max" else (first + second) / 2
    np.testing.assert_array_equal(found.reshape(-1), expected.astype(HALF))


@pytest.mark.parametrize("kernel", [(3, 3, 3), (5, 5, 7)], ids=["sums in half", "too many taps for that"])
def test_a_depthwise_convolution_of_small_integers_is_exact(kernel: tuple[int, int, int]) -> None:
    rng, size, padding = np.random.default_rng(0), (4, 5, 6), tuple(k // 2 for k in kernel)
    window = Window(1, size, size, kernel, padding=padding)
    conv = DepthwiseConv(window, 11, 11, DepthwiseTile(3, 2, 8, 2), residual=True, dtype=HALF)
    x, residual = rng.integers(-4, 5, (2, 1, *size, 11)).astype("float32")
    weight, bias = rng.integers(-3, 4, (11, 1, *kernel)).astype("float32"), rng.integers(-9, 9, 11).astype("float32")
    found, _ = call(conv, x, weights=Weights(weight, bias), residual=residual)
    arrays = (torch.from_numpy(x.transpose(0, 4, 1, 2, 3)), torch.from_numpy(weight), torch.from_numpy(bias))
    expected = torch.nn.functional.conv3d(*arrays, padding=padding, groups=11).numpy().transpose(0, 2, 3, 4, 1)
    np.testing.assert_array_equal(found, expected + residual)


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_a_pool_rounds_once(pooling) -> None:
    rng, window = np.random.default_rng(0), Window(1, (4, 6, 6), (2, 3, 6), (3, 2, 3), (2, 2, 1), (1, 0, 1))
    masks = {"in_frames": np.array([[True, True, False, True]])}
    pool = VectorPool(window, 13, pooling, in_frames=True, vector_floats=8, dtype=HALF)
    x = rng.normal(0, 100, (1, 4, 6, 6, 13)).astype(HALF)
    whole = VectorPool(window, 13, pooling, in_frames=True, vector_floats=8)
    np.testing.assert_array_equal(call(pool, x, masks)[0], call(whole, x.astype("float32"), masks)[0].astype(HALF))


def test_a_carry_is_the_same_in_half_precision() -> None:
    rng, both = np.random.default_rng(0), ("positions", "channels")
    carry = Carry(3, 2, 2, 3, 10, 8, fresh=both, taken=both, kept=both)
    masks = {each.axis: rng.random(each.shape) < 0.5 for each in carry.masks.values()}
    x = rng.integers(-9, 10, carry.shape)
    found, _ = call(replace(carry, dtype=HALF), x, masks)
    np.testing.assert_array_equal(found, call(carry, x.astype("float32"), masks)[0])
