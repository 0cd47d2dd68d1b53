"""Winograd kernels over the weight columns that pruning left, against PyTorch in float64 on small integers."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from convolutions import call
from counting import counted_alike
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dance_tvm.benchmarking.layers import profile
from dance_tvm.compiler.build import build_network
from dance_tvm.device import open_device
from dance_tvm.schedules.cpu.tiles import Tile
from dance_tvm.schedules.cpu.winograd import WinogradConv
from dance_tvm.schedules.cpu.winograd_columns import WinogradColumns
from dance_tvm.schedules.kernel import Weights
from dance_tvm.schedules.kernel_columns import Nonzero
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate
from tests.test_winograd import WinogradCase, computed_outputs, expected_output, make

#: Share of the slices that is kept: none and all of them, too.
KEPT = [0.0, 0.2, 0.5, 1.0]


def sliced(shape: tuple[int, ...], group: tuple[int, int], kept: float, rng: np.random.Generator) -> np.ndarray:
    """Weights of small integers of which whole frames of kernel groups are zero."""
    weight = rng.integers(1, 4, shape) * rng.choice([-1, 1], shape)
    groups = (-(-shape[0] // group[0]), -(-shape[1] // group[1]), shape[2])
    live = (rng.random(groups) < kept).repeat(group[0], 0).repeat(group[1], 1)[: shape[0], : shape[1]]
    return (weight * live[..., None, None]).astype("float32")


def over_columns(case: WinogradCase, weight: np.ndarray, run: int) -> WinogradColumns:
    conv = make(case)
    named = {each.name: getattr(conv, each.name) for each in fields(WinogradConv)}
    return WinogradColumns(**named, nonzero=Nonzero.of(weight), run=run)


def check(case: WinogradCase, group: tuple[int, int], kept: float, run: int) -> WinogradColumns:
    rng = np.random.default_rng(case.seed)
    weight = sliced((case.channels_out, case.channels_in, *case.kernel), group, kept, rng)
    x = rng.integers(-4, 5, (case.batch, *case.size, case.channels_in)).astype("float32")
    bias = rng.integers(-5, 6, case.channels_out).astype("float32")
    residual = rng.integers(-9, 10, (case.batch, *case.window.out, case.channels_out)).astype("float32")
    expected = np.maximum(expected_output(case, x, weight, bias) + (residual if case.residual else 0), 0)
    masks = {"in_frames": None, "out_frames": case.out_frames, "positions": case.positions}
    conv = over_columns(case, weight, run)
    y, _ = call(conv, x, masks, Weights(weight, bias), residual)
    computed = computed_outputs(case, expected.shape)
    bound = case.tolerance * max(1.0, float(expected.max(initial=0)))
    np.testing.assert_allclose(y[computed], expected[computed], rtol=0, atol=bound)
    return conv


TILE = Tile(mr=3, vectors=2, vector_floats=4, step=1, block_tiles=1, segment_taps=2, depth_block=4)
CASES = {
    "frames as taps": WinogradCase(channels_in=12, channels_out=20, size=(5, 6, 7), tile=TILE),
    "frames transformed": WinogradCase(channels_in=8, channels_out=8, size=(5, 6, 7), m=(2, 2, 2), tile=TILE),
    "one frame of a kernel": WinogradCase(
        channels_in=8, channels_out=24, size=(3, 6, 5), kernel=(1, 3, 3), padding=(0, 1, 1), tile=TILE
    ),
    "lanes of a vector": WinogradCase(
        channels_in=16, channels_out=16, size=(4, 5, 5), residual=True, tile=replace(TILE, step=4)
    ),
    "larger tiles": WinogradCase(channels_in=4, channels_out=9, size=(3, 9, 9), m=(1, 4, 4), columns=4, tile=TILE),
}


@pytest.mark.parametrize(
    ("name", "kept"), [*((name, 0.5) for name in CASES), *(("frames as taps", kept) for kept in (0.0, 0.2, 1.0))]
)
def test_products_over_columns_are_the_convolution(name: str, kept: float) -> None:
    case = CASES[name]
    conv = check(case, (8, 4), kept, 4)
    assert conv.weight_shape == (conv.plan.xi, max(4, conv.own.count), 8)
    assert kept > 0 or conv.own.count == 0


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_any_shape_mask_and_group(data: st.DataObject) -> None:
    draw = data.draw
    transformed = draw(st.booleans())
    case = WinogradCase(
        batch=draw(st.integers(1, 2)),
        size=draw(st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7))),
        channels_in=draw(st.integers(1, 9)),
        channels_out=draw(st.integers(1, 19)),
        dilation=(1 if transformed else draw(st.integers(1, 2)), 1, 1),
        padding=(2, 1, 1),
        m=(2 if transformed else 1, 2, 2),
        columns=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 99)),
        residual=draw(st.booleans()),
        tile=TILE,
    )
    if case.window.out[0] < case.m[0]:
        return
    rng = np.random.default_rng(case.seed)
    if draw(st.booleans()):
        case.out_frames = rng.random((case.batch, case.window.out[0])) < 0.6
        case.positions = rng.random((case.batch, 1, *case.window.out[1:])) < 0.6
    run = draw(st.sampled_from([run for run in (1, 2, 4) if case.channels_in % run == 0]))
    check(case, (draw(st.sampled_from([4, 8])), run), draw(st.sampled_from(KEPT)), run)


def test_columns_are_those_of_panels_and_channel_groups_with_a_weight() -> None:
    weight = np.zeros((6, 4, 3, 3, 3), "float32")
    weight[5, 3, 2, 0, 1] = weight[0, 0, 1, 2, 2] = 1
    kept = Nonzero.of(weight).columns(4, 2, whole=False)
    assert np.argwhere(kept.live).tolist() == [[0, 0, 1], [1, 1, 2]]
    assert Nonzero.of(weight).columns(4, 2, whole=True).live.squeeze(2).tolist() == [[True, False], [False, True]]
    assert Nonzero.of(weight).columns(8, 4, whole=True).live.shape == (1, 1, 1)


def test_a_build_takes_them_where_slices_are_gone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv3d(64, 64, 3, padding=1)).eval()
    clip = torch.randn(1, 3, 6, 20, 20)
    prune_to_rate(network, (clip,), "slices", 3.0, 16, 4)
    built = build_network(network, tmp_path / "built", example_inputs=(clip,), threads=1)
    _, second = built.artifact.manifest.layers
    assert "winograd_columns" in second.kernel, second.reason
    assert "weight columns" in second.skips
    with open_device("local") as session:
        loaded = session.load(built.artifact)
        given_inputs = {loaded.manifest.inputs[0].name: clip.numpy()}
        assert any("winograd_columns" in symbol for symbol in counted_alike(built.artifact, given_inputs))
        (found,) = loaded.run(given_inputs).values()
        seen = {layer.name: layer for layer in profile(loaded.manifest, loaded.kernels(given_inputs, 1), 1.0).layers}
    live = (network[2].weight != 0).flatten(3).any(3).sum(dim=(0, 1)) * 9
    frames = torch.tensor([5, 6, 5])  # that read each tap of three over six frames
    assert seen[second.name].executed_macs == pytest.approx(int((live * frames).sum()) * 20 * 20, rel=0.12)
    with torch.inference_mode():
        expected = network.double()(clip.double()).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
