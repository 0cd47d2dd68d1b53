"""What exported programs hold besides operators: types, open dimensions, state, regions, odd inputs and outputs."""

from __future__ import annotations

import re
import zipfile
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dance_tvm import build_network, import_model, open_device
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs

torch.manual_seed(0)
CLIP = torch.randn(1, 3, 4, 6, 6)


class Pair(NamedTuple):
    scores: torch.Tensor
    best: torch.Tensor


def saved(network, args, path, **options):
    """The network's file."""
    torch.export.save(torch.export.export(network, args, **options), path)
    return path


def run(built, *arrays):
    names = [tensor.name for tensor in built.artifact.manifest.inputs]
    with open_device("local") as device:
        return device.load(built.artifact).run(dict(zip(names, arrays, strict=True)))


class Mixed(nn.Module):
    """Inputs and outputs of every kind that a forward may have."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.register_buffer("threshold", torch.tensor([0.25, 0.5]))

    def forward(self, x, frames, on, gain, mask=None, mode="mean"):
        y = x.index_select(2, frames) * gain + self.table(frames).T[None, :, :, None, None]
        y = y if mask is None else y * mask
        y = torch.where(on, y, -y)
        return {"y": y, "none": mask, "input": x, "constant": self.threshold, "count": 3, "twice": (y, frames)}


def test_inputs_and_outputs_of_every_kind_are_built(tmp_path):
    args = (CLIP, torch.tensor([3, 0]), torch.tensor(True), torch.tensor(0.5), None, "mean")
    network = Mixed().eval()
    built = build_network(saved(network, args, tmp_path / "mixed.pt2"), tmp_path / "artifact", threads=1)
    wanted = network(*args)
    found = run(built, *(value.numpy() for value in args[:4]))
    expected = {
        "output_y": wanted["y"],
        "output_input": CLIP,
        "output_constant": network.threshold,
        "output_count": torch.tensor(3),
        "output_twice_0": wanted["y"],
        "output_twice_1": args[1],
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        assert found[name].dtype == value.detach().numpy().dtype
    inputs = {tensor.name: tensor for tensor in built.artifact.manifest.inputs}
    assert inputs["gain"].shape == []
    assert random_inputs(built.artifact.manifest.inputs)["frames"].max() <= 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_computed_in_float32(dtype, tmp_path):
    network = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    network(CLIP)
    network = network.eval().to(dtype)
    built = build_network(network, tmp_path / "artifact", example_inputs=(CLIP.to(dtype),), threads=1)
    numpy_dtype = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    found = run(built, CLIP.to(dtype).float().numpy().astype(numpy_dtype))["output"]
    assert found.dtype == numpy_dtype
    wanted = network.float()(CLIP.to(dtype).float()).detach()
    step = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    np.testing.assert_allclose(found.astype(np.float32), wanted.numpy(), rtol=step, atol=step)


def test_regions_in_files_are_taken(tmp_path):
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 2, 1)

        def forward(self, x):
            with torch.no_grad():
                y = self.frozen(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = self.head(y)
            return z.float() + self.head(y)

    imported = import_model(saved(Regions().eval(), (CLIP,), tmp_path / "regions.pt2"))
    assert [spec.dtype for spec in imported.outputs] == ["float32"]


def test_regions_inside_of_regions_are_taken_once_they_are_flat(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(3, 4, 3)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with torch.no_grad():
                    y = self.conv(x)
                return y.float() + self.conv(x)

    program = torch.export.export(Nested().eval(), (CLIP,))
    torch.export.save(program, tmp_path / "nested.pt2")
    with pytest.raises(DanceError, match=r"nested regions.*run_decompositions"):
        import_model(tmp_path / "nested.pt2")
    torch.export.save(program.run_decompositions({}), tmp_path / "flat.pt2")
    import_model(tmp_path / "flat.pt2")


def test_no_traceback_of_pytorchs_loader_is_printed(tmp_path, caplog, capfd):
    whole, torn = saved(nn.Conv3d(3, 4, 3).eval(), (CLIP,), tmp_path / "whole.pt2"), tmp_path / "torn.pt2"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(torn, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, re.sub(rb'"strides": \[[^\]]*\]', b'"strides": []', content))
    with pytest.raises(DanceError, match="cannot be read as an exported program"):
        import_model(torn)
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_an_operator_with_an_effect_is_named():
    class Inverse(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x @ x.mT + torch.eye(6))

    with pytest.raises(DanceError, match=r"linalg_inv_ex.*is not supported"):
        import_model(Inverse(), example_inputs=(torch.randn(2, 6, 6),))


def test_open_dimensions_are_fixed_by_shapes(tmp_path):
    network = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.Flatten(2)).eval()
    free = ({0: torch.export.Dim("batch", min=1, max=9), 2: torch.export.Dim.DYNAMIC},)
    path = saved(network, (torch.randn(2, 3, 4, 6, 6),), tmp_path / "open.pt2", dynamic_shapes=free)
    with pytest.raises(DanceError, match=r"dynamic shape .* --shape input=1x3x1x6x6"):
        import_model(path)
    imported = import_model(path, shapes={"input": (1, 3, 5, 6, 6)})
    assert imported.inputs[0].shape == (1, 3, 5, 6, 6)
    assert imported.outputs[0].shape == (1, 4, 180)
    for shape, told in (
        ((1, 3, 5, 6, 7), "does not fit"),
        ((1, 3), "does not fit"),
        ((99, 3, 5, 6, 6), "shapes given"),
    ):
        with pytest.raises(DanceError, match=told):
            import_model(path, shapes={"input": shape})
    with pytest.raises(DanceError, match="no input 'clip'"):
        import_model(path, shapes={"clip": (1, 3, 5, 6, 6)})


def test_the_input_is_left_as_it_was():
    class Normalised(nn.Module):
        def forward(self, x):
            x.sub_(0.4).div_(0.2)
            return F.relu(x)

    imported = import_model(Normalised(), example_inputs=(CLIP.clone(),))
    arrays = random_inputs(imported.inputs)
    before = {name: array.copy() for name, array in arrays.items()}
    once, twice = imported.reference(arrays), imported.reference(arrays)
    np.testing.assert_array_equal(once["output"], twice["output"])
    np.testing.assert_array_equal(arrays["x"], before["x"])


def test_results_that_are_named_tuples():
    class Best(nn.Module):
        def forward(self, x):
            return Pair(x.softmax(1), x.max(1)[1]), x.max(2)

    imported = import_model(Best(), example_inputs=(CLIP,))
    assert len(imported.outputs) == 4


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("earlier", torch.zeros(1, 3, 2, 6, 6))

    def forward(self, x):
        both = torch.cat([self.earlier, x], 2)
        self.earlier.copy_(both[:, :, -2:])
        return both.mean(2)


def _with_training(part):
    network = nn.Sequential(nn.Conv3d(3, 4, 1), part)
    network.train()
    return network


REFUSED = {
    "state": (Stream(), "keeps state.*'earlier'"),
    "batch norm in training": (
        _with_training(nn.BatchNorm3d(4)),
        r"'1' \(batch_norm\) is in training mode: call .eval\(\)",
    ),
    "dropout in training": (_with_training(nn.Dropout3d(0.3)), "training mode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_training_does_is_refused(case, tmp_path):
    network, told = REFUSED[case]
    path = saved(network, (CLIP,), tmp_path / "network.pt2")
    with pytest.raises(DanceError, match=told):
        import_model(path)


class Tail(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.frames, self.function = nn.Conv3d(3, 2, 1), function
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.function(self, self.frames(x))


def _counted(network, x):
    network.seen += x.mean()
    return x * network.seen


OBSTACLES = {
    r"aten.mode.default of layer 'mode' is not supported": lambda network, x: x.mode(-1)[0],
    r"aten.rand_like.default of layer 'rand_like' is not supported": lambda network, x: x + torch.rand_like(x),
    r"aten.fft_rfft.default of layer 'fft_rfft' makes complex numbers": lambda network, x: torch.fft.rfft(x).abs(),
    r"changes the buffer 'seen'": _counted,
}


@pytest.mark.parametrize("told", OBSTACLES)
def test_what_nothing_mends_is_refused_before_the_program_is_taken_apart(told, monkeypatch):
    program = torch.export.export(Tail(OBSTACLES[told]), (CLIP,))
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    with pytest.raises(DanceError, match=told):
        import_model(program)


def test_training_mode_that_changes_nothing_is_taken(tmp_path):
    network = _with_training(nn.Sequential(nn.Dropout(0.0), nn.InstanceNorm3d(4), nn.ReLU()))
    import_model(saved(network, (CLIP,), tmp_path / "network.pt2"))


def test_a_size_that_depends_on_values_is_told_with_its_operator():
    class Chosen(nn.Module):
        def forward(self, x, count):
            size = count.item()
            torch._check(size >= 1)
            torch._check(size <= 4)
            return torch.arange(size, dtype=x.dtype).sum() + x

    with pytest.raises(DanceError, match=r"arange.*depends on the input's values"):
        import_model(Chosen(), example_inputs=(torch.ones(3), torch.tensor(3)))
