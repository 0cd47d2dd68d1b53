"""Few calls instead of many: small operators joined, lists without masks planned when compiled, one thread."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from torch.nn import functional
from tvm import relax, tirx
from tvm.relax.frontend.torch import from_exported_program

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.cost import tiles_filled
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
    known = joined.kernels
    assert all(known[name].parts for name in small)
    assert {part for name in small for part in known[name].parts} >= {"plan_channels", "compact_channels"}
    assert all(known[name].is_planner == ("plan_channels" in known[name].parts) for name in small)
    layers = [name for name in calls(apart) if name.startswith("conv3d_")]
    assert [name for name in calls(joined) if name.startswith("conv3d_")] == layers, "layers are calls of their own"
    compiled, before = machine_of(joined), machine_of(apart)
    for clip in some:
        with torch.no_grad():
            expected = network(clip).numpy()
        found = outputs(compiled, clip)[0]
        np.testing.assert_array_equal(found, outputs(before, clip)[0])
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def swapped(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def rolled(x: torch.Tensor) -> torch.Tensor:
    return torch.roll(x, (1, -1), (1, 2))


def padded(x: torch.Tensor) -> torch.Tensor:
    return functional.pad(x, (1, 2, 1, 0))


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Every other channel, and a constant added: operators without a kernel of their own."""
    return x[:, ::2] + 1


WIDE, LARGEST = nn.AvgPool3d(3, 1, 1), nn.MaxPool3d(3, 1, 1)
FLAT, PEAKS = nn.AvgPool2d((3, 2), 1), nn.MaxPool2d(2, 1)
LINE, PEAK = nn.AvgPool1d(3, 1, 1), nn.MaxPool1d(2, 1)
#: Small operators behind one another, by the rank of what they take; each kind is a chain of kernels that see tensors
#: as one dimension, or such a kernel between operators that do not.
CHAINS = {
    (2, 6, 4, 6, 5): [
        [LARGEST, LARGEST],
        [WIDE, WIDE, WIDE, LARGEST],
        [rolled, WIDE],
        [swapped, nn.MaxPool3d(2, 1), swapped, WIDE],
        [padded, nn.AvgPool3d(2), LARGEST],
        [LARGEST, shifted, LARGEST, rolled],
        [torch.sigmoid, nn.AvgPool3d((1, 2, 3), 1), torch.abs, LARGEST, padded],
    ],
    (3, 6, 7, 5): [
        [FLAT, FLAT],
        [PEAKS, PEAKS, PEAKS],
        [swapped, PEAKS],
        [padded, FLAT, rolled, PEAKS],
        [shifted, FLAT],
    ],
    (2, 8, 9): [[LINE, LINE], [PEAK, PEAK, LINE], [swapped, PEAK], [rolled, LINE, shifted, PEAK]],
}


class SideBySide(nn.Module):
    """Each chain applied to the same input."""

    def __init__(self, chains: list[list[Callable[[torch.Tensor], torch.Tensor]]]) -> None:
        super().__init__()
        self.chains = chains

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = []
        for chain in self.chains:
            y = x
            for step in chain:
                y = step(y)
            found.append(y)
        return tuple(found)


def hidden_reads(low: Lowered) -> list[str]:
    """Local memory of functions that they access through views, which TVM's reuse of memory overlooks."""
    found = []
    for _, func in low.mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            script = func.script()
            viewed = re.findall(r"decl_buffer\(.*data=(\w+)\.data", script)
            found += [name for name in viewed if f" {name} = T." in script]
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", list(CHAINS), ids=lambda shape: f"rank {len(shape)}")
def test_joined_kernels_keep_what_is_still_read(shape: tuple[int, ...], threads: int) -> None:
    network = SideBySide(CHAINS[shape]).eval()
    x = torch.randint(-9, 10, shape).float()
    low = lowered(network, x, threads)
    assert any(name.startswith("small") for name in calls(low))
    assert not hidden_reads(low)
    machine = machine_of(low, threads)
    poisoned = torch.full_like(x, torch.nan)
    for clip in (poisoned, x, poisoned, x.flip(0)):  # what one call leaves in memory, the next must not read
        found = outputs(machine, clip)
        if not clip.isnan().any():
            for one, wanted in zip(found, network(clip), strict=True):
                np.testing.assert_allclose(one, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_lists_and_masks_outlive_the_kernels_that_make_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planners joined with their readers: every list of a planner is a result of the joined function, read or not."""
    from dance_tvm.lowering import plan_lists

    monkeypatch.setattr(plan_lists, "MOST_CONSTANT_LISTS", 0)
    network, some = integers(Decides()), clips(2)
    low = lowered(network, some[0])
    assert not hidden_reads(low)
    machine = machine_of(low)
    outputs(machine, torch.full_like(some[0], torch.nan))
    for clip in some:
        with torch.no_grad():
            np.testing.assert_allclose(outputs(machine, clip)[0], network(clip).numpy(), rtol=1e-5)


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
    from dance_tvm.lowering import plan_lists

    monkeypatch.setattr(plan_lists, "MOST_CONSTANT_LISTS", 0)
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

    assert tiles_filled(window(4, 4, 4), 1, 1.0) == 1.0, "tiles of one row are always full"
    assert tiles_filled(window(4, 4, 4), 6, 1.0) < 0.5, "27 kinds of edges share 64 rows"
    assert tiles_filled(window(16, 56, 56), 6, 1.0) > 0.95
    assert tiles_filled(window(4, 4, 4), 6, 0.5) < tiles_filled(window(4, 4, 4), 6, 1.0)


class Ordered(nn.Module):
    """A small operator whose result is sorted, and what is taken of the order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.median(x * 2 + 1, 2, keepdim=True)[0]


def test_a_sort_among_small_operators_is_right() -> None:
    x = torch.randn(1, 3, 7, 2)
    np.testing.assert_allclose(outputs(machine_of(lowered(Ordered(), x)), x)[0], Ordered()(x), rtol=1e-6)
