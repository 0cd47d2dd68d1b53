"""Kernel-group schemes, exact accounting and one global rate."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dance_tvm import models
from dance_tvm.core.errors import DanceError
from dance_tvm.liveness.kernel_groups import find_kernel_groups
from dance_tvm.models.macs import count
from dance_tvm.sparsity.rt3d.masks import add_mask, bake_masks, set_mask
from dance_tvm.sparsity.rt3d.pruning import FLOOR, find_layers, magnitude, prune_to_rate, select, weight_masks
from dance_tvm.sparsity.rt3d.schemes import SCHEMES, Scheme

KERNELS = [(1, 1, 1), (3, 1, 1), (1, 3, 3), (2, 3, 3), (3, 3), (5,)]


class Chain(nn.Module):
    """Three convolutions of channel counts that no group divides, ReLU and pooling between them, one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 10, 3, padding=1)
        self.norm = nn.BatchNorm3d(10)
        self.second = nn.Conv3d(10, 21, 3, padding=1)
        self.third = nn.Conv3d(21, 13, (1, 3, 3), padding=(0, 1, 1))
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.last = nn.Linear(13, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = torch.relu(self.second(self.pool(x)))
        return self.last(self.third(x).mean((2, 3, 4)))


def clip() -> torch.Tensor:
    return torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@given(
    name=st.sampled_from(SCHEMES),
    filters=st.integers(1, 19),
    channels=st.integers(1, 13),
    kernel=st.sampled_from(KERNELS),
    gm=st.sampled_from([4, 8, 16]),
    gn=st.sampled_from([1, 4, 8]),
)
@settings(max_examples=60, deadline=None)
def test_units_cover_every_weight_exactly_once(name, filters, channels, kernel, gm, gn):
    scheme = Scheme(name, gm, gn)
    weight = torch.randint(-4, 5, (filters, channels, *kernel)).double()
    units = scheme.sums(weight)
    numbered = scheme.expand(torch.arange(units.numel()).reshape(units.shape), weight)
    sizes = torch.bincount(numbered.flatten(), minlength=units.numel()).reshape(units.shape)
    sums = torch.zeros(units.numel(), dtype=torch.float64).index_add(0, numbered.flatten(), weight.flatten())
    assert torch.equal(scheme.sizes(weight), sizes)
    assert torch.equal(units, sums.reshape(units.shape))


def test_norms_follow_the_paper_and_mix_l1_with_l2():
    scheme = Scheme("kgs", 2, 2)
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).reshape(2, 2, 1, 1, 1)
    assert scheme.norms(weight).item() == pytest.approx(5)
    assert scheme.norms(weight, mix=1).item() == pytest.approx(7 / 2)
    assert scheme.norms(weight, mix=0.5).item() == pytest.approx((5 + 3.5) / 2)
    zero = torch.zeros(2, 2, 1, 1, 1, requires_grad=True)
    scheme.norms(zero, mix=0.5).sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize(
    ("model", "rate", "paper"),
    [("c3d", 2.6, 15.2e9), ("c3d", 3.6, 10.8e9), ("r2plus1d-18", 2.6, 15.9e9), ("r2plus1d-18", 3.2, 12.7e9)],
    ids=str,
)
def test_macs_at_one_global_rate_agree_with_the_paper(model, rate, paper):
    # Table 1 calls multiply-accumulates FLOPs: C3D's 15.2 G x 2.6 is its 38.5 G multiply-accumulates.
    network = models.create(model)
    report = prune_to_rate(network, models.example_inputs(model), "kgs", rate)
    assert report.rate == pytest.approx(rate, rel=0.001)
    assert report.macs == pytest.approx(paper, rel=0.03)
    for layer in report.layers:
        groups = find_kernel_groups(network.get_submodule(layer.name).weight.detach().numpy(), 8, 4)
        assert groups.scheme == ("kgs" if groups.taps > 1 else "vanilla")
        assert groups.live_weights == layer.live_weights


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rate", [1.0, 1.7, 3.0])
def test_the_report_counts_the_zeros_that_are_there(scheme, rate):
    network = Chain()
    dense = count(network, clip())
    report = prune_to_rate(network, [clip()], scheme, rate, gm=4, gn=4)
    assert report.dense_macs == dense
    assert report.rate >= rate
    positions = {"second": 2 * 4 * 4 * 4, "third": 2 * 4 * 4 * 4}
    live = {name: int(network.get_submodule(name).weight.count_nonzero()) for name in positions}
    assert {layer.name: layer.live_weights for layer in report.layers} == live
    zeros = {name: network.get_submodule(name).weight.numel() - live[name] for name in positions}
    assert report.macs == dense - sum(zeros[name] * positions[name] for name in positions)
    assert report.parameters == report.dense_parameters - sum(zeros.values())
    assert network.first.weight.all(), "the first convolution stays dense"


