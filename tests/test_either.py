"""Two kernels in one: whichever runs computes the same, only its lists are planned, and what it executed is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from convolutions import call, on_processor, pooled_by
from counting import counted_alike
from test_depthwise import window_of
from test_pointwise import AVX512
from torch import nn

from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.check import DisagreementError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import open_device
from dance_tvm.lowering.registry import choose
from dance_tvm.schedules import emit
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.either import Either
from dance_tvm.schedules.cpu.either_choice import direct_costs, either, winograd_costs
from dance_tvm.schedules.cpu.pooled import pooled
from dance_tvm.schedules.cpu.winograd import WinogradConv
from dance_tvm.schedules.kernel import Weights
from dance_tvm.schedules.layer import Layer, Limits

WINDOW = window_of(2, (4, 8, 9), (3, 3, 3), padding=(1, 1, 1))
MASKED = Layer(
    WINDOW, 48, 32, in_frames=True, out_frames=True, positions=(2, 4), live_in=True, live_out=True,
    activation="relu", zero_dead="all",
)  # fmt: skip


def both_of(layer: Layer = MASKED) -> Either:
    kernel = choose(layer, AVX512).kernel
    assert isinstance(kernel, Either)
    return kernel


def masks_of(density: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(int(100 * density))
    shapes = {
        "in_frames": (2, 4), "out_frames": (2, 4), "positions": (2, 4, 8, 9), "in_channels": (2, 48),
        "out_channels": (2, 32),
    }  # fmt: skip
    return {name: (rng.random(shape) < density).astype("float32") for name, shape in shapes.items()}


@pytest.mark.parametrize("forced", [-1, 0, 1])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_both_kernels_compute_the_same(monkeypatch, density, forced):
    kernel, masks, rng = both_of(), masks_of(density), np.random.default_rng(3)
    monkeypatch.setattr("dance_tvm.schedules.cpu.either.UNDECIDED", forced)
    weight = rng.standard_normal((32, 48, 3, 3, 3)).astype("float32")
    bias = rng.standard_normal(32).astype("float32")
    alive = masks["in_frames"][:, :, None, None, None] * masks["in_channels"][:, None, None, None, :]
    x = rng.standard_normal(kernel.x_shape).astype("float32")
    x = np.where(alive > 0, x, 0)
    y, values = call(kernel, x, masks, Weights(weight, bias))
    data = torch.from_numpy(x * alive).double().permute(0, 4, 1, 2, 3)
    exact = nn.functional.conv3d(data, torch.from_numpy(weight).double(), torch.from_numpy(bias).double(), 1, 1)
    wanted = masks["out_frames"][:, :, None, None, None] * masks["positions"][..., None]
    wanted = wanted * masks["out_channels"][:, None, None, None, :]
    expected = np.maximum(exact.permute(0, 2, 3, 4, 1).numpy(), 0) * wanted
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4 * np.abs(exact.numpy()).max())
    decision = int(values["decision"][0])
    assert decision == forced or forced < 0
    told = values["second_counts"][:, 3] if decision else values["pairs"][:, 0]
    np.testing.assert_array_equal(values["executed"][:, 0], told if decision else told * kernel.first.work()[0].factor)
    assert (values["counts"] if decision else values["second_counts"]).min() < 0, "the other's lists are not planned"


@pytest.mark.parametrize("forced", [0, 1])
def test_both_kernels_compute_the_pool_behind_them(monkeypatch, forced):
    monkeypatch.setattr("dance_tvm.schedules.cpu.either.UNDECIDED", forced)
    layer = replace(MASKED, window=window_of(1, (4, 8, 8), (3, 3, 3), padding=(1, 1, 1)), positions=(1, 1))
    kernel, pool, rng = both_of(layer), (1, 2, 2), np.random.default_rng(3)
    both = pooled(kernel, pool, "all", AVX512)
    assert both is not None
    assert pooled(kernel, (1, 8, 1), "all", AVX512) is None, "windows cross tiles"
    weights = Weights(rng.standard_normal((32, 48, 3, 3, 3)).astype("float32"), np.zeros(32, "float32"))
    masks = {name: rng.random(shape) < 0.6 for name, shape in (("in_frames", (1, 4)), ("out_frames", (1, 4)))}
    masks |= {"in_channels": rng.random((1, 48)) < 0.6, "out_channels": rng.random((1, 32)) < 0.6}
    masks["positions"] = rng.random((1, 1, 8, 8)) < 0.6
    x = rng.standard_normal(kernel.x_shape).astype("float32")
    apart, _ = call(kernel, x, masks, weights)
    found, _ = call(both, x, masks, weights)
    np.testing.assert_array_equal(found, pooled_by(apart, pool))


def test_scattered_thin_masks_run_the_direct_kernel_and_full_ones_winograd():
    kernel = both_of()
    for density, decision in ((1.0, 0), (0.9, 0), (0.15, 1)):
        weights = Weights(np.zeros((32, 48, 3, 3, 3), "float32"), np.zeros(32, "float32"))
        masks = {**masks_of(density), "in_frames": np.ones((2, 4)), "out_frames": np.ones((2, 4))}
        _, values = call(kernel, np.zeros(kernel.x_shape), masks, weights)
        assert int(values["decision"][0]) == decision


def test_output_channels_that_are_left_cost_their_whole_panel():
    layer = Layer(window_of(1, (8, 16, 16), (3, 3, 3), padding=(1, 1, 1)), 32, 64, positions=(1, 1), live_out=True)
    kernel = both_of(layer)
    panel = kernel.second.tile.nr
    assert kernel.decision.grains[1].panel == panel > 16
    dense, costs = 64 // panel, kernel.decision.costs[1]
    for left, panels in ((1, 1), (panel, 1), (panel + 1, 2)):
        channels, forced = np.zeros((1, 64), "float32"), np.full(1, -1, "int32")
        channels[:, ::-1][:, :left] = 1
        (decision,) = on_processor(
            kernel.decision.primfunc(), [forced, np.ones((1, 1, 16, 16), "float32"), channels], [np.zeros(1, "int32")]
        )
        winograd = kernel.decision.costs[0].seconds(1, 1, -(-left // 16) / 4)
        assert int(decision[0]) == (costs.seconds(1, 1, panels / dense) < winograd)


def test_costs_are_those_of_the_model():
    kernel = both_of()
    dense = kernel.first.predict(AVX512, 1, [1.0], whole_units=True)
    assert winograd_costs(kernel.first, AVX512, 1).seconds(1, 1, 1) == pytest.approx(dense, rel=0.05)
    thin, full = (direct_costs(kernel.second, AVX512, 1).seconds(rows, 1, 1) for rows in (0.1, 1.0))
    assert thin < 0.5 * full


class Scattered(nn.Module):
    """A convolution of which a mask leaves single positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(64, 64, 3, padding=1)

    def forward(self, x, scores):
        return torch.relu(self.conv(x)) * (scores > 0).to(x.dtype)


