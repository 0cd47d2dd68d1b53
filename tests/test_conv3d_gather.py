"""The gathered convolution against PyTorch: small integers, compared exactly; NaN where nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from convolutions import SMALL_TILE, Case, call, draw_masks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dance_tvm.liveness.kernel_groups import find_kernel_groups
from dance_tvm.lowering.registry import kernel_of
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.conv3d_kgs import KernelGroupConv
from dance_tvm.schedules.cpu.row_plan import RowPlan
from dance_tvm.schedules.cpu.tiles import Machine, Tile
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.kernel import Weights
from dance_tvm.schedules.workload import Workload


@dataclass
class GatherCase(Case):
    """A convolution, direct or with its weights pruned in kernel groups (gm, gn, share of columns kept).

    ``in_positions``: (clips or 1, frames or 1, height, width) of the input that is not zero.
    """

    kernel_groups: tuple[int, int, float] | None = None
    in_positions: np.ndarray | None = None


def run(case: GatherCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the kernel's output, PyTorch's on the masked input (float64), and which outputs must be computed."""
    rng = np.random.default_rng(case.seed)
    window = case.window
    samples = case.batch if case.live_in is not None or case.live_out is not None else 1
    plan = RowPlan(
        window,
        case.tile.mr,
        case.tile.block_tiles,
        case.tile.segment_taps,
        samples,
        case.in_frames is not None,
        case.out_frames is not None,
        None if case.positions is None else case.positions.shape[:2],
        None if case.in_positions is None else case.in_positions.shape[:2],
    )
    settings_of_kernel = (
        window,
        case.channels_in,
        case.channels_out,
        case.groups,
        case.tile,
        plan,
        case.live_in is not None,
        case.live_out is not None,
        case.residual,
        "relu",
        case.zero_dead,
        case.dtype,
    )
    conv = GatherConv(*settings_of_kernel)
    x = rng.integers(-4, 5, (case.batch, *case.size, case.channels_in)).astype("float32")
    weight = rng.integers(-3, 4, (case.channels_out, conv.depth, *case.kernel)).astype("float32")
    if case.kernel_groups is not None:
        weight = prune(weight, *case.kernel_groups, rng)
    bias = rng.integers(-5, 6, case.channels_out).astype("float32")
    residual = rng.integers(-9, 10, (case.batch, *window.out, case.channels_out)).astype("float32")

    masked, poisoned = x.copy(), x.copy()
    if case.in_frames is not None:
        masked[~case.in_frames] = 0
        poisoned[~case.in_frames] = np.nan if plan.dynamic_taps else 0
    if case.live_in is not None:
        for sample, live in enumerate(case.live_in):
            masked[sample][..., ~live] = 0
            poisoned[sample][..., ~live] = np.nan
    if case.in_positions is not None:
        dead = np.broadcast_to(~case.in_positions, (case.batch, *case.size))
        masked[dead], poisoned[dead] = 0, np.nan
    reference = torch.nn.functional.conv3d(
        torch.from_numpy(masked).double().permute(0, 4, 1, 2, 3),
        torch.from_numpy(weight).double(),
        torch.from_numpy(bias).double(),
        case.stride,
        case.padding,
        case.dilation,
        case.groups,
    ).permute(0, 2, 3, 4, 1)
    expected = torch.relu(reference + (torch.from_numpy(residual) if case.residual else 0)).numpy()

    computed = np.ones_like(expected, bool)
    if case.out_frames is not None:
        computed &= case.out_frames[:, :, None, None, None]
    if case.positions is not None:
        computed &= case.positions[..., None]
    rows = computed[..., 0].copy()
    if case.live_out is not None:
        computed &= case.live_out[:, None, None, None, :]

    masks = {"in_frames": case.in_frames, "out_frames": case.out_frames}
    masks |= {"positions": case.positions, "in_positions": case.in_positions}
    masks |= {"in_channels": case.live_in, "out_channels": case.live_out}
    weights = Weights(weight, bias)
    if case.kernel_groups is not None:
        groups = find_kernel_groups(weight, *case.kernel_groups[:2])
        run = 1 if case.live_in is not None else groups.run
        conv = KernelGroupConv(*settings_of_kernel, columns=len(groups.columns), run=run, threads=2)
        weights = Weights(weight, bias, groups.listed, groups.weights)
    y, lists = call(conv, poisoned, masks, weights, residual)
    pairs = int(lists["counts"][:, 3].sum())
    alive = np.ones((case.batch, *case.size), bool)
    if case.in_frames is not None and plan.dynamic_taps:
        alive &= case.in_frames[:, :, None, None]
    if case.in_positions is not None:
        alive &= case.in_positions
    assert pairs == count_pairs(window, alive, rows)
    return y, expected, computed


