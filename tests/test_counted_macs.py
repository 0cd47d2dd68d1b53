"""Training counts what the built network executes, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_dance import SHAPE, Three, controller_of, pruned_at_random
from test_transform import compile_network, executed
from torch import Tensor, nn

from benchmarks.random_policies import Mix, example_clip, with_mix
from dance_tvm.benchmarking.layers import profile
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.device import DeviceSession, open_device
from dance_tvm.models.resnet import BasicBlock, VideoResNet
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dstep.flops import Needed
from dance_tvm.sparsity.dstep.network import DStepOptions, Stream
from dance_tvm.sparsity.rt3d.options import SchemeName
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate


def test_dance_counts_each_layer_as_the_built_network_does() -> None:
    graph = pruned_at_random(Three(), SHAPE, seed=1).eval()
    clip = torch.rand(1, *SHAPE)
    lowered, machine = compile_network(graph, clip)
    with torch.no_grad():
        graph(clip)
    count = MacCounter(graph).count(controller_of(graph).decisions, 1)
    layers = [layer for layer in lowered.layers if layer.kind in ("conv3d", "linear")]
    found = [(layer.macs, macs) for layer, macs in zip(layers, executed(machine, clip).values(), strict=True)]
    counted = [(int(layer.nominal), int(layer.executed[0])) for layer in count.layers]
    assert [pair for pair in found if pair[0] in {nominal for nominal, _ in counted}] == counted
    assert sum(int(layer.executed[0]) for layer in count.layers) < sum(layer.dense for layer in count.layers)


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


@pytest.fixture(scope="module")
def device():
    with open_device("local") as session:
        yield session


@pytest.mark.parametrize(("scheme", "rate"), [("filter", 2.0), ("vanilla", 1.3), ("kgs", 2.0)])
def test_rt3d_counts_each_layer_as_the_built_network_does(
    scheme: SchemeName, rate: float, tmp_path: Path, device: DeviceSession
) -> None:
    torch.manual_seed(5)
    network, clip = Pruned().eval(), torch.rand(1, 2, 4, 9, 9)
    report = prune_to_rate(network, [clip], scheme, rate, 16, 1)
    built = build_network(
        network, tmp_path / "pruned", example_inputs=(clip,), threads=1, check=False, options=Options(conv="direct")
    )
    loaded = device.load(built.artifact)
    calls = loaded.kernels({loaded.manifest.inputs[0].name: clip.numpy()}, repeats=0)
    executed_macs = {layer.name: layer.executed_macs for layer in profile(loaded.manifest, calls, 0.0).layers}
    # The network gives out all filters of its last layer, the pruned ones too.
    rows = report.layers[:-1] if scheme == "filter" else report.layers
    assert [executed_macs[row.name] for row in rows] == [row.executed_macs for row in rows]
    assert all(row.executed_macs < row.live_macs < row.macs for row in rows)


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
