"""Winograd convolution against PyTorch in float64: exact where its points are whole, else within a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from convolutions import Case, call, compiled, draw_masks, pooled_by, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.device.serve import executed
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.convolution import LayerKernel
from dance_tvm.schedules.cpu import cost, winograd_multiply
from dance_tvm.schedules.cpu.choice import direct
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.conv3d_gather_pooled import PooledGather
from dance_tvm.schedules.cpu.pooled import pooled
from dance_tvm.schedules.cpu.row_plan import RowPlan
from dance_tvm.schedules.cpu.tiles import Machine, Tile, evenly
from dance_tvm.schedules.cpu.transform_weights import TransformWeights
from dance_tvm.schedules.cpu.winograd import WinogradConv
from dance_tvm.schedules.cpu.winograd_choice import transformed, why_no_winograd
from dance_tvm.schedules.cpu.winograd_plan import WinogradPlan
from dance_tvm.schedules.cpu.winograd_space import best
from dance_tvm.schedules.cpu.winograd_transforms import POINTS, WinogradPanels, matrices, transform_weights
from dance_tvm.schedules.emit import number, store
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.kernel import Weights
from dance_tvm.schedules.layer import Layer, Limits
from tests.test_transform import outputs

TILE = Tile(mr=3, vectors=2, vector_floats=4, step=1, block_tiles=4, segment_taps=2, depth_block=4)
#: A core of a server.
LARGE = Machine(16, 32, 49152, 2 << 20, True, l3=256 << 20, gflops=160.0, memory_gb_per_s=25.0)
#: Stands in weights that were asked for before they were read.
MARK = 12345.0
#: Largest error of the largest output, by the largest m of a tile; at most 2 is exact on small integers.
TOLERANCE = {1: 0.0, 2: 0.0, 3: 3e-6, 4: 3e-6, 5: 1e-5, 6: 2e-5}


@dataclass
class WinogradCase(Case):
    """A convolution, its masks, the tile of outputs and how many columns make a chunk."""

    m: tuple[int, int, int] = (1, 2, 2)
    columns: int = 3
    tile: Tile = TILE

    @property
    def tolerance(self) -> float:
        return TOLERANCE[max(self.m)]


def make(case: WinogradCase) -> WinogradConv:
    samples = case.batch if case.live_in is not None or case.live_out is not None else 1
    positions = None if case.positions is None else case.positions.shape[:2]
    masks = (case.in_frames is not None, case.out_frames is not None, positions)
    plan = WinogradPlan(case.window, case.m, case.tile.mr, case.columns, samples, *masks)
    return WinogradConv(
        case.window,
        case.channels_in,
        case.channels_out,
        1,
        case.tile,
        plan,
        case.live_in is not None,
        case.live_out is not None,
        case.residual,
        "relu",
        case.zero_dead,
    )


def expected_output(case: WinogradCase, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Convolution of the masked input in float64, channels last."""
    masked = x.copy()
    if case.in_frames is not None:
        masked[~case.in_frames] = 0
    if case.live_in is not None:
        masked *= case.live_in[:, None, None, None, :]
    arrays = (torch.from_numpy(array).double() for array in (masked.transpose(0, 4, 1, 2, 3), weight, bias))
    y = torch.nn.functional.conv3d(*arrays, case.stride, case.padding, case.dilation)
    return y.permute(0, 2, 3, 4, 1).numpy()


def frames_read(case: WinogradCase) -> np.ndarray:
    """Which input frames (N, T) some live output frame reads."""
    read = np.zeros((case.batch, case.size[0]), bool)
    for clip, frame in np.argwhere(case.out_frames):
        read[clip, [case.window.source(0, frame, tap) for tap in case.window.live_taps(0, frame)]] = True
    return read


def poison(case: WinogradCase, x: np.ndarray) -> np.ndarray:
    """NaN where nothing may be read."""
    x = x.copy()
    if case.in_frames is not None:
        x[~case.in_frames] = np.nan
    if case.out_frames is not None:
        x[~frames_read(case)] = np.nan
    if case.live_in is not None:
        x[np.broadcast_to(~case.live_in[:, None, None, None, :], x.shape)] = np.nan
    return x


