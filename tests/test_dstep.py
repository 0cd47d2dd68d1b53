"""D-STEP: equation 1 by pixel, policies, counts, losses, clips against streams, export, and training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.random_policies import (
    Mix,
    example_clip,
    needed_share,
    random_policies,
    with_mix,
)
from dance_tvm import export_dstep, train
from dance_tvm.core.errors import DanceError
from dance_tvm.models.resnet import BasicBlock, VideoResNet, resnet18, resnet50, resnet_mini
from dance_tvm.sparsity.dstep import export, flops, losses
from dance_tvm.sparsity.dstep.method import DSTEP, load_trained
from dance_tvm.sparsity.dstep.network import DStepOptions, DStepResNet, Merged, Stream, merge
from dance_tvm.sparsity.dstep.policy import Decision, SpatialPolicy, TemporalPolicy, gumbel_sigmoid

SKIP, REUSE, COMPUTE = 0, 1, 2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only lose time to a thread pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decision_of(ways: Tensor, mask: Tensor) -> Decision:
    """From each frame's and channel's way (T*N, C) and mask (T*N, h, w)."""
    compute, reuse = ((ways == way).float()[:, :, None, None] for way in (COMPUTE, REUSE))
    return Decision(None, mask.float().unsqueeze(1), compute, reuse)


def by_pixel(result: Tensor, ways: Tensor, mask: Tensor, count: int, before: Tensor | None) -> Tensor:
    """Equation 1 read literally: one number at a time."""
    merged = torch.zeros_like(result)
    for row, channel, i, j in itertools.product(*map(range, result.shape)):
        last = merged[row - count] if row >= count else before[row] if before is not None else None
        if not mask[row, i, j]:
            continue
        if ways[row, channel] == COMPUTE:
            merged[row, channel, i, j] = result[row, channel, i, j]
        elif ways[row, channel] == REUSE and last is not None:
            merged[row, channel, i, j] = last[channel, i, j]
    return merged


def drawn_ways(kind: str, rows: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    fixed = {"all compute": COMPUTE, "all reuse": REUSE, "all skip": SKIP}
    if kind in fixed:
        return torch.full((rows, channels), fixed[kind])
    ways = torch.randint(0, 3, (rows, channels), generator=generator)
    if kind == "computed once":
        ways[:2], ways[2:] = COMPUTE, REUSE
    return ways


@pytest.mark.parametrize("streamed", [False, True], ids=["from the first frame", "after a frame"])
@pytest.mark.parametrize("tiles", ["mixed tiles", "no tiles", "all tiles"])
@pytest.mark.parametrize("kind", ["mixed", "all compute", "all reuse", "all skip", "computed once"])
def test_merge_is_equation_1(kind, tiles, streamed):
    generator = torch.Generator().manual_seed(7)
    count, frames, channels, height, width = 2, 3, 4, 3, 5
    result = torch.randint(-9, 10, (frames * count, channels, height, width), generator=generator).float()
    ways = drawn_ways(kind, frames * count, channels)
    mask = torch.randint(0, 2, (frames * count, height, width), generator=generator).bool()
    mask = {"mixed tiles": mask, "no tiles": mask & False, "all tiles": mask | True}[tiles]
    before = torch.randint(-9, 10, (count, channels, height, width), generator=generator).float() if streamed else None
    last = None if before is None else Merged(before, (before != 0).amax((2, 3), keepdim=True).float())
    merged, live = merge(result, decision_of(ways, mask), count, last)
    assert torch.equal(merged * live, merged)  # what is not live is zero
    assert torch.equal(merged, by_pixel(result, ways, mask, count, before))


def test_without_a_channel_policy_only_tiles_are_zeroed():
    result, mask = torch.ones(2, 3, 2, 2), torch.tensor([[[[1.0, 0], [0, 1]]], [[[0.0, 0], [1, 1]]]])
    merged = merge(result, Decision(None, mask, torch.ones(2, 1, 1, 1), None), 1, None).maps
    assert torch.equal(merged, mask.expand_as(result))


# ---- policies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 8), (13, 10), (3, 17), (5, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_tiles_cover_maps_they_do_not_divide(height, width, stride):
    policy = SpatialPolicy(3, 4, stride).eval()
    x = torch.randint(-8, 9, (2, 3, height, width)).double()
    out_height, out_width = -(-height // stride), -(-width // stride)
    averages = policy.double().average(x)
    assert averages.shape[2:] == (math.ceil(out_height / 4), math.ceil(out_width / 4))
    tiles = torch.randint(0, 2, (2, 1, *averages.shape[2:])).double()
    mask = policy.upsampled(tiles, out_height, out_width)
    for row, i, j in itertools.product(range(2), range(out_height), range(out_width)):
        assert mask[row, 0, i, j] == tiles[row, 0, i // 4, j // 4]
    over_input = torch.nn.functional.interpolate(tiles, scale_factor=4 * stride)[:, :, :height, :width]
    means = policy.masked_means(averages, tiles, height * width)
    torch.testing.assert_close(means, (x * over_input).mean((2, 3)))


def test_a_tile_is_kept_where_its_rounded_gate_is_1():
    policy = SpatialPolicy(2, 2, 1).eval()
    averages = torch.randint(-3, 4, (4, 2, 5, 5)).float()
    policy.conv.weight.data = torch.randint(-2, 3, policy.conv.weight.shape).float()
    policy.conv.bias.data.zero_()
    logits = policy.conv(averages)
    assert (logits == 0).any()  # a tie rounds to even: 0
    assert torch.equal(policy(averages, 1.0)[0], torch.sigmoid(logits).round())


def test_channels_take_the_largest_logit():
    policy = TemporalPolicy(2, 500, 4, reuse=True).eval()
    policy.fc2.weight.data.zero_()
    logits = torch.randint(0, 3, (3, 500)).float()  # skip, compute, reuse; many ties
    policy.fc2.bias.data = logits.flatten()
    compute, reuse = (way.flatten() for way in policy(torch.ones(1, 2), torch.ones(1, 2), 1.0)[0])
    assert set(compute.tolist()) == set(reuse.tolist()) == {0.0, 1.0}
    taken = torch.where(compute > 0, logits[1], torch.where(reuse > 0, logits[2], logits[0]))
    assert torch.equal(taken, logits.max(0).values)
    assert not (compute * reuse).any()


def test_two_ways_without_reuse():
    policy = TemporalPolicy(2, 3, 4, reuse=False).eval()
    policy.fc2.weight.data.zero_()
    policy.fc2.bias.data = torch.tensor([1.0, 0, 0, 0, 1, 0])
    compute, reuse = policy(torch.ones(1, 2), torch.ones(1, 2), 1.0)[0]
    assert reuse is None
    assert compute.flatten().tolist() == [0, 1, 1]


def test_channels_of_a_group_share_a_decision():
    policy = TemporalPolicy(2, 5, 4, reuse=True, group=3).eval()
    policy.fc2.weight.data.zero_()
    policy.fc2.bias.data = torch.tensor([0.0, 1, 1, 0, 0, 0])  # skip, compute, reuse of two groups
    compute, reuse = (way.flatten().tolist() for way in policy(torch.ones(1, 2), torch.ones(1, 2), 1.0)[0])
    assert compute == [1, 1, 1, 0, 0]
    assert reuse == [0, 0, 0, 0, 0]
    alone = TemporalPolicy(2, 5, 4, reuse=True)
    assert (policy.fc2.out_features, alone.fc2.out_features) == (6, 15)


def test_gumbel_sigmoid_is_hard_fair_and_differentiable():
    torch.manual_seed(0)
    logits = torch.tensor([-2.0, 0.0, 1.0]).repeat(20_000, 1).requires_grad_()
    drawn = gumbel_sigmoid(logits, 0.67)
    assert ((drawn - drawn.round()).abs() < 1e-6).all()
    torch.testing.assert_close(drawn.mean(0), torch.sigmoid(torch.tensor([-2.0, 0.0, 1.0])), atol=0.015, rtol=0)
    drawn.sum().backward()
    assert logits.grad is not None
    assert (logits.grad > 0).float().mean() > 0.99


def test_training_draws_and_evaluation_repeats():
    network = DStepResNet(resnet_mini(4, width=8), DStepOptions(tile=(2,), hidden=8))
    clip = torch.randn(1, 1, 4, 24, 24)
    network.train()
    with network.watched() as drawn:
        network(clip), network(clip)
    blocks = len(drawn) // 2
    assert any(not torch.equal(drawn[i].compute, drawn[i + blocks].compute) for i in range(blocks))
    network.eval()
    assert torch.equal(network(clip), network(clip))


# ---- one network, two forms ------------------------------------------------------------------------------------


def small(temporal: str, mix: Mix, size: tuple[int, int], **options) -> tuple[DStepResNet, Tensor]:
    torch.manual_seed(5)
    clip = example_clip((1, 6, *size), seed=2).double()
    base = resnet_mini(5, temporal, width=8).double()
    return with_mix(base, clip, mix, options=DStepOptions(tile=(4, 2, 3), hidden=8, **options), seed=1), clip


MIXES = {
    "mixed": Mix(0.6, 0.5, 0.3),
    "all computed": Mix(1, 1, 0),
    "all reused": Mix(1, 0, 1),
    "all skipped": Mix(1, 0, 0),
    "no tiles": Mix(0, 0.5, 0.3),
    "nothing skipped": Mix(0.7, 0.5, 0.5),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(("temporal", "group"), [("tsn", 1), ("tsm-online", 3)])
def test_a_stream_equals_the_clip(temporal, group, mix):
    network, clip = small(temporal, mix, (26, 23), group=group)
    stream = Stream(network, (1, 26, 23))
    with torch.no_grad():
        whole, state = network(clip), stream.start()
        for frame in clip.unbind(2):
            scores, *state = stream(frame, *state)
    torch.testing.assert_close(scores, whole, atol=1e-11, rtol=1e-11)


def test_the_mixes_are_what_they_say():
    for name, mix in MIXES.items():
        network, clip = small("tsn", mix, (26, 23))
        with network.watched() as decisions, torch.no_grad():
            network(clip)
        for decision in decisions:
            assert decision.tiles is not None
            assert decision.reuse is not None
            assert abs(float(decision.tiles.mean()) - mix.tiles) < 0.1, name
            assert abs(float(decision.compute.mean()) - mix.compute) < 0.1, name
            assert abs(float(decision.reuse.mean()) - mix.reuse) < 0.2, name


def test_all_skipped_leaves_the_shortcuts():
    network, clip = small("tsn", MIXES["all skipped"], (24, 24))
    dead = DStepResNet(resnet_mini(5, "tsn", width=8).double(), DStepOptions(tile=(4,), hidden=8)).eval()
    dead.load_state_dict(network.state_dict())
    for _, block in dead.residual_blocks():
        block.conv1.weight.data.normal_()  # what nobody reads may be anything
    torch.testing.assert_close(network(clip), dead(clip))


def test_a_fresh_state_forgets():
    network, clip = small("tsm-online", MIXES["mixed"], (24, 24))
    stream = Stream(network, (1, 24, 24))
    first, *state = stream(clip[:, :, 0], *stream.start())
    second, *_ = stream(clip[:, :, 0], *state)
    again, *_ = stream(clip[:, :, 0], *stream.start())
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_ablated_forms_keep_less_state():
    kept = {
        (spatial, reuse): Stream(
            small("tsn", Mix(0.6, 0.5, 0.3), (24, 24), spatial=spatial, reuse=reuse)[0], (1, 24, 24)
        )
        for spatial in (True, False)
        for reuse in (True, False)
    }
    assert kept[True, True].state_names == kept[False, True].state_names
    assert kept[True, False].state_names == ["scores", "frames"]
    with pytest.raises(DanceError, match="state tensors"):
        kept[True, True](torch.zeros(1, 1, 24, 24).double())


# ---- export ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["clip", "stream"])
def exported(request):
    clip = example_clip((1, 4, 20, 22), seed=2)
    base = VideoResNet(BasicBlock, (1, 1), temporal="tsm-online", num_classes=5, in_channels=1, width=8, stem="small")
    network = with_mix(base, clip, MIXES["mixed"], options=DStepOptions(tile=(4, 2), hidden=8), seed=1)
    if request.param == "clip":
        return network, (clip,)
    stream = Stream(network, (1, 20, 22)).eval()
    _, *state = stream(clip[:, :, 0], *stream.start())
    return stream, (clip[:, :, 1], *(tensor.detach() for tensor in state))


def test_torch_export_keeps_the_decisions_as_ordinary_operators(exported):
    network, inputs = exported
    program = torch.export.export(network, inputs)
    operators = {node.target.__name__ for node in program.graph.nodes if node.op == "call_function"} - {"getitem"}
    assert not [name for name in operators if "rand" in name or "cond" in name or "item" in name]
    assert {"gt.Scalar", "ge.Tensor", "maximum.default", "expand.default"} <= operators
    convolutions = [node for node in program.graph.nodes if "conv2d" in str(node.target)]
    frames = {node.meta["val"].shape[0] for node in convolutions}
    assert frames == {inputs[0].shape[2] if inputs[0].dim() == 5 else 1}  # one convolution handles all frames
    for ours, theirs in zip(as_tuple(network(*inputs)), as_tuple(program.module()(*inputs)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_onnx_computes_the_same(exported):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    network, inputs = exported
    program = torch.onnx.export(network, inputs, dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    evaluator = ReferenceEvaluator(program.model_proto)
    outputs = evaluator.run(None, dict(zip(evaluator.input_names, (x.numpy() for x in inputs), strict=True)))
    for ours, theirs in zip(as_tuple(network(*inputs)), outputs, strict=True):
        torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs.copy()), atol=1e-4, rtol=1e-4)


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


# ---- counts ----------------------------------------------------------------------------------------------------


def test_equation_2_by_its_sums():
    generator = torch.Generator().manual_seed(11)
    frames, channels, edge = 4, 5, 3
    ways = torch.randint(0, 3, (frames, channels), generator=generator)
    mask = torch.randint(0, 2, (frames, edge, edge), generator=generator)
    first = second = 0
    for t, c, i, j in itertools.product(range(frames), range(channels), range(edge), range(edge)):
        reused = t + 1 < frames and ways[t + 1, c] == REUSE
        first += int(mask[t, i, j] and (ways[t, c] == COMPUTE or reused))
        second += int(mask[t, i, j] and ways[t, c] != SKIP)
    shares = flops.paper_shares(decision_of(ways, mask), 1)
    whole = frames * channels * edge * edge
    assert shares.first.item() == pytest.approx(first / whole)
    assert shares.second.item() == pytest.approx(second / whole)


def test_needed_work_is_what_is_not_zero():
    """With nothing zero by chance, the merged map's live channels are counted exactly, padding left out."""
    ways = torch.tensor(
        [[REUSE, COMPUTE, SKIP], [REUSE, REUSE, REUSE], [COMPUTE, REUSE, COMPUTE], [REUSE, SKIP, REUSE]]
    )
    mask = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 1], [1, 0]]])
    network = VideoResNet(BasicBlock, (1,), in_channels=1, width=3, stem="small")
    decision = decision_of(ways, mask)
    merged = decision.mask * merge(torch.ones(4, 3, 2, 2), decision, 1, None).live
    ((first, second),) = flops.Needed(network, (1, 4, 4, 4)).macs([decision], 1)
    # On a map of 2x2 every output reads each of its four positions through one tap.
    computed = (ways == COMPUTE).float().sum(1)
    assert first.tolist() == (mask.sum((1, 2)) * 4 * 3 * computed).tolist()
    assert second.tolist() == (4 * 3 * merged.sum((1, 2, 3))).tolist()
    ((shown, used),) = flops.Needed(network, (1, 4, 4, 4)).shares([decision], 1)
    assert shown.item() == pytest.approx(first.mean().item() / (4 * 4 * 3 * 3))
    assert used.item() == pytest.approx(second.mean().item() / (4 * 4 * 3 * 3))