def prune(weight: np.ndarray, gm: int, gn: int, keep: float, rng: np.random.Generator) -> np.ndarray:
    """Zero whole columns of kernel groups of ``gm`` filters by ``gn`` channels."""
    filters, channels, *kernel = weight.shape
    kept = rng.random((-(-filters // gm), -(-channels // gn), *kernel)) < keep
    return weight * kept.repeat(gm, 0)[:filters].repeat(gn, 1)[:, :channels]


def count_pairs(window: Window, alive: np.ndarray, rows: np.ndarray) -> int:
    """Pairs of computed row and tap that reads a living input (N, T, H, W), counted one by one."""
    total = 0
    for n, *at in np.argwhere(rows):
        sources = [
            [window.source(axis, index, tap) for tap in window.live_taps(axis, index)] for axis, index in enumerate(at)
        ]
        total += int(alive[n][np.ix_(*sources)].sum())
    return total


def check(case: GatherCase) -> None:
    got, expected, computed = run(case)
    np.testing.assert_array_equal(got[computed], expected[computed])
    if case.zero_dead == "all":
        np.testing.assert_array_equal(got[~computed], 0)


DENSE = [
    GatherCase(),
    GatherCase(batch=2, size=(4, 7, 7), channels_in=8, channels_out=16),
    GatherCase(kernel=(1, 3, 3), padding=(0, 1, 1)),
    GatherCase(kernel=(3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1)),
    GatherCase(kernel=(1, 1, 1), padding=(0, 0, 0), residual=True),
    GatherCase(size=(1, 9, 9), channels_in=3, kernel=(1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3)),
    GatherCase(channels_in=6, channels_out=9, groups=3),
    GatherCase(size=(5, 6, 6), stride=(2, 2, 2), kernel=(3, 3, 3)),
    GatherCase(size=(2, 3, 3), kernel=(3, 5, 5), padding=(1, 2, 2), residual=True),
    GatherCase(channels_in=11, tile=Tile(5, 1, 4, 4, 3, 27)),
    GatherCase(channels_in=8, tile=Tile(4, 2, 4, 4, 100, 3)),
    GatherCase(channels_in=9, tile=Tile(4, 2, 4, 4, 3, 3, depth_block=4, panels_outer=True)),
    GatherCase(channels_in=9, channels_out=21, kernel_groups=(8, 4, 0.4), residual=True),
    GatherCase(channels_in=6, channels_out=16, kernel_groups=(8, 1, 0.0)),
    GatherCase(channels_in=8, channels_out=18, kernel_groups=(8, 8, 0.5), tile=Tile(4, 2, 4, 4, 3, 5)),
]


@pytest.mark.parametrize("case", DENSE, ids=range(len(DENSE)))
def test_dense_equals_pytorch(case: GatherCase) -> None:
    check(case)


def scattered(density: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).random(shape) < density


#: Masks of input positions: by clip and frame, shared, nearly empty, empty; with strides, dead frames and lists.
IN_POSITIONS = [
    GatherCase(kernel=(1, 3, 3), padding=(0, 1, 1), in_positions=scattered(0.6, 1, 3, 5, 6), residual=True),
    GatherCase(batch=2, kernel=(1, 3, 3), padding=(0, 1, 1), in_positions=scattered(0.7, 1, 1, 5, 6)),
    GatherCase(kernel=(1, 3, 3), padding=(0, 1, 1), stride=(1, 2, 2), in_positions=scattered(0.1, 1, 3, 5, 6)),
    GatherCase(kernel=(1, 1, 1), padding=(0, 0, 0), in_positions=scattered(0.0, 1, 3, 5, 6)),
    GatherCase(kernel=(1, 1, 3), padding=(0, 0, 2), dilation=(1, 1, 2), in_positions=scattered(0.5, 1, 3, 5, 6)),
    GatherCase(
        batch=2,
        size=(2, 6, 7),
        kernel=(1, 3, 3),
        padding=(0, 1, 1),
        tile=Tile(4, 2, 4, 4, 3, 1, depth_block=4),
        in_positions=scattered(0.5, 2, 2, 6, 7),
        positions=scattered(0.6, 2, 2, 6, 7),
        in_frames=np.array([[True, False], [True, True]]),
        live_in=scattered(0.6, 2, 5),
        live_out=scattered(0.6, 2, 7),
    ),
    GatherCase(kernel=(1, 3, 3), padding=(0, 1, 1), in_positions=scattered(0.6, 1, 3, 5, 6), kernel_groups=(8, 4, 0.5)),
]


@pytest.mark.parametrize("case", IN_POSITIONS, ids=range(len(IN_POSITIONS)))
def test_dead_positions_of_the_input_are_not_read(case: GatherCase) -> None:
    check(case)


DENSITIES = st.sampled_from([0.0, 0.3, 0.7, 1.0])


@st.composite
def masked_cases(draw: st.DrawFn) -> GatherCase:
    kernel = draw(st.sampled_from([(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1), (2, 3, 1)]))
    case = GatherCase(
        batch=draw(st.integers(1, 2)),
        size=(draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6))),
        channels_in=draw(st.integers(1, 6)),
        channels_out=draw(st.integers(1, 10)),
        kernel=kernel,
        padding=tuple(k // 2 for k in kernel),
        stride=draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 1)])),
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    draw_masks(draw, case)
    if draw(st.booleans()):
        case.kernel_groups = (draw(st.sampled_from([4, 8])), draw(st.sampled_from([1, 4, 8])), draw(DENSITIES))
        case.tile = replace(case.tile, vectors=case.kernel_groups[0] // 4)
    return case


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(masked_cases())
def test_masked_equals_pytorch_on_the_masked_input(case: GatherCase) -> None:
    check(case)


@st.composite
def chosen_cases(draw: st.DrawFn) -> GatherCase:
    """Kernel groups in a tile that the tuning space may choose."""
    machine = draw(st.sampled_from([Machine(4, 16, 32768, 524288, True), Machine(4, 32, 65536, 524288, False)]))
    gm, gn = draw(st.sampled_from([(4, 4), (8, 4), (8, 1), (16, 8)]))
    case = GatherCase(
        size=(3, 5, 6),
        channels_in=draw(st.sampled_from([6, 8])),
        channels_out=draw(st.integers(5, 20)),
        kernel_groups=(gm, gn, draw(st.sampled_from([0.2, 0.7]))),
        live_in=draw(st.sampled_from([None, np.array([[True, False, True, True, False, True, True, False]])])),
    )
    if case.live_in is not None:
        case.live_in = case.live_in[:, : case.channels_in]
    lists = ("in_channels",) if case.live_in is not None else ()
    layer = Workload(case.window, case.channels_in, case.channels_out, lists=lists)
    work = layer.grouped((gm, gn), case.kernel_groups[2])
    kernel = kernel_of(work, machine)
    space = kernel.space(machine, work)
    (values,) = space.parts()
    decisions = {name: draw(st.sampled_from(values[name]), label=name) for name in space.names}
    assert space.allows(decisions)
    case.tile = kernel.sized(decisions).tile
    return case


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(chosen_cases())
def test_any_choice_of_the_space_computes_the_same(case: GatherCase) -> None:
    check(case)


LAST = [[8, 15], [8, 9, 10, 11, 12, 15], [8, 9, 11], [8, 9], [8, 9, 10, 11], [8, 9, 10, 11, 12], [12, 13, 14], [12]]


@pytest.mark.parametrize("last", LAST, ids=str)
def test_a_last_panel_that_is_not_full_stores_its_channels_alone(last: list[int]) -> None:
    """Past the end of a list its last channel is repeated, as if it filled the gap before it; where weights are read in
    place, the sums there are those of other channels."""
    live = np.zeros((1, 16), bool)
    live[0, [*range(8), *last]] = True
    check(GatherCase(channels_out=16, live_out=live))


#: Live input channels in whole vectors of four, in vectors but for one channel, all of an odd number, none; tiles that
#: load single channels and vectors of them, and sums cut where no vector ends.
IN_VECTORS = [
    GatherCase(channels_in=16, live_in=np.array([[0, 1, 0, 1]], bool).repeat(4, axis=1)),
    GatherCase(
        batch=2,
        channels_in=16,
        channels_out=16,
        tile=Tile(4, 2, 4, 4, 3, 3, depth_block=6),
        live_in=np.array([[1, 0, 1, 1], [0, 1, 0, 0]], bool).repeat(4, axis=1),
        live_out=np.array([[1, 1, 0, 1], [0, 0, 0, 1]], bool).repeat(4, axis=1),
    ),
    GatherCase(
        channels_in=12,
        tile=replace(SMALL_TILE, depth_block=3),
        live_in=np.array([[0, 1, 1]], bool).repeat(4, axis=1),
        live_out=np.array([[1, 0, 1, 1, 0, 1, 1]], bool),
    ),
    GatherCase(channels_in=8, live_in=np.array([[1, 1, 1, 1, 0, 0, 1, 0]], bool)),
    GatherCase(channels_in=8, live_in=np.array([[0, 1, 1, 1, 1, 0, 0, 0]], bool)),
    GatherCase(channels_in=7, live_in=np.ones((1, 7), bool)),
    GatherCase(channels_in=8, live_in=np.zeros((1, 8), bool)),
]


@pytest.mark.parametrize("case", IN_VECTORS, ids=range(len(IN_VECTORS)))
def test_whole_vectors_of_input_channels(case: GatherCase) -> None:
    """They are brought side by side by the vector; single ones among them, one by one."""
    check(case)