def poison_weight(case: WinogradCase, weight: np.ndarray) -> np.ndarray:
    """NaN in the weights of channels whose whole units are dead in every clip."""
    weight, conv = weight.copy(), make(case)
    for live, unit, axis in ((case.live_in, conv.unit, 1), (case.live_out, case.tile.vector_floats, 0)):
        if live is not None:
            channels = live.any(axis=0)
            kept = np.logical_or.reduceat(channels, np.arange(0, len(channels), unit)).repeat(unit)[: len(channels)]
            weight[(slice(None),) * axis + (~kept,)] = np.nan
    return weight


def computed_outputs(case: WinogradCase, shape: tuple[int, ...]) -> np.ndarray:
    computed = np.ones(shape, bool)
    if case.out_frames is not None:
        computed &= case.out_frames[:, :, None, None, None]
    if case.positions is not None:
        computed &= case.positions[..., None]
    if case.live_out is not None:
        computed &= case.live_out[:, None, None, None, :]
    return computed


def run(
    case: WinogradCase, conv: LayerKernel | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return the output of ``conv``, or of the case's kernel, PyTorch's, which outputs must be computed, and lists."""
    rng = np.random.default_rng(case.seed)
    conv = conv or make(case)
    x = rng.integers(-4, 5, (case.batch, *case.size, case.channels_in)).astype("float32")
    weight = rng.integers(-3, 4, (case.channels_out, case.channels_in, *case.kernel)).astype("float32")
    bias = rng.integers(-5, 6, case.channels_out).astype("float32")
    residual = rng.integers(-9, 10, (case.batch, *case.window.out, case.channels_out)).astype("float32")
    expected = np.maximum(expected_output(case, x, weight, bias) + (residual if case.residual else 0), 0)

    masks = {"in_frames": case.in_frames, "out_frames": case.out_frames, "positions": case.positions}
    masks |= {"in_channels": case.live_in, "out_channels": case.live_out}
    y, lists = call(conv, poison(case, x), masks, Weights(poison_weight(case, weight), bias), residual)
    return y, expected, computed_outputs(case, expected.shape), lists


def check(case: WinogradCase) -> dict[str, np.ndarray]:
    got, expected, computed, lists = run(case)
    bound = case.tolerance * max(1.0, float(expected.max(initial=0)))
    np.testing.assert_allclose(got[computed], expected[computed], rtol=0, atol=bound)
    if case.zero_dead == "all":
        np.testing.assert_array_equal(got[~computed], 0)
    return lists


@pytest.mark.parametrize("m", POINTS)
def test_transforms_are_minimal_filtering(m: int) -> None:
    a, g, b = matrices(m, 3)
    rng = np.random.default_rng(m)
    weight, data = rng.standard_normal(3), rng.standard_normal(m + 2)
    np.testing.assert_allclose(a @ ((g @ weight) * (b @ data)), np.correlate(data, weight), atol=1e-13)
    assert np.count_nonzero(b[1:, 0]) == np.count_nonzero(b[:-1, -1]) == 0, "what a tile's ends reach (plane_sets)"


def test_weights_are_transformed_along_each_axis() -> None:
    weight = np.random.default_rng(0).standard_normal((2, 5, 3, 3, 3)).astype("float32")
    got = transform_weights(weight, (2, 4, 1), (True, True, False))
    expected = np.einsum("at,bh,ncthw->ncabw", matrices(2, 3)[1], matrices(4, 3)[1], weight)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


DENSE = [
    WinogradCase(),
    WinogradCase(m=(2, 2, 2), size=(4, 5, 5), batch=2, residual=True),
    WinogradCase(m=(1, 4, 4), size=(2, 7, 9), channels_in=9, channels_out=11, padding=(1, 0, 1)),
    WinogradCase(m=(4, 4, 4), size=(5, 6, 6)),
    WinogradCase(m=(2, 6, 6), size=(3, 8, 7), residual=True),
    WinogradCase(m=(1, 3, 5), kernel=(1, 3, 3), padding=(0, 1, 1)),
    WinogradCase(m=(4, 1, 1), kernel=(3, 1, 1), padding=(1, 0, 0), size=(7, 3, 3), columns=100),
    WinogradCase(m=(1, 2, 2), size=(6, 4, 4), stride=(2, 1, 1), dilation=(2, 1, 1), padding=(2, 1, 1)),
    WinogradCase(m=(1, 2, 2), channels_in=11, tile=replace(TILE, step=4, depth_block=8)),
]


@pytest.mark.parametrize("case", DENSE, ids=range(len(DENSE)))
def test_dense_equals_pytorch(case: WinogradCase) -> None:
    check(case)


@st.composite
def masked_cases(draw: st.DrawFn) -> WinogradCase:
    kernel, m = draw(
        st.sampled_from(
            [
                ((3, 3, 3), (1, 2, 2)),
                ((3, 3, 3), (2, 2, 2)),
                ((3, 3, 3), (1, 4, 4)),
                ((1, 3, 3), (1, 2, 2)),
                ((3, 1, 1), (2, 1, 1)),
            ]
        )
    )
    case = WinogradCase(
        batch=draw(st.integers(1, 2)),
        size=(draw(st.integers(1, 4)), draw(st.integers(3, 6)), draw(st.integers(3, 7))),
        channels_in=draw(st.integers(1, 6)),
        channels_out=draw(st.integers(1, 10)),
        kernel=kernel,
        padding=tuple(k // 2 for k in kernel),
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        m=m,
        columns=draw(st.integers(1, 5)),
    )
    draw_masks(draw, case)
    return case


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(masked_cases())
def test_masked_equals_pytorch_on_the_masked_input(case: WinogradCase) -> None:
    check(case)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    st.data(), st.sampled_from([(1, 2, 2), (2, 2, 2), (2, 1, 2)]), st.sampled_from([(4, 4, 4), (2, 2, 2), (1, 2, 4)])
)
def test_a_max_pool_behind_it(data: st.DataObject, pool: tuple[int, int, int], m: tuple[int, int, int]) -> None:
    draw = data.draw
    frames, taps = draw(st.sampled_from([(2, (3, 3, 3)), (4, (3, 3, 3)), (2, (1, 3, 3))]))
    m = (m[0] if taps[0] > 1 else 1, *m[1:])
    pool = (pool[0] if m[0] > 1 else 1, *pool[1:])
    case = WinogradCase(
        batch=draw(st.integers(1, 2)),
        size=(frames, draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([2, 4, 8]))),
        channels_out=draw(st.integers(1, 19)),
        kernel=taps,
        padding=tuple(count // 2 for count in taps),
        m=m,
        columns=draw(st.integers(1, 5)),
    )
    draw_masks(draw, case)
    check_pooled(case, pooled(make(case), pool, case.zero_dead, LARGE), pool)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.data(), st.sampled_from([(1, 2, 2), (2, 2, 2), (2, 1, 3)]))
def test_a_max_pool_behind_the_direct_kernel_beside_it(data: st.DataObject, pool: tuple[int, int, int]) -> None:
    batch = data.draw(st.integers(1, 2))
    case = WinogradCase(batch=batch, size=(2, 4, 6), channels_out=data.draw(st.integers(1, 11)))
    draw_masks(data.draw, case)
    conv = make(case)
    masks = (conv.plan.in_frames, conv.plan.out_frames, conv.plan.positions)
    plan = RowPlan(case.window, TILE.mr, TILE.block_tiles, TILE.segment_taps, conv.plan.samples, *masks)
    sizes = (case.window, case.channels_in, case.channels_out, 1, TILE, plan, conv.live_in, conv.live_out)
    check_pooled(case, PooledGather(*sizes, activation="relu", zero_dead="all", pool=pool), pool)


def check_pooled(case: WinogradCase, kernel: LayerKernel | None, pool: tuple[int, int, int]) -> None:
    """``kernel`` computes the case with a pool behind it, to which what masks leave out is zero."""
    assert kernel is not None
    found, expected, computed, lists = run(case, kernel)
    expected = pooled_by(np.where(computed, expected, 0), pool)
    bound = case.tolerance * max(1.0, float(expected.max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
    arrays = {**lists, "x": np.zeros(kernel.x_shape, "float32"), "y": found}
    told = executed(kernel.describe(), {name: tensor(value) for name, value in arrays.items()})
    assert told is not None
    assert told[1].shape == found.shape[:4]


def test_pools_that_cross_tiles_or_follow_a_residual_stay_apart() -> None:
    conv = make(WinogradCase(size=(2, 6, 6), m=(2, 2, 2)))
    assert pooled(conv, (2, 2, 2), "", LARGE) is not None
    assert pooled(conv, (1, 3, 3), "", LARGE) is None
    assert pooled(conv, (1, 4, 2), "", LARGE) is None
    assert pooled(replace(conv, residual=True), (2, 2, 2), "", LARGE) is None


#: Stride and dilation of axes that cannot be transformed are free.
FREE = list(product((1, 2, 3), (1, 2)))


@st.composite
def windows(draw: st.DrawFn) -> WinogradCase:
    """Any window that a Winograd kernel may be chosen for, with one of the tiles it may be given."""

    def axis(kernels: tuple[int, ...]) -> tuple[int, int, int]:
        taps = draw(st.sampled_from(kernels))
        return (taps, 1, 1) if taps == 3 else (1, *draw(st.sampled_from(FREE)))

    frames = draw(st.sampled_from([(taps, *free) for taps in (1, 3) for free in FREE]))
    rows = axis((1, 3))
    columns = axis((1, 3) if rows[0] == 3 or frames == (3, 1, 1) else (3,))
    kernel, stride, dilation = zip(frames, rows, columns, strict=True)
    tiles = [2 if taps == (3, 1, 1) else 1 for taps in (rows, columns)]
    only_frames = max(tiles) == 1
    case = WinogradCase(
        size=(draw(st.integers(5, 6)), draw(st.integers(3, 7)), draw(st.integers(3, 6))),
        channels_in=draw(st.integers(1, 5)),
        channels_out=draw(st.integers(1, 6)),
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        padding=tuple(draw(st.integers(0, 1)) for _ in range(3)),
        seed=draw(st.integers(0, 99)),
        m=(2 if only_frames or (frames == (3, 1, 1) and draw(st.booleans())) else 1, *tiles),
        columns=draw(st.integers(1, 30)),
    )
    if draw(st.booleans()):
        draw_masks(draw, case)
    return case


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(windows())
def test_axes_that_are_not_transformed_have_any_stride_and_padding(case: WinogradCase) -> None:
    assert not why_no_winograd(gathered(case))
    check(case)


def gathered(case: WinogradCase) -> GatherConv:
    """The direct kernel of the same convolution."""
    plan = RowPlan(case.window, TILE.mr, TILE.block_tiles, TILE.segment_taps)
    return GatherConv(case.window, case.channels_in, case.channels_out, 1, plan=plan, tile=TILE)


def test_frames_that_read_one_frame_each_are_planned_as_clips() -> None:
    """A chunk holds a few tiles of a few frames then, in place of a place's tiles over all frames."""
    case = WinogradCase(batch=2, size=(9, 7, 6), kernel=(1, 3, 3), padding=(0, 1, 1), m=(1, 2, 2))
    conv = transformed(gathered(case)).retiled(case.m, 4, TILE)
    assert (conv.plan.window.batch, conv.plan.source_rows, conv.plan.chunks) == (18, 4, 54)
    rng = np.random.default_rng(5)
    x, weight, bias = (
        rng.integers(-3, 4, shape).astype("float32")
        for shape in (conv.x_shape, (case.channels_out, case.channels_in, *case.kernel), (case.channels_out,))
    )
    found, lists = call(conv, x, {}, Weights(weight, bias))
    np.testing.assert_array_equal(found, expected_output(case, x, weight, bias))
    named = {name: tensor(value) for name, value in {**lists, "x": x, "y": found}.items()}
    counted, alive, _ = executed(conv.describe(), named) or ({}, np.zeros(0), None)
    assert (counted["share"], alive.shape, alive.all()) == (1.0, found.shape[:4], True)
    strided = replace(case, kernel=(3, 1, 3), stride=(2, 1, 1), padding=(1, 0, 1))
    assert transformed(gathered(strided)).plan.window == strided.window


def test_the_code_of_a_planner_does_not_grow_with_its_classes() -> None:
    """Where frames die, rows of three taps are of eight classes and those of five of 32."""
    codes = []
    for taps in (3, 5):
        window = Window(1, (8, 8, 8), (8, 8, 8), (taps, 3, 3), padding=(taps // 2, 1, 1))
        plan = WinogradPlan(window, (1, 2, 2), 4, 4, in_frames=True, out_frames=True, positions=(1, 1))
        assert len(plan.tap_sets) == 1 << taps
        codes.append(plan.primfunc().script().count("\n"))
    assert codes[0] == codes[1]


def test_a_window_is_refused_unless_its_transformed_axes_are_three_long_and_dense() -> None:
    axis = list(product((1, 2, 3, 5), (1, 2), (1, 2)))  # kernel, stride, dilation
    for frames, rows, columns in product(axis, repeat=3):
        kernel, stride, dilation = zip(frames, rows, columns, strict=True)
        case = WinogradCase(size=(9, 9, 9), kernel=kernel, stride=stride, dilation=dilation, padding=(1, 0, 1))
        whole = [taps in ((3, 1, 1), (1, *taps[1:])) for taps in (rows, columns)]
        some = (3, 1, 1) in (frames, rows, columns)
        assert (not why_no_winograd(gathered(case))) == (all(whole) and some), (frames, rows, columns)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 1, 1), (1, 1, 2), (0, 1, 0)), ((1, 3, 1), (2, 1, 2), (1, 0, 0)), ((3, 1, 3), (1, 3, 1), (1, 1, 1))],
)
def test_a_factorised_convolution_is_right_whatever_kernel_is_chosen(kernel, stride, padding) -> None:
    conv = nn.Conv3d(16, 16, kernel, stride=stride, padding=padding)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape).float())
    x = torch.randint(-3, 4, (1, 16, 6, 9, 11)).float()
    mod = from_exported_program(torch.export.export(conv.eval(), (x,)))
    low = lower(mod, load_target("host"), Options(conv="winograd"))
    assert "winograd" in low.layers[0].kernel
    executable = tvm.compile(low.mod, target=load_target("host").tvm_target(1))
    found = outputs(relax.VirtualMachine(executable, tvm.cpu()), x)[0]
    wanted = conv.double()(x.double()).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def alive(channels: int, *runs: tuple[int, int]) -> np.ndarray:
    """A channel mask (1, channels) in which the runs (first, past the last) are alive."""
    mask = np.zeros((1, channels), bool)
    for first, end in runs:
        mask[:, first:end] = True
    return mask


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([(0, 18)], id="all"),
        pytest.param([(4, 8), (12, 16)], id="whole vectors, of two panels"),
        pytest.param([(0, 4), (8, 10)], id="the last vector not full"),
        pytest.param([(8, 12), (16, 18)], id="the last vector at the edge"),
        pytest.param([(2, 10)], id="side by side across vectors"),
        pytest.param([(0, 5), (6, 18)], id="one missing"),
        pytest.param([(17, 18)], id="one alone"),
        pytest.param([(1, 2), (16, 17)], id="a unit between is dead"),
    ],
)
def test_listed_channels_are_found_wherever_they_are(runs: list[tuple[int, int]]) -> None:
    case = WinogradCase(size=(2, 5, 6), channels_in=18, channels_out=18, residual=True, columns=4)
    case.live_in = case.live_out = alive(18, *runs)
    check(case)
    case.tile = replace(TILE, step=4, depth_block=8)
    check(case)


