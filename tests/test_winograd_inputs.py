"""Winograd convolution from the side of its input, under masks of the input's positions, against PyTorch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from convolutions import call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dance_tvm.schedules.cpu.winograd_inputs import InputTiles, WinogradInputs
from dance_tvm.schedules.cpu.winograd_transforms import POINTS, matrices
from dance_tvm.schedules.kernel import Weights
from tests.test_winograd import WinogradCase, alive, expected_output


@dataclass
class InputCase(WinogradCase):
    """Frames are the batch; ``in_positions`` (batch, 1, H, W) says which positions of the input are alive."""

    size: tuple[int, int, int] = (1, 9, 10)
    batch: int = 3
    channels_out: int = 8
    kernel: tuple[int, int, int] = (1, 3, 3)
    padding: tuple[int, int, int] = (0, 1, 1)
    in_positions: np.ndarray | None = None


def kernel_of(case: InputCase) -> WinogradInputs:
    assert case.in_positions is not None
    samples = 1 if case.live_in is None else case.batch
    masks = {"in_frames": case.in_frames is not None, "in_positions": case.in_positions.shape[:2]}
    plan = InputTiles(case.window, case.m, case.tile.mr, case.columns, samples, **masks)
    lists = (case.live_in is not None, False, case.residual, "relu")
    return WinogradInputs(case.window, case.channels_in, case.channels_out, 1, case.tile, plan, *lists)


def check(case: InputCase) -> dict[str, np.ndarray]:
    """Dead positions, frames and channels are NaN."""
    assert case.in_positions is not None
    rng = np.random.default_rng(case.seed)
    x = rng.integers(-4, 5, (case.batch, *case.size, case.channels_in)).astype("float32") * case.in_positions[..., None]
    weight = rng.integers(-3, 4, (case.channels_out, case.channels_in, *case.kernel)).astype("float32")
    bias = rng.integers(-5, 6, case.channels_out).astype("float32")
    residual = rng.integers(-9, 10, (case.batch, *case.window.out, case.channels_out)).astype("float32")
    expected = np.maximum(expected_output(case, x, weight, bias) + (residual if case.residual else 0), 0)
    masks = {"in_frames": case.in_frames, "in_positions": case.in_positions, "in_channels": case.live_in}
    given_x = np.where(np.broadcast_to(case.in_positions[..., None], x.shape), x, np.float32(np.nan))
    if case.in_frames is not None:
        given_x[~case.in_frames] = np.nan
    if case.live_in is not None:
        given_x[np.broadcast_to(~case.live_in[:, None, None, None, :], x.shape)] = np.nan
    y, lists = call(kernel_of(case), given_x, masks, Weights(weight, bias), residual)
    bound = case.tolerance * max(1.0, float(expected.max(initial=0)))
    np.testing.assert_allclose(y, expected, rtol=0, atol=bound)
    return lists


@pytest.mark.parametrize("m", POINTS)
def test_a_tile_of_inputs_reaches_two_outputs_more(m: int) -> None:
    a, g, b = matrices(m, 3)
    rng = np.random.default_rng(m)
    weight, data = rng.standard_normal(3), rng.standard_normal(m)
    np.testing.assert_allclose(b.T @ ((g @ weight) * (a.T @ data)), np.convolve(data, weight), atol=1e-13)


@st.composite
def cases(draw: st.DrawFn) -> InputCase:
    batch = draw(st.integers(1, 3))
    size = (1, draw(st.integers(2, 9)), draw(st.integers(2, 9)))
    m = draw(st.sampled_from([2, 4]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    masks, density = draw(st.sampled_from([1, batch])), draw(st.sampled_from([0, 0.1, 0.5, 1]))
    case = InputCase(
        batch=batch,
        size=size,
        m=(1, min(m, size[1]), min(m, size[2])),
        columns=draw(st.integers(1, 30)),
        residual=draw(st.booleans()),
        channels_out=draw(st.sampled_from([4, 20, 24])),
        seed=draw(st.integers(0, 99)),
        in_positions=rng.random((masks, 1, *size[1:])) < density,
    )
    if draw(st.booleans()):
        case.in_frames = rng.random((batch, 1)) < 0.5
    if draw(st.booleans()):
        case.live_in = rng.random((batch, case.channels_in)) < 0.5
    return case


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(cases())
def test_it_equals_pytorch_on_the_masked_input(case: InputCase) -> None:
    check(case)


def test_tiles_without_a_living_input_are_not_touched_and_chunks_may_end_anywhere() -> None:
    case = InputCase(size=(1, 12, 12), batch=2, m=(1, 4, 4), columns=2, channels_in=18, residual=True)
    case.in_positions = np.zeros((2, 1, 12, 12), bool)
    case.in_positions[0, 0, 4:8] = True
    case.in_positions[1, 0, 11, 11] = True
    case.live_in = np.concatenate([alive(18, run) for run in ((8, 16), (0, 18))])
    lists = check(case)
    assert lists["pairs"].ravel().tolist() == [3, 1]
