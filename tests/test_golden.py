"""Kernels as they come out: a change of one shows as a change of its file.

`pytest tests/test_golden.py --refresh-golden` writes the files anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dance_tvm.schedules.cpu import channel_plan, mask_window
from dance_tvm.schedules.cpu.attention import Attention
from dance_tvm.schedules.cpu.carry_frames import Carry
from dance_tvm.schedules.cpu.compact_channels import CompactChannels
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.conv3d_kgs import KernelGroupConv
from dance_tvm.schedules.cpu.conv3d_line import LineConv
from dance_tvm.schedules.cpu.conv3d_transposed import TransposedConv
from dance_tvm.schedules.cpu.depthwise import DepthwiseConv, DepthwiseTile
from dance_tvm.schedules.cpu.moments import VectorReduction
from dance_tvm.schedules.cpu.norm import Norm
from dance_tvm.schedules.cpu.pointwise import PointwiseConv, PointwiseTile
from dance_tvm.schedules.cpu.pool3d import VectorPool
from dance_tvm.schedules.cpu.pool_planar import PlanarPool
from dance_tvm.schedules.cpu.product import Placed, Product, ProductTile
from dance_tvm.schedules.cpu.resample import Resample
from dance_tvm.schedules.cpu.row_plan import RowPlan
from dance_tvm.schedules.cpu.row_tiles import RowTile
from dance_tvm.schedules.cpu.tiles import Tile
from dance_tvm.schedules.cpu.weighted_rows import WeightedRows
from dance_tvm.schedules.cpu.winograd import WinogradConv
from dance_tvm.schedules.cpu.winograd_plan import WinogradPlan
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.gpu.conv3d_gather import BlockConv
from dance_tvm.schedules.gpu.conv3d_kgs import GroupConv
from dance_tvm.schedules.gpu.row_plan import block_plan
from dance_tvm.schedules.gpu.tiles import BlockTile
from dance_tvm.schedules.kernel import Kernel
from dance_tvm.schedules.strided import Strided

GOLDEN = Path(__file__).parent / "golden"
WINDOW = Window(1, (2, 4, 4), (2, 4, 4), (1, 3, 3), (1, 1, 1), (0, 1, 1))
TILE = Tile(mr=2, vectors=1, vector_floats=4, step=1, block_tiles=2, segment_taps=3)
PLAN = RowPlan(WINDOW, 2, 2, 3, 1, False, True)
BLOCK = BlockTile(32, 16, 8, 4, 4)
LAYER = (WINDOW, 8, 8, 1)
HEAD = [Placed((1, 10, 3, 2, 8), Strided(((2, 8),), *distances)) for distances in ((48, 1, 0), (1, 48, 16))]
PRODUCT = ProductTile(4, 2, 4, 1)

KERNELS: dict[str, Kernel] = {
    "conv3d_gather": GatherConv(*LAYER, TILE, PLAN, activation="relu", zero_dead="rows"),
    "conv3d_gather_io": GatherConv(*LAYER, TILE, PLAN, live_in=True, live_out=True, residual=True),
    "conv3d_kgs": KernelGroupConv(*LAYER, TILE, PLAN, columns=8, run=4),
    "conv3d_line": LineConv(WINDOW, 3, 8, RowTile(2, 1, 4, 1), activation="relu"),
    "conv3d_transposed": TransposedConv(
        Window(1, (3, 5, 7), (4, 6, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1)), (2, 2, 2), 4, 6, RowTile(2, 2, 4, 1)
    ),
    "conv3d_winograd": WinogradConv(*LAYER, TILE, WinogradPlan(WINDOW, (1, 2, 2), 2, 4), activation="relu"),
    "depthwise3d": DepthwiseConv(WINDOW, 8, 8, DepthwiseTile(2, 1, 4, 2), out_frames=True),
    "conv3d_pointwise": PointwiseConv(WINDOW, 8, 10, PointwiseTile(2, 2, 4, 1, 4), residual=True, activation="relu"),
    "pool3d_planar": PlanarPool(
        Window(1, (6, 8, 40), (3, 5, 20), (3, 2, 2), (2, 2, 2), (1, 1, 0)), 2, "max", vector_floats=4
    ),
    "pool3d_max": VectorPool(WINDOW, 8, "max", in_frames=True, vector_floats=4),
    "attention": Attention(
        2, 10, 10, 8, 8, *HEAD, HEAD[0], Placed((1, 10, 16), Strided(((2, 8),), 16, 1)), PRODUCT, 0.5
    ),
    "product": Product(2, 10, 8, 10, *HEAD, Placed((2, 10, 10), Strided(((2, 100),), 10, 1)), PRODUCT),
    "weighted_rows": WeightedRows(6, 5, 7, 2, 4),
    "resample": Resample(1, (2, 3, 4), (4, 3, 8), 6, (2, 1, 2), (True, False, True), 4),
    "norm": Norm((1, 32, 8), 1, 32, 8, 4, 1e-5, 4, affine="lanes", scales=8),
    "reduce_mean": VectorReduction((2, 16, 8), (2, 8), 2, 16, 8, "mean", vector_floats=4),
    "carry_frames": Carry(2, 1, 4, 4, 8, 4, ("positions",), ("positions", "channels")),
    "compact_channels": CompactChannels(WINDOW, 8, 1, True, 4),
    "plan_rows": PLAN,
    "plan_channels": channel_plan.ChannelPlan(1, 8),
    "mask_backward": mask_window.GrownMask(WINDOW, (1, 1, 4, 4), forward=False),
    "conv3d_gather_gpu": BlockConv(*LAYER, BLOCK, block_plan(WINDOW, 32), activation="relu"),
    "conv3d_kgs_gpu": GroupConv(*LAYER, BLOCK, block_plan(WINDOW, 32), columns=8),
    "plan_rows_gpu": block_plan(WINDOW, 32, out_frames=True),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_comes_out_as_before(name: str, request: pytest.FixtureRequest) -> None:
    text, path = KERNELS[name].primfunc().script(show_meta=False) + "\n", GOLDEN / f"{name}.txt"
    if request.config.getoption("--refresh-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} has another kernel: --refresh-golden writes it anew"


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_has_variables_that_double(name: str) -> None:
    """TVM's simplifier puts into a variable what it is made of: of six that each name the one before four times it
    made expressions of 4^6 parts, in 22 s."""
    parts: dict[str, int] = {}
    for line in KERNELS[name].primfunc().script(show_meta=False).splitlines():
        if found := re.match(r"\s*(\w+): T\.let\S* = (.*)", line):
            parts[found[1]] = sum(parts.get(word, 1) for word in re.findall(r"\w+", found[2]))
    assert max(parts.values()) < 3000


def test_every_file_is_of_a_kernel() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(KERNELS)