def test_a_dense_decision_costs_everything():
    network = DStepResNet(resnet_mini(5, "tsn"), DStepOptions(tile=(4,), hidden=8))
    dense = flops.dense_macs(network, (1, 8, 32, 32))
    full = flops.Shares(torch.ones(1), torch.ones(1))
    nothing = flops.Shares(torch.zeros(1), torch.zeros(1))
    blocks = len(dense.first)
    assert flops.network_share(dense, [full] * blocks).item() == 1
    rest = dense.total - sum(dense.first) - sum(dense.second)
    assert flops.network_share(dense, [nothing] * blocks).item() == pytest.approx(rest / dense.total, rel=1e-4)


@pytest.mark.parametrize(
    ("build", "parameters", "printed_gflops"), [(resnet18, 15.6e6, 0.14), (resnet50, 42.8e6, 0.62)]
)
def test_policies_cost_what_section_31_says(build, parameters, printed_gflops):
    """512 hidden units a block; the paper counts 4 per weight and frame, and prints 37.8 M (docs/dstep.md)."""
    with torch.device("meta"):
        network = DStepResNet(build(400), DStepOptions(tile=(4,), hidden=512))
    head = network.fc.weight.numel() + network.fc.bias.numel()
    spatial, temporal = flops.policy_macs(network, (3, 8, 224, 224))
    counted = sum(tensor.numel() for tensor in network.parameters()) - head
    counted -= sum(policy.spatial.conv.weight.numel() + 1 for policy in network.policies)
    assert abs(counted - parameters) < 0.05e6
    assert round(4 * temporal / 1e9, 2) == printed_gflops
    if build is resnet50:
        assert spatial < 0.0014 * 33.2e9


