"""The check of a build: what it lets pass, what it refuses, what it tries and what it tells."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dance_tvm import build
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.check import check_artifact
from dance_tvm.compiler.check_inputs import CLOSE, MIXED, STATES, USUAL, check_inputs
from dance_tvm.core.agreement import LEAST_SCALE, TOLERANCE, difference
from dance_tvm.core.cli import start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.frontend import import_model
from dance_tvm.frontend.interface import TensorSpec

CLIP = torch.zeros(1, 2, 6, 8, 8)


# -- the measure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e9])
def test_differences_are_shares_of_the_largest_value(scale):
    wanted = scale * np.array([0.5, -2.0, 1.0])
    assert difference(wanted + scale * np.array([0, 0, 0.02]), wanted) == pytest.approx(0.01)
    assert difference(wanted, wanted) == 0


def test_zeros_have_a_scale_of_their_own():
    assert difference(np.array([1e-20, 0.0]), np.zeros(2)) == pytest.approx(1e-20 / LEAST_SCALE)
    assert difference(np.zeros(2), np.zeros(2)) == 0


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([1.0, math.inf, 3.0], [1.0, math.inf, 2.0]),
        ([1.0, -math.inf], [1.0, math.inf]),
        ([1.0, 5.0], [1.0, math.inf]),
        ([1.0, math.inf], [1.0, math.nan]),
        ([1.0, math.nan], [1.0, 2.0]),
        ([math.nan, 1.0], [1.0, math.nan]),
        ([[1.0, 2.0]], [1.0, 2.0]),
    ],
)
def test_what_never_agrees(found, wanted):
    assert difference(np.array(found), np.array(wanted)) > 0.1


def test_infinities_and_nan_agree_in_place():
    values = np.array([math.inf, -math.inf, math.nan, 1.0])
    assert difference(values + np.array([0, 0, 0, 1e-3]), values) == pytest.approx(1e-3)


@pytest.mark.parametrize("fill", [-1e9, 65504.0, float(np.finfo(np.float32).min)])
def test_a_fill_does_not_hide_the_other_values(fill):
    scores = np.array([0.5, fill, -2.0, fill, 1.0])
    assert difference(scores + np.array([0, 0, 0, 0, 0.02]), scores) == pytest.approx(0.01)
    assert difference(scores * np.array([1, 1 + 1e-7, 1, 1, 1]), scores) == pytest.approx(1e-7)


def test_a_value_that_is_large_alone_sets_the_scale():
    values = np.array([4e5, 1.0, -2.0])
    assert difference(values + np.array([0, 0.4, 0]), values) == pytest.approx(1e-6)


def test_a_float_is_no_whole_number():
    assert difference(np.array([1.0, 2.0]), np.array([1, 2])) == math.inf
    assert difference(np.array([True, False]), np.array([1.0, 0.0])) == math.inf


def test_whole_numbers_agree_or_do_not():
    assert difference(np.array([70_001, 3, 4, 5]), np.array([70_000, 3, 4, 5])) == 0.25
    assert difference(np.array([True, False]), np.array([True, False])) == 0


# -- what is refused ---------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """Outputs that a careless check would not look at closely; ``changed`` says which of them is another function."""

    def __init__(self, changed: str = "") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.changed = nn.Conv3d(2, 8, 3, padding=1), changed
        self.register_buffer("divisor", torch.ones(8, 1, 1, 1).index_fill(0, torch.tensor([3]), 0.0))

    def forward(self, clip):
        y = self.conv(clip)
        gate = (clip.mean((1, 3, 4), keepdim=True) > 0.5).float()  # noise is never over, an offset clip always
        off = {name: float(name == self.changed) for name in ("small", "beside infinity", "offset", "not a number")}
        return (
            y * (1e-7 + 1e-10 * off["small"]),
            (y + 1e-2 * off["beside infinity"]) / self.divisor,
            torch.relu(clip - 50) * (1 + 1e-2 * off["offset"]),
            torch.sqrt(y + 1e-1 * off["not a number"]),
            y * (torch.roll(gate, 1, 2) if self.changed == "mixed mask" else gate),
        )


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return build_network(Several(), tmp_path_factory.mktemp("check") / "several", example_inputs=(CLIP,)).artifact


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("small", "output_0 on the normal input"),
        ("beside infinity", "output_1 on the normal input"),
        ("offset", "output_2 on the offset input"),
        ("not a number", "output_3 on the normal input"),
        ("mixed mask", "output_4 on the"),
    ],
)
def test_an_artifact_of_another_function_is_refused(several, changed, told):
    other = import_model(Several(changed), example_inputs=(CLIP,))
    with pytest.raises(DanceError, match=told):
        check_artifact(several, other)


def test_a_source_that_is_off_its_own_float64_is_no_reason_to_refuse(several):
    imported = import_model(Several(), example_inputs=(CLIP,))

    def careless(arrays):
        return {name: value + np.float32(4e-4) * np.abs(value).max() for name, value in right(arrays).items()}

    def right(arrays):
        found = imported.reference(arrays)
        return {name: value if name == "output_1" else value.astype(np.float64) for name, value in found.items()}

    off = replace(imported, reference=lambda arrays: {**right(arrays), "output_2": careless(arrays)["output_2"]})
    with pytest.raises(DanceError, match="output_2"):
        check_artifact(several, off)
    check = check_artifact(several, replace(off, exact=lambda arrays: list(right(arrays).values())))
    doubted = [one for one in check.outputs if one.difference > TOLERANCE]
    assert {one.output for one in doubted} == {"output_2"}
    assert all(one.error < TOLERANCE < one.source_error < one.allowed for one in doubted)
    with pytest.raises(DanceError, match="output_2"):
        check_artifact(several, replace(off, exact=lambda arrays: list(careless(arrays).values())))


def test_the_manifest_tells_each_output_on_each_input(several):
    check = several.manifest.check
    assert check.inputs[:3] == ["normal", "offset", "varied"]
    assert {(one.output, one.input) for one in check.outputs} == {
        (f"output_{index}", name) for index in range(5) for name in check.inputs
    }
    assert all(one.difference <= one.allowed for one in check.outputs)
    assert check.masks == 1
    assert check.uniform == []


class Chaotic(nn.Module):
    """Rounding alone decides much of the output, in whatever order the products are summed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.conv = nn.Conv3d(2, 8, 3, padding=1)

    def forward(self, clip):
        return torch.sin(self.conv(clip) * 2e3)


