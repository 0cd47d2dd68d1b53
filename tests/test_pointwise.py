"""The pointwise kernel equals PyTorch for any shape, tile and epilogue; dense layers of one tap take it."""

from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from convolutions import TARGET, call, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend.importer import import_model
from dance_tvm.lowering.registry import kernel_of
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.pointwise import PointwiseConv, PointwiseTile
from dance_tvm.schedules.cpu.pointwise_tiles import is_pointwise, leaves_caches, pointwise, reads_far
from dance_tvm.schedules.cpu.row_tiles import panel_widths
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.elementary import written_out
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.kernel import Weights
from dance_tvm.schedules.layer import Layer
from dance_tvm.schedules.workload import Workload

AVX2 = Machine(8, 16, 32768, 1 << 20, broadcast_loads=True)
AVX512 = Machine(16, 32, 49152, 2 << 20, broadcast_loads=True)
NEON = Machine(4, 32, 65536, 1 << 19, broadcast_loads=False)


#: Type, lanes of a vector and terms that are loaded as one.
LANES = [
    ("float32", 4, 1),
    ("float32", 4, 4),
    ("float32", 8, 1),
    ("float32", 16, 1),
    ("float16", 8, 8),
    ("float16", 8, 1),
]


def window_of(batch: int, *size: int) -> Window:
    return Window(batch, size, size, (1, 1, 1))


def check(conv: PointwiseConv, seed: int = 0) -> None:
    """Small integers, so that sums are exact; the output is NaN beforehand."""
    rng, most = np.random.default_rng(seed), 9 if conv.dtype == "float32" else 1
    x = rng.integers(-most, most + 1, conv.x_shape).astype("float32")
    weight = rng.integers(-4, 5, (conv.channels_out, conv.channels_in)).astype("float32")
    bias = rng.integers(-9, 10, conv.channels_out).astype("float32")
    residual = rng.integers(-9, 10, conv.y_shape).astype("float32")
    gate = rng.integers(-3, 4, (conv.window.batch, conv.channels_in)).astype("float32")
    y, _ = call(conv, x, {}, Weights(weight.reshape(*weight.shape, 1, 1, 1), bias), residual, gate=gate)
    read = x * gate[:, None, None, None, :] if conv.gate else x
    read = np.maximum(read, 0) if conv.before else read
    exact = read.astype("float64") @ weight.T + bias + (residual if conv.residual else 0)
    np.testing.assert_array_equal(y, np.maximum(exact, 0) if conv.activation else exact)


@st.composite
def convolutions(draw: st.DrawFn) -> PointwiseConv:
    window = window_of(
        draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    )
    dtype, floats, step = draw(st.sampled_from(LANES))
    tile = PointwiseTile(
        draw(st.integers(1, 7)),
        draw(st.integers(1, 3)),
        floats,
        step,
        draw(st.integers(1, 5)),
        draw(st.sampled_from([1, 1, 2, 3])),
    )
    channels = draw(st.sampled_from([*range(1, 14), 60, 300])), draw(st.integers(1, 53))
    gate = draw(st.booleans())
    before = draw(st.sampled_from(["", "relu"])) if gate else ""
    behind = draw(st.booleans()), draw(st.sampled_from(["", "relu"]))
    return PointwiseConv(window, *channels, tile, *behind, gate, before, dtype, far_input=draw(st.booleans()))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(convolutions(), st.integers(0, 99))
def test_any_pointwise_convolution(conv, seed):
    check(conv, seed)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="stores of x86")
@pytest.mark.parametrize(("lanes", "vectors"), [(4, 4), (8, 2), (16, 3)])
def test_results_go_past_the_caches_where_a_tile_stores_whole_lines(lanes: int, vectors: int) -> None:
    tile = PointwiseTile(3, vectors, lanes, 1, 2)
    conv = PointwiseConv(window_of(1, 2, 3, 5), 40, 96, tile, True, "relu", past_caches=True)
    check(conv)
    code = tvm.compile(tvm.IRModule({"k": written_out(conv.primfunc("k"))}), target=TARGET).mod.inspect_source("asm")
    assert "movnt" in code
    assert "sfence" in code
    assert not replace(conv, channels_out=88).stores_past
    assert not replace(conv, tile=replace(tile, vectors=1)).stores_past or lanes == 16


