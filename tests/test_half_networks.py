"""Networks in half precision, on the emulated device and on this machine where it multiplies halves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dance_tvm import DanceError, open_device
from dance_tvm.artifact.layers import LayerInfo
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.magnitudes import measured_on
from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.core.agreement import HALF_ON_PROCESSOR
from dance_tvm.core.errors import DanceWarning
from dance_tvm.frontend import import_model
from dance_tvm.ir.graph import Graph, is_tensor
from dance_tvm.machines.target import load_target


class EveryKind(nn.Module):
    """Convolutions direct, pruned, depthwise and under masks, norms, pools, a gate of a layer's own, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv3d(3, 24, (1, 3, 3), padding=(0, 1, 1)), nn.InstanceNorm3d(24, affine=True)
        self.depthwise, self.point = nn.Conv3d(24, 24, 3, padding=1, groups=24), nn.Conv3d(24, 24, 1)
        self.squeeze, self.excite = nn.Conv3d(24, 8, 1), nn.Conv3d(8, 24, 1)
        self.project = nn.Conv3d(24, 24, 1)
        self.pruned, self.masked = nn.Conv3d(24, 16, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1)
        self.twice, self.apart = nn.ConvTranspose3d(16, 9, 2, 2), nn.ConvTranspose3d(16, 9, 3, 2, 1, 1)
        self.head = nn.Linear(9, 5)
        keep = torch.rand(16 // 8, 24 // 8, 3, 3, 3) < 0.4
        self.pruned.weight.data *= keep.repeat_interleave(8, 0).repeat_interleave(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = self.point(nn.functional.silu(self.norm(self.depthwise(x)) + x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3, 4), keepdim=True)))))
        y = nn.functional.max_pool3d(self.project(nn.functional.silu(y * gate)), (1, 2, 2))
        y = torch.relu(self.pruned(y))
        frames = (y.mean((1, 3, 4), keepdim=True) > y.mean((1, 2, 3, 4), keepdim=True)).float()
        channels = (y.mean((2, 3, 4), keepdim=True) > y.mean((1, 2, 3, 4), keepdim=True)).float()
        y = self.masked(y * frames * channels) * channels
        return self.head((self.twice(y) + self.apart(y)).mean((2, 3, 4)))


@pytest.mark.parametrize("target", [pytest.param("snapdragon", marks=pytest.mark.device), "host"])
def test_a_network_of_every_kind_of_layer_agrees_with_its_source(tmp_path, target):
    from dance_tvm.device import why_no_emulator

    if target != "host" and (reason := why_no_emulator()):
        pytest.skip(f"no emulated device: {reason}")
    if not load_target(target).vector.fp16:
        pytest.skip(f"{target} does not multiply halves")
    torch.manual_seed(0)
    network, clip = EveryKind().eval(), torch.rand(1, 3, 4, 8, 8)
    options = Options(threads=1, dtype="float16", conv="direct")
    manifest = build_network(
        network, tmp_path / "half", target=target, example_inputs=(clip,), options=options, check=True
    ).artifact.manifest
    assert (manifest.check.status, manifest.tolerance) == ("passed", HALF_ON_PROCESSOR)
    kernels = {layer.kernel.split("_f16")[0] for layer in manifest.layers}
    direct = {"conv3d_gather_io", "conv3d_line", "conv3d_pointwise", "conv3d_pointwise_g", "conv3d_kgs"}
    assert direct | {"depthwise3d", "pool3d_max", "conv3d_transposed"} <= kernels, kernels


class Curves(nn.Module):
    """The functions that take fewer terms where their results are rounded to half precision, behind a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(8, 8, 1, bias=False) for _ in range(3))
        for layer in self.layers:
            layer.weight.data = torch.eye(8).reshape(8, 8, 1, 1, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        curves = (torch.sigmoid, nn.functional.silu, torch.tanh)
        return tuple(curve(layer(x)) for curve, layer in zip(curves, self.layers, strict=True))


@pytest.mark.device
def test_every_half_on_an_arm_processor(tmp_path):
    """Of each number, infinities and NaN among them: the estimates that stand in the place of divisions there."""
    from dance_tvm.device import open_device, why_no_emulator

    if reason := why_no_emulator():
        pytest.skip(f"no emulated device: {reason}")
    # One channel of eight: the others are zeros, of which a product with an infinity is NaN.
    halves = np.zeros((1, 8, 1, 256, 256), "float16")
    halves[0, 0] = np.arange(1 << 16, dtype=np.uint16).view("float16").reshape(1, 256, 256)
    clip, network = torch.from_numpy(halves.astype("float32")), Curves().eval()
    options = Options(threads=1, dtype="float16")
    built = build_network(
        network, tmp_path / "curves", target="snapdragon", example_inputs=(clip,), options=options, check=False
    )
    with open_device("emulator") as device:
        found = list(device.load(built.artifact).run({"x": clip.numpy()}).values())
    for each, exact in zip(found, network.double()(clip.double()), strict=True):
        one, wanted = each[0, 0].astype("float64"), exact[0, 0].detach().numpy()
        rounded = wanted.astype("float16")
        np.testing.assert_array_equal(np.isnan(one), np.isnan(rounded))
        finite = np.isfinite(rounded)
        units = np.abs(one[finite] - wanted[finite]) / np.spacing(np.abs(rounded[finite])).astype("float64")
        assert units.max() < 0.71


class Loud(nn.Module):
    """Its middle layer's results, a million, are beyond half precision; the last one brings them back."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.loud, self.back = (nn.Conv3d(8, 8, 1, bias=False) for _ in range(3))
        for layer, scale in ((self.quiet, 1.0), (self.loud, 1e6), (self.back, 1e-6)):
            layer.weight.data = torch.eye(8).reshape(8, 8, 1, 1, 1) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.loud(self.quiet(x)))