def test_a_chaotic_network_is_held_to_its_own_rounding(tmp_path):
    check = build_network(Chaotic(), tmp_path / "out", example_inputs=(CLIP,), check=True).artifact.manifest.check
    doubted = [one for one in check.outputs if one.error is not None]
    assert doubted
    for one in doubted:
        assert one.allowed == pytest.approx(max(TOLERANCE, 16 * one.source_error))
        assert one.error < one.allowed


def test_a_norm_of_a_constant_volume_is_held_to_its_rounding(tmp_path):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm3d(3)

        def forward(self, clip):
            return self.norm(clip * (clip.mean() > 1e6).float() - 100) + 1

    check = build_network(
        Flat(), tmp_path / "out", example_inputs=(torch.zeros(1, 3, 3, 5, 7),)
    ).artifact.manifest.check
    assert check.status == "passed"
    assert max(one.difference for one in check.outputs) > TOLERANCE


class Undecided(nn.Module):
    """The root of rounding alone: NaN here, a small number there."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.norm, self.other = nn.InstanceNorm3d(3), other

    def forward(self, clip):
        y = torch.sqrt(self.norm(clip * (clip.mean() > 1e6).float() + 300))
        return (y, clip * 2) if self.other else y


def test_what_rounding_alone_decides_is_told(tmp_path):
    artifact = build_network(
        Undecided(other=True), tmp_path / "out", example_inputs=(torch.zeros(1, 3, 3, 5, 7),)
    ).artifact
    check = artifact.manifest.check
    assert (check.status, check.unclear) == ("passed", ["output_0"])
    assert {one.output for one in check.outputs} == {"output_1"}
    assert "rounding alone could make anything of output_0" in check.lines()[-1]
    assert "Infinity" not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_check_that_compared_nothing_was_none(tmp_path):
    built = build_network(Undecided(other=False), tmp_path / "out", example_inputs=(torch.zeros(1, 3, 3, 5, 7),))
    assert built.artifact.manifest.check.status == "not run"


# -- what is tried -----------------------------------------------------------------------------------------------------


def spec(dtype: str, bounds: tuple[float, float] | None = None) -> TensorSpec:
    return TensorSpec("x", (2, 3, 8, 9, 9), dtype, "", bounds)


@pytest.mark.parametrize("kind", ["normal", "offset", "ranged", "varied", "picture"])
@pytest.mark.parametrize(
    ("dtype", "bounds", "low", "high"),
    [("uint8", None, 0, 255), ("int64", None, 0, 9), ("int32", (2, 4), 2, 4), ("bool", None, 0, 1)],
)
def test_inputs_of_whole_numbers_lie_in_their_range(kind, dtype, bounds, low, high):
    array = random_inputs([spec(dtype, bounds)], 3, kind)["x"]
    assert str(array.dtype) == dtype
    assert low <= array.min() < array.max() <= high


def test_a_ranged_input_fills_the_declared_range():
    assert random_inputs([spec("float32", (-1.0, 1.0))], 0, "offset")["x"].mean() == pytest.approx(100, abs=1)
    array = random_inputs([spec("float32", (-1.0, 1.0))], 0, "ranged")["x"]
    assert -1 <= array.min() < -0.9 < 0.9 < array.max() <= 1


def test_a_network_that_declares_its_range_is_tried_there():
    imported = import_model("dance-c3d-mini")
    assert [one.range for one in imported.inputs] == [(0.0, 1.0)]
    tried = check_inputs(imported).arrays
    assert list(tried)[:4] == ["normal", "offset", "varied", "ranged"]
    (array,) = tried["ranged"].values()
    assert 0 <= array.min() < 0.01 < 0.99 < array.max() <= 1


class Gated(nn.Module):
    """Masks of frames, positions and channels that noise leaves off, and one that nothing turns on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv3d(2, 8, 3, padding=1)

    def forward(self, clip):
        y = self.conv(clip)
        frames = (clip.mean((1, 3, 4), keepdim=True) > 0.4).float()
        positions = (clip.mean((1, 2), keepdim=True) > 0.7).float()
        channels = (y.mean((2, 3, 4), keepdim=True) > y.mean() + 0.3).float()
        return y * frames * positions * channels * (clip.sum() < 1e9).float() * (y > 1e9).float()


