"""Training counts what the built network executes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from counting import counted_alike
from test_dance import SHAPE, Three, controller_of, pruned_at_random
from test_transform import compile_network, executed
from torch import Tensor, nn

from benchmarks.random_policies import Mix, example_clip, with_mix
from dance_tvm.benchmarking.layers import profile
from dance_tvm.benchmarking.results import Layer
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.device import DeviceSession, open_device
from dance_tvm.models.resnet import BasicBlock, VideoResNet
from dance_tvm.sparsity.clips import Splits
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dstep.flops import Needed
from dance_tvm.sparsity.dstep.network import DStepOptions, Stream
from dance_tvm.sparsity.rt3d.options import SchemeName
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate
from dance_tvm.sparsity.settings import Settings
from dance_tvm.sparsity.training import train


class Powers(Three):
    """Whole powers of masked activations, pools as functions, and a transposed convolution, which runs whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(12, 12, (1, 2, 2), (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool3d(torch.relu(self.bn1(self.conv1(x))) ** 3, (1, 2, 2))
        x = self.up(torch.pow(torch.relu(self.conv2(x)), 2))
        x = nn.functional.avg_pool3d(torch.relu(self.conv3(x)), kernel_size=2, stride=1)
        return self.fc(x.square().mean((2, 3, 4)))


class Frames(Three):
    """Layers beside those that masks thin: over single frames, along them, and with weights of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=3)
        self.along = nn.Conv1d(12, 64, 3, padding=1)
        self.weight, self.last = nn.Parameter(torch.randn(6, 64, 3, 1, 1)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        frames = x.shape[2]
        x = self.frame(x.movedim(2, 1).flatten(0, 1)).mean((2, 3))
        x = self.along(x.unflatten(0, (-1, frames)).movedim(1, 2))
        x = nn.functional.conv3d(x[..., None, None], self.weight, padding=(1, 0, 0)).mean((2, 3, 4))
        return nn.functional.linear(x, self.last)


def executed_by_layer(network: nn.Module, clip: Tensor, folder: Path, device: DeviceSession) -> list[Layer]:
    """The layers that multiply of the network as built and called with the clip."""
    options = Options(conv="direct")
    built = build_network(network, folder, example_inputs=(clip,), threads=1, check=False, options=options)
    counted_alike(built.artifact, {built.artifact.manifest.inputs[0].name: clip.numpy()})
    loaded = device.load(built.artifact)
    calls = loaded.kernels({loaded.manifest.inputs[0].name: clip.numpy()}, repeats=0)
    return [layer for layer in profile(loaded.manifest, calls, 0.0).layers if layer.macs]


@pytest.fixture(scope="module")
def device() -> Iterator[DeviceSession]:
    with open_device("local") as session:
        yield session


def test_a_pool_whose_window_is_computed_is_counted_as_reading_everything() -> None:
    class Whole(Three):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
            return nn.functional.avg_pool3d(x, x.shape[2:])

    count = MacCounter(pruned_at_random(Whole(), SHAPE, seed=5)).count([], 1)
    assert [layer.executed.item() for layer in count.layers] == [layer.dense for layer in count.layers]


@pytest.mark.parametrize("network", [Three, Powers, Frames])
def test_dance_counts_each_layer_as_the_built_network_does(
    network: type[Three], tmp_path: Path, device: DeviceSession
) -> None:
    graph = pruned_at_random(network(), SHAPE, seed=5).eval()
    torch.manual_seed(3)  # other clips may be left nothing of some layer
    clip = torch.rand(1, *SHAPE)
    with torch.no_grad():
        graph(clip)
    count = MacCounter(graph).count(controller_of(graph).decisions, 1)
    layers = executed_by_layer(graph, clip, tmp_path / "built", device)
    found = {layer.name: (layer.macs, layer.executed_macs) for layer in layers}
    assert [found[layer.name] for layer in count.layers] == [
        (int(layer.nominal), int(layer.executed[0])) for layer in count.layers
    ]
    assert sum(layer.executed_macs for layer in layers) == int(count.executed[0])
    assert all(0 < int(layer.executed[0]) <= layer.dense for layer in count.layers)
    assert all(int(layer.executed[0]) < layer.dense for layer in count.layers[1:])


class Pruned(nn.Module):
    """Strided, dilated and one-dimensional convolutions, padded so that most of their outputs lack some tap."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 16, 3, padding=1)
        self.strided = nn.Conv3d(16, 32, 3, stride=(1, 2, 2), padding=1)
        self.dilated = nn.Conv3d(32, 32, 3, padding=2, dilation=2)
        self.along = nn.Conv3d(32, 32, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, clip: Tensor) -> Tensor:
        for layer in self.children():
            clip = torch.relu(layer(clip))
        return clip


@pytest.mark.parametrize(("scheme", "rate"), [("filter", 2.0), ("vanilla", 1.3), ("kgs", 2.0)])
def test_rt3d_counts_each_layer_as_the_built_network_does(
    scheme: SchemeName, rate: float, tmp_path: Path, device: DeviceSession
) -> None:
    torch.manual_seed(5)
    network, clip = Pruned().eval(), torch.rand(1, 2, 4, 9, 9)
    report = prune_to_rate(network, [clip], scheme, rate, 16, 1)
    layers = executed_by_layer(network, clip, tmp_path / "pruned", device)
    executed_macs = {layer.name: layer.executed_macs for layer in layers}
    # The network gives out all filters of its last layer, the pruned ones too.
    rows = report.layers[:-1] if scheme == "filter" else report.layers
    assert [executed_macs[row.name] for row in rows] == [row.executed_macs for row in rows]
    assert all(row.executed_macs < row.live_macs < row.macs for row in rows)


class Few:
    """Four clips, one of each class."""

    classes, shape = ("0", "1", "2", "3"), (3, 4, 12, 12)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(index)), index


class Shared(nn.Module):
    """A convolution that runs twice, at two sizes, and one that has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, 3, padding=1)
        self.twice, self.same = nn.Conv3d(16, 16, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1, stride=2)
        self.same.weight = self.twice.weight
        self.last = nn.Conv3d(16, 4, 3, padding=1)

    def forward(self, clip: Tensor) -> Tensor:
        clip = torch.relu(self.twice(torch.relu(self.stem(clip))))
        clip = torch.relu(self.twice(nn.functional.max_pool3d(clip, (1, 2, 2))))
        return self.last(torch.relu(self.same(clip))).mean((2, 3, 4))


def test_rt3d_counts_a_shared_weight_at_each_use(tmp_path: Path, device: DeviceSession) -> None:
    torch.manual_seed(7)
    network, clip = Shared().eval(), torch.rand(1, 3, 4, 12, 12)
    report = prune_to_rate(network, [clip], "kgs", 1.5, 16, 1)
    assert [row.name for row in report.layers] == ["twice", "last"]
    assert [row.live_weights for row in report.layers] == [
        int(layer.weight.count_nonzero()) for layer in (network.twice, network.last)
    ]
    _, *uses, last = (layer.executed_macs for layer in executed_by_layer(network, clip, tmp_path / "shared", device))
    assert len(uses) == 3
    assert [sum(uses), last] == [row.executed_macs for row in report.layers]


def test_rt3d_trains_a_shared_weight_under_one_mask(tmp_path: Path) -> None:
    options = {"rate": 1.5, "scheme": "vanilla", "gm": 16, "gn": 4}
    settings = Settings(method="kgs", model="own", data="own", options=options, epochs=2, batch=4, amp=False)
    found = train(settings, Shared(), Splits("own", Few(), Few()), tmp_path)
    pruned, network = found.card["pruning"]["layers"], found.network
    assert list(pruned) == ["twice", "last"]
    assert network.twice.weight is network.same.weight
    assert pruned["twice"]["weights"] == int(network.twice.weight.count_nonzero()) < network.twice.weight.numel()


def test_dstep_counts_each_layer_of_each_frame_as_the_built_stream_does() -> None:
    torch.manual_seed(6)  # the decisions of other weights may lie within rounding of their thresholds
    clip = example_clip((1, 3, 32, 32), seed=3)
    base = VideoResNet(BasicBlock, (1,), temporal="tsm-online", num_classes=3, in_channels=1, width=64, stem="small")
    network = with_mix(base.eval(), clip, Mix(0.4, 0.4, 0.3), options=DStepOptions(tile=(4,), hidden=8), seed=2)
    stream = Stream(network, (1, 32, 32)).eval()
    state = stream.start()
    lowered, machine = compile_network(stream, clip[:, :, 0], *state)
    layers = [layer for layer in lowered.layers if layer.kind in ("conv3d", "linear")]
    thinned = [place for place, layer in enumerate(layers) if layer.skips]
    assert [layers[place].skips for place in thinned] == [
        ["output positions", "output channels"],
        ["input positions", "input channels"],
    ]
    found = []
    with torch.no_grad():
        for frame in clip.unbind(2):
            found.append([executed(machine, frame, *state)[place] for place in thinned])
            _, *state = stream(frame, *state)
        with network.watched() as decisions:
            network(clip)
    ((first, second),) = Needed(network, clip.shape[1:]).macs(decisions, 1)
    assert found == torch.stack([first, second], 1).int().tolist()
    assert all(0 < one < layers[place].macs for frame in found for one, place in zip(frame, thinned, strict=True))
