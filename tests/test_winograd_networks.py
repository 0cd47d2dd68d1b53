"""Winograd kernels inside networks: chosen with a reason, under masks, never where sums must stay as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from test_transform import SHAPES, Masked, executed, integers, masks, outputs
from torch import nn
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu import cost, winograd_space
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.row_plan import RowPlan
from dance_tvm.schedules.cpu.tiles import Machine, default_tile
from dance_tvm.schedules.cpu.winograd import WinogradConv
from dance_tvm.schedules.cpu.winograd_choice import choose
from dance_tvm.schedules.cpu.winograd_space import NEVER_SLOWER
from dance_tvm.schedules.geometry import Window

SERVER = Machine(8, 16, 32768, 524288, True, 33554432, 100.0, 25.0)


def lowered(module: nn.Module, *inputs: torch.Tensor, **options: str) -> Lowered:
    mod = from_exported_program(torch.export.export(module, inputs))
    return lower(mod, load_target("host"), Options(threads=2, **options))


def machine_for(network: Lowered) -> relax.VirtualMachine:
    return relax.VirtualMachine(tvm.compile(network.mod, target=load_target("host").tvm_target(2)), tvm.cpu())


@pytest.mark.parametrize("axis", SHAPES)
def test_masked_networks_agree_with_pytorch(axis: str) -> None:
    module = integers(Masked())
    x = torch.randint(-3, 4, (2, 4, 4, 12, 10), generator=torch.Generator().manual_seed(0)).float()
    network = lowered(module, x, masks(SHAPES[axis])[0], conv="winograd")
    assert all(layer.kernel.startswith("conv3d_winograd") for layer in network.layers)
    assert all(layer.scratch_bytes > 0 for layer in network.layers)
    machine = machine_for(network)
    work = []
    for mask in masks(SHAPES[axis]):
        with torch.no_grad():
            expected = module.double()(x.double(), mask.double()).numpy()
        module.float()
        got = outputs(machine, x, mask)[0]
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        work.append(sum(executed(machine, x, mask).values()))
    some, everything, nothing = work
    assert nothing < everything
    assert nothing <= some <= everything


def test_exact_numerics_rule_winograd_out() -> None:
    x, mask = torch.zeros(2, 4, 4, 6, 5), torch.ones(2, 1, 4, 1, 1)
    network = lowered(integers(Masked()), x, mask, conv="winograd", numerics="exact")
    assert all(layer.kernel.startswith(("conv3d_gather", "conv3d_line")) for layer in network.layers)


def gather(channels_in: int, channels_out: int, size: tuple[int, int, int], **changes: object) -> GatherConv:
    window = Window(1, size, size, (3, 3, 3), padding=(1, 1, 1))
    window = replace(window, **{key: value for key, value in changes.items() if hasattr(window, key)})
    tile = default_tile(SERVER, window, channels_in, channels_out)
    plan = RowPlan(window, tile.mr, tile.block_tiles, tile.segment_taps, out_frames=bool(changes.get("out_frames")))
    return GatherConv(window, channels_in, channels_out, int(changes.get("groups", 1)), tile, plan)


def test_large_layers_are_transformed_and_the_reason_gives_both_times() -> None:
    conv = gather(256, 256, (8, 28, 28))
    choice = choose(conv, SERVER, 1)
    assert isinstance(choice.kernel, WinogradConv)
    assert choice.kernel.predict(SERVER, 1) < 0.5 * conv.predict(SERVER, 1)
    assert "predicted, direct" in choice.reason
    assert "scratch" in choice.reason
    assert choice.kernel.scratch_bytes < SERVER.l3 * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"groups": 2}, "grouped"),
        ({"kernel": (1, 1, 1), "padding": (0, 0, 0)}, "no taps to share"),
        ({"stride": (1, 2, 2), "out": (4, 4, 4)}, "not 3×3"),
        ({"kernel": (5, 1, 1), "padding": (2, 0, 0)}, "no axis of kernel 5×1×1"),
    ],
)
def test_what_cannot_be_transformed_stays_direct_and_says_why(changes: dict[str, object], reason: str) -> None:
    choice = choose(gather(16, 16, (4, 8, 8), **changes), SERVER, 1, "winograd")
    assert isinstance(choice.kernel, GatherConv)
    assert reason in choice.reason


def test_thin_layers_stay_direct() -> None:
    choice = choose(gather(1, 4, (4, 8, 8)), SERVER, 1)
    assert isinstance(choice.kernel, GatherConv)
    assert choice.reason.startswith("direct: Winograd")


def test_masks_never_make_a_layer_slower_than_without_them(monkeypatch) -> None:
    """Four frames transformed together save most where all are read; where few are, frames are left out one by one.

    Whatever masks are expected, the kernel keeps pace with the dense layer's where they leave everything.
    """
    masked, dense = gather(256, 256, (8, 28, 28), out_frames=True), gather(256, 256, (8, 28, 28))
    chosen = choose(masked, SERVER, 1).kernel
    monkeypatch.setattr(cost, "ASSUMED_LEFT", (1.0,))
    fastest = choose(dense, SERVER, 1).kernel.predict(SERVER, 1)
    assert chosen.predict(SERVER, 1) <= NEVER_SLOWER * fastest
    monkeypatch.setattr(cost, "ASSUMED_LEFT", (0.1,))
    thin = choose(masked, SERVER, 1).kernel
    assert thin.predict(SERVER, 1, [1.0]) <= NEVER_SLOWER * fastest
    monkeypatch.setattr(winograd_space, "NEVER_SLOWER", 10.0)
    assert choose(masked, SERVER, 1).kernel.plan.m[0] == 1
