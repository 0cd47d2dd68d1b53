"""Whole networks lowered for GPUs and run through OpenCL on this machine's processor, against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm.relax.frontend.torch import from_exported_program

from dance_tvm import models
from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.core.errors import DanceError
from dance_tvm.device.launches import device_code, opencl_target
from dance_tvm.device.opencl import OpenCLSession
from dance_tvm.device.opencl_network import OpenCLNetwork
from dance_tvm.frontend import import_model
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import load_target

RELATIVE = {"float32": 1e-4, "float16": 2e-2}


@pytest.fixture(scope="module")
def device() -> OpenCLSession:
    try:
        return OpenCLSession(optimise=False, emulate_half=True)
    except DanceError as error:
        pytest.skip(str(error))


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
    return module.eval()


def same_as_pytorch(
    device: OpenCLSession, module: nn.Module, target: str, *inputs: torch.Tensor, dtype: str = "float32"
) -> Lowered:
    program = torch.export.export(module, inputs)
    lowered = lower(from_exported_program(program), load_target(target), Options(dtype=dtype))
    found = OpenCLNetwork(device, lowered).run([value.numpy() for value in inputs])
    with torch.no_grad():
        expected = module(*inputs).numpy()
    assert np.abs(found[0] - expected).max() <= RELATIVE[dtype] * np.abs(expected).max()
    return lowered


class Masked(nn.Module):
    """Each clip decides which frames, positions and channels of the second convolution's input are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 10, 3, padding=1), nn.Conv3d(10, 12, 3, padding=1)
        self.pool, self.score = nn.MaxPool3d((1, 2, 2)), nn.Linear(12, 5)

    def forward(
        self, x: torch.Tensor, frames: torch.Tensor, channels: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        alive = [(mask > 0).to(x.dtype) for mask in (frames, channels, positions)]
        x = torch.relu(self.first(x)) * alive[0][:, None, :, None, None]
        x = x * alive[1][:, :, None, None, None] * alive[2][:, None, None]
        x = self.pool(torch.relu(self.second(x)))
        return self.score(x.mean((2, 3, 4)))


class Pruned(nn.Module):
    """Separable convolutions with zero columns, a residual and a depthwise layer: RT3D's sparsity and more shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Conv3d(4, 16, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.time = nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0))
        self.depthwise = nn.Conv3d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.picture(x))
        x = torch.relu(self.time(x) + x)
        return self.depthwise(x).mean((2, 3, 4))


def masked_inputs(share: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    masks = [torch.rand(shape, generator=generator) for shape in ((2, 5), (2, 10), (2, 8, 6))]
    return [torch.randn((2, 3, 5, 8, 6), generator=generator), *(mask - (1 - share) for mask in masks)]


def test_a_masked_network_equals_pytorch(device):
    module = seeded(Masked())
    lowered = same_as_pytorch(device, module, "jetson-nano", *masked_inputs(0.6))
    skips = {axis for layer in lowered.layers for axis in layer.skips}
    assert {"input frames", "input channels", "output frames", "output positions", "output channels"} <= skips
    network = OpenCLNetwork(device, lowered)
    for share in (0.0, 1.0):  # nothing and everything alive
        inputs = masked_inputs(share)
        with torch.no_grad():
            expected = module(*inputs).numpy()
        found = network.run([value.numpy() for value in inputs])[0]
        assert np.abs(found - expected).max() <= RELATIVE["float32"] * max(1.0, np.abs(expected).max())


def test_half_precision_is_storage_alone(device):
    """Where the device has no half precision, it is emulated: every store rounds, sums stay as they are."""
    lowered = same_as_pytorch(device, seeded(Masked()), "snapdragon-gpu", *masked_inputs(0.6), dtype="float16")
    source = device_code(lowered.mod, opencl_target()).source
    kernel = next(text for text in source.split("// Function: ") if text.startswith("conv3d_gather_gpu_i_f16"))
    assert "__global half*" in kernel
    assert "__local half" not in kernel
    casts = kernel.count("convert_float")
    assert casts > 0
    assert all(layer.kernel.count("_f16") or layer.kind == "linear" for layer in lowered.layers)
    found, exact = (
        OpenCLNetwork(device, each).run([value.numpy() for value in masked_inputs(0.6)])[0]
        for each in (lowered, same_as_pytorch(device, seeded(Masked()), "snapdragon-gpu", *masked_inputs(0.6)))
    )
    assert np.abs(found - exact).max() > 0, "nothing was rounded"


def test_only_gpus_with_half_precision_store_it():
    program = torch.export.export(seeded(Pruned()), (torch.randn(1, 4, 4, 9, 11),))
    host = load_target("host")
    whole = host.model_copy(update={"vector": host.vector.model_copy(update={"fp16": False})})
    for target in (whole, load_target("opencl")):
        with pytest.raises(DanceError, match=f"{target.name} cannot compute in half precision"):
            lower(from_exported_program(program), target, Options(dtype="float16"))


@pytest.mark.parametrize("dtype", RELATIVE)
def test_a_pruned_network_equals_pytorch(device, dtype):
    module = seeded(Pruned())
    with torch.no_grad():
        module.time.weight *= torch.rand(1, 16, 3, 1, 1, generator=torch.Generator().manual_seed(1)) < 0.3
    clip = torch.randn((1, 4, 4, 9, 11), generator=torch.Generator().manual_seed(2))
    lowered = same_as_pytorch(device, module, "jetson-nano", clip, dtype=dtype)
    kernels = " ".join(layer.kernel for layer in lowered.layers)
    assert "conv3d_kgs_gpu" in kernels
    assert "conv3d_direct_gpu" in kernels


@pytest.mark.parametrize("dtype", RELATIVE)
def test_c3d_mini_equals_pytorch(device, dtype):
    module = models.create("c3d-mini")
    clip = torch.randn((1, 1, 16, 32, 32), generator=torch.Generator().manual_seed(2))
    same_as_pytorch(device, module, "snapdragon-gpu", clip, dtype=dtype)


def test_a_function_without_a_gpu_schedule_is_refused():
    x = tvm.te.placeholder((8,), name="x")
    doubled = tvm.te.create_prim_func([x, tvm.te.compute((8,), lambda i: x[i] * 2)])
    with pytest.raises(DanceError, match="doubled has no GPU schedule"):
        device_code(tvm.IRModule({"doubled": doubled}), opencl_target())


class MeansOfAll(nn.Module):
    """TVM's rule for reductions fails at the mean over everything."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.masked = nn.Conv3d(3, 13, 3, padding=1), nn.Conv3d(13, 13, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        frames = (y.mean((1, 3, 4), keepdim=True) > y.mean()).float()
        return self.masked(y * frames)


def test_a_reduction_at_which_tvms_rule_fails_has_another_schedule():
    imported = import_model(MeansOfAll().eval(), example_inputs=(torch.randn(2, 3, 6, 10, 9),), check=False)
    assert lower(imported.mod, load_target("jetson-nano"), Options()).layers


class TakesNothing(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :0] + 1, x * 2


class AdaptsUnevenly(nn.Module):
    """A pool for which GPUs have no schedule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool3d(x, (1, 2, 1))


def test_what_a_pass_refuses_is_told_as_it_is():
    for network, x in ((AdaptsUnevenly(), torch.randn(1, 1, 1, 1, 1)), (TakesNothing(), torch.randn(2, 3))):
        program = torch.export.export(network, (x,))
        with pytest.raises(DanceError, match="has no GPU schedule: build this network for a CPU target"):
            lower(from_exported_program(program), load_target("jetson-nano"), Options())
