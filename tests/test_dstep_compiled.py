"""D-STEP compiled: exact against PyTorch, streams bit for bit equal to clips, nothing left out is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dance_tvm.compiler import build_network
from dance_tvm.device import open_device
from dance_tvm.errors import DanceError
from dance_tvm.models.resnet import BasicBlock, VideoResNet
from dance_tvm.sparsity.dstep.network import DStepOptions, DStepResNet, Stream
from dance_tvm.sparsity.dstep.random_policies import Mix, example_clip, with_mix
from dance_tvm.stream import StreamSession

FRAMES, HEIGHT, WIDTH = 4, 18, 20


def network(mix: Mix) -> tuple[DStepResNet, torch.Tensor]:
    """One block on maps of 9x10 under tiles of 4; the layers' weights are small whole numbers, so sums are exact."""
    clip = example_clip((1, FRAMES, HEIGHT, WIDTH), seed=2).mul(3).round()
    base = VideoResNet(
        BasicBlock, (1,), temporal="tsm-online", num_classes=3, in_channels=1, width=16, stem="small"
    ).eval()
    generator = torch.Generator().manual_seed(4)
    for name, tensor in base.named_parameters():
        if tensor.dim() > 1:
            tensor.data = torch.randint(-2, 3, tensor.shape, generator=generator).float()
        if "bn" in name and name.endswith("weight"):
            tensor.data.fill_(1.0)
    for layer in base.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = 0.0
    return with_mix(base, clip, mix, options=DStepOptions(tile=(4,), hidden=8), seed=1), clip


def build(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], folder):
    return build_network(module, folder, example_inputs=inputs, threads=1, check=False).artifact


def run(device, artifact, *inputs: torch.Tensor) -> np.ndarray:
    names = [tensor.name for tensor in artifact.manifest.inputs]
    outputs = device.load(artifact).run(dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True)))
    return outputs[artifact.manifest.outputs[0].name]


@pytest.fixture(scope="module")
def device():
    with open_device("local") as session:
        yield session


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A network of mixed decisions as clip and as stream: (network, clip, clip's artifact, stream's artifact)."""
    thinned, clip = network(Mix(0.6, 0.5, 0.3))
    stream = Stream(thinned, (1, HEIGHT, WIDTH)).eval()
    folder = tmp_path_factory.mktemp("dstep")
    whole = build(thinned, (clip,), folder / "clip")
    return thinned, clip, whole, build(stream, (clip[:, :, 0], *stream.start()), folder / "stream")


def test_the_lists_are_found_in_an_ordinary_graph(compiled):
    """The first convolution computes listed channels at listed positions, the second reads listed channels."""
    for artifact in compiled[2:]:
        skips = [
            next(layer.skips for layer in artifact.manifest.layers if place in layer.name)
            for place in ("layer1_0_conv1", "layer1_0_conv2")
        ]
        assert {"output positions", "output channels"} <= set(skips[0])
        assert "input channels" in skips[1]


def test_a_compiled_clip_equals_pytorch(compiled, device):
    thinned, _, whole, _ = compiled
    for seed in range(3):
        other = example_clip((1, FRAMES, HEIGHT, WIDTH), seed=seed).mul(3).round()
        expected = thinned(other).detach().numpy()
        np.testing.assert_allclose(run(device, whole, other), expected, rtol=2e-6, atol=1e-4)


def test_a_compiled_stream_equals_the_clip_to_the_last_bit(compiled, device):
    _, clip, whole, artifact = compiled
    loaded = device.load(artifact)
    here, there = StreamSession(loaded), StreamSession(loaded)
    for _ in range(2):
        for index in range(FRAMES):
            scores = here.step(clip[:, :, index].numpy())
            there.step(clip[:, :, FRAMES - 1 - index].numpy())  # another stream in between
        assert np.array_equal(scores, run(device, whole, clip))
        here.reset()
    with pytest.raises(DanceError, match="shape"):
        here.step(np.zeros((1, 1, 5, 5), "float32"))


def test_only_streaming_networks_make_sessions(compiled, device):
    with pytest.raises(DanceError, match="streaming form"):
        StreamSession(device.load(compiled[2]))


@pytest.mark.parametrize("mix", [Mix(1, 0, 0), Mix(0, 1, 0)], ids=["skipped", "no tiles"])
def test_weights_of_what_is_left_out_are_not_read(mix, device, tmp_path):
    """All channels skipped or no tile kept: the first convolution's weights may be NaN."""
    thinned, clip = network(mix)
    expected = thinned(clip).detach().numpy()
    thinned.layer1[0].conv1.weight.data.fill_(float("nan"))
    assert torch.isnan(thinned(clip)).all()  # PyTorch multiplies them by zero
    artifact = build(thinned, (clip,), tmp_path / "artifact")
    np.testing.assert_allclose(run(device, artifact, clip), expected, rtol=2e-6, atol=1e-4)