def lowered_layers(network: nn.Module, *clips: torch.Tensor) -> dict[str, LayerInfo]:
    """The layers of a network lowered for a phone in half precision, measured on the usual inputs and ``clips``."""
    imported = import_model(network.eval(), example_inputs=(torch.zeros(1, 8, 2, 4, 4),))
    (name,) = (each.name for each in imported.inputs)
    measure = measured_on(imported, [{name: clip.numpy()} for clip in clips])
    options = Options(threads=1, dtype="float16")
    return {each.name: each for each in lower(imported.mod, load_target("snapdragon"), options, measure=measure).layers}


def test_layers_beyond_the_range_stay_in_single_precision_and_say_so():
    layers = lowered_layers(Loud())
    assert "_f16_" in layers["quiet"].kernel
    for name, what in (("loud", "its result reaches"), ("back", "what it reads reaches")):
        assert "_f32_" in layers[name].kernel
        assert what in layers[name].reason


def test_real_inputs_tell_of_ranges_that_random_ones_do_not_reach():
    network = nn.Sequential(nn.Conv3d(8, 8, 1))
    (usual,) = lowered_layers(network).values()
    (calibrated,) = lowered_layers(network, torch.full((1, 8, 2, 4, 4), 4e4)).values()
    assert "_f16_" in usual.kernel
    assert "_f32_" in calibrated.kernel
    assert "what it reads reaches 4e+04" in calibrated.reason


class Shifted(nn.Module):
    """Frames moved by one, zeros and whole numbers in the place of what is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv3d(8, 8, 1), nn.Conv3d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        moved = torch.cat([torch.zeros_like(x[:, :4, :1]), x[:, :4, :-1]], 2)
        return self.behind(torch.cat([moved, x[:, 4:]], 1))


def test_what_only_moves_moves_as_it_is_stored():
    imported = import_model(Shifted().eval(), example_inputs=(torch.zeros(1, 8, 2, 4, 4),))
    lowered = lower(imported.mod, load_target("snapdragon"), Options(threads=1, dtype="float16"))
    types = [str(var.ty.dtype) for var in Graph.of(lowered.mod["main"]).order if is_tensor(var)]
    first, last = types.index("float16"), len(types) - 1 - types[::-1].index("float16")
    assert "float32" not in types[first:last], "something was widened on the way"


@pytest.mark.parametrize(
    ("fp16", "why"),
    [(True, "half precision has to be checked"), (False, "snapdragon does not compute in half precision")],
)
def test_auto_says_why_it_takes_single_precision(tmp_path, fp16, why):
    phone = load_target("snapdragon")
    phone = phone.model_copy(update={"vector": phone.vector.model_copy(update={"fp16": fp16})})
    options, clip = Options(threads=1, dtype="auto"), torch.zeros(1, 8, 2, 4, 4)
    with pytest.warns(DanceWarning, match=f"^--dtype auto takes float32: {why}$"):
        built = build_network(
            Loud().eval(), tmp_path / "auto", target=phone, example_inputs=(clip,), options=options, check=False
        )
    assert all("_f32_" in layer.kernel for layer in built.artifact.manifest.layers)
    assert "dtype" not in built.artifact.manifest.options


class Sharp(nn.Module):
    """Softmax of scores near 100, which half precision keeps in steps of 1/16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(8, 8, 1)
        self.layer.weight.data *= 100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.layer(x).flatten(2), 2)


@pytest.mark.device
def test_auto_takes_single_precision_where_half_has_too_few_digits(tmp_path):
    from dance_tvm.device import why_no_emulator

    if reason := why_no_emulator():
        pytest.skip(f"no emulated device: {reason}")
    torch.manual_seed(0)
    given = {"target": "snapdragon", "example_inputs": (torch.zeros(1, 8, 2, 4, 4),)}
    with pytest.warns(DanceWarning, match="in half precision Sharp as built for snapdragon differs") as told:
        built = build_network(
            Sharp().eval(), tmp_path / "auto", options=Options(threads=1, dtype="auto"), check=True, **given
        )
    assert "debug-dump" not in str(told[0].message)
    assert built.artifact.manifest.check.status == "passed"
    assert all("_f32_" in layer.kernel for layer in built.artifact.manifest.layers)


def test_inputs_and_outputs_are_in_half_precision_where_asked_for(tmp_path):
    network, options = nn.Sequential(nn.Conv3d(3, 8, 1), nn.ReLU()).eval(), Options(threads=1, io="float16")
    clip = torch.rand(1, 3, 2, 6, 6)
    built = build_network(network, tmp_path / "io", example_inputs=(clip,), options=options, check=True)
    manifest = built.artifact.manifest
    assert manifest.check.status == "passed"
    assert [each.dtype for each in (*manifest.inputs, *manifest.outputs)] == ["float16"] * 2
    with open_device("local") as device:
        (found,) = device.load(built.artifact).run({manifest.inputs[0].name: clip.half().numpy()}).values()
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, network(clip.half().float()).detach().numpy(), rtol=2e-3, atol=1e-4)


class Million(nn.Module):
    """A million times its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e6 * x


def test_an_output_beyond_half_precision_is_refused_and_not_made_infinite(tmp_path):
    with pytest.raises(DanceError, match="half precision ends at 65504: leave --io out"):
        build_network(
            Million().eval(),
            tmp_path / "io",
            example_inputs=(torch.ones(1, 2, 1, 4, 4),),
            options=Options(threads=1, io="float16"),
            check=True,
        )
