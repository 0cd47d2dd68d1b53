"""The convolution along lines equals PyTorch for any window, tile and epilogue; layers of few channels take it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from convolutions import call, pooled_by, read_together, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_depthwise import window_of
from test_pointwise import AVX2, AVX512, LANES, NEON
from torch import nn

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend.importer import import_model
from dance_tvm.lowering.registry import choose
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.conv3d_line import LineConv, runs
from dance_tvm.schedules.cpu.line_tiles import LineSpace, line
from dance_tvm.schedules.cpu.pooled import pooled
from dance_tvm.schedules.cpu.row_tiles import RowTile
from dance_tvm.schedules.kernel import Weights
from dance_tvm.schedules.layer import Layer
from dance_tvm.schedules.workload import Workload


def plain(conv: LineConv, x: np.ndarray, weights: Weights) -> np.ndarray:
    """The convolution alone, in float64."""
    data, window = torch.from_numpy(x).double().permute(0, 4, 1, 2, 3), conv.window
    weight, bias = (torch.from_numpy(each).double() for each in (weights.weight, weights.bias))
    wanted = nn.functional.conv3d(data, weight, bias, window.stride, window.padding, window.dilation, conv.groups)
    return wanted.permute(0, 2, 3, 4, 1).numpy()


def check(conv: LineConv, seed: int = 0, density: float = 0.5) -> None:
    """Small integers, so that sums are exact; the output is NaN beforehand."""
    rng, window, most = np.random.default_rng(seed), conv.window, 9 if conv.dtype == "float32" else 1
    x = rng.integers(-most, most + 1, conv.x_shape).astype("float32")
    weight = rng.integers(-4, 5, (conv.channels_out, conv.depth, *window.kernel)).astype("float32")
    bias = rng.integers(-9, 10, conv.channels_out).astype("float32")
    residual = rng.integers(-9, 10, conv.y_shape).astype("float32")
    masks = {name: rng.random(operand.shape) < density for name, operand in conv.plan.masks.items()}
    y, values = call(conv, x, masks, Weights(weight, bias), residual)
    exact = plain(conv, x, Weights(weight, bias)) + (residual if conv.residual else 0)
    exact = np.maximum(exact, 0) if conv.activation else exact
    places = (window.batch, *window.out)
    frames = np.broadcast_to(masks.get("out_frames", np.ones((1, 1), bool))[:, :, None, None], places)
    positions = np.broadcast_to(masks.get("positions", np.ones((1, 1, 1, 1), bool)), places)
    np.testing.assert_array_equal(y[frames & positions], exact[frames & positions])
    zeros = {"": ~positions & False, "rows": frames & ~positions, "all": ~(frames & positions)}[conv.zero_dead]
    assert not y[zeros].any()
    if masks:
        taps = [[len(window.live_taps(axis, index)) for index in range(window.out[axis])] for axis in range(3)]
        pairs = np.einsum("nthw,t,h,w->", (frames & positions).astype(int), *taps)
        assert int(values["counts"][0, 3]) == pairs


@st.composite
def convolutions(draw: st.DrawFn, grouped: bool = False) -> LineConv:
    groups = draw(st.sampled_from([2, 3, 4, 5, 8])) if grouped else 1
    depth = draw(st.sampled_from([1, 2, 3, 4, 8] if grouped else [1, 2, 3, 4, 5, 6, 17, 70]))
    group_out = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 24])) if grouped else draw(st.integers(1, 23))
    kernel = draw(st.sampled_from([(3, 3, 3), (1, 3, 3), (1, 5, 4), (3, 1, 1), (1, 1, 3), (2, 3, 1), (1, 1, 1)]))
    stride = draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 3)]))
    dilation = draw(st.sampled_from([(1, 1, 1), (1, 1, 1), (2, 2, 1), (1, 1, 2)]))
    padding = draw(st.sampled_from([(0, 0, 0), tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(draw(st.integers(need, need + more)) for need, more in zip(reach, (2, 3, 9), strict=True))
    dtype, floats, step = draw(st.sampled_from(LANES))
    batch = draw(st.integers(1, 2))
    window = window_of(batch, size, kernel, stride, padding, dilation)
    told_apart = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, window.out[0]])))
    return LineConv(
        window,
        groups * depth,
        groups * group_out,
        RowTile(draw(st.integers(1, 7)), draw(st.integers(1, 3)), floats, step),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(["", "relu"])),
        out_frames=draw(st.booleans()),
        positions=draw(st.sampled_from([None, told_apart])),
        zero_dead=draw(st.sampled_from(["", "rows", "all"])),
        dtype=dtype,
        groups=groups,
    )


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(convolutions(), st.integers(0, 99), st.sampled_from([0.1, 0.6, 0.95, 1.0]))
def test_any_convolution_under_any_masks_of_its_outputs(conv, seed, density):
    check(conv, seed, density)


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(convolutions(grouped=True), st.integers(0, 99), st.sampled_from([0.6, 1.0]))
def test_any_grouped_convolution(conv, seed, density):
    check(conv, seed, density)


@pytest.mark.parametrize(
    ("channels", "groups", "blocks"), [((64, 64), 16, 4), ((48, 96), 4, 2), ((24, 24), 6, 1), ((64, 48), 16, 1)]
)
def test_groups_that_fill_no_vector_are_computed_as_one(channels, groups, blocks):
    conv = LineConv(window_of(1, (1, 3, 9), (1, 3, 3)), *channels, RowTile(7, 2, 16, 1), groups=groups)
    assert (conv.blocks, conv.block_in) == (blocks, channels[0] // blocks)
    assert conv.operands()[1].shape == (-(-channels[1] // 16), 9, channels[0] // blocks, 16)
    check(conv)


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(convolutions(), st.sampled_from([(1, 2, 2), (2, 2, 2), (1, 1, 3), (2, 1, 1)]), st.data())
def test_a_max_pool_behind_any_of_them(conv, pool, data):
    pool = tuple(size if out % size == 0 else 1 for size, out in zip(pool, conv.window.out, strict=True))
    conv = replace(conv, residual=False)
    kernel = pooled(conv, pool, conv.zero_dead, AVX512)
    window, places = conv.window, (conv.window.batch, *conv.window.out)
    rng, density = np.random.default_rng(data.draw(st.integers(0, 99))), data.draw(st.sampled_from([0.1, 0.6, 1.0]))
    x = rng.integers(-1, 2, conv.x_shape).astype("float32")
    weight = rng.integers(-4, 5, (conv.channels_out, conv.channels_in, *window.kernel)).astype("float32")
    weights = Weights(weight, rng.integers(-9, 10, conv.channels_out).astype("float32"))
    masks = {name: read_together(rng.random(mask.shape) < density, pool) for name, mask in conv.plan.masks.items()}
    full = np.maximum(plain(conv, x, weights), 0) if conv.activation else plain(conv, x, weights)
    exact = pooled_by(full, pool)
    y, _ = call(kernel, x, masks, weights)
    frames = np.broadcast_to(masks.get("out_frames", np.ones((1, 1), bool))[:, :, None, None], places)
    positions = np.broadcast_to(masks.get("positions", np.ones((1, 1, 1, 1), bool)), places)
    frames, positions = pooled_by(frames, pool), pooled_by(positions, pool)
    np.testing.assert_array_equal(y[frames & positions], exact[frames & positions])
    zeros = {"rows": frames & ~positions, "all": ~(frames & positions)}
    assert conv.zero_dead == "" or not y[zeros[conv.zero_dead]].any()


def test_a_pool_keeps_not_a_number_and_needs_lines_that_stay_near():
    conv = LineConv(window_of(1, (1, 4, 4), (1, 1, 1)), 1, 3, RowTile(4, 1, 16, 1), activation="relu")
    x = np.arange(16, dtype="float32").reshape(conv.x_shape)
    x[0, 0, 1, 1] = np.nan
    weights = Weights(np.ones((3, 1, 1, 1, 1), "float32"), np.zeros(3, "float32"))
    kernel = pooled(conv, (1, 2, 2), "", AVX512)
    y, _ = call(kernel, x, {}, weights)
    np.testing.assert_array_equal(y[0, 0, ..., 0], [[np.nan, 7], [13, 15]])
    wide = replace(conv, window=window_of(1, (2, 2, 70_000), (1, 1, 1)))
    assert pooled(wide, (2, 2, 2), "", AVX512) is None


def test_taps_that_the_same_outputs_read_are_one_loop():
    window = window_of(1, (1, 1, 6), (1, 1, 3), padding=(0, 0, 1))
    assert runs(window, [[0, 1, 2]] * 4) == [(0, 3, 0, 4)]
    assert runs(window, [[1, 2], [0, 1, 2], [0, 1, 2]]) == [(0, 1, 1, 3), (1, 2, 0, 3)]
    assert runs(window_of(1, (1, 1, 9), (1, 1, 3), dilation=(1, 1, 2)), [[0, 1, 2]]) == [
        (0, 1, 0, 1),
        (1, 1, 0, 1),
        (2, 1, 0, 1),
    ]


STEM = window_of(1, (8, 56, 56), (3, 3, 3), (1, 2, 2), (1, 1, 1))


@pytest.mark.parametrize("machine", [AVX2, AVX512, NEON], ids=["avx2", "avx512", "neon"])
@pytest.mark.parametrize("channels", [(3, 24), (64, 128), (1, 2)])
def test_a_space_holds_its_default_and_only_what_fits(machine, channels):
    space = LineSpace(machine, line(Workload(STEM, *channels)))
    default = space.default()
    assert space.allows(default)
    assert space.normal(default) == default
    assert default["mr"] in [mr for part in space.parts() for mr in part["mr"]]
    assert not space.allows({**default, "mr": machine.registers})
    assert not space.allows({"mr": 1, "vectors": 1})


def test_layers_that_have_the_kernel():
    strided = window_of(1, (2, 20, 20), (1, 1, 1), (1, 2, 2))
    deep = window_of(1, (2, 14, 14), (3, 3, 3), padding=(1, 1, 1))
    assert choose(Layer(STEM, 3, 24), AVX512).kernel.name.startswith("conv3d_line_")
    assert choose(Layer(strided, 24, 48), AVX512).kernel.name.startswith("conv3d_line_")
    assert choose(Layer(deep, 64, 64), AVX512, "auto").kernel.name.startswith("conv3d_winograd_")
    masked = choose(Layer(STEM, 3, 24, out_frames=True, positions=(1, 1), zero_dead="rows"), AVX512).kernel
    assert masked.name.startswith("conv3d_line_")
    assert set(masked.plan.masks) == {"out_frames", "positions"}
    assert choose(Layer(STEM, 3, 24, in_frames=True), AVX512).kernel.name.startswith("conv3d_gather_")
    assert choose(Layer(strided, 24, 48, out_frames=True), AVX512).kernel.name.startswith("conv3d_gather_")
    for channels, groups in (((4, 24), 2), ((64, 64), 4), ((64, 64), 16), ((256, 256), 32)):
        assert choose(Layer(deep, *channels, groups=groups), AVX512).kernel.name.startswith("conv3d_line_")
        apart = choose(Layer(deep, *channels, groups=groups), AVX512, "direct").kernel
        assert apart.name.startswith("conv3d_line_" if channels[1] // groups == 16 else "conv3d_gather_")
        masked = Layer(deep, *channels, groups=groups, out_frames=True)
        assert choose(masked, AVX512).kernel.name.startswith("conv3d_gather_")
    assert choose(Layer(deep, 48, 48, groups=3), AVX512).kernel.name.startswith("conv3d_line_")
    assert choose(Layer(deep, 72, 72, groups=3), AVX512).kernel.name.startswith("conv3d_gather_")


def test_networks_take_the_kernel():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 20, 3, (1, 2, 2), 1), nn.SiLU(), nn.Conv3d(20, 9, 1, (2, 2, 2))).eval()
    x, target = torch.randn(1, 3, 3, 13, 41), load_target("host")
    for threads in (1, 2):
        imported = import_model(network.float(), example_inputs=(x,), check=False)
        lowered = lower(imported.mod, target, Options(threads=threads))
        assert [layer.kernel[:12] for layer in lowered.layers] == ["conv3d_line_", "conv3d_line_"]
        machine = tvm.relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(threads)), tvm.cpu())
        given = [tensor(x.numpy()), *map(tensor, lowered.weights.values())]
        exact = network.double()(x.double()).detach().numpy()
        found = machine["main"](*given)[0].numpy()
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
        counts = machine["counts"](*given).numpy()
        assert [int(np.prod(row[1:])) for row in counts] == [7 * 19 * 61 * 60, 2 * 4 * 11 * 180]
