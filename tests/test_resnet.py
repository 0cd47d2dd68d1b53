"""Video ResNets: names and shapes of public weights, counts, the temporal shift, and clips against streams."""

from __future__ import annotations

import pytest
import torch

from dance_tvm import models
from dance_tvm.core.errors import DanceError
from dance_tvm.models.macs import count
from dance_tvm.models.resnet import BasicBlock, VideoResNet, resnet18, resnet50, resnet_mini
from dance_tvm.sparsity.dstep.network import Stream


def imagenet_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's ImageNet checkpoints, written out from the architecture's tables."""
    blocks, wide = {18: ((2, 2, 2, 2), 1), 50: ((3, 4, 6, 3), 4)}[depth]
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **batch_norm("bn1", 64)}
    channels = 64
    for stage, number in enumerate(blocks):
        width = 64 * 2**stage
        for index in range(number):
            kernels = (
                [(width, channels, 1), (width, width, 3), (4 * width, width, 1)]
                if wide == 4
                else [(width, channels, 3), (width, width, 3)]
            )
            name = f"layer{stage + 1}.{index}"
            for place, (out, into, edge) in enumerate(kernels, start=1):
                shapes[f"{name}.conv{place}.weight"] = (out, into, edge, edge)
                shapes |= batch_norm(f"{name}.bn{place}", out)
            if index == 0 and (stage > 0 or wide == 4):
                shapes[f"{name}.downsample.0.weight"] = (wide * width, channels, 1, 1)
                shapes |= batch_norm(f"{name}.downsample.1", wide * width)
            channels = wide * width
    return shapes | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


def batch_norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


@pytest.mark.parametrize(("build", "depth"), [(resnet18, 18), (resnet50, 50)])
def test_imagenet_checkpoints_load_by_name(build, depth):
    with torch.device("meta"):
        network = build(1000)
    ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert {name: shape for name, shape in ours.items() if "num_batches" not in name} == imagenet_shapes(depth)


def test_imagenet_weights_reach_the_layers():
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=generator) for name, shape in imagenet_shapes(18).items()}
    network = resnet18(1000, "tsm")
    models.load_state(network, {f"module.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(network.layer3[0].downsample[0].weight, state["layer3.0.downsample.0.weight"])
    assert torch.equal(network.bn1.running_var, state["bn1.running_var"])


def test_the_layout_of_tsms_release_loads():
    network, other = resnet_mini(8, "tsm"), resnet_mini(8, "tsm")
    theirs = {
        ("new_fc." + name[3:] if name.startswith("fc.") else "base_model." + name).replace(
            ".conv1.", ".conv1.net." if name.startswith("layer") else ".conv1."
        ): torch.randn_like(tensor.float())
        for name, tensor in network.state_dict().items()
    }
    models.load_state(other, {"module." + name: tensor for name, tensor in theirs.items()})
    assert torch.equal(other.layer2[0].conv1.weight, theirs["base_model.layer2.0.conv1.net.weight"])
    assert torch.equal(other.fc.bias, theirs["new_fc.bias"])


def test_weights_of_another_depth_are_refused():
    with pytest.raises(DanceError, match=r"wrong shape|missing"):
        models.load_state(resnet_mini(8), dict(resnet18(8).state_dict()))


@pytest.mark.parametrize(("build", "macs", "parameters"), [(resnet18, 14.6e9, 11.2e6), (resnet50, 33.2e9, 24.3e6)])
def test_dense_counts_are_table_1s(build, macs, parameters):
    """Table 1 counts batch norms and ReLUs too (docs/dstep.md), so multiply-accumulates alone stay 1-2% below."""
    with torch.device("meta"):
        network = build(400)
    counted = count(network, torch.empty(1, 3, 8, 224, 224, device="meta"))
    assert 0.98 * macs < counted < macs
    # ResNet-18's 11.2 M leave the head out, ResNet-50's 24.3 M have 400 classes.
    body = sum(tensor.numel() for tensor in network.parameters())
    if build is resnet18:
        body -= network.fc.weight.numel() + network.fc.bias.numel()
    assert abs(body - parameters) < 0.05e6


def whole_numbers(network: VideoResNet) -> VideoResNet:
    """Weights -1, 0 and 1, few enough that sums stay exact in float32."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.named_parameters():
        if tensor.dim() > 1:
            drawn = torch.randint(-1, 2, tensor.shape, generator=generator).float()
            kept = torch.rand(tensor.shape, generator=generator) < (0.1 if "layer" in name else 0.3)
            tensor.data = drawn * kept
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = 0.0
    return network.eval()


def test_shift_moves_an_eighth_each_way():
    network = VideoResNet(BasicBlock, (1,), temporal="tsm", width=16, in_channels=1, stem="small")
    x = torch.arange(3 * 2 * 16, dtype=torch.float32).reshape(6, 16, 1, 1)  # 3 frames of 2 clips
    moved, kept = network.shift(x, 2, None)
    by_frame, original = moved.reshape(3, 2, 16), x.reshape(3, 2, 16)
    assert kept is None
    assert torch.equal(by_frame[:2, :, :2], original[1:, :, :2])
    assert torch.equal(by_frame[1:, :, 2:4], original[:2, :, 2:4])
    assert not by_frame[2, :, :2].any()
    assert not by_frame[0, :, 2:4].any()
    assert torch.equal(by_frame[:, :, 4:], original[:, :, 4:])


@pytest.mark.parametrize("temporal", ["tsn", "tsm-online"])
def test_a_stream_gives_the_clips_scores(temporal):
    network = whole_numbers(resnet_mini(5, temporal, width=8))
    clips = torch.randint(-2, 3, (2, 1, 4, 24, 26)).float()
    stream = Stream(network, (1, 24, 26), clips=2)
    state = stream.start()
    with torch.no_grad():
        for frame in clips.unbind(2):
            scores, *state = stream(frame, *state)
        assert torch.equal(scores, network(clips))


def test_tsn_averages_the_frames_scores():
    network = whole_numbers(resnet_mini(5, "tsn", width=8))
    clips = torch.randint(-2, 3, (2, 1, 4, 24, 24)).float()
    with torch.no_grad():
        frames = torch.stack([network(clips[:, :, index : index + 1]) for index in range(4)])
        assert torch.equal(network(clips), frames.sum(0) / 4)


def test_a_network_that_looks_ahead_cannot_stream():
    with pytest.raises(DanceError, match="tsm-online"):
        Stream(resnet_mini(5, "tsm"), (1, 24, 24))


def test_unknown_forms_are_named():
    with pytest.raises(DanceError, match="tsm-online"):
        resnet_mini(5, "gsm")
