"""DANCE: adaptors, controller, masks in the graph, and MACs counted against a walk over index lists."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from untrained import keep_at_random

from dance_tvm import models
from dance_tvm.build import DEFAULT_MODEL
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.core.errors import DanceError
from dance_tvm.device import open_device
from dance_tvm.frontend import import_model
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.choice import Advice
from dance_tvm.schedules.workload import GATHER, Workload
from dance_tvm.sparsity import checkpoint, training
from dance_tvm.sparsity.clips import Batch, Splits
from dance_tvm.sparsity.dance.adaptors import Adaptor, AdaptorSpatial, AdaptorTemporal
from dance_tvm.sparsity.dance.controller import Masks
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dance.method import AAP, AVA, controller_of, prune
from dance_tvm.sparsity.dance.options import AXES, parse_amount
from dance_tvm.sparsity.dance.sites import trace
from dance_tvm.sparsity.dance.start import leave_out_least, refit
from dance_tvm.sparsity.dance.trained import SHIPPED, load
from dance_tvm.sparsity.method import Context
from dance_tvm.sparsity.motion_digits import MotionDigits
from dance_tvm.sparsity.settings import Settings
from dance_tvm.sparsity.tasks import Classification, Distillation, Logits
from dance_tvm.sparsity.video import FrameWindows
from dance_tvm.train import run, write_export

SHAPE = (1, 8, 16, 16)


class Three(nn.Module):
    """Three convolutions, with batch norm, without and strided, and both kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2 = nn.Conv3d(8, 12, 3, padding=1)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3 = nn.Conv3d(12, 8, (3, 1, 1), padding=(1, 0, 0), stride=(2, 1, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(F.relu(self.bn1(self.conv1(x))))
        x = self.pool2(F.relu(self.conv2(x)))
        scores: Tensor = self.fc(F.relu(self.conv3(x)).mean((2, 3, 4)))
        return scores


def pruned_at_random(network: nn.Module, shape: tuple[int, ...], seed: int) -> torch.fx.GraphModule:
    """`network` with masks that keep about 0.6 of each axis and vary from clip to clip."""
    generator = torch.Generator().manual_seed(seed)
    clips = torch.rand(6, *shape, generator=generator) * torch.rand(6, 1, shape[1], 1, 1, generator=generator)
    torch.manual_seed(seed)
    return keep_at_random(prune(network, shape), clips, 0.6, seed)


# ---- adaptors ----


def test_adaptors_are_those_of_the_supplement() -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 5, 4, 6, 7)
    temporal, spatial = AdaptorTemporal(4), AdaptorSpatial(5, 6, 7)
    for parameter in (*temporal.parameters(), *spatial.parameters()):
        parameter.data.normal_(1, 0.7)
    assert {name: tuple(p.shape) for name, p in spatial.named_parameters()} == {
        "bias_ch": (1, 5, 1, 1, 1),
        "bias_sp": (1, 1, 1, 6, 7),
    }

    t = F.relu(x * temporal.bias_t)
    t_mean = t.mean(dim=(1, 3, 4))
    t_soft = t_mean / t_mean.sum(dim=-1, keepdim=True)
    c = F.relu(x * spatial.bias_ch)
    ch_mean = c.mean(dim=(3, 4)).flatten(1)
    ch_soft = ch_mean / ch_mean.sum(dim=-1, keepdim=True)
    s = F.relu(c * spatial.bias_sp)
    sp_mean = s.mean(dim=1).flatten(1)
    sp_soft = sp_mean / sp_mean.sum(dim=-1, keepdim=True)

    for ours, theirs in zip(temporal(x), (t, t_soft.std(dim=-1) / 3), strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = (s, 2 * ch_soft.std(dim=-1) / 3, sp_soft.std(dim=-1) / 3)
    for ours, theirs in zip(spatial(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_dead_activation_has_no_variability_and_no_nan() -> None:
    dead = torch.zeros(2, 5, 4, 6, 7)
    assert torch.equal(AdaptorTemporal(4)(dead)[1], torch.zeros(2))


def test_the_only_frame_and_the_only_position_deviate_nowhere() -> None:
    ava = AVA()
    adaptor = Adaptor(5, 1, 1, 1)
    ava._adaptors, ava._before, ava._weight = [adaptor], torch.zeros(3), 1.0
    clips = torch.rand(2, 5, 1, 1, 1)
    adaptor(clips)
    loss = ava.losses(adaptor, None, Batch(clips, torch.zeros(2), torch.zeros(2)))["variability"]
    loss.backward()
    assert loss.isfinite()
    assert adaptor.spatial.bias_ch.grad.isfinite().all()


# ---- masks ----


def test_masks_are_hard_have_the_shapes_compilers_look_for_and_follow_the_clip() -> None:
    graph = pruned_at_random(Three(), SHAPE, seed=1)
    with torch.no_grad():
        graph(torch.rand(6, *SHAPE) * torch.rand(6, 1, 8, 1, 1) * torch.rand(6, 1, 1, 16, 16))
    shapes = [(12, 8, 8, 8)]
    decisions = controller_of(graph).decisions
    assert [tuple(mask.shape) for mask in decisions[1] if mask is not None] == [
        (6, 1, 8, 1, 1),
        (6, shapes[0][0], 1, 1, 1),
        (6, 1, 1, 8, 8),
    ]
    for site in decisions:
        for mask in site:
            assert mask is not None
            assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert any(not torch.equal(mask[0], mask[1]) for site in decisions for mask in site if mask is not None)
    channels = decisions[1].channels
    assert channels is not None
    assert torch.equal(channels[:, 0], channels[:, 7]), "channels are decided in groups of eight"


def test_a_fresh_controller_prunes_nothing() -> None:
    network = Three().eval()
    graph = prune(network, SHAPE).eval()
    x = torch.rand(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(graph(x), network(x))
    assert set(network.state_dict()) < set(graph.state_dict()), "the network's own names are kept"


def test_gradients_pass_straight_through_to_controller_and_threshold() -> None:
    graph = pruned_at_random(Three(), SHAPE, seed=2).train()
    counter, controller = MacCounter(graph), controller_of(graph)
    graph(torch.rand(4, *SHAPE))
    count = counter.count(controller.decisions, 4)
    count.executed.mean().backward()
    assert controller.theta.grad is not None
    assert float(controller.theta.grad) < 0, "a higher threshold leaves fewer MACs"
    silent = [name for name, p in controller.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in silent if "stem" in name]


def test_decisions_read_the_first_activation_alone() -> None:
    graph = pruned_at_random(Three(), SHAPE, seed=3)
    x = torch.rand(2, *SHAPE)
    with torch.no_grad():
        graph(x)
        before = [mask.clone() for site in controller_of(graph).decisions for mask in site if mask is not None]
        graph.get_submodule("conv2").weight.mul_(-3)
        graph(x)
    after = [mask for site in controller_of(graph).decisions for mask in site if mask is not None]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# ---- MACs ----


def taps_inside(conv: nn.Conv3d, positions: Tensor | None, place: list[int]) -> int:
    """The window's rows and columns that fall inside the picture, for one output position."""
    assert positions is not None
    count = 1
    for axis, index in enumerate(place, 1):
        sources = [index * conv.stride[axis] - conv.padding[axis] + tap for tap in range(conv.kernel_size[axis])]
        count *= sum(0 <= source < positions.shape[axis - 3] for source in sources)
    return count


def walked_macs(conv: nn.Conv3d, alive: Masks, read: Masks, clip: int) -> int:
    """The convolution's MACs as nested lists give them: every live output row, tap, input channel, output channel."""
    frames_in, channels_in = (mask[clip].flatten().numpy() for mask in (alive.frames, alive.channels))
    frames_out = read.frames[clip].flatten().numpy()
    pairs = sum(
        taps_inside(conv, alive.positions, place) for place in read.positions[clip].squeeze().nonzero().tolist()
    )
    total = 0
    for t in np.flatnonzero(frames_out):
        for tap in range(conv.kernel_size[0]):
            source = t * conv.stride[0] - conv.padding[0] + tap
            if 0 <= source < len(frames_in) and frames_in[source]:
                total += pairs * int(channels_in.sum()) * int(read.channels[clip].sum())
    return total


def seen_by_the_third(conv3: nn.Conv3d, second: Masks, third: Masks) -> Masks:
    """What of the second convolution's output the third still reads, through masks, pool2 and its own window."""
    assert second.frames is not None
    assert second.positions is not None
    assert third.frames is not None
    assert third.positions is not None
    frames, positions = torch.zeros_like(second.frames), torch.zeros_like(second.positions)
    for clip in range(len(frames)):
        for t in third.frames[clip].flatten().nonzero().flatten().tolist():
            for tap in range(3):
                pooled = 2 * t - 1 + tap
                if 0 <= pooled < 4:
                    frames[clip, 0, 2 * pooled : 2 * pooled + 2] = 1
        for row, column in third.positions[clip].squeeze().nonzero().tolist():
            positions[clip, ..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
    return Masks(frames * second.frames, second.channels, positions * second.positions)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_macs_are_those_of_a_walk_over_the_lists(seed: int) -> None:
    network = Three()
    graph = pruned_at_random(network, SHAPE, seed=seed)
    with torch.no_grad():
        graph(torch.rand(3, *SHAPE) * torch.rand(3, 1, 8, 1, 1))
    first, second, third = controller_of(graph).decisions
    count = MacCounter(graph).count(controller_of(graph).decisions, 3)

    pooled = Masks(first.frames, first.channels, F.max_pool3d(first.positions, (1, 2, 2)))
    alive3 = Masks(F.max_pool3d(second.frames, (2, 1, 1)), second.channels, second.positions)
    ones = Masks(torch.ones(3, 8), torch.ones(3, 8), torch.ones(3, 16, 16))
    read2 = seen_by_the_third(network.conv3, second, third)
    inputs = Masks(torch.ones(3, 8), torch.ones(3, 1), torch.ones(3, 16, 16))
    for clip in range(3):
        by_layer = [int(layer.executed[clip]) for layer in count.layers]
        assert by_layer == [
            walked_macs(network.conv1, inputs, ones, clip),  # the controller reads all of the first layer
            walked_macs(network.conv2, pooled, read2, clip),
            walked_macs(network.conv3, alive3, third, clip),
        ]
    total = count.executed - count.whole - count.controller
    assert torch.equal(total, torch.stack([layer.executed for layer in count.layers]).sum(0))


def test_nominal_macs_are_the_published_ones_and_the_controller_costs_under_one_percent() -> None:
    published = {"c3d": 38.5e9, "r2plus1d-18": 40.5e9}
    for name, macs in published.items():
        graph = prune(models.create(name), (3, 16, 112, 112))
        count = MacCounter(graph).count([], 1)
        assert count.nominal == pytest.approx(macs, rel=2e-3)
        assert count.controller < 0.01 * count.dense
    small = MacCounter(prune(models.create("c3d-mini"), (1, 16, 32, 32))).count([], 1)
    assert 0 < small.controller < 0.01 * small.dense


def test_a_linear_layer_counts_for_each_row_that_it_maps() -> None:
    graph, _ = trace(Logits(models.create("transnetv2")).eval(), (50, 27, 48, 3))
    assert MacCounter(graph).count([], 1).whole == 50 * ((256 * 3 * 6 + 256) * 1024 + 2 * 1024)  # by frames


def test_random_masks_keep_the_share_asked_for() -> None:
    graph = keep_at_random(prune(Three(), SHAPE), torch.rand(8, *SHAPE), {"frames": 0.5, "channels": 1.0}, seed=7)
    with torch.no_grad():
        graph(torch.rand(64, *SHAPE))
    for site in controller_of(graph).decisions:
        frames, channels, positions = (float(mask.mean()) for mask in site if mask is not None)
        assert 0.3 < frames < 0.7
        assert channels == positions == 1


def test_residual_networks_are_masked_and_counted() -> None:
    graph = pruned_at_random(models.create("r2plus1d-mini"), (1, 16, 32, 32), seed=5)
    with torch.no_grad():
        graph(torch.rand(2, 1, 16, 32, 32))
    count = MacCounter(graph).count(controller_of(graph).decisions, 2)
    assert (count.executed < 0.8 * count.dense).all()
    ones = [Masks(*(torch.ones_like(m) for m in site if m is not None)) for site in controller_of(graph).decisions]
    assert float(MacCounter(graph).count(ones, 2).executed[0]) == count.dense + count.controller


# ---- export ----


def test_exported_graph_equals_the_masked_network() -> None:
    graph = pruned_at_random(models.create("c3d-mini", num_classes=8), (1, 16, 32, 32), seed=4)
    clips = torch.rand(3, 1, 1, 16, 32, 32) * torch.rand(3, 1, 1, 16, 1, 1)
    program = torch.export.export(graph, (clips[0],))
    outputs = []
    for clip in clips:
        with torch.no_grad():
            expected = graph(clip)
            outputs.append(program.module()(clip))
        assert torch.equal(outputs[-1], expected)
    assert not torch.equal(outputs[0], outputs[1])
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.gt.Tensor") == 18, "one comparison an axis and site, and nothing data-dependent"


def test_onnx_carries_the_decisions_to_the_kernels(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    graph = pruned_at_random(Three(), SHAPE, seed=1)
    path = tmp_path / "pruned.onnx"
    torch.onnx.export(graph, (torch.rand(1, *SHAPE),), dynamo=True, verbose=False).save(str(path))
    imported = import_model(path)
    layers = {layer.name: layer for layer in lower(imported.mod, load_target("host"), Options(conv="direct")).layers}
    skipped = [layer.skips for layer in layers.values() if layer.kind == "conv3d" and layer.skips]
    assert len(skipped) == 2, "both convolutions behind the first"
    assert {"output frames", "output positions", "output channels"} <= set(skipped[0])


# ---- where training starts ----


class Echo(nn.Module):
    """The second convolution's later eight channels repeat its first eight, so the third can do without them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv3d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv3d(8, 16, (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1))
        self.conv3 = nn.Conv3d(16, 8, (3, 1, 1), stride=(2, 1, 1), dilation=(2, 1, 1), padding="valid")
        self.fc = nn.Linear(8, 3)
        with torch.no_grad():
            for parameter in self.conv2.parameters():
                parameter[8:] = 2 * parameter[:8].flip(0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        scores: Tensor = self.fc(x.mean((2, 3, 4)))
        return scores


def keeping(graph: torch.fx.GraphModule, kept: list[list[int]]) -> torch.fx.GraphModule:
    """Sets the controller so that every clip keeps these channel groups (1 or 0) of each site."""
    controller_of(graph).start_channels([torch.tensor(groups).float() * 2 - 1 for groups in kept])
    return graph.eval()


def test_fitted_weights_do_without_channels_that_others_tell() -> None:
    graph = keeping(prune(Echo(), SHAPE, axes=["channels"]), [[1], [1, 0], [1]])
    dense = Echo().eval()
    clips, others = torch.rand(2, 6, *SHAPE)
    with torch.no_grad():
        lost = float((graph(others) - dense(others)).abs().max())
        refit(graph, clips)
        left = float((graph(others) - dense(others)).abs().max())
    assert lost > 0.01
    assert left < 0.02 * lost
    for name in ("conv1.weight", "conv2.weight"):
        assert torch.equal(graph.state_dict()[name], dense.state_dict()[name]), "nothing pruned is read here"


def test_fitting_moves_batch_norm_by_what_the_mean_still_differs() -> None:
    network = Three()
    network.conv2 = nn.Sequential(nn.Conv3d(8, 12, 3, padding=1, bias=False), nn.BatchNorm3d(12))
    dense = copy.deepcopy(network).eval()
    graph = keeping(prune(network, SHAPE, axes=["channels"], group=4), [[1, 0], [1, 0, 1], [1, 1]])
    clips = torch.rand(6, *SHAPE)
    seen: list[Tensor] = []
    for model in (dense, graph):
        model.get_submodule("conv2.1").register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        refit(graph, clips)
        seen.clear()
        dense(clips)
        graph(clips)
    torch.testing.assert_close(seen[0].mean((0, 2, 3, 4)), seen[1].mean((0, 2, 3, 4)), rtol=0, atol=1e-5)
    assert not graph.training


def test_what_matters_least_for_its_work_is_left_out_first() -> None:
    network = Three()
    with torch.no_grad():
        network.conv2.weight[:, :4] *= 1e-3  # the second convolution hardly reads the first group
        network.conv3.weight[:, 8:] *= 1e-3
    graph = prune(network, SHAPE, axes=["channels"], group=4)
    torch.manual_seed(0)
    clips = torch.rand(4, *SHAPE)
    leave_out_least(graph, clips, Classification().probe, target=0.55, floor=0.3)
    with torch.no_grad():
        graph.eval()(clips)
    decisions = controller_of(graph).decisions
    first, second, _ = (site.channels[0, ::4, 0, 0, 0].tolist() for site in decisions if site.channels is not None)
    assert first == [0, 1]
    assert second[2] == 0
    count = MacCounter(graph).count(decisions, len(clips))
    assert 0.3 < float(count.executed.mean() / count.dense) <= 0.55
    assert all(torch.equal(mask[0], mask[1]) for site in decisions for mask in site if mask is not None)


def test_no_site_falls_below_its_floor() -> None:
    graph = prune(Three(), SHAPE, axes=["channels"], group=4)
    leave_out_least(graph, torch.rand(2, *SHAPE), Classification().probe, target=0.01, floor=0.6)
    with torch.no_grad():
        graph.eval()(torch.rand(1, *SHAPE))
    kept = [int(site.channels[0].sum()) // 4 for site in controller_of(graph).decisions if site.channels is not None]
    assert kept == [1, 2, 1]


class Gated(Three):
    """A gate of its input's mean scales the second convolution's result: no work of others depends on its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv3d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        gate = F.relu(self.gate(x.mean((2, 3, 4), keepdim=True))).mean(1, keepdim=True)
        return self.fc(F.relu(self.conv3(F.relu(self.conv2(x)) * gate)).mean((2, 3, 4)))


def test_channels_whose_absence_saves_nothing_are_ranked_too() -> None:
    graph = prune(Gated(), SHAPE, axes=["channels"], group=4)
    leave_out_least(graph, torch.rand(2, *SHAPE), Classification().probe, target=0.5, floor=0.5)
    assert all(parameter.isfinite().all() for parameter in controller_of(graph).parameters())


def test_the_start_needs_channels() -> None:
    with pytest.raises(DanceError, match="add them to axes"):
        AAP(start=4, axes="positions")
    with pytest.raises(DanceError, match="set start as well"):
        AAP(refit=4)


def test_training_starts_at_its_budget_and_is_drawn_to_the_dense_activations(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (40, 27, 48, 3), np.uint8)
    splits = Splits("frames", FrameWindows([frames[:32]], 8, 8), FrameWindows([frames[32:]], 8, 8), "distillation")
    options = {"target_macs": 0.6, "axes": "channels", "group": 4, "ramp": 0.0, "start": 2, "floor": 0.3}

    def trained(**more: float) -> training.Result:
        torch.manual_seed(0)
        teacher, student = (Logits(models.create("transnetv2", filters=4)) for _ in range(2))
        settings = Settings(
            method="aap", model="transnetv2", data="frames", epochs=2, batch=2, lr=3e-4, options={**options, **more}
        )
        folder = tmp_path / "-".join(more)
        result = training.train(settings, student, splits, folder, task=Distillation(teacher))
        assert all(0.3 < row["share"] <= 0.62 for row in result.history)
        return result

    cut, fitted = trained(hint=10.0), trained(hint=10.0, refit=4)
    assert cut.history[-1]["loss/hint"] < 0.95 * cut.history[0]["loss/hint"]
    assert fitted.history[0]["loss/hint"] < 0.3 * cut.history[0]["loss/hint"], "gradients have not come as far"
    tensors, card = checkpoint.read_checkpoint(fitted.folder / "model.safetensors")
    again = prune(Logits(models.create("transnetv2", filters=4)), (8, 27, 48, 3), **card["dance"]).eval()
    checkpoint.load_weights(again, checkpoint.without_prefix("network", tensors), fitted.folder)
    clip = splits.held_out[0][0][None]
    with torch.no_grad():
        assert torch.equal(again(clip)[0], fitted.network(clip)[0])


def test_an_unpruned_network_lacks_nothing_of_the_dense_activations() -> None:
    method, data = AAP(hint=1.0, keep_norm=True), MotionDigits(8, size=24, frames=8)
    shape = data.shape
    context = Context("three", shape, 3, 1, 4, 2, 0, torch.device("cpu"), data, Classification())
    graph = method.prepare(Three().eval(), context).train()
    method.epoch_started(graph, 0)
    batch = Batch(torch.rand(2, *shape), torch.zeros(2, dtype=torch.long), torch.arange(2))

    def hint() -> float:
        return float(method.losses(graph, graph(batch.clips), batch)["hint"].detach())

    assert hint() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        graph.get_submodule("conv2").weight.mul_(1.1)
    assert hint() > 1e-4


# ---- training ----


def test_small_batches_may_leave_batch_norm_as_it_came(tmp_path: Path) -> None:
    data = "motion-digits,train=8,test=8,size=24,frames=8"

    def trained(keep: bool) -> dict[str, Tensor]:
        options = {"target_macs": 0.5, "keep_norm": keep}
        out = tmp_path / str(keep)
        done = run(method="aap", model="c3d-mini", data=data, out=out, epochs=1, batch=4, threads=1, options=options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # attributes that a call would leave behind
            write_export(done, out / "model.pt2")
        return checkpoint.without_prefix("network", checkpoint.read_checkpoint(out / "model.safetensors")[0])

    kept, moved = trained(True), trained(False)
    own = "bn3b.running_mean"
    assert not kept[own].any(), "as it came"
    assert moved[own].any()
    assert kept["controller.norm.running_mean"].any(), "the controller's own is new and has to learn"


def test_targets_are_shares_percents_or_counts() -> None:
    assert [parse_amount(value) for value in ("0.4", "40%", "120M", 0.4)] == [0.4, 0.4, 120e6, 0.4]
    assert AAP(target_macs="40%").options.target_macs == pytest.approx(0.4)
    assert AAP(axes="frames+channels").options.axes == ("frames", "channels")
    with pytest.raises(DanceError, match="axes"):
        AAP(axes="colours")


def test_networks_without_two_convolutions_are_refused() -> None:
    with pytest.raises(DanceError, match="two are needed"):
        trace(nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU()), SHAPE)
    with pytest.raises(DanceError, match="does not take clips of shape"):
        trace(models.create("c3d-mini"), (3, 16, 32, 32))


def test_shortened_training_moves_towards_its_budget(tmp_path: Path) -> None:
    data = "motion-digits,train=96,test=32,size=24,frames=8"
    common = {"model": "c3d-mini", "data": data, "batch": 16, "threads": 1}
    amplified = run(method="ava", out=tmp_path / "ava", epochs=1, lr=2e-3, **common)
    assert amplified.history[-1]["variability"] > 0
    options = {
        "target_macs": 0.4, "compute": 6.0, "ramp": 0.3, "grid": 6, "controller_rate": 20, "threshold_rate": 40,
        "momentum": 0.3,
    }  # fmt: skip
    start = tmp_path / "ava" / "model.safetensors"
    pruned = run(method="aap", out=tmp_path / "aap", epochs=4, lr=2e-3, init=start, options=options, **common)
    shares = [row["share"] for row in pruned.history]
    assert 0.2 < shares[-1] < 0.6, "two dozen steps lead near the target and not past it"

    loaded, card = load(tmp_path / "aap" / "model.safetensors")
    clip = torch.rand(2, 1, 8, 24, 24)
    with torch.no_grad():
        assert torch.equal(loaded(clip), pruned.network(clip))
    assert card["macs"]["controller"] < 0.03 * card["macs"]["dense"]
    assert card["dance"]["axes"] == list(AXES)


def test_transnet_is_pruned_without_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, student = (Logits(models.create("transnetv2", filters=2)) for _ in range(2))
    frames = np.random.default_rng(0).integers(0, 256, (64, 27, 48, 3), np.uint8)
    splits = Splits("frames", FrameWindows([frames[:48]], 8, 8), FrameWindows([frames[48:]], 8, 8), "distillation")
    settings = Settings(
        method="aap", model="transnetv2", data="frames", epochs=1, batch=4, options={"target_macs": 0.5}
    )
    result = training.train(settings, student, splits, tmp_path, task=Distillation(teacher))
    assert {"f1", "agreement", "difference", "share"} <= result.metrics.keys()
    assert result.metrics["share"] > 0.95, "a controller that has hardly begun prunes little"
    # Untrained networks call frames of noise by a hair: how many stay the same depends on the processor's rounding.
    assert result.metrics["agreement"] > 0.5


def test_distillation_weighs_boundaries_as_much_as_all_other_frames() -> None:
    class Says(nn.Module):
        def forward(self, clips: Tensor) -> Tensor:
            return torch.full(clips.shape, -10.0).index_fill(1, torch.tensor([3]), 10.0)

    task = Distillation(Says())
    batch = Batch(torch.zeros(1, 100), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    truth = Says()(batch.clips)
    assert float(task.loss(truth.clone(), batch)) == pytest.approx(0, abs=1e-6)
    missed = float(task.loss(truth.index_fill(1, torch.tensor([3]), -10.0), batch))
    invented = float(task.loss(truth.index_fill(1, torch.tensor([50]), 10.0), batch))
    everywhere = float(task.loss(-truth.index_fill(1, torch.tensor([3]), -10.0), batch))
    assert missed == pytest.approx(10, rel=0.01)
    assert invented == pytest.approx(missed / 99, rel=0.01)
    assert everywhere == pytest.approx(missed, rel=0.01)


def test_a_network_that_imitates_trains_as_it_is_used(tmp_path: Path) -> None:
    modes: list[dict[str, bool]] = []

    class Watched(AAP):
        def losses(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
            modes.append({name: module.training for name, module in network.named_modules()})
            return super().losses(network, outputs, batch)

    teacher, student = (Logits(models.create("transnetv2", filters=2)) for _ in range(2))
    before = {name: value.clone() for name, value in student.state_dict().items() if "running" in name}
    frames = np.random.default_rng(0).integers(0, 256, (32, 27, 48, 3), np.uint8)
    splits = Splits("frames", FrameWindows([frames[:16]], 8, 8), FrameWindows([frames[16:]], 8, 8), "distillation")
    settings = Settings(method="aap", model="transnetv2", data="frames", epochs=1, batch=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dance_tvm.sparsity.dance.method.AAP", Watched)
        result = training.train(settings, student, splits, tmp_path, task=Distillation(teacher))
    assert all(not mode["network.dropout"] and not mode["network.stacks.0.cells.0.bn"] for mode in modes)
    assert modes
    assert all(mode["controller.norm"] for mode in modes), "the controller's own norm learns"
    after = result.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ---- the network that ships ----


def held_out_clips(count: int) -> tuple[Tensor, Tensor]:
    clips = MotionDigits(count, held_out=True)
    return torch.stack([clips[index][0] for index in range(count)]), torch.arange(count) % 8


def test_the_shipped_network_does_what_its_card_says() -> None:
    network, card = load(SHIPPED)
    assert SHIPPED.stat().st_size < 5e6
    assert json.loads(SHIPPED.with_suffix(".json").read_text()) == card
    assert card["command"].startswith("python -m benchmarks.dance train")
    clips, labels = held_out_clips(128)
    with torch.no_grad():
        scores = network(clips)
        count = MacCounter(network).count(controller_of(network).decisions, len(clips))
        assert torch.equal(models.create("dance-c3d-mini")(clips[:2]), network(clips[:2]))
    assert float((scores.argmax(1) == labels).float().mean()) == pytest.approx(card["metrics"]["accuracy"], abs=0.04)
    shares = count.executed / count.dense
    assert float(shares.mean()) == pytest.approx(card["metrics"]["share"], abs=0.03)
    assert float(shares.mean()) < 0.5, "half of the MACs at most"
    assert float(shares.max() - shares.min()) > 0.1, "easy clips need less than hard ones"


def test_the_shipped_network_is_asked_for_its_own_classes_only() -> None:
    assert DEFAULT_MODEL == "dance-c3d-mini"
    with pytest.raises(DanceError, match="knows 8 motions, not 5"):
        models.create("dance-c3d-mini", num_classes=5)


def test_a_file_of_another_method_holds_no_controller(tmp_path: Path) -> None:
    checkpoint.write_checkpoint(tmp_path / "dense.safetensors", {"a": torch.ones(1)}, {"settings": {"method": "dense"}})
    with pytest.raises(DanceError, match="was trained by --method dense, not aap"):
        load(tmp_path / "dense.safetensors")


# ---- compiled ----


class SmallTiles:
    """A log of tiles that LLVM compiles in a fifth of the time; what is computed and skipped is the same with any."""

    def advise(self, workload: Workload) -> Advice | None:
        names = ("mr", "vectors", "step", "block_tiles", "segment_taps", "depth_block", "panels_outer")
        decisions = dict(zip(names, (2, 1, 1, 4, 3, 64, 0), strict=True))
        return Advice(workload, decisions, "the test's") if workload.family == GATHER else None


def test_the_shipped_network_compiled_executes_the_counted_macs_and_gives_the_same_scores(tmp_path: Path) -> None:
    graph, _ = load(SHIPPED)
    clips, _ = held_out_clips(12)
    # Winograd kernels skip whole tiles and count no multiplications.
    options = Options(threads=1, conv="direct", tuning=SmallTiles())
    built = build_network(DEFAULT_MODEL, tmp_path / "artifact", options=options, check=False)
    name = built.artifact.manifest.inputs[0].name
    counter, shares = MacCounter(graph), set()
    with open_device("local") as device:
        compiled = device.load(built.artifact)
        for clip in clips[:, None]:
            with torch.no_grad():
                expected = graph(clip).numpy()
            count = counter.count(controller_of(graph).decisions, 1)
            (found,) = compiled.run({name: clip.numpy()}).values()
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
            kernels = compiled.kernels({name: clip.numpy()}, repeats=0)
            executed = sum(call.work["macs"] for call in kernels if call.work)
            assert executed == int(count.executed[0])
            shares.add(executed)
    assert len(shares) > 1, "clips differ in what they need"