def test_large_layers_alone_bypass_caches_or_read_ahead() -> None:
    x86 = replace(AVX512, l3=32 << 20)
    large = Layer(window_of(1, 32, 56, 56), 64, 256, residual=True)
    without = replace(large, residual=False)
    assert leaves_caches(large, x86)
    assert not reads_far(large, x86)
    assert reads_far(without, x86)
    assert not leaves_caches(without, x86)
    small = replace(large, window=window_of(1, 4, 14, 14))
    half, unknown = replace(large, dtype="float16"), replace(x86, l3=0)
    assert not any((leaves_caches(small, x86), leaves_caches(half, x86), leaves_caches(large, unknown)))
    assert not leaves_caches(large, replace(NEON, l3=32 << 20))
    assert not reads_far(without, NEON)
    assert not reads_far(replace(small, residual=False), x86)
    assert not reads_far(without, unknown)


@pytest.mark.parametrize("machine", [AVX2, AVX512, NEON], ids=["avx2", "avx512", "neon"])
@pytest.mark.parametrize("channels", [(24, 54), (432, 192), (3, 2), (1024, 1000)])
@pytest.mark.parametrize("rows", [1, 3, 100, 12800])
def test_a_space_holds_its_default_and_only_what_fits(machine, channels, rows):
    for threads in (1, 2):
        work = pointwise(Workload(window_of(1, 1, 1, rows), *channels, threads=threads))
        kernel = kernel_of(work, machine)
        space = kernel.space(machine, work)
        default = space.default()
        assert space.allows(default)
        assert space.normal(default) == default
        tile = kernel.sized(default).tile
        assert tile.mr * tile.vectors + tile.vectors <= machine.registers
        assert tile.mr <= rows
        blocks = -(-rows // (tile.mr * tile.block_tiles))
        assert rows < 100 or blocks >= threads
        assert all(space.allows({**default, "splits": part}) for part in space.parts()[0]["splits"])
        assert not space.allows({**default, "mr": machine.registers})
        assert not space.allows({name: value for name, value in default.items() if name != "splits"})


def test_output_channels_are_shared_evenly_by_panels():
    assert panel_widths(7, 4) == [(1, 4), (1, 3)]
    assert panel_widths(14, 4) == [(2, 4), (2, 3)]
    assert panel_widths(8, 4) == [(2, 4)]
    assert panel_widths(1, 6) == [(1, 1)]


def test_what_is_no_matrix_product_of_all_positions_has_another_kernel():
    layer = Layer(window_of(1, 2, 4, 4), 8, 8)
    assert is_pointwise(layer)
    others = (
        Layer(Window(1, (2, 4, 4), (2, 2, 2), (1, 1, 1), (1, 2, 2)), 8, 8),
        Layer(Window(1, (2, 4, 4), (2, 6, 6), (1, 1, 1), padding=(0, 1, 1)), 8, 8),
        Layer(Window(1, (2, 4, 4), (2, 4, 4), (1, 3, 3), padding=(0, 1, 1)), 8, 8),
        Layer(window_of(1, 2, 4, 4), 8, 8, groups=2),
        Layer(window_of(1, 2, 4, 4), 8, 8, out_frames=True),
        Layer(window_of(1, 2, 4, 4), 8, 8, live_in=True),
        Layer(window_of(1, 2, 4, 4), 8, 8, columns=12),
    )
    assert not any(map(is_pointwise, others))


class Narrow(nn.Module):
    """Pointwise layers of odd widths, with what may be fused behind them, one with a stride, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow = nn.Conv3d(6, 27, 1), nn.Conv3d(27, 6, 1, bias=False)
        self.strided = nn.Conv3d(6, 10, 1, (1, 2, 2))
        self.linear, self.head = nn.Linear(10, 19), nn.Linear(19, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.narrow(nn.functional.silu(self.wide(x))) + x)
        y = self.linear(torch.relu(self.strided(y)).permute(0, 2, 3, 4, 1))
        return self.head(nn.functional.gelu(y).mean((1, 2, 3)))


class Excited(nn.Module):
    """Gates before pointwise layers: with an activation between, in one clip of two, with another reader."""

    def __init__(self, twice: bool, act: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depthwise = nn.Conv3d(9, 9, 3, padding=1, groups=9)
        self.squeeze, self.excite, self.act = nn.Conv3d(9, 3, 1), nn.Conv3d(3, 9, 1), act
        self.behind = nn.Conv3d(9, 7, 1)
        self.twice, self.gate = twice, nn.Hardsigmoid() if twice else nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(x)
        gate = self.gate(self.excite(torch.relu(self.squeeze(x.mean((2, 3, 4), keepdim=True)))))
        gated = self.act(x * gate)
        return self.behind(gated) + gated.sum() if self.twice else self.behind(gated)


@pytest.mark.parametrize(
    ("twice", "act", "taken"),
    [(False, nn.SiLU(), True), (False, nn.Identity(), True), (False, nn.PReLU(9), False), (True, nn.GELU(), False)],
)
def test_a_gate_is_applied_by_the_layer_that_reads_it(twice, act, taken):
    network, x, target = Excited(twice, act).eval(), torch.randn(2, 9, 3, 5, 4), load_target("host")
    lowered = lower(import_model(network, example_inputs=(x,), check=False).mod, target, Options())
    assert lowered.layers[-1].kernel.startswith("conv3d_pointwise_g_") == taken
    machine = tvm.relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(1)), tvm.cpu())
    found = machine["main"](tensor(x.numpy()), *map(tensor, lowered.weights.values()))[0].numpy()
    exact = network.double()(x.double()).detach().numpy()
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_a_hard_gate_is_applied_by_the_layer_too():
    network, x = Excited(False, nn.Identity()), torch.randn(1, 9, 2, 4, 4)
    network.gate = nn.Hardsigmoid()
    lowered = lower(import_model(network.eval(), example_inputs=(x,), check=False).mod, load_target("host"), Options())
    assert lowered.layers[-1].kernel.startswith("conv3d_pointwise_g_")


def test_networks_take_the_kernel():
    network, x = Narrow(), torch.randn(2, 6, 3, 5, 7)
    target = load_target("host")
    for threads in (1, 2):
        imported = import_model(network.float().eval(), example_inputs=(x,), check=False)
        lowered = lower(imported.mod, target, Options(threads=threads))
        taken = [layer.kernel.startswith("conv3d_pointwise_") for layer in lowered.layers]
        assert taken == [True, True, False, True, True]
        machine = tvm.relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(threads)), tvm.cpu())
        given = [tensor(x.numpy()), *map(tensor, lowered.weights.values())]
        exact = network.double()(x.double()).detach().numpy()
        found = machine["main"](*given)[0].numpy()
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
        counts = machine["counts"](*given).numpy()
        macs = [int(np.prod(row[1:], dtype=np.int64)) for row in counts]
        assert macs == [210 * 6 * 27, 210 * 27 * 6, 2 * 3 * 3 * 4 * 60, 2 * 3 * 3 * 4 * 190, 2 * 95]


def one_row(channels_in: int, channels_out: int, tile: PointwiseTile, activation: str = "") -> PointwiseConv:
    return PointwiseConv(window_of(1, 1, 1, 1), channels_in, channels_out, tile, activation=activation)


@pytest.mark.parametrize("left", [1.0, 0.5, 0.02, 0.0], ids=["all", "half", "few", "none"])
def test_a_large_layer_of_one_row_reads_the_weights_of_values_that_are_not_zero_alone(left: float) -> None:
    conv = one_row(2050, 133, PointwiseTile(4, 3, 16, 1, 1, 2), "relu")
    assert conv.lists_terms
    rng = np.random.default_rng(3)
    alive = rng.permutation(conv.channels_in) < left * conv.channels_in
    x = np.where(alive, rng.integers(1, 9, conv.channels_in), -0.0).astype("float32")
    weight = rng.integers(-4, 5, (conv.channels_out, conv.channels_in)).astype("float32")
    bias = rng.integers(-9, 10, conv.channels_out).astype("float32")
    exact = np.maximum(weight.astype("float64") @ x + bias, 0)
    weight[:, ~alive] = np.nan
    y, _ = call(conv, x.reshape(conv.x_shape), {}, Weights(weight.reshape(*weight.shape, 1, 1, 1), bias))
    np.testing.assert_array_equal(y.ravel(), exact)


def test_of_one_row_nan_is_a_value_and_small_layers_keep_no_list() -> None:
    conv = one_row(2050, 133, PointwiseTile(1, 2, 16, 1, 1, 1))
    x, weight = np.zeros(2050, "float32"), np.ones((133, 2050, 1, 1, 1), "float32")
    x[7] = np.nan
    y, _ = call(conv, x.reshape(conv.x_shape), {}, Weights(weight, np.zeros(133, "float32")))
    assert np.isnan(y).all()
    assert not one_row(300, 133, conv.tile).lists_terms
    assert not PointwiseConv(window_of(2, 1, 1, 1), 2050, 133, conv.tile).lists_terms
