"""Pruning inside the training loop: penalties, phases, the cut, and zeros that stay."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dance_tvm import models, train
from dance_tvm.core.errors import DanceError
from dance_tvm.liveness.kernel_groups import find_kernel_groups
from dance_tvm.sparsity.checkpoint import read_weights
from dance_tvm.sparsity.rt3d.importance import importance
from dance_tvm.sparsity.rt3d.penalty import Penalty
from dance_tvm.sparsity.rt3d.pruning import find_layers, layer_rms
from dance_tvm.sparsity.rt3d.schemes import Scheme

SMALL = "motion-digits,train=32,test=16,size=24,frames=8"


def two_layers() -> tuple[torch.nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 1), torch.nn.Conv2d(4, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3, stride=2)
    )
    return network, torch.rand(1, 1, 9, 9)


def test_group_lasso_is_equation_2_in_the_layers_own_unit():
    network, image = two_layers()
    prunable = find_layers(network, image)
    scheme = Scheme("kgs", 4, 2)
    penalty = Penalty(prunable, scheme, strength=0.5, mix=0, budget="parameters")
    expected = 0.0
    for layer in prunable.layers:
        weight = layer.weight.detach().numpy()
        unit = np.sqrt(np.mean(weight**2)) * np.sqrt(4 * 2)
        for m in range(0, weight.shape[0], 4):
            for n in range(0, weight.shape[1], 2):
                columns = weight[m : m + 4, n : n + 2].reshape(8, -1)
                expected += np.linalg.norm(columns, axis=0).sum() / unit
    assert penalty().item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_macs_weigh_the_layers_of_the_penalty():
    network, image = two_layers()
    prunable = find_layers(network, image)
    scheme = Scheme("kgs", 4, 2)
    macs = [layer.weight.numel() * layer.positions for layer in prunable.layers]
    for layer, share in zip(prunable.layers, macs, strict=True):
        plain = Penalty(prunable, scheme, budget="parameters")
        weighted = Penalty(prunable, scheme, budget="macs")
        (by_parameters,) = torch.autograd.grad(plain(), layer.weight)
        (by_macs,) = torch.autograd.grad(weighted(), layer.weight)
        torch.testing.assert_close(by_macs, by_parameters * share / np.mean(macs))


def test_reweighting_is_equation_3_and_presses_small_units_harder():
    network, image = two_layers()
    prunable = find_layers(network, image)
    layer = prunable.layers[0]
    with torch.no_grad():
        layer.weight[:4] *= 0.1
    penalty = Penalty(prunable, Scheme("kgs", 4, 4), mix=0, epsilon=0.25)
    penalty.reweight()
    rms = layer.weight.detach().reshape(2, 4, 4).square().mean((1, 2)).sqrt() / layer_rms(layer.weight)
    torch.testing.assert_close(penalty.penalties[layer.name].flatten(), 1 / (rms.square() + 0.25))
    assert penalty.penalties[layer.name][0].item() > 3 * penalty.penalties[layer.name][1].item()


def test_importance_is_what_a_unit_carries_to_the_response():
    network, image = two_layers()
    with torch.no_grad():
        network[1].weight.copy_(torch.arange(1.0, 33).reshape(8, 4, 1, 1))
        network[3].weight[:, :4] = 0  # nothing after it reads the first four filters of the second layer
    prunable = find_layers(network, image)
    scores = importance(network, prunable, Scheme("filter"), image)
    assert (scores["1"][:4] == 0).all()
    assert (scores["1"][4:] > 0).any()
    assert network.training


def options(**changed: object) -> dict[str, object]:
    return {"rate": 2.0, "gm": 4, "gn": 4, "dense": 0.0, "retrain": 0.5, **changed}


def run(folder: Path, changed: dict[str, object], **settings: object) -> object:
    given = {"epochs": 2, "batch": 16, **settings}
    return train.run(
        method="kgs", model="c3d-mini", data=SMALL, out=folder, options=options(**changed), threads=1, **given
    )


@pytest.mark.parametrize(
    ("algorithm", "scheme"), [("heuristic", "filter"), ("lasso", "vanilla"), ("reweighted", "kgs")]
)
def test_training_ends_at_the_rate_with_zeros_in_the_saved_weights(tmp_path, algorithm, scheme):
    result = run(tmp_path, {"algorithm": algorithm, "scheme": scheme})
    card = json.loads((tmp_path / "card.json").read_text())["pruning"]
    assert card["rate"] >= 2.0
    assert card["macs"] <= card["dense_macs"] / 2
    weights = read_weights(tmp_path / "model.safetensors")
    assert weights.keys() == models.create("c3d-mini", num_classes=8).state_dict().keys()
    for name, layer in card["layers"].items():
        weight = weights[f"{name}.weight"]
        assert int(weight.count_nonzero()) == layer["weights"]
        assert find_kernel_groups(weight.numpy(), 4, 4).scheme == scheme
    pressed = [row.get("loss/groups", 0) > 0 for row in result.history]
    assert pressed == [algorithm != "heuristic", False]


def test_a_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", {"rounds": 2, "retrain": 0.3}, epochs=3)

    from dance_tvm.sparsity.rt3d.method import KGS

    def killed(self, network, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return started(self, network, epoch)

    started = KGS.epoch_started
    with monkeypatch.context() as patch:
        patch.setattr(KGS, "epoch_started", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", {"rounds": 2, "retrain": 0.3}, epochs=3)
    resumed = run(tmp_path / "killed", {"rounds": 2, "retrain": 0.3}, epochs=3, resume=True)
    ours, theirs = resumed.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.card["pruning"] == whole.card["pruning"]


def test_too_few_epochs_for_a_penalty_are_refused(tmp_path):
    with pytest.raises(DanceError, match=r"1 epoch leaves none .*: lower a share$"):
        run(tmp_path, {"dense": 0.7, "retrain": 0.5}, epochs=1)
    with pytest.raises(DanceError, match=r": give --epochs 2 or more$"):
        run(tmp_path, {"dense": 0.25, "retrain": 0.35}, epochs=1)  # of 2: 0 dense, 1 with the penalty, 1 retrained


def test_a_wrong_option_is_told_with_those_that_exist(tmp_path):
    with pytest.raises(DanceError, match="scheme"):
        run(tmp_path, {"scheme": "irregular"})


def test_the_group_measured_on_the_target_is_trained_with(own_logs):
    from dance_tvm.machines.target import load_target
    from dance_tvm.records import group_choice, group_log
    from dance_tvm.sparsity.rt3d import method

    assert method.measured_group("snapdragon") == method.DEFAULT_GROUP
    phone = load_target("snapdragon")
    layer = group_choice.SynthesisedLayer(16, 16, (3, 3, 3), (2, 4, 4))
    found = group_choice.measure_groups(
        lambda layer, weight, group: 1.0 if group in (None, (4, 8)) else 2.0,
        fingerprint=phone.fingerprint, device="emulator", threads=1, layers=[layer],
    )  # fmt: skip
    group_log.write_log(group_log.log_path(phone), found)
    assert method.measured_group("snapdragon") == (4, 8)
    with pytest.raises(DanceError, match="target"):
        method.measured_group("abacus")
