"""Depthwise, transposed and channels-first kernels are tuned as convolutions are: spaces, records, builds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from test_tuning import AVX2, NEON, SERVER, workload
from torch import nn

from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.cli import start
from dance_tvm.lowering.machine import machine_of
from dance_tvm.lowering.registry import choose, kernel_of
from dance_tvm.machines.target import load_target
from dance_tvm.records import kernel_log
from dance_tvm.records.kernel_log import append, log_path, new_record
from dance_tvm.schedules.cpu.choice import Advice
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.layer import Layer
from dance_tvm.schedules.workload import DEPTHWISE, PLANAR, TRANSPOSED, Decisions, Workload
from dance_tvm.tune import app as tune_command
from dance_tvm.tuning import tuner
from dance_tvm.tuning.search import LayerSearch, new_cost_model
from dance_tvm.tuning.workloads import layers_of

HOST = load_target("host")
WORKS = [
    workload(48, family=DEPTHWISE, groups=48),
    workload(20, family=DEPTHWISE, groups=20, lists=("in_frames",), density=0.5),
    *(
        Workload(
            Window(1, (3, 7, 39), out, kernel, padding=(1, 1, 1)), 32, 24, threads=2, family=TRANSPOSED, spread=spread
        )
        for kernel, out, spread in (((2, 2, 2), (4, 8, 40), (2, 2, 2)), ((3, 3, 3), (3, 7, 39), (2, 2, 2)))
    ),
    replace(workload(40, family=PLANAR), window=Window(2, (4, 14, 14), (4, 14, 14), (1, 1, 1))),
]


@dataclass(frozen=True)
class Told:
    """A log that holds these decisions for any workload."""

    decisions: Decisions

    def advise(self, asked: Workload) -> Advice:
        return Advice(asked, self.decisions, "tuned")


#: Networks with a kernel of each kind (one whose operators all can has channels first), and their inputs.
NETWORKS = [
    (
        (DEPTHWISE, TRANSPOSED),
        nn.Sequential(nn.Conv3d(24, 24, 3, padding=1, groups=24), nn.ReLU(), nn.ConvTranspose3d(24, 20, 2, 2)),
        (1, 24, 4, 10, 20),
    ),
    ((PLANAR,), nn.Sequential(nn.Conv3d(3, 12, 1), nn.InstanceNorm3d(12), nn.SiLU()), (1, 3, 4, 8, 16)),
]


def titled(work: Workload) -> str:
    return f"{work.family}-{work.window.kernel[0]}-{len(work.lists)}"


@pytest.mark.parametrize("machine", [AVX2, NEON, SERVER], ids=["avx2", "neon", "avx512"])
@pytest.mark.parametrize("work", WORKS, ids=titled)
def test_a_space_holds_its_default_and_only_what_fits(machine, work):
    kernel = kernel_of(work, machine)
    space = kernel.space(machine, work)
    default = space.default()
    assert kernel.sized(default) == choose(Layer.of(work), machine).kernel
    assert space.normal(default) == default
    parts = space.parts()
    assert space.size == sum(math.prod(map(len, part.values())) for part in parts) > 4
    assert any(all(default[name] in values for name, values in part.items()) for part in parts)
    for part in parts:
        for name, values in part.items():
            first = {other: others[0] for other, others in part.items()}
            assert all(space.allows(space.normal({**first, name: value})) for value in values)
    for wrong in ({"mr": 60}, {"mr": 0}, {"vectors": 40}, {"unheard": 1}):
        assert not space.allows({**default, **wrong})
    assert not space.allows({"mr": default["mr"]})


@pytest.mark.parametrize("work", WORKS, ids=titled)
def test_records_are_followed_where_they_can_be_built(work):
    machine = machine_of(HOST)
    space = kernel_of(work, machine).space(machine, work)
    other = next(part for part in space.parts() if space.default()["vectors"] not in part["vectors"])
    decisions = space.normal({name: values[0] for name, values in other.items()})
    told = choose(Layer.of(work), machine, "auto", Told(decisions))
    assert told.origin
    assert told.kernel.tile.vectors == decisions["vectors"] != space.default()["vectors"]
    refused = choose(Layer.of(work), machine, "auto", Told({**decisions, "vectors": 0}))
    assert not refused.origin
    assert refused.kernel == choose(Layer.of(work), machine).kernel


@pytest.mark.usefixtures("small_generations")
@pytest.mark.parametrize("work", [WORKS[0], WORKS[2], WORKS[4]], ids=titled)
def test_they_are_searched(work):
    machine = machine_of(HOST)
    space = kernel_of(work, machine).space(machine, work)
    batch = LayerSearch(space, HOST.tvm_target(2), new_cost_model()[0], 8).propose()
    assert batch
    assert all(space.allows(decisions) for decisions in batch)


def test_masks_that_a_kernel_does_not_take_tune_the_one_that_does():
    network = nn.Conv3d(24, 24, 3, padding=1, groups=24)
    exported = torch.export.export(network.eval(), (torch.randn(NETWORKS[0][2]),))
    found = [layers_of(exported, HOST, threads=1, lists=lists) for lists in ((), ("in_frames",), ("positions",))]
    assert [layers[0].workload.family for layers in found] == [DEPTHWISE, DEPTHWISE, "conv3d_gather"]
    assert [layers[0].workload.lists for layers in found] == [(), ("in_frames",), ("positions",)]


@pytest.mark.usefixtures("small_generations")
@pytest.mark.parametrize(("kinds", "network", "shape"), NETWORKS, ids=["last", "first"])
def test_a_network_is_tuned_and_built_by_its_records(kinds, network, shape, tmp_path, own_logs, monkeypatch, capsys):
    monkeypatch.setattr(tuner, "DISTURBED", math.inf)  # layers this small take less time than their noise
    monkeypatch.setattr(kernel_log, "MOST_SPREAD", math.inf)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(network.eval(), (torch.randn(shape),)), path)
    with pytest.raises(SystemExit) as left:
        start(tune_command, "tune", ["--model", str(path), "--trials", "3", "--threads", "1", "--json"])
    said = capsys.readouterr()
    assert left.value.code in (0, None), said.err
    layers = json.loads(said.out)["layers"]
    assert tuple(layer["family"] for layer in layers) == kinds
    assert all(layer["verified"] and not layer["failed"] for layer in layers)
    machine, rest = machine_of(HOST), {"status": "verified", "origin": "local", "trials": 9, "default_seconds": 0.02}
    for layer in layers_of(path, HOST, threads=1):
        work = layer.workload
        sizes = {**kernel_of(work, machine).space(machine, work).default(), "mr": 3}
        append(log_path(HOST, work.family), [new_record(work, HOST, sizes, [0.01], **rest)])
    manifest = build_network(path, tmp_path / "made", options=Options(threads=1), check=True).artifact.manifest
    built = [layer for layer in manifest.layers if layer.macs]
    assert len(built) == len(kinds)
    assert all("2.00x the defaults" in layer.tuned and "_mr3" in layer.kernel for layer in built)
    assert manifest.check.status == "passed"