def test_inputs_are_sought_that_turn_every_mask_on_and_off():
    found = check_inputs(import_model(Gated(), example_inputs=(CLIP,)))
    assert len(found.masks) == 4
    assert len(found.uniform) == 1


# -- what the user says ------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, clip):
        return clip * 0.25


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "scaled.pt2"
    torch.export.save(torch.export.export(Scaled(), (CLIP,)), path)
    return path


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        start(build.app, "test", [str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"clip": np.zeros((1, 2, 6, 8, 9), "float32")}, "clip has shape (1, 2, 6, 8, 9), and"),
        ({"clip": np.zeros((1, 2, 6, 8, 8), "float64")}, "clip has type float64, and"),
        ({"clip": CLIP.numpy(), "more": np.zeros(2)}, "has unknown more"),
    ],
)
def test_given_inputs_that_do_not_fit(capsys, scaled, tmp_path, arrays, told):
    np.savez(tmp_path / "real.npz", **arrays)
    words = ["--model", scaled, "--out", tmp_path / "out", "--check-inputs", tmp_path / "real.npz"]
    assert command(*words) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_given_inputs_are_tried_and_told(capsys, scaled, tmp_path):
    np.savez(tmp_path / "real.npz", clip=CLIP.numpy() + 7)
    words = ["--model", scaled, "--out", tmp_path / "out", "--check-inputs", tmp_path / "real.npz", "--json"]
    assert command(*words) == 0
    tried = json.loads(capsys.readouterr().out)["manifest"]["check"]["inputs"]
    assert [name.split(" ")[0] for name in tried] == ["normal", "offset", "varied", "real.npz"]