def test_the_check_runs_both_kernels_whatever_calls_choose(monkeypatch, tmp_path):
    example = torch.randn(1, 64, 3, 14, 14), torch.ones(1, 1, 1, 14, 14)

    def wrong_second(kernel, args):
        emit.choose(args["decision"][0] == 0, lambda: kernel.first.emit(args), lambda: emit.clear(args["y"]))

    monkeypatch.setattr(Either, "emit", wrong_second)
    with pytest.raises(DisagreementError):
        build_network(Scattered().eval(), tmp_path / "wrong", example_inputs=example, check=True)
    unchecked = build_network(Scattered().eval(), tmp_path / "wrong", example_inputs=example, check=False).artifact
    assert any("_or_" in layer.kernel for layer in unchecked.manifest.layers)
    given = random_inputs(unchecked.manifest.inputs)
    x, scores = (torch.from_numpy(array) for array in given.values())
    with torch.no_grad():
        exact = Scattered().double()(x.double(), scores.double()).numpy()
    with open_device("local") as device:
        network = device.load(unchecked)
        ran, first, second = (
            next(iter(found.values()))
            for found in (network.run(given), network.run_choosing(given, 0), network.run_choosing(given, 1))
        )
    macs = [list(counted_alike(unchecked, given, which).values()) for which in (0, 1)]
    assert macs[0] != macs[1]
    for answer in (ran, first):
        np.testing.assert_allclose(answer, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    assert not second.any()


def test_layers_that_have_one_kernel():
    assert not isinstance(choose(Layer(WINDOW, 48, 32), AVX512).kernel, Either), "no mask thins it"
    direct = choose(MASKED, AVX512, "direct").kernel
    assert isinstance(direct, GatherConv)
    assert not isinstance(choose(MASKED, AVX512, "winograd").kernel, Either)
    tight = replace(MASKED, memory=Limits(growth=2.4))
    winograd = choose(tight, AVX512).kernel
    assert isinstance(winograd, WinogradConv), "weights in two layouts take too much"
    assert either(winograd, direct, AVX512, 1, Limits(growth=winograd.growth + 0.9)) is None
    assert either(winograd, direct, AVX512, 1, Limits(growth=winograd.growth + 1)) is not None