# ---- losses ----------------------------------------------------------------------------------------------------


def test_sparsity_loss_and_its_schedule():
    assert losses.sparsity_loss(torch.tensor([0.9, 0.7]), 0.6).item() == pytest.approx(0.04)
    weights = [losses.sparsity_weight(epoch, warmup=2, alpha=0.5, beta=0.3) for epoch in range(5)]
    assert weights == [0, 0] + [pytest.approx(0.5 * math.exp(0.3 * epoch)) for epoch in (2, 3, 4)]


def test_bounds_start_at_the_target_and_relax():
    assert losses.density_bounds(0, 8, 0.6) == (0.6, 1 - 0.4)
    assert losses.density_bounds(8, 8, 0.6) == losses.density_bounds(20, 8, 0.6) == (0.0, 1.0)
    least, largest = losses.density_bounds(4, 8, 0.6)
    assert least == pytest.approx(0.3)
    assert largest == pytest.approx(0.8)
    within = losses.bound_loss([torch.tensor([0.2, 0.6])], (0.3, 0.8))
    assert within == 0
    outside = losses.bound_loss([torch.tensor([1.0]), torch.tensor([0.1])], (0.3, 0.8))
    assert outside.item() == pytest.approx((0.2**2 + 0.2**2) / 2)


def test_gradients_reach_both_policies():
    torch.manual_seed(0)
    network = DStepResNet(resnet_mini(4, width=8), DStepOptions(tile=(2,), hidden=8)).train()
    dense = flops.dense_macs(network, (1, 4, 24, 24))
    with network.watched() as decisions:
        network(torch.randn(2, 1, 4, 24, 24))
    share = flops.network_share(dense, [flops.paper_shares(one, 2) for one in decisions])
    losses.sparsity_loss(share, 0.2).backward()
    for policy in network.policies:
        assert policy.spatial.conv.bias.grad.abs() > 0
        assert policy.temporal.fc2.bias.grad.abs().sum() > 0


