"""Few calls instead of many: small operators joined, lists without masks planned when compiled, one thread."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax, tirx
from tvm.relax.frontend.torch import from_exported_program

from dance_tvm.compiler.pipeline import Lowered, Options, lower
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.winograd_choice import _tiles_filled
from dance_tvm.schedules.geometry import Window
from dance_tvm.transform import join_small
from tests.test_transform import integers, outputs


class Decides(nn.Module):
    """A convolution whose statistics decide, by a dozen small operators, which channels of it the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 16, 3, padding=1)
        self.head = nn.Linear(32, 2)
        self.second = nn.Conv3d(16, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        mean = x.mean(dim=(3, 4))
        seen = torch.cat([mean.mean(dim=2), (mean[:, :, 1:] - mean[:, :, :-1]).abs().sum(dim=2)], dim=1)
        group = (self.head(seen).sigmoid() > 0.5).to(x.dtype)
        mask = group[:, :, None].expand(-1, -1, 8).reshape(-1, 16)
        return self.second(x * mask[:, :, None, None, None])


def lowered(network: nn.Module, x: torch.Tensor, threads: int = 1) -> Lowered:
    mod = from_exported_program(torch.export.export(network, (x,)))
    return lower(mod, load_target("host"), Options(threads=threads, conv="direct"))


def machine_of(low: Lowered, threads: int = 1) -> relax.VirtualMachine:
    executable = tvm.compile(low.mod, target=load_target("host").tvm_target(threads))
    return relax.VirtualMachine(executable, tvm.cpu())


def calls(low: Lowered) -> list[str]:
    """Names of the kernels that ``main`` calls, in order."""
    found = []
    for block in low.mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.call_tir":
                found.append(value.args[0].name_hint)
    return found


def clips(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-3, 4, (1, 2, 4, 8, 8), generator=generator).float() for _ in range(count)]


def test_small_operators_become_few_calls_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, some = integers(Decides()), clips(4)
    joined = lowered(network, some[0])
    monkeypatch.setattr(join_small, "SMALL_ELEMENTS", -1)  # nothing is small
    apart = lowered(network, some[0])
    assert not any(name.startswith("small") for name in calls(apart))
    small = [name for name in calls(joined) if name.startswith("small")]
    assert small
    assert len(calls(joined)) <= len(calls(apart)) / 2
    layers = [name for name in calls(apart) if name.startswith("conv3d_")]
    assert [name for name in calls(joined) if name.startswith("conv3d_")] == layers, "layers are calls of their own"
    compiled, before = machine_of(joined), machine_of(apart)
    for clip in some:
        with torch.no_grad():
            expected = network(clip).numpy()
        found = outputs(compiled, clip)[0]
        np.testing.assert_array_equal(found, outputs(before, clip)[0])
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_groups_are_no_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    network, (clip,) = integers(Decides()), clips(1)
    few = calls(lowered(network, clip))
    monkeypatch.setattr(join_small, "MOST_JOINED", 3)
    several = lowered(network, clip)
    assert len(calls(several)) > len(few)
    with torch.no_grad():
        expected = network(clip).numpy()
    np.testing.assert_allclose(outputs(machine_of(several), clip)[0], expected, rtol=1e-5)


class Elementwise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(torch.sigmoid(x).sum(dim=1), dim=1)


def test_large_operators_stay_alone() -> None:
    assert not any(name.startswith("small") for name in calls(lowered(Elementwise(), torch.rand(2, 64, 64, 64))))


def test_one_thread_is_never_asked_to_wake_another() -> None:
    network, (clip,) = integers(Decides()), clips(1)

    def shares_out(threads: int) -> bool:
        functions = [func for _, func in lowered(network, clip, threads).mod.functions_items()]
        return any("T.parallel" in func.script() for func in functions if isinstance(func, tirx.PrimFunc))

    assert shares_out(2)
    assert not shares_out(1)


def test_lists_that_no_mask_thins_are_planned_when_compiled() -> None:
    network, (clip,) = integers(Decides()), clips(1)
    low = lowered(network, clip)
    script = low.mod.script()
    planners = re.findall(r"def (plan_\w+)", script)
    assert len([name for name in calls(low) if name.startswith("plan_rows")]) == 0, planners
    with torch.no_grad():
        expected = network(clip).numpy()
    np.testing.assert_allclose(outputs(machine_of(low), clip)[0], expected, rtol=1e-5)


def test_long_lists_are_planned_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from dance_tvm.lowering import lower_windows

    monkeypatch.setattr(lower_windows, "MOST_CONSTANT_LISTS", 0)
    monkeypatch.setattr(join_small, "SMALL_ELEMENTS", -1)
    network, (clip,) = integers(Decides()), clips(1)
    low = lowered(network, clip)
    assert [name for name in calls(low) if name.startswith("plan_rows")]
    with torch.no_grad():
        expected = network(clip).numpy()
    np.testing.assert_allclose(outputs(machine_of(low), clip)[0], expected, rtol=1e-5)


def test_rows_at_the_edges_fill_tiles_of_their_own() -> None:
    def window(*out: int) -> Window:
        return Window(1, out, out, (3, 3, 3), (1, 1, 1), (1, 1, 1))

    assert _tiles_filled(window(4, 4, 4), 1, 1.0) == 1.0, "tiles of one row are always full"
    assert _tiles_filled(window(4, 4, 4), 6, 1.0) < 0.5, "27 kinds of edges share 64 rows"
    assert _tiles_filled(window(16, 56, 56), 6, 1.0) > 0.95
    assert _tiles_filled(window(4, 4, 4), 6, 0.5) < _tiles_filled(window(4, 4, 4), 6, 1.0)