def test_an_artifact_that_is_kept_is_checked_once(scaled, tmp_path):
    out = tmp_path / "out"
    first = build_network(scaled, out, check=False).artifact
    library = (out / "model.so").read_bytes()
    kept = build_network(scaled, out, reuse=True)
    assert "compile" not in kept.seconds
    assert (first.manifest.check.status, kept.artifact.manifest.check.status) == ("not run", "passed")
    assert (out / "model.so").read_bytes() == library
    assert kept.artifact.reference()
    assert "check" not in build_network(scaled, out, reuse=True).seconds
    np.savez(tmp_path / "real.npz", clip=CLIP.numpy() + 7)
    for _ in range(2):  # the second time it has been tried
        again = build_network(scaled, out, reuse=True, check_inputs=[tmp_path / "real.npz"])
        assert len(again.artifact.manifest.check.inputs) == 4
    assert "check" not in again.seconds


class OneFrame(nn.Module):
    """Keeps the frame with the largest mean of a clip alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv3d(2, 4, 3, padding=1)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        energy = clip.mean((1, 3, 4), keepdim=True)
        kept = (energy >= energy.amax(2, keepdim=True)).float()
        return self.conv(clip * kept)


def test_entries_of_masks_are_on_and_off_in_turn():
    """Each input keeps one of twelve frames: the usual inputs and a few mixed ones would leave most of them out."""
    imported = import_model(OneFrame().eval(), example_inputs=(torch.randn(1, 2, 12, 6, 6),))
    tried = check_inputs(imported)
    kept = {int(arrays["clip"].mean((0, 1, 3, 4)).argmax()) for arrays in tried.arrays.values()}
    assert len(kept) >= 8
    assert len(tried.arrays) <= len(USUAL) + MIXED + STATES + 2 * CLOSE


class Bright(nn.Module):
    """Keeps the frames whose mean is above a threshold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv3d(2, 4, 3, padding=1)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.conv(clip * (clip.mean((1, 3, 4), keepdim=True) > 0.2).float())


def test_decisions_are_tried_on_either_side():
    """A threshold moved by a hundredth of what scores differ by shows on inputs beside it alone."""
    tried = check_inputs(import_model(Bright().eval(), example_inputs=(torch.randn(1, 2, 6, 8, 8),)))
    low, high = (tried.arrays[f"close {number}"]["clip"] for number in (1, 2))
    means = [array.mean((0, 1, 3, 4)) for array in (low, high)]
    changed = (means[0] > 0.2) != (means[1] > 0.2)
    assert changed.sum() == 1
    assert max(abs(mean[changed][0] - 0.2) for mean in means) < 0.01
    assert min(abs(mean[changed][0] - 0.2) for mean in means) > 1e-5


def test_an_output_of_another_type_is_refused(tmp_path):
    """Whole numbers of 32 bits compare as equal to those of 64, but who reads the memory sees others."""
    from dance_tvm.compiler import check

    class Places(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(1)

    built = build_network(Places(), tmp_path / "a", example_inputs=(torch.randn(2, 5),), threads=1, check=True)
    spec = built.artifact.manifest.outputs[0]
    narrow = {spec.name: np.zeros(spec.shape, "int32")}
    with pytest.raises(DanceError, match="is of int32, not int64"):
        check._require_types(built.artifact.manifest, narrow)