@pytest.mark.parametrize("scheme", ["vanilla", "kgs"])
def test_no_more_than_needed_is_removed(scheme):
    network = Chain()
    report = prune_to_rate(network, [clip()], scheme, 2.0, gm=4, gn=4)
    one_unit = 4 * 4 * (27 if scheme == "vanilla" else 1) * 128
    assert report.dense_macs / 2 - one_unit < report.macs <= report.dense_macs / 2


def test_parameters_can_be_the_budget():
    network = models.create("c3d-mini")
    report = prune_to_rate(network, models.example_inputs("c3d-mini"), "kgs", 2.0, budget="parameters")
    assert report.dense_parameters / report.parameters == pytest.approx(2, rel=0.01)


def test_a_pruned_filter_takes_its_channel_out_of_the_next_layer():
    network = Chain()
    prune_to_rate(network, [clip()], "filter", 2.0)
    dead = ~network.second.weight.flatten(1).any(1)
    assert dead.any()
    assert not network.third.weight[:, dead].any()
    groups = find_kernel_groups(network.third.weight.detach().numpy(), 4, 4)
    assert groups.scheme == "filter"
    assert len(groups.live_channels) == 21 - int(dead.sum())


def test_residual_sums_do_not_link_channels():
    network = models.create("r2plus1d-mini")
    layers = {
        layer.name: layer.source for layer in find_layers(network, *models.example_inputs("r2plus1d-mini")).layers
    }
    assert layers["layer2.0.conv1.temporal"] == "layer2.0.conv1.spatial"
    assert layers["layer2.0.conv2.spatial"] == "layer2.0.conv1.temporal"
    assert layers["layer3.0.conv1.spatial"] is None


def test_every_layer_keeps_its_best_units_and_an_unreachable_rate_is_refused():
    network = Chain()
    with torch.no_grad():
        network.third.weight.mul_(1e-6)
    prunable = find_layers(network, clip())
    scheme = Scheme("kgs", 4, 4)
    flat_scores = {layer.name: scheme.sums(layer.weight.abs()) for layer in prunable.layers}
    keep = select(prunable, scheme, flat_scores, 2.0)
    assert keep["third"].sum() == round(FLOOR * keep["third"].numel())
    assert magnitude(prunable, scheme)["third"].mean() > 0.5, "the layer's own scale does not count against it"
    with pytest.raises(DanceError, match="cannot be reached"):
        select(prunable, scheme, flat_scores, 1000)
    with pytest.raises(DanceError, match="rate"):
        select(prunable, scheme, flat_scores, 0.5)


def test_grouped_convolutions_stay_dense_with_a_reason():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1))
    prunable = find_layers(network, torch.zeros(1, 3, 8, 8))
    assert [layer.name for layer in prunable.layers] == ["2"]
    assert prunable.why_dense.keys() == {"0", "1"}


def test_masked_weights_stay_exactly_zero_while_training_and_after_baking():
    network = Chain()
    prunable = find_layers(network, clip())
    scheme = Scheme("kgs", 4, 4)
    masks = weight_masks(prunable, scheme, select(prunable, scheme, magnitude(prunable, scheme), 2.0))
    names = list(network.state_dict())
    for name, mask in masks.items():
        add_mask(network.get_submodule(name))
        set_mask(network.get_submodule(name), mask)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(clip()).square().sum().backward()
        optimizer.step()
    before = network.eval()(clip())
    bake_masks(network)
    assert sorted(network.state_dict()) == sorted(names)
    assert torch.equal(network(clip()), before)
    for name, mask in masks.items():
        weight = network.get_submodule(name).weight
        assert torch.equal(weight != 0, mask), "zero where masked, trained everywhere else"


def test_zeros_survive_torch_export_and_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import numpy_helper

    network = Chain().eval()
    prune_to_rate(network, [clip()], "kgs", 2.0, gm=4, gn=4)
    exported = torch.export.export(network, (clip(),))
    torch.export.save(exported, tmp_path / "chain.pt2")
    loaded = torch.export.load(tmp_path / "chain.pt2").state_dict
    torch.onnx.export(network, (clip(),), tmp_path / "chain.onnx", dynamo=True, verbose=False)
    in_onnx = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "chain.onnx").graph.initializer]
    for name in ("second", "third"):
        weight = network.get_submodule(name).weight.detach().numpy()
        np.testing.assert_array_equal(loaded[f"{name}.weight"].detach().numpy(), weight)
        assert any(other.shape == weight.shape and np.array_equal(other, weight) for other in in_onnx)
        assert find_kernel_groups(weight, 4, 4).scheme == "kgs"
