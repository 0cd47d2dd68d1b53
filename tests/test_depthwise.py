"""The depthwise kernel equals PyTorch for any window, multiplier, tile and mask of frames; nothing dead is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from convolutions import call, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend.importer import import_model
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.depthwise import DepthwiseConv, why_no_depthwise
from dance_tvm.schedules.cpu.depthwise_tiles import DepthwiseTile, default_tile, fits, held_taps
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.geometry import TIME, WIDTH, Window
from dance_tvm.schedules.kernel import Weights

AVX2 = Machine(8, 16, 32768, 1 << 20, broadcast_loads=True)
Masks = dict[str, np.ndarray]


def window_of(batch: int, size, kernel, stride=(1, 1, 1), padding=(0, 0, 0), dilation=(1, 1, 1)) -> Window:
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
    return Window(batch, size, out, kernel, stride, padding, dilation)


def check(conv: DepthwiseConv, masks: Masks, seed: int = 0) -> None:
    """Small integers, so that sums are exact; dead input frames are NaN, and so is the output beforehand."""
    rng, window = np.random.default_rng(seed), conv.window
    x = rng.integers(-9, 10, (window.batch, *window.size, conv.channels_in)).astype("float32")
    weight = rng.integers(-4, 5, (conv.channels_out, 1, *window.kernel)).astype("float32")
    bias = rng.integers(-9, 10, conv.channels_out).astype("float32")
    out = (window.batch, *window.out, conv.channels_out)
    residual = rng.integers(-9, 10, out).astype("float32")
    poisoned, zeroed = x.copy(), x.copy()
    if "in_frames" in masks:
        poisoned[~masks["in_frames"]], zeroed[~masks["in_frames"]] = np.nan, 0
    y, _ = call(conv, poisoned, masks, Weights(weight, bias), residual)
    data = torch.from_numpy(zeroed).double().permute(0, 4, 1, 2, 3)
    sizes = (window.stride, window.padding, window.dilation, conv.channels_in)
    wanted = nn.functional.conv3d(data, torch.from_numpy(weight).double(), torch.from_numpy(bias).double(), *sizes)
    exact = wanted.permute(0, 2, 3, 4, 1).numpy() + (residual if conv.residual else 0)
    exact = np.maximum(exact, 0) if conv.activation == "relu" else exact
    live = masks.get("out_frames", np.ones(out[:2], bool))
    np.testing.assert_array_equal(y[live], exact[live])
    dead = y[~live]
    assert np.all(dead == 0) if conv.zero_dead else np.all(np.isnan(dead))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[DepthwiseConv, Masks]:
    kernel = draw(st.sampled_from([(3, 3, 3), (1, 3, 3), (1, 5, 4), (5, 1, 1), (1, 1, 3), (2, 3, 1), (1, 1, 1)]))
    stride = draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 2), (3, 2, 1)]))
    dilation = draw(st.sampled_from([(1, 1, 1), (1, 1, 1), (2, 2, 1), (1, 1, 2)]))
    padding = draw(st.sampled_from([(0, 0, 0), tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(draw(st.integers(need, need + more)) for need, more in zip(reach, (3, 4, 9), strict=True))
    window = window_of(draw(st.integers(1, 2)), size, kernel, stride, padding, dilation)
    channels, each, floats = (
        draw(st.integers(1, 21)),
        draw(st.sampled_from([1, 1, 2, 4])),
        draw(st.sampled_from([4, 8])),
    )
    channels = channels + each if why_no_depthwise(window, channels, channels * each, channels, floats) else channels
    listed = [draw(st.booleans()), draw(st.booleans())]
    conv = DepthwiseConv(
        window,
        channels,
        channels * each,
        DepthwiseTile(
            draw(st.integers(1, 8)),
            draw(st.integers(1, 3)),
            floats,
            draw(st.integers(1, 5)),
            draw(st.integers(1, 4)),
            draw(st.integers(0, 1)),
        ),
        *listed,
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(["", "relu"])),
        zero_dead=draw(st.booleans()),
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    density = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return conv, {name: rng.random(mask.shape) < density for name, mask in conv.plan.masks.items()}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(convolutions(), st.integers(0, 99))
def test_any_depthwise_convolution(case, seed):
    check(*case, seed)


@pytest.mark.parametrize("density", [0, 1])
def test_all_frames_dead_or_alive(density):
    window = window_of(2, (4, 5, 7), (3, 3, 3), padding=(1, 1, 1))
    conv = DepthwiseConv(window, 11, 11, DepthwiseTile(3, 2, 4, 2, 3, 1), True, True, zero_dead=True)
    check(conv, {name: np.full(mask.shape, bool(density)) for name, mask in conv.plan.masks.items()})


@pytest.mark.parametrize(("stride", "inner"), [((1, 1, 1), 0), ((1, 2, 2), 1), ((2, 2, 2), 0)])
def test_frames_abreast(stride, inner):
    """Some frames of one tile read fewer taps, and the last tile overlaps the one before."""
    window = window_of(2, (7, 8, 11), (3, 3, 3), stride, (1, 1, 1))
    conv = DepthwiseConv(window, 11, 11, DepthwiseTile(2, 2, 4, 3, 3, inner), residual=True, activation="relu")
    assert conv.name == "depthwise3d_f32_mr2x3_nr8"
    check(conv, {})


def test_a_layer_that_fits_no_vector_is_told():
    window = window_of(1, (1, 5, 5), (1, 3, 3))
    assert (
        why_no_depthwise(window, 6, 18, 6, 8) == "3 output channels for each input channel, which fill no vector of 8"
    )
    assert why_no_depthwise(window, 6, 6, 2, 8) == "groups of several input channels"
    assert not why_no_depthwise(window, 6, 24, 6, 8)


def test_default_tiles_fit():
    for kernel in ((3, 3, 3), (1, 7, 7), (5, 1, 1), (1, 11, 11)):
        for channels in (1, 8, 54, 432):
            for extent in (1, 5, 20, 80):
                window = window_of(1, (8, 80, extent), kernel, padding=tuple(k // 2 for k in kernel))
                tile = default_tile(AVX2, window, channels)
                axis = TIME if kernel == (5, 1, 1) else WIDTH
                assert fits(AVX2, held_taps(window, axis, tile.frames), tile.mr * tile.vectors * tile.frames)
                assert 1 <= tile.rows <= 80


class Separable(nn.Module):
    """Depthwise layers of every kind, with what may be fused behind them, and one that has another kernel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.space = nn.Conv3d(10, 10, (1, 3, 3), (1, 2, 2), (0, 1, 1), groups=10, bias=False)
        self.norm = nn.BatchNorm3d(10).eval()
        self.time = nn.Conv3d(10, 10, (3, 1, 1), padding=(1, 0, 0), groups=10)
        self.wide = nn.Conv3d(10, 20, 3, padding=1, groups=10)
        self.odd = nn.Conv3d(20, 60, 1, groups=20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.norm(self.space(x)))
        return self.odd(nn.functional.hardswish(self.wide(self.time(y) + y)))


def test_networks_take_the_kernel():
    network, x = Separable(), torch.randn(2, 10, 4, 13, 12)
    target = load_target("host")
    lowered = lower(import_model(network.eval(), example_inputs=(x,), check=False).mod, target, Options())
    kernels = [layer.kernel.split("_")[0] for layer in lowered.layers]
    assert kernels == ["depthwise3d"] * 3 + ["conv3d"]
    machine = tvm.relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(1)), tvm.cpu())
    given = [tensor(x.numpy()), *map(tensor, lowered.weights.values())]
    exact = network.double()(x.double()).detach().numpy()
    np.testing.assert_allclose(machine["main"](*given)[0].numpy(), exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    counts = machine["counts"](*given).numpy()
    macs = [int(np.prod(row[1:], dtype=np.int64)) for row in counts]
    taps = [2 * 4 * 19 * 17, 2 * 10 * 7 * 6, 2 * 10 * 19 * 16]  # pairs of row and tap inside the clip
    assert macs[:3] == [taps[0] * 10, taps[1] * 10, taps[2] * 20]