# ---- random policies, training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.6, 0.4])
def test_random_policies_leave_the_wanted_share(target):
    clip = example_clip((3, 4, 64, 64), seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = resnet18(10, "tsn")
    network = random_policies(base, clip, target, options=DStepOptions(tile=(4, 4, 2, 2), hidden=64), tolerance=0.01)
    assert needed_share(network, clip).item() == pytest.approx(target, abs=0.011)
    other = example_clip((3, 4, 64, 64), seed=9)
    assert needed_share(network, other).item() == pytest.approx(target, abs=0.15)
    with network.watched() as decisions, torch.no_grad():
        network(other)
    assert all(set(one.compute.unique().tolist()) == {0.0, 1.0} for one in decisions)
    # Frames decide for themselves, but for blocks whose few tiles are all left out.
    assert sum(not torch.equal(one.compute[0], one.compute[1]) for one in decisions) >= len(decisions) // 2


def test_unreachable_shares_are_refused():
    with pytest.raises(DanceError, match="choose another share"):
        random_policies(resnet_mini(5), example_clip((1, 4, 24, 24)), 0.05, options=DStepOptions(tile=(4,), hidden=8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dstep")
    torch.manual_seed(0)
    return train.run(
        method="dstep",
        model="resnet-mini",
        data="motion-digits,train=32,test=16,size=24,frames=8",
        out=folder,
        threads=1,
        options={"target_flops": 0.5, "alpha": 30.0, "beta": 0.0, "warmup_share": 0.2, "policy_lr": 10.0},
        epochs=5,
        batch=4,
        lr=5e-3,
    )


def test_training_reaches_the_target(trained):
    flops_by_epoch = [row["flops"] for row in trained.history]
    assert trained.history[0]["loss/sparsity"] == 0
    assert trained.history[1]["loss/sparsity"] > 0
    assert abs(flops_by_epoch[-1] - 0.5) < 0.12
    assert all(row["needed"] <= row["flops"] + 1e-6 for row in trained.history)


def test_a_trained_network_loads_and_decides_alike(trained):
    network, card = load_trained(trained.folder / "model.safetensors")
    clip = example_clip((1, 8, 24, 24))
    assert torch.equal(network(clip), trained.network(clip))
    assert card["target_flops"] == 0.5
    assert network.options.tile == (4, 2, 2)


def test_wrong_options_are_told(tmp_path):
    with pytest.raises(DanceError, match="target_flops"):
        DSTEP(target_flops=1.5)
    with pytest.raises(DanceError, match="out of reach"):
        train.run(
            method="dstep", model="resnet-mini", data="motion-digits,train=8,test=8,frames=8", out=tmp_path,
            options={"target_flops": 0.01}, epochs=1, batch=8,
        )  # fmt: skip
    with pytest.raises(DanceError, match="choose --model resnet"):
        train.run(
            method="dstep", model="c3d-mini", data="motion-digits,train=8,test=8", out=tmp_path, epochs=1, batch=8
        )


def test_the_shipped_network_is_exported_to_where_the_user_is(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(export, "export_network", lambda _network, _shape, path, stream: written.append((path, stream)))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(export_dstep.app, ["--stream"])
    assert written == [(Path("stream.pt2"), True)]
    assert done.output == "next: dance-tvm build --model stream.pt2\n"
