"""GPU kernels through OpenCL on this machine's processor: small integers, compared exactly with PyTorch.

NaN lies where nothing may be read. The same kernels are built for CUDA; no GPU runs them here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import convolutions
import numpy as np
import pytest
import torch
import tvm
from convolutions import NEVER, call, on_processor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dance_tvm.artifact.layers import KernelInfo
from dance_tvm.core.errors import DanceError
from dance_tvm.device import serve
from dance_tvm.device.opencl import OpenCLSession
from dance_tvm.device.opencl_network import run_function
from dance_tvm.liveness.kernel_groups import KernelGroups, find_kernel_groups
from dance_tvm.schedules.cpu.mask_window import GrownMask as OnProcessor
from dance_tvm.schedules.cpu.row_plan import RowPlan
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.gpu.channel_plan import ChannelPlan
from dance_tvm.schedules.gpu.conv3d_direct import DirectConv, LinearConv, is_few_rows
from dance_tvm.schedules.gpu.conv3d_gather import BlockConv
from dance_tvm.schedules.gpu.conv3d_kgs import GroupConv
from dance_tvm.schedules.gpu.mask_window import GrownMask
from dance_tvm.schedules.gpu.pool3d import BlockPool
from dance_tvm.schedules.gpu.row_plan import BlockPlan, block_plan
from dance_tvm.schedules.gpu.tiles import BlockTile
from dance_tvm.schedules.kernel import Kernel, Weights
from dance_tvm.schedules.plans import channel_list_shape


@pytest.fixture(scope="module")
def device() -> OpenCLSession:
    try:
        return OpenCLSession(optimise=False)
    except DanceError as error:
        pytest.skip(str(error))


def vars_of(kernel: Kernel) -> dict[str, object]:
    """The fields of a kernel."""
    return {field.name: getattr(kernel, field.name) for field in fields(kernel)}


def some(shape: tuple[int, ...], share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < share


SMALL = BlockTile(32, 16, 8, 4, 4)


@dataclass
class Case(convolutions.Case):
    """A convolution and its masks for blocks of threads."""

    channels_in: int = 8
    channels_out: int = 12
    tile: BlockTile = SMALL

    def conv(self) -> BlockConv:
        samples = self.batch if self.live_in is not None or self.live_out is not None else 1
        positions = None if self.positions is None else self.positions.shape[:2]
        plan = block_plan(
            self.window, self.tile.mr, samples, self.in_frames is not None, self.out_frames is not None, positions
        )
        return BlockConv(
            self.window, self.channels_in, self.channels_out, self.groups, self.tile, plan,
            self.live_in is not None, self.live_out is not None, self.residual, "relu", self.zero_dead,
        )  # fmt: skip

    @property
    def masks(self) -> dict[str, np.ndarray | None]:
        """The masks by axis."""
        masks = {"in_frames": self.in_frames, "out_frames": self.out_frames, "positions": self.positions}
        return masks | {"in_channels": self.live_in, "out_channels": self.live_out}


def data_of(case: Case, conv: BlockConv) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.integers(-4, 5, (case.batch, *case.size, case.channels_in)).astype("float32")
    masked, poisoned = x.copy(), x.copy()
    if case.in_frames is not None:
        masked[~case.in_frames] = 0
        poisoned[~case.in_frames] = np.nan if conv.plan.dynamic_taps else 0
    if case.live_in is not None:
        for sample, live in enumerate(case.live_in):
            masked[sample][..., ~live] = 0
            poisoned[sample][..., ~live] = np.nan
    return {
        "masked": masked,
        "poisoned": poisoned,
        "weight": rng.integers(-3, 4, (case.channels_out, conv.depth, *case.kernel)).astype("float32"),
        "bias": rng.integers(-5, 6, case.channels_out).astype("float32"),
        "residual": rng.integers(-9, 10, (case.batch, *case.window.out, case.channels_out)).astype("float32"),
    }


def expected_of(case: Case, data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PyTorch's output, which of it must be computed, and which must be zero."""
    reference = torch.nn.functional.conv3d(
        torch.from_numpy(data["masked"]).double().permute(0, 4, 1, 2, 3),
        torch.from_numpy(data["weight"]).double(),
        torch.from_numpy(data["bias"]).double(),
        case.stride, case.padding, case.dilation, case.groups,
    ).permute(0, 2, 3, 4, 1)  # fmt: skip
    expected = torch.relu(reference + (torch.from_numpy(data["residual"]) if case.residual else 0)).numpy()
    computed = np.ones_like(expected, bool)
    if case.out_frames is not None:
        computed &= case.out_frames[:, :, None, None, None]
    frames = computed.copy()
    if case.positions is not None:
        computed &= case.positions[..., None]
    rows = computed.copy()
    if case.live_out is not None:
        computed &= case.live_out[:, None, None, None, :]
    zero = ~computed if case.zero_dead == "all" else frames & ~rows & (case.zero_dead == "rows")
    return expected, computed, zero


