"""Kernels for channels first equal PyTorch, and parts of a network that have them keep the source's layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from convolutions import call
from counting import counted_alike
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.layer_errors import layer_errors
from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.device import open_device
from dance_tvm.frontend.importer import import_model
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.choice import offer_planar
from dance_tvm.schedules.cpu.conv3d_planar import PlanarConv
from dance_tvm.schedules.cpu.planar_tiles import PlanarTile
from dance_tvm.schedules.cpu.pool_planar import PlanarPool
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.kernel import Weights
from dance_tvm.schedules.layer import Layer

AVX512 = Machine(16, 32, 49152, 2 << 20, broadcast_loads=True)
NEON = Machine(4, 32, 65536, 1 << 19, broadcast_loads=False)


def of_one_tap(batch: int, *size: int) -> Window:
    return Window(batch, size, size, (1, 1, 1))


# -- kernels ----------------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> PlanarConv:
    floats, step = draw(st.sampled_from([(4, 1), (4, 4), (8, 1), (16, 1)]))
    size = (draw(st.integers(1, 2)), draw(st.integers(4, 5)), draw(st.integers(4, 9)))
    block = draw(st.integers(1, 4))
    tile = PlanarTile(draw(st.integers(1, 6)), draw(st.integers(1, block)), floats, step, block)
    channels = draw(st.sampled_from([1, 3, 4, 7, 33])), draw(st.integers(1, 20))
    behind = draw(st.booleans()), draw(st.sampled_from(["", "relu"]))
    return PlanarConv(of_one_tap(draw(st.integers(1, 2)), *size), *channels, tile, *behind)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(convolutions(), st.integers(0, 99))
def test_any_planar_convolution(conv, seed):
    rng = np.random.default_rng(seed)
    x, residual = (rng.integers(-9, 10, shape).astype("float32") for shape in (conv.x_shape, conv.y_shape))
    weight = rng.integers(-4, 5, (conv.channels_out, conv.channels_in)).astype("float32")
    bias = rng.integers(-9, 10, conv.channels_out).astype("float32")
    y, _ = call(conv, x, {}, Weights(weight[:, :, None, None, None], bias), residual)
    exact = np.einsum("oc,ncthw->nothw", weight, x) + bias[:, None, None, None] + (residual if conv.residual else 0)
    np.testing.assert_array_equal(y, np.maximum(exact, 0) if conv.activation else exact)


@pytest.mark.parametrize("machine", [AVX512, NEON], ids=["avx512", "neon"])
@pytest.mark.parametrize("channels", [(3, 2), (24, 54), (1024, 1000)])
def test_a_tile_fits_registers_and_caches(machine, channels):
    for threads in (1, 2):
        choice = offer_planar(
            Layer(of_one_tap(1, 4, 20, 20), *channels, threads=threads, planar=True), machine, "auto", None
        )
        kernel = choice.kernel
        tile = kernel.tile
        assert tile.mr * tile.vectors + tile.vectors + 1 <= machine.registers
        assert kernel.blocks[0] >= threads
        assert kernel.scratch_bytes <= machine.l2
        assert kernel.predict(machine, threads) > 0
    assert offer_planar(Layer(of_one_tap(1, 4, 20, 20), *channels), machine, "auto", None) is None


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "floats"),
    [
        ((3, 4, 9), (2, 2, 2), (2, 2, 2), (0, 0, 0), 1, 8),
        ((3, 5, 17), (3, 3, 3), (1, 1, 1), (1, 1, 1), 1, 16),
        ((4, 6, 40), (3, 2, 3), (1, 1, 2), (1, 1, 1), 2, 16),
        ((1, 1, 3), (1, 1, 1), (1, 1, 1), (0, 0, 0), 1, 4),
        ((6, 8, 5), (5, 4, 1), (1, 2, 1), (2, 1, 0), 1, 4),  # many taps
        ((2, 5, 9), (2, 2, 1), (1, 1, 1), (1, 0, 0), 3, 8),  # a window that reads nothing
    ],
)
def test_planar_pools_keep_what_is_not_a_number(size, kernel, stride, padding, dilation, floats):
    rng = np.random.default_rng(0)
    x = rng.integers(-99, 99, (2, 2, *size)).astype("float32")
    x.reshape(-1)[rng.integers(0, x.size, 3)] = np.nan
    x[1] = -np.inf
    expected = nn.functional.max_pool3d(torch.from_numpy(x), kernel, stride, padding, dilation).numpy()
    window = Window(2, size, expected.shape[2:], kernel, stride, padding, (dilation,) * 3)
    y, _ = call(PlanarPool(window, 2, "max", vector_floats=floats), x)
    np.testing.assert_array_equal(y, expected)


# -- which parts of a network keep the source's layout ----------------------------------------------------------------


def layers_of(network: nn.Module, *shape: int) -> list[str]:
    imported = import_model(network.eval(), example_inputs=(torch.randn(*shape),))
    return [layer.kernel for layer in lower(imported.mod, load_target("host"), Options()).layers]


def masked(x: torch.Tensor) -> torch.Tensor:
    return x * (x.mean((1, 3, 4), keepdim=True) > 0).float()


class Behind(nn.Module):
    """A pointwise convolution, and something behind it."""

    def __init__(self, rest: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.rest = nn.Conv3d(3, 6, 1), rest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(x))


@pytest.mark.parametrize(
    ("rest", "planar"),
    [
        (nn.Sequential(nn.InstanceNorm3d(6), nn.SiLU()), True),
        (lambda x: torch.relu(x).flatten(2), True),
        (nn.Sequential(nn.MaxPool3d(2), nn.Conv3d(6, 6, 1)), False),  # too few positions behind the pool
        (nn.Conv3d(6, 6, 3), False),
        (nn.AvgPool3d(2), False),
        (masked, False),
        (lambda x: x.permute(0, 2, 3, 4, 1), False),
    ],
)
def test_a_part_is_planar_only_as_a_whole(rest, planar):
    kernels = layers_of(Behind(rest), 1, 3, 4, 8, 16)
    assert kernels[0].startswith("conv3d_planar") == planar
    assert not any("planar" in kernel for kernel in kernels) or planar


def test_a_planar_network_is_right_and_says_how_its_layers_are(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(5, 9, 1),
        nn.BatchNorm2d(9),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(9, 4, 1),
        nn.Hardswish(),
    ).eval()
    x = torch.randn(2, 5, 29, 31)
    imported = import_model(network, example_inputs=(x,))
    target, options = load_target("host"), Options()
    built = build_network(imported, tmp_path / "artifact", target=target, options=options, check=True)
    layers = built.artifact.manifest.layers
    assert ["planar" in layer.kernel for layer in layers] == [True] * 3
    named = {built.artifact.manifest.inputs[0].name: x.numpy()}
    assert len(counted_alike(built.artifact, named)) == 2
    with open_device("local") as device:
        works = [call.work for call in device.load(built.artifact).kernels(named, 1) if call.work]
    assert [work["shape"] for work in works] == [[1, 29, 31], [1, 15, 16]]
    errors = layer_errors(built.artifact, lower(imported.mod, target, options), named)
    assert [error.layer for error in errors.layers] == [layer.name for layer in layers]
    assert min(error.signal_to_noise for error in errors.layers) > 100