@pytest.mark.parametrize("depth_block", [8, 64])
def test_only_live_weights_are_asked_for_and_all_but_the_first(
    monkeypatch: pytest.MonkeyPatch, depth_block: int
) -> None:
    def marked(buffer: tvm.tirx.Buffer, index: Any) -> None:
        store(buffer, number(MARK), tvm.tirx.min(index, int(buffer.shape[0]) - 1))

    monkeypatch.setattr(winograd_multiply, "prefetch", marked)
    tile = replace(TILE, depth_block=depth_block)
    flat = {"size": (1, 4, 4), "kernel": (1, 3, 3), "padding": (0, 1, 1)}
    case = WinogradCase(channels_in=32, channels_out=24, tile=tile, **flat)
    case.live_in, case.live_out = alive(32, (0, 8), (16, 24), (24, 32)), alive(24, (0, 4), (8, 12), (20, 24))
    found: list[np.ndarray] = []

    def keeping(func: tvm.tirx.PrimFunc, arrays: Sequence[np.ndarray], blank: list[np.ndarray]) -> list[np.ndarray]:
        given, results = [tensor(array) for array in arrays], [tensor(array) for array in blank]
        compiled(func)(*given, *results)
        found[:] = [array.numpy() for array in given if array.shape == make(case).weight_shape]
        return [array.numpy() for array in results]

    weights = Weights(np.ones((24, 32, 1, 3, 3), "float32"), np.zeros(24, "float32"))
    masks = {"in_channels": case.live_in, "out_channels": case.live_out}
    call(make(case), np.ones((1, 1, 4, 4, 32), "float32"), masks, weights, run=keeping)
    asked = (found[0] == MARK).any(axis=-1)[:, :, 0]  # (ξ, vectors, C_in)
    asked[-1, -1] = False  # what is past the end
    vectors, channels = [0, 2, 5], np.flatnonzero(case.live_in[0])
    dead = np.ones(asked.shape, bool)
    dead[np.ix_(range(len(asked)), vectors, channels)] = False
    assert not asked[dead].any()
    behind_the_first = asked[1:-1][np.ix_(range(len(asked) - 2), vectors, channels)]
    assert behind_the_first.all()


