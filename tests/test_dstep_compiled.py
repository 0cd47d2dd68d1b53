"""D-STEP compiled: exact against PyTorch, streams bit for bit equal to clips, nothing left out is read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from counting import counted_alike
from typer.testing import CliRunner

from benchmarks.random_policies import Mix, example_clip, with_mix
from dance_tvm import stream
from dance_tvm.compiler.build import build_network
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import open_device
from dance_tvm.models.resnet import BasicBlock, VideoResNet
from dance_tvm.sparsity.dstep.network import DStepOptions, DStepResNet, Stream

FRAMES, SIZE, CHANNELS = 4, 16, 16
EYE = (
    8  # the channel that the policies look at: it holds the frame's brightness, and the temporal shift leaves it alone
)


def network(mix: Mix, tile: int = 3) -> tuple[DStepResNet, torch.Tensor]:
    """One block on maps of 8x8. Weights are whole numbers and means divide by powers of two: exact."""
    clip = example_clip((1, FRAMES, SIZE, SIZE), seed=2).mul(3).round()
    base = VideoResNet(
        BasicBlock, (1,), temporal="tsm-online", num_classes=3, in_channels=1, width=CHANNELS, stem="small"
    ).eval()
    generator = torch.Generator().manual_seed(4)
    for name, tensor in base.named_parameters():
        if tensor.dim() > 1:
            tensor.data = torch.randint(-1, 2, tensor.shape, generator=generator).float()
        if "bn" in name and name.endswith("weight"):
            tensor.data.fill_(1.0)
    base.fc.bias.data.zero_()
    for layer in base.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = 0.0
    return with_mix(base, clip, mix, options=DStepOptions(tile=(tile,), hidden=8), seed=1), clip


def steered() -> DStepResNet:
    """A network whose policies follow the frames' brightness, so that clips can be made to decide anything.

    A tile counts where it is bright; channel c is computed where the frame is brighter than its threshold, else reused
    where the frame before was, else skipped.
    """
    thinned, _ = network(Mix(0.5, 0.5, 0.2))
    thinned.conv1.weight.data[EYE] = 0.0
    thinned.conv1.weight.data[EYE, 0, 1, 1] = 1.0
    (policy,) = thinned.policies
    policy.spatial.conv.weight.data.zero_()
    policy.spatial.conv.weight.data[0, EYE, 1, 1] = 1.0
    policy.spatial.conv.bias.data.fill_(-0.3)
    mlp, thresholds = policy.temporal, torch.linspace(0.53, 2.53, CHANNELS)
    for layer in (mlp.fc1, mlp.fc2):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    before, now = 0, 1
    mlp.fc1.weight.data[before, EYE] = 1.0
    mlp.fc1.weight.data[now, CHANNELS + EYE] = 1.0
    compute, reuse = slice(CHANNELS, 2 * CHANNELS), slice(2 * CHANNELS, 3 * CHANNELS)
    mlp.fc2.weight.data[compute, now] = 1.0
    mlp.fc2.bias.data[compute] = -thresholds
    mlp.fc2.weight.data[reuse, before] = 0.01
    mlp.fc2.bias.data[reuse] = -0.01 * thresholds
    return thinned


def clips() -> list[torch.Tensor]:
    """Clips of whole numbers whose frames are dark, dim, bright or patchy in every order that matters."""
    orders = [(0, 3, 0, 0), (3, 3, 0, 3), (3, 1, 0, 0), (1, 1, 2, 1), (2, 0, 3, 1), (0, 0, 0, 0), (3, 3, 3, 3)]
    generator = torch.Generator().manual_seed(7)
    made = [
        torch.tensor(order).float().reshape(1, 1, FRAMES, 1, 1).expand(1, 1, FRAMES, SIZE, SIZE).clone()
        for order in orders
    ]
    for order in orders[:5]:
        bright = torch.tensor(order).reshape(1, 1, FRAMES, 1, 1)
        patches = torch.randint(0, 2, (1, 1, FRAMES, 4, 4), generator=generator).repeat_interleave(4, 3)
        grain = torch.randint(0, 2, (1, 1, FRAMES, SIZE, SIZE), generator=generator)
        made.append((bright * patches.repeat_interleave(4, 4) + grain).float())
    return made


def build(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], folder, target: str = "host"):
    return build_network(module, folder, example_inputs=inputs, threads=1, check=False, target=target).artifact


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
    """The steered network as clip and as stream: (network, clip's artifact, stream's artifact)."""
    thinned = steered()
    streaming = Stream(thinned, (1, SIZE, SIZE)).eval()
    folder = tmp_path_factory.mktemp("dstep")
    clip = clips()[0]
    return (
        thinned,
        build(thinned, (clip,), folder / "clip"),
        build(streaming, (clip[:, :, 0], *streaming.start()), folder / "stream"),
    )


def skips(artifact, place: str) -> list[str]:
    return next(layer.skips for layer in artifact.manifest.layers if place in layer.name)


def test_a_tile_over_the_whole_map_leaves_out_whole_frames(device, tmp_path):
    thinned, clip = network(Mix(0.5, 0.5, 0.3), tile=8)
    artifact = build(thinned, (clip,), tmp_path / "frames")
    assert "output frames" in skips(artifact, "layer1.0.conv1")
    assert "input frames" in skips(artifact, "layer1.0.conv2")
    with torch.no_grad():
        np.testing.assert_allclose(run(device, artifact, clip), thinned(clip).numpy(), rtol=1e-5, atol=1e-5)


def test_the_lists_are_found_in_an_ordinary_graph(compiled):
    """The first convolution computes listed channels at listed positions, the second reads listed channels.

    A clip's frames have channel lists of their own, which are used only where they are predicted to pay.
    """
    _, clip, streamed = compiled
    assert {"output positions", "output channels"} <= set(skips(streamed, "layer1.0.conv1"))
    assert "input channels" in skips(streamed, "layer1.0.conv2")
    assert "output positions" in skips(clip, "layer1.0.conv1")
    for artifact in (clip, streamed):
        counted_alike(artifact, random_inputs(artifact.manifest.inputs))


def test_the_clips_decide_everything_that_can_be_decided():
    """Frames all computed, all reused, all skipped and mixed; tiles all kept, none kept and some kept."""
    thinned = steered()
    channels, tiles = set(), set()
    for clip in clips():
        with thinned.watched() as decisions, torch.no_grad():
            thinned(clip)
        for compute, reuse, kept in zip(*(decisions[0][key].flatten(1) for key in (2, 3, 0)), strict=True):
            shares = (float(compute.mean()), float(reuse.mean()))
            channels.add(shares if shares in ((1, 0), (0, 1), (0, 0)) else "mixed" if min(shares) > 0 else "two ways")
            tiles.add(float(kept.mean()) if kept.mean() in (0, 1) else "some")
    assert channels == {(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), "mixed", "two ways"}
    assert tiles == {0.0, 1.0, "some"}


def test_a_compiled_clip_equals_pytorch_exactly(compiled, device):
    thinned, whole, _ = compiled
    loaded = device.load(whole)
    for clip in clips():
        expected = thinned(clip).detach().numpy()
        (found,) = loaded.run({whole.manifest.inputs[0].name: clip.numpy()}).values()
        np.testing.assert_array_equal(found, expected)


def test_a_compiled_stream_equals_the_clip_to_the_last_bit(compiled, device):
    thinned, _, artifact = compiled
    loaded = device.load(artifact)
    here, there = loaded.stream(), loaded.stream()
    for clip in clips():
        for index in range(FRAMES):
            scores = here.step(clip[:, :, index].numpy())
            there.step(clip[:, :, FRAMES - 1 - index].numpy())  # another stream in between
        np.testing.assert_array_equal(scores, thinned(clip).detach().numpy())
        here.reset()
    with pytest.raises(DanceError, match="shape"):
        here.step(np.zeros((1, 1, 5, 5), "float32"))


def test_the_stream_command_runs_the_frames_of_a_file(compiled, tmp_path):
    thinned, whole, artifact = compiled
    clip = clips()[-1]
    frames, scores = tmp_path / "frames.npy", tmp_path / "scores.npz"
    np.save(frames, clip[0].permute(1, 0, 2, 3).numpy())
    words = [str(artifact.path), "--frames", str(frames), "--outputs", str(scores), "--json-lines"]
    done = CliRunner().invoke(stream.app, words)
    assert done.exit_code == 0, done.exception
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["index"] for event in events if event["event"] == "frame"] == list(range(FRAMES))
    assert events[-1]["result"]["frames"] == FRAMES
    (found,) = np.load(scores).values()
    np.testing.assert_array_equal(found[-1], thinned(clip).detach().numpy())
    np.save(frames, np.zeros((2, 1, 5, 5), "float32"))
    assert "holds frames of shape" in str(CliRunner().invoke(stream.app, words).exception)
    refused = CliRunner().invoke(stream.app, [str(whole.path), "--random", "1"])
    assert "is not a streaming network" in str(refused.exception)


def test_a_streams_state_stays_on_the_device(compiled, device):
    """What a step leaves serves the next one as well as arrays of a whole run do, however often it is used."""
    clip, loaded = clips()[-1], device.load(compiled[2])
    frame, *state = (tensor.name for tensor in loaded.manifest.inputs)
    zeros = {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in loaded.manifest.inputs[1:]}
    outputs = loaded.run({frame: clip[:, :, 0].numpy(), **zeros})
    first, kept = loaded.step({frame: clip[:, :, 0].numpy(), **zeros})
    np.testing.assert_array_equal(first, next(iter(outputs.values())))
    arrays = dict(zip(state, list(outputs.values())[1:], strict=True))
    for index in (1, 2, 1):
        expected = loaded.run({frame: clip[:, :, index].numpy(), **arrays})
        found, _ = loaded.step({frame: clip[:, :, index].numpy(), **dict(zip(state, kept, strict=True))})
        np.testing.assert_array_equal(found, next(iter(expected.values())))


@pytest.mark.device
def test_an_emulated_phone_streams_exactly(emulator, tmp_path):
    thinned = steered()
    streaming = Stream(thinned, (1, SIZE, SIZE)).eval()
    clip = clips()[-1]
    inputs = (clip[:, :, 0], *streaming.start())
    artifact = build(streaming, inputs, tmp_path / "phone", target="snapdragon")
    with open_device(emulator.tracker, timeout=120) as phone:
        session = phone.load(artifact).stream()
        for index in range(FRAMES):
            scores = session.step(clip[:, :, index].numpy())
        assert not any(isinstance(tensor, np.ndarray) for tensor in session._state)  # it stays on the phone
    np.testing.assert_array_equal(scores, thinned(clip).detach().numpy())


def test_only_streaming_networks_make_sessions(compiled, device):
    with pytest.raises(DanceError, match=r"is not a streaming network.*export-dstep --stream"):
        device.load(compiled[1]).stream()


@pytest.mark.parametrize("mix", [Mix(1, 0, 0), Mix(0, 1, 0)], ids=["skipped", "no tiles"])
def test_weights_of_what_is_left_out_are_not_read(mix, device, tmp_path):
    """All channels skipped or no tile kept: the first convolution's weights may be NaN."""
    thinned, clip = network(mix)
    expected = thinned(clip).detach().numpy()
    thinned.layer1[0].conv1.weight.data.fill_(float("nan"))
    assert torch.isnan(thinned(clip)).all()  # PyTorch multiplies them by zero
    artifact = build(thinned, (clip,), tmp_path / "artifact")
    np.testing.assert_array_equal(run(device, artifact, clip), expected)
