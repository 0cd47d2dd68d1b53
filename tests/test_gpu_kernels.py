"""GPU kernels through OpenCL on this machine's processor: small integers, compared exactly with PyTorch.

NaN lies where nothing may be read. The same kernels are built for CUDA; no GPU runs them here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import tvm

from dance_tvm.device.opencl import OpenCLSession
from dance_tvm.errors import DanceError
from dance_tvm.schedules.channel_plan import channel_list_shape
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.gpu.channel_plan import plan_channels
from dance_tvm.schedules.gpu.conv3d_gather import BlockConv, conv3d_gather
from dance_tvm.schedules.gpu.row_plan import block_plan, plan_rows
from dance_tvm.schedules.gpu.tiles import BlockTile
from dance_tvm.schedules.row_plan import plan_rows as plan_rows_on_cpu

CPU = tvm.target.Target({"kind": "llvm"})
NEVER = -(2**31)


@pytest.fixture(scope="module")
def device() -> OpenCLSession:
    try:
        return OpenCLSession(optimise=False)
    except DanceError as error:
        pytest.skip(str(error))


def some(shape: tuple[int, ...], share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < share


@dataclass
class Case:
    """One convolution and the masks around it; masks are boolean arrays or None."""

    batch: int = 1
    size: tuple[int, int, int] = (3, 5, 6)
    channels_in: int = 8
    channels_out: int = 12
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    tile: BlockTile = BlockTile(32, 16, 8, 4, 4)
    in_frames: np.ndarray | None = None
    out_frames: np.ndarray | None = None
    positions: np.ndarray | None = None
    live_in: np.ndarray | None = None
    live_out: np.ndarray | None = None
    residual: bool = False
    zero_dead: str = "all"

    @property
    def window(self) -> Window:
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
        return Window(self.batch, self.size, out, self.kernel, self.stride, self.padding, self.dilation)

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

    def masks(self, conv: BlockConv) -> dict[str, np.ndarray]:
        given = {"in_frames": self.in_frames, "out_frames": self.out_frames, "positions": self.positions}
        return {key: given[key].astype("float32") for key in conv.plan.masks}


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


def planned(device: OpenCLSession, conv: BlockConv, masks: dict[str, np.ndarray]) -> list[np.ndarray]:
    lists = [np.full(shape, NEVER, "int32") for shape in conv.plan.shapes.values()]
    return device.call(plan_rows(conv.plan), [*masks.values(), *conv.plan.tables.values()], lists)


def listed(device: OpenCLSession, live: np.ndarray) -> np.ndarray:
    samples, channels = live.shape
    blank = np.full(channel_list_shape(samples, channels), NEVER, "int32")
    return device.call(plan_channels(samples, channels), [live.astype("float32")], [blank])[0]


def run(device: OpenCLSession, case: Case) -> None:
    conv = case.conv()
    data, masks = data_of(case, conv), case.masks(conv)
    args = [data["poisoned"], conv.pack_weights(data["weight"]), conv.pack_bias(data["bias"]), conv.plan.tap_entries]
    args += planned(device, conv, masks)
    if case.live_in is not None:
        args.append(listed(device, case.live_in))
    if case.live_out is not None:
        args.append(listed(device, case.live_out))
    if case.zero_dead:
        args += [masks[key] for key in ("out_frames", "positions") if key in masks]
    if case.residual:
        args.append(data["residual"])
    blank = np.full((case.batch, *case.window.out, case.channels_out), np.nan, "float32")
    (found,) = device.call(conv3d_gather(conv), args, [blank])
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


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("positions", [None, (2, 1), (2, 5), (1, 1)])
def test_rows_are_listed_as_on_the_cpu(device, samples, positions):
    window = Window(2, (5, 9, 7), (5, 5, 4), (3, 3, 3), (1, 2, 2), (1, 1, 1))
    plan = block_plan(window, 16, samples, positions is not None, True, positions)
    inputs = [some(shape, 0.6, 7).astype("float32") for shape in plan.masks.values()] + list(plan.tables.values())
    found = device.call(plan_rows(plan), inputs, [np.zeros(shape, "int32") for shape in plan.shapes.values()])
    built = tvm.compile(tvm.IRModule({"plan": plan_rows_on_cpu(plan)}), target=CPU)
    expected = [tvm.runtime.tensor(np.zeros(shape, "int32")) for shape in plan.shapes.values()]
    built["plan"](*(tvm.runtime.tensor(array) for array in inputs), *expected)
    for name, got, want in zip(plan.shapes, found, expected, strict=True):
        assert name == "frame_slots" or np.array_equal(got, want.numpy()), name