def listed(live: np.ndarray) -> np.ndarray:
    found = np.full(channel_list_shape(*live.shape), NEVER, "int32")
    for row, mask in zip(found, live, strict=True):
        row[: 1 + mask.sum()] = [mask.sum(), *np.flatnonzero(mask)]
    return found


def run(device: OpenCLSession, case: Case) -> None:
    compare(device, case, case.conv())


def compare(
    device: OpenCLSession,
    case: Case,
    conv: BlockConv,
    data: dict[str, np.ndarray] | None = None,
    groups: KernelGroups | None = None,
) -> None:
    """Run ``conv`` and its planners, and PyTorch."""
    data = data or data_of(case, conv)
    columns = () if groups is None else (groups.listed, groups.weights)
    weights = Weights(data["weight"], data["bias"], *columns)
    found, _ = call(conv, data["poisoned"], case.masks, weights, data["residual"], partial(run_function, device))
    expected, computed, zero = expected_of(case, data)
    assert np.array_equal(found[computed], expected[computed].astype("float32"))
    assert not found[zero].any()
    assert np.isnan(found[~computed & ~zero]).all(), "something was written that nobody reads"


CASES = {
    "dense": Case(),
    "odd": Case(size=(2, 7, 5), channels_in=5, channels_out=7, batch=2, residual=True),
    "first layer": Case(channels_in=3, channels_out=20, tile=BlockTile(32, 32, 8, 4, 4)),
    "large tile": Case(size=(2, 9, 8), channels_in=20, channels_out=40, tile=BlockTile(64, 32, 16, 8, 4)),
    "largest tile": Case(size=(2, 9, 8), channels_in=12, channels_out=70, tile=BlockTile(128, 64, 8, 8, 8)),
    "stride": Case(size=(5, 9, 8), stride=(2, 2, 1), padding=(1, 0, 2)),
    "dilation": Case(size=(5, 9, 8), dilation=(2, 1, 2), padding=(2, 1, 2)),
    "frames apart": Case(kernel=(3, 1, 1), padding=(1, 0, 0)),
    "picture apart": Case(kernel=(1, 3, 3), padding=(0, 1, 1)),
    "seven frames": Case(size=(9, 3, 2), kernel=(7, 1, 1), padding=(3, 0, 0), in_frames=some((1, 9), 0.5, 1)),
    "groups": Case(groups=2, channels_in=16, channels_out=40, tile=BlockTile(32, 16, 8, 4, 4)),
    "linear": Case(batch=5, size=(1, 1, 1), kernel=(1, 1, 1), padding=(0, 0, 0), channels_in=33, channels_out=10),
    "frames": Case(batch=2, size=(5, 4, 3), in_frames=some((2, 5), 0.5, 1), out_frames=some((2, 5), 0.6, 2)),
    "positions": Case(batch=2, positions=some((2, 3, 5, 6), 0.4, 3), zero_dead="rows", residual=True),
    "shared positions": Case(
        batch=2, positions=some((1, 1, 5, 6), 0.4, 3), out_frames=some((2, 3), 0.5, 5), zero_dead="rows"
    ),
    "live input channels": Case(batch=2, channels_in=20, live_in=some((2, 20), 0.4, 4)),
    "live output channels": Case(batch=2, channels_out=21, live_out=some((2, 21), 0.5, 4)),
    "all axes": Case(
        batch=2, size=(5, 6, 7), channels_in=19, channels_out=23,
        in_frames=some((2, 5), 0.6, 1), out_frames=some((2, 5), 0.6, 2), positions=some((2, 1, 6, 7), 0.5, 3),
        live_in=some((2, 19), 0.5, 4), live_out=some((2, 23), 0.5, 5), residual=True,
    ),
    "no rows": Case(positions=np.zeros((1, 1, 5, 6), bool)),
    "no frames read": Case(in_frames=np.zeros((1, 3), bool)),
    "no frames wanted": Case(out_frames=np.zeros((1, 3), bool)),
    "no input channels": Case(live_in=np.zeros((1, 8), bool)),
    "no output channels": Case(live_out=np.zeros((1, 12), bool)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gathered_convolution_equals_pytorch(device, name):
    run(device, CASES[name])


@pytest.mark.parametrize(("samples", "positions"), [(1, None), (2, (2, 1)), (1, (2, 5)), (2, (1, 1))])
def test_rows_are_listed_as_on_the_cpu(device, samples, positions):
    window = Window(2, (5, 9, 7), (5, 5, 4), (3, 3, 3), (1, 2, 2), (1, 1, 1))
    plan = block_plan(window, 16, samples, positions is not None, True, positions)
    inputs = [some(mask.shape, 0.6, 7).astype("float32") for mask in plan.masks.values()]
    inputs += plan.tables.values()
    blank = [np.zeros(shape, "int32") for shape in plan.shapes.values()]
    found = run_function(device, plan.primfunc(), inputs, blank)
    on_cpu = type("OnProcessor", (BlockPlan,), {"emit": RowPlan.emit})(**vars_of(plan))
    expected = on_processor(on_cpu.primfunc(), inputs, blank)
    for name, got, want in zip(plan.shapes, found, expected, strict=True):
        assert name == "frame_slots" or np.array_equal(got, want), name


EXTENTS = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=EXTENTS,
    kernel=st.sampled_from([(1, 1, 1), (3, 3, 3), (1, 3, 3), (3, 1, 1), (2, 3, 2)]),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 36)),
    share=st.sampled_from([0.0, 0.3, 0.8]),
    axes=st.sets(st.sampled_from(["in_frames", "out_frames", "positions", "live_in", "live_out"])),
)
def test_any_shape_under_any_masks_equals_pytorch(device, size, kernel, channels, share, axes):
    padding = tuple(extent // 2 for extent in kernel)
    case = Case(2, size, *channels, kernel=kernel, padding=padding, residual=channels[0] % 2 == 0)
    out = case.window.out
    shapes = {
        "in_frames": (2, size[0]), "out_frames": (2, out[0]), "positions": (2, 1, *out[1:]),
        "live_in": (2, channels[0]), "live_out": (2, channels[1]),
    }  # fmt: skip
    run(device, replace(case, **{axis: some(shapes[axis], share, 11) for axis in axes}))


DIRECT = {
    "depthwise": Case(channels_in=12, groups=12, residual=True),
    "few channels a group": Case(channels_in=12, channels_out=18, groups=6, stride=(1, 2, 2), padding=(1, 0, 1)),
    "depthwise, thinned": Case(
        batch=2, channels_in=12, groups=12, out_frames=some((2, 3), 0.5, 1), live_out=some((2, 12), 0.5, 2)
    ),
}
FEW_ROWS = {
    "linear": Case(batch=3, size=(1, 1, 1), kernel=(1, 1, 1), padding=(0, 0, 0), channels_in=70, channels_out=45),
    "linear, thinned": Case(
        batch=2, size=(1, 1, 1), kernel=(1, 1, 1), padding=(0, 0, 0), channels_in=70, channels_out=45,
        live_in=some((2, 70), 0.4, 1), live_out=some((2, 45), 0.4, 2),
    ),
}  # fmt: skip


def special(case: Case, kind: type[BlockConv], rows: int) -> BlockConv:
    conv = replace(case, tile=BlockTile(rows, 4, 4, 4, 4)).conv()
    return kind(**vars_of(conv))


@pytest.mark.parametrize("name", DIRECT)
def test_grouped_convolution_equals_pytorch(device, name):
    case = DIRECT[name]
    conv = special(case, DirectConv, 8)
    compare(device, case, conv)


@pytest.mark.parametrize("name", FEW_ROWS)
def test_linear_layer_equals_pytorch(device, name):
    case = FEW_ROWS[name]
    conv = special(case, LinearConv, case.batch if case.live_in is None else 1)
    assert is_few_rows(conv.window, conv.groups, conv.plan.samples)
    compare(device, case, conv)


GROUPS = {
    "kgs": Case(channels_in=16, channels_out=40, residual=True),
    "kgs, odd": Case(batch=2, channels_in=13, channels_out=21, stride=(1, 2, 1)),
    "kgs, frames": Case(batch=2, size=(5, 4, 3), in_frames=some((2, 5), 0.5, 1), out_frames=some((2, 5), 0.6, 2)),
    "kgs, channels": Case(
        batch=2, channels_in=16, channels_out=24, live_in=some((2, 16), 0.5, 1), live_out=some((2, 24), 0.4, 2),
        positions=some((1, 1, 5, 6), 0.5, 4),
    ),
    "kgs, nothing left": Case(channels_in=8, channels_out=16),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_kernel_groups_equal_pytorch(device, name):
    case = replace(GROUPS[name], tile=BlockTile(64, 8, 8, 4, 4))
    share = 0.0 if "nothing" in name else 0.4
    plain = case.conv()
    data = data_of(case, plain)
    rng = np.random.default_rng(9)
    groups, taps = -(-case.channels_out // 8), plain.window.taps
    kept = (rng.random((groups, plain.depth, taps)) < share).repeat(8, 0)[: case.channels_out]
    data["weight"] *= kept.reshape(data["weight"].shape)
    found = find_kernel_groups(data["weight"], 8, 1)
    compare(device, case, GroupConv(**vars_of(plain), columns=len(found.columns)), data, found)


def looked_at(conv: BlockConv, masks: dict[str, np.ndarray | None], weights: Weights) -> dict[str, Any]:
    """What a device tells of a call that writes ones, its lists made by the processor's planner, which is a GPU's."""
    plan = type("OnProcessor", (BlockPlan,), {"emit": RowPlan.emit})(**vars_of(conv.plan))
    lists = dict(zip(plan.shapes, planned(plan, masks), strict=True))
    lists |= {
        f"{side}_channels": listed(live)
        for side in ("in", "out")
        if (live := masks.get(f"{side}_channels")) is not None
    }
    lists |= conv.prepare(weights)
    shapes = {each.name: each for each in conv.operands()}
    arrays = [lists.get(name, np.ones(each.shape, each.dtype)) for name, each in shapes.items()]
    return serve.looked_at(
        KernelInfo(**conv.describe()).model_dump(),
        [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays],
    )


def planned(plan: BlockPlan, masks: dict[str, np.ndarray | None]) -> list[np.ndarray]:
    given = [masks[each.axis].astype("float32") for each in plan.masks.values()]
    blank = [np.full(shape, NEVER, "int32") for shape in plan.shapes.values()]
    return on_processor(plan.primfunc(), [*given, *plan.tables.values()], blank)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_kernels_clock_counts_what_the_lists_of_a_gpu_kept(dtype):
    """Frames 1 to 3 of 6 are wanted, frame 0 is dead: 2 + 3 + 3 taps of 3 by 3; channels 3 of 8 and 4 of 12."""
    in_frames, out_frames = np.arange(6) > 0, (np.arange(6) > 0) & (np.arange(6) < 4)
    case = Case(
        size=(6, 6, 6), padding=(1, 0, 0), in_frames=in_frames[None], out_frames=out_frames[None],
        live_in=some((1, 8), 0.4, 4), live_out=some((1, 12), 0.4, 5),
    )  # fmt: skip
    conv = replace(case.conv(), dtype=dtype)
    calls = looked_at(conv, case.masks, Weights(None, np.zeros(12)))
    work, kept_in, kept_out = calls["work"], int(case.live_in.sum()), int(case.live_out.sum())
    assert work["macs"] == (2 + 3 + 3) * 9 * 16 * kept_in * kept_out
    assert (work["frames"], work["positions"]) == (0.5, 0.5)
    assert (work["channels_in"], work["channels_out"]) == (kept_in / 8, kept_out / 12)
    assert calls["mean"] == 1


def test_a_kernels_clock_counts_the_columns_of_kernel_groups_on_a_gpu():
    """Two groups of 8 filters, of which one has kept 5 columns at each tap and the other one."""
    case = Case(size=(3, 6, 6), channels_out=16, padding=(0, 0, 0), tile=BlockTile(64, 8, 8, 4, 4))
    plain = case.conv()
    weight = np.zeros((16, 8, 27), "float32")
    weight[:8, :5], weight[8:, 7] = 1, 1
    found = find_kernel_groups(weight.reshape(16, 8, 3, 3, 3), 8, 1)
    conv = GroupConv(**vars_of(plain), columns=len(found.columns))
    calls = looked_at(conv, {}, Weights(None, np.zeros(16), found.listed, found.weights))
    assert calls["work"]["macs"] == 16 * 27 * (5 + 1) * 8


POOLS = {
    "max": ("max", Window(2, (4, 7, 5), (2, 3, 2), (2, 3, 2), (2, 2, 2)), {}),
    "padded average": ("avg", Window(1, (4, 6, 5), (4, 6, 5), (3, 3, 3), (1, 1, 1), (1, 1, 1)), {}),
    "counted average": (
        "avg", Window(1, (4, 6, 5), (4, 6, 5), (3, 3, 3), (1, 1, 1), (1, 1, 1)), {"counted": ((1, 1, 1), (1, 1, 1))}
    ),
    "average that hangs over": ("avg", Window(1, (4, 5, 3), (2, 3, 2), (2, 2, 2), (2, 2, 2)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("masked", [False, True])
def test_pools_equal_pytorch(device, name, masked):
    kind, window, options = POOLS[name]
    x = np.random.default_rng(0).integers(-9, 9, (window.batch, *window.size, 5)).astype("float32")
    pool = BlockPool(window, 5, kind, in_frames=masked, out_frames=masked, **options)
    in_frames, out_frames = some((window.batch, window.size[0]), 0.5, 1), some((window.batch, window.out[0]), 0.5, 2)
    given = np.where(in_frames[..., None, None, None], x, np.nan).astype("float32") if masked else x
    masks = {"in_frames": in_frames, "out_frames": out_frames}
    found, _ = call(pool, given, masks, run=partial(run_function, device))
    data = torch.from_numpy(np.nan_to_num(given)).permute(0, 4, 1, 2, 3)
    sizes = (list(window.kernel), list(window.stride), list(window.padding), "hangs over" in name)
    if kind == "max":
        expected = torch.nn.functional.max_pool3d(data, *sizes[:3], ceil_mode=sizes[3])
    else:
        expected = torch.nn.functional.avg_pool3d(data, *sizes, count_include_pad=any(pool.counted[0]))
    want = expected.permute(0, 2, 3, 4, 1).numpy() * (out_frames[..., None, None, None] if masked else 1)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)


def test_a_largest_value_of_nan_is_nan(device):
    window = Window(1, (2, 4, 5), (1, 3, 3), (2, 2, 3))
    x = np.random.default_rng(3).integers(-9, 9, (1, *window.size, 3)).astype("float32")
    x[0, 0, 1, 1, 0] = x[0, 1, 3, 4, 2] = np.nan
    x[0, :, 0, :3, 1] = x[0, :, 1, :3, 1] = -np.inf
    found, _ = call(BlockPool(window, 3, "max"), x, run=partial(run_function, device))
    want = torch.nn.functional.max_pool3d(torch.from_numpy(x).permute(0, 4, 1, 2, 3), (2, 2, 3), 1)
    np.testing.assert_array_equal(found, want.permute(0, 2, 3, 4, 1).numpy())


@pytest.mark.parametrize("forward", [True, False])
def test_masks_grow_as_on_the_cpu(device, forward):
    window = Window(2, (5, 6, 9), (3, 6, 4), (3, 3, 2), (2, 1, 2), (1, 1, 0))
    for flat in (False, True):
        extents = window.size if forward else window.out
        field = (2, 1 if flat else extents[0], *extents[1:])
        mask = some(field, 0.2, 5).astype("float32")
        found, _ = call(GrownMask(window, field, forward), mask, run=partial(run_function, device))
        assert np.array_equal(found, call(OnProcessor(window, field, forward), mask)[0])


def test_channels_are_listed_in_order(device):
    live = np.concatenate([some((2, 300), 0.4, 1), np.zeros((1, 300), bool), np.ones((1, 300), bool)])
    found, _ = call(ChannelPlan(*live.shape), masks={"": live}, run=partial(run_function, device))
    for row, want in zip(found, listed(live), strict=True):
        assert np.array_equal(row[: 1 + want[0]], want[: 1 + want[0]])