def thinned(**lists: Any) -> WinogradConv:
    """A layer of 49 tiles of 2 × 2 × 2, whose weights lie beyond the caches that are ours."""
    size = (4, 13, 13)
    window = Window(1, size, size, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    found = best(transformed(direct(Layer(window, 448, 480, **lists), LARGE)), LARGE, 1, limits=Limits(growth=2.4))
    assert found is not None
    return found


def test_one_chunk_holds_what_masks_may_leave_where_weights_come_from_memory() -> None:
    assert thinned(positions=(1, 1), live_in=True, live_out=True).plan.chunks == 1


def test_a_chunk_that_live_places_begin_reads_all_weights_again() -> None:
    conv = thinned(positions=(1, 1))
    halved = conv.retiled(conv.plan.m, 25, conv.tile)
    below, half, above = (halved.predict(LARGE, 1, [share], whole_units=True) for share in (0.47, 0.5, 0.53))
    assert above - half > 2 * (half - below)


def test_weights_of_a_small_network_stay_in_the_cache_so_that_more_of_them_pay() -> None:
    """Of a layer of few positions and many channels, whose transformed weights no second-level cache takes."""
    size = (4, 6, 6)
    layer = direct(Layer(Window(1, size, size, (3, 3, 3), (1, 1, 1), (1, 1, 1)), 128, 128), LARGE)
    small, large = (cost.running(LARGE, weight_bytes) for weight_bytes in (4 << 20, 400 << 20))
    stays, streams = best(transformed(layer), small, 1), best(transformed(layer), large, 1)
    assert stays is not None
    assert streams is not None
    assert stays.growth > streams.growth
    assert layer.predict(small, 1) < layer.predict(large, 1)


def test_dead_tiles_and_frames_are_not_touched() -> None:
    positions = np.zeros((1, 1, 8, 8), bool)
    positions[0, 0, 1, 6] = positions[0, 0, 5, 5] = True  # in tiles (0, 1) and (1, 1) of four
    out_frames = np.array([[True, False, False, True]])
    in_frames = np.array([[True, True, False, True]])
    case = WinogradCase(size=(4, 8, 8), m=(1, 4, 4), columns=4)
    case.positions, case.out_frames, case.in_frames = positions, out_frames, in_frames
    lists = check(case)
    assert lists["counts"][-1, 0] == 1, "one chunk holds both columns"
    assert sorted(lists["columns"][0, :2]) == [1, 3]
    inputs, tiles, runs = lists["counts"][0]
    rows = lists["rows_out"][0, :tiles]
    assert (rows >= 0).sum() == 4, "two columns in two live frames"
    assert lists["pairs"] == 6, "two columns, two taps in frame 0 and one in frame 3"
    assert inputs == 6, "frames 0, 1 and 3 of both columns: frame 2 is dead"
    taps = {tuple(int(field) for field in run[1] - run[:1]) for run in lists["runs"][0, :runs]}
    assert taps == {(2,), (1,)}, "frame 0 reads frames 0 and 1, frame 3 only itself"


@pytest.mark.parametrize(
    ("alive", "planes"),
    [("110000", 4 + 1 + 0), ("000011", 0 + 1 + 4), ("110011", 4 + 2 + 4), ("001000", 1 + 4 + 0), ("000000", 0)],
)
def test_frames_at_the_ends_of_a_tile_take_a_plane_each(alive: str, planes: int) -> None:
    case = WinogradCase(batch=2, size=(6, 4, 4), m=(2, 2, 2), columns=3)
    case.in_frames = np.array([[digit == "1" for digit in alive], [False] * 5 + [True]])
    lists = check(case)
    assert lists["pairs"] == 4 * (planes + 4), "four columns of either clip; the second's last frame is inside"
    assert make(case).work()[0].factor == 4 * 4, "a plane along frames is of 4 × 4 products"


def test_dead_frames_leave_room_for_further_columns_in_a_chunk() -> None:
    """Four columns of two tiles of frames each, two columns a chunk: with one tile alive all four fit one chunk."""
    case = WinogradCase(size=(4, 8, 8), m=(2, 4, 4), columns=2)
    case.out_frames = np.array([[False, False, True, False]])
    lists = check(case)
    assert lists["counts"][-1, 0] == 1
    assert lists["counts"][0, 0] == 4, "one source row for each column"
    assert [*lists["rows_in"].ravel()[:4]] == [0, 1, 2, 3], "one behind the other"
    case.out_frames = np.array([[True, False, True, False]])
    assert check(case)["counts"][-1, 0] == 2


@pytest.mark.parametrize(("extent", "most", "unit", "part"), [(512, 268, 16, 256), (256, 268, 16, 256), (3, 2, 1, 2)])
def test_blocks_of_a_sum_are_even(extent: int, most: int, unit: int, part: int) -> None:
    assert evenly(extent, most, unit) == part


def test_wide_panels_are_taken_where_the_last_one_may_be_narrow() -> None:
    """96 of 128 output channels alive are a panel of 64 and one of 32, not two of 64."""
    window = Window(1, (4, 4, 4), (4, 4, 4), (3, 3, 3), (1, 1, 1), (1, 1, 1))
    conv = transformed(direct(Layer(window, 128, 128), LARGE))
    plan = replace(conv.plan, columns=4)
    dense, listed = (replace(conv, live_out=on).register_tile(LARGE, plan) for on in (False, True))
    assert listed == dense
    assert (listed.mr, listed.nr, listed.depth_block) == (4, 64, 128)


def test_nothing_alive_leaves_the_bias() -> None:
    case = WinogradCase(m=(1, 4, 4), residual=True, zero_dead="")
    case.live_in = np.zeros((1, 5), bool)
    check(case)


def test_clips_that_list_channels_of_their_own_share_a_chunk() -> None:
    """Weights are read once for all of them; each has runs of its own rows, and no rows where nobody reads any."""
    case = WinogradCase(size=(1, 4, 6), batch=4, channels_in=18, channels_out=18, kernel=(1, 3, 3), padding=(0, 1, 1))
    case.columns, case.positions = 100, np.ones((4, 1, 4, 6), bool)
    case.positions[2] = False
    case.live_in = np.concatenate([alive(18, run) for run in ((0, 18), (8, 16), (0, 8), (0, 0))])
    case.live_out = np.concatenate([alive(18, run) for run in ((4, 8), (0, 18), (0, 4), (9, 17))])
    lists = check(case)
    assert lists["counts"][-1, 0] == 1
    runs = lists["runs"][0, : lists["counts"][0, 2]]
    assert [(sample, last - first) for _, _, first, last, sample in runs] == [(0, 2), (1, 2), (3, 2)]


def test_masks_of_ones_equal_dense() -> None:
    case = WinogradCase(size=(3, 6, 6), m=(1, 4, 4), seed=3)
    dense = run(case)[0]
    case.in_frames = case.out_frames = np.ones((1, 3), bool)
    case.positions = np.ones((1, 1, 6, 6), bool)
    case.live_in, case.live_out = np.ones((1, 5), bool), np.ones((1, 7), bool)
    np.testing.assert_array_equal(run(case)[0], dense)


@pytest.mark.parametrize(
    ("kernel", "m", "transformed", "lanes"),
    [
        ((3, 3, 3), (2, 4, 3), (True, True, True), 8),
        ((3, 3, 3), (1, 6, 5), (False, True, True), 4),
        ((1, 3, 3), (1, 2, 2), (False, True, True), 16),
        ((3, 1, 1), (4, 1, 1), (True, False, False), 4),
    ],
)
def test_weights_that_a_call_transforms_are_those_that_are_kept(kernel, m, transformed, lanes):
    """A last vector that is not full, channels that are no whole task."""
    panelled = WinogradPanels(21, 24, kernel, m, transformed, lanes)
    planner = TransformWeights(panelled)
    weight = np.random.default_rng(7).standard_normal((21, 24, *kernel)).astype("float32")
    filters, made = planner.operands()
    run = tvm.compile(tvm.IRModule({"f": planner.primfunc("f")}), target=load_target("host").tvm_target(1))["f"]
    given = tensor(planner.prepare(Weights(weight, np.zeros(21, "float32")))[filters.name])
    result = tensor(np.full(made.shape, np.nan, "float32"))
    run(given, result)
    np.testing.assert_allclose(result.numpy(), panelled.apply(weight), rtol=2e-7, atol=0)
