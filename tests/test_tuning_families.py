"""Kernel groups and pools are tuned as other families are: spaces, records that serve networks pruned alike, builds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from test_tuning import AVX2, NEON, Told, record, workload
from torch import nn

from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.core.cli import start
from dance_tvm.frontend import import_model
from dance_tvm.liveness import kernel_groups
from dance_tvm.lowering.machine import machine_of
from dance_tvm.lowering.registry import kernel_of
from dance_tvm.machines.target import load_target
from dance_tvm.records import kernel_log
from dance_tvm.records.kernel_log import Log, append, log_path, new_record
from dance_tvm.schedules.cpu.choice import direct_or_winograd
from dance_tvm.schedules.cpu.conv3d_kgs import KernelGroupConv
from dance_tvm.schedules.cpu.direct_spaces import KernelGroupSpace, kernel_group_tile
from dance_tvm.schedules.cpu.pool_space import PoolSpace
from dance_tvm.schedules.cpu.winograd import WinogradConv
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.workload import KERNEL_GROUPS, POINTWISE, POOL, WINOGRAD, Workload
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate
from dance_tvm.tune import app as tune_command
from dance_tvm.tuning import tuner
from dance_tvm.tuning.calibration import density_of
from dance_tvm.tuning.search import LayerSearch, WholeSpace, new_cost_model, new_search
from dance_tvm.tuning.workloads import layers_of

HOST = load_target("host")
CLIP = (torch.zeros(1, 8, 4, 14, 14),)


def pruned_workload(kept: float = 0.28, group: tuple[int, int] = (16, 4), channels: int = 64, **rest) -> Workload:
    return workload(channels, **rest).grouped(group, kept)


def pool_workload(channels: int = 64, **rest) -> Workload:
    window = Window(1, (4, 14, 14), (2, 7, 7), (2, 2, 2), (2, 2, 2))
    return Workload(window, channels, channels, channels, threads=2, family=POOL, pooling="max", **rest)


class Pruned(nn.Module):
    """One convolution that kernel groups prune, and a pool."""

    def __init__(self, seed: int, rate: float = 3.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.conv = nn.Conv3d(8, 16, 1), nn.Conv3d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool3d(2)
        prune_to_rate(self.eval(), CLIP, "kgs", rate, 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(torch.relu(self.conv(torch.relu(self.first(x)))))


@pytest.fixture
def groups_of_16x4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size in which the networks here are pruned is the only candidate."""
    monkeypatch.setattr(kernel_groups, "CANDIDATES", ((16, 4),))


def families(network: nn.Module, **options) -> dict[str, Workload]:
    exported = torch.export.export(network, CLIP)
    return {layer.workload.family: layer.workload for layer in layers_of(exported, HOST, threads=1, **options)}


# -- workloads --------------------------------------------------------------------------------------------------------


def test_networks_pruned_alike_share_their_records(groups_of_16x4):
    one, other = families(Pruned(0), conv="direct"), families(Pruned(1), conv="direct")
    less = families(Pruned(0, rate=1.5), conv="direct")
    assert not np.array_equal(Pruned(0).conv.weight != 0, Pruned(1).conv.weight != 0)
    assert one == other
    assert one[KERNEL_GROUPS].group == (16, 4)
    assert 1 / 4 < one[KERNEL_GROUPS].kept < 1 / 2
    assert one[KERNEL_GROUPS].kept * 16 == round(one[KERNEL_GROUPS].kept * 16)
    assert less[KERNEL_GROUPS].identity != one[KERNEL_GROUPS].identity
    assert 0 < less[KERNEL_GROUPS].distance(one[KERNEL_GROUPS]) <= 2
    assert one[POOL].pooling == "max"


def test_a_network_in_half_precision_has_records_of_its_own():
    found = layers_of(torch.export.export(Pruned(0), CLIP), load_target("snapdragon"), threads=1, dtype="float16")
    assert {layer.workload.dtype for layer in found} == {"float16"}


def test_what_a_kernel_group_costs_is_in_its_workload():
    work = pruned_workload()
    assert work.kept == 0.25
    assert work.identity == pruned_workload(0.26).identity
    assert Workload.of(json.loads(json.dumps(work.facts()))) == work
    assert work.work == pytest.approx(workload(64).work / 4)
    assert work.columns().count == round(0.25 * 4 * 16 * 27) * 4
    assert work.distance(pruned_workload(0.3125)) == pytest.approx(math.log2(1.25))
    assert work.distance(pruned_workload(group=(8, 4))) == math.inf  # another register tile
    assert work.distance(pruned_workload(group=(16, 8))) == 0.25
    assert work.distance(workload(64)) == math.inf
    assert work.direct == workload(64)
    assert work.winograd == workload(64, family=WINOGRAD)
    assert pool_workload().distance(Workload(**{**vars(pool_workload()), "pooling": "avg"})) == math.inf


def test_a_clip_thins_columns_and_not_what_pruning_left_of_them():
    """Masks leave a half of the input channels, pruning a quarter of the columns; some taps are padding."""
    work = pruned_workload(0.25, lists=("in_channels",), density=0.5)
    executed = work.work / (work.window.positions_out * 27 * 64 * 64)
    assert density_of(work, executed) == 0.5
    assert density_of(work, 2 * executed) == 1.0


# -- spaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [AVX2, NEON], ids=["avx2", "neon"])
@pytest.mark.parametrize("lists", [(), ("in_channels", "out_frames")])
@pytest.mark.parametrize("group", [(8, 4), (16, 8), (16, 1)])
def test_a_space_of_kernel_groups_holds_its_default_and_only_what_fits(machine, lists, group):
    work = pruned_workload(group=group, lists=lists, density=0.5 if lists else 1.0)
    kernel = kernel_of(work, machine)
    space = kernel.space(machine, work)
    default = space.default()
    per_tap = 16
    run = 1 if lists else group[1]
    tile = kernel_group_tile(machine, work.window, (64, 64), per_tap, group[0], run)
    assert default == {name: int(getattr(tile, name)) for name in space.names}
    (part,) = space.parts()
    assert space.size == math.prod(map(len, part.values())) > 20
    for name, values in part.items():
        assert default[name] in values
        assert all(space.allows({**default, name: value}) for value in values)
    conv = kernel.sized(default)
    assert (conv.tile.nr, conv.run, conv.columns) == (group[0], run, work.columns().count)
    assert not space.allows({**default, "mr": 16, "vectors": 1})
    assert not space.allows({**default, "mr": 40})
    assert not space.allows({**default, "block_tiles": 0})


def test_a_record_of_longer_runs_is_fitted_to_shorter_ones():
    """On NEON a run of four channels is one load; without runs there are no such loads."""
    tuned = KernelGroupSpace(NEON, pruned_workload(group=(16, 4))).default()
    assert tuned["step"] == 4
    single = KernelGroupSpace(NEON, pruned_workload(group=(16, 1)))
    assert single.normal(tuned)["step"] == 1
    assert single.allows(single.normal(tuned))


WORKS = [workload(16), workload(16, family=WINOGRAD), pruned_workload(), pool_workload(512)]


@pytest.mark.usefixtures("small_generations")
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.family)
def test_every_family_is_searched(work):
    space = kernel_of(work, machine_of(HOST)).space(machine_of(HOST), work)
    found = LayerSearch(space, HOST.tvm_target(2), new_cost_model()[0], 8)
    batch = found.propose()
    assert batch
    assert all(space.allows(decisions) for decisions in batch)
    found.tell([(space.default(), 1.0), *((decisions, 2.0) for decisions in batch)])


def test_a_small_space_is_tried_whole():
    space = PoolSpace(AVX2, pool_workload(512))
    found = new_search(space, None, None, batch=8)
    assert isinstance(found, WholeSpace)
    found.tell([({"vectors": 4}, 1.0)])
    assert found.propose() == [{"vectors": count} for count in (1, 2, 8)]
    assert found.propose() == []


def test_measurements_choose_between_kernel_groups_and_winograd():
    work = pruned_workload()
    conv = kernel_of(work, AVX2)
    conv = conv.sized(conv.space(AVX2, work).default())
    slow = direct_or_winograd(conv, "groups'", work, AVX2, "auto", Told(conv3d_kgs=0.01, conv3d_winograd=0.02))
    assert isinstance(slow.kernel, KernelGroupConv)
    assert slow.origin == "groups'"
    assert "kernel groups 10 ms" in slow.reason
    fast = direct_or_winograd(conv, "groups'", work, AVX2, "auto", Told(conv3d_kgs=0.02, conv3d_winograd=0.01))
    assert isinstance(fast.kernel, WinogradConv)
    assert fast.origin == "tuned conv3d_winograd"


def test_a_build_takes_the_kernel_group_that_it_is_given():
    mod = import_model(Pruned(0), example_inputs=CLIP, check=False).mod

    def group(**options) -> tuple[int, int] | None:
        workloads = lower(mod, HOST, Options(conv="direct", **options)).workloads.values()
        return next((work.group for work in workloads if work.family == KERNEL_GROUPS), None)

    assert group(kernel_group=(16, 1)) == (16, 1)
    assert group(kernel_group=(1, 1)) is None
    assert group()[1] != 1


# -- tuning and building ----------------------------------------------------------------------------------------------


def test_builds_follow_the_records_of_kernel_groups_and_pools(tmp_path, own_logs, groups_of_16x4):
    """The records name sizes that no default would be, and stem from a network with other zeros."""
    options = Options(threads=1, conv="direct")
    found = families(Pruned(0), conv="direct")
    machine = machine_of(HOST)
    for family, chosen in ((KERNEL_GROUPS, {"mr": 3, "segment_taps": 2}), (POOL, {"vectors": 2})):
        space = kernel_of(found[family], machine).space(machine, found[family])
        decisions = {**space.default(), **chosen}
        rest = {"status": "verified", "origin": "local", "trials": 3, "default_seconds": 0.02}
        append(log_path(HOST, family), [new_record(found[family], HOST, decisions, [0.01], **rest)])
    built = build_network(Pruned(1), tmp_path / "made", example_inputs=CLIP, options=options, check=True)
    layers = {layer.name: layer for layer in built.artifact.manifest.layers}
    groups = next(layer for layer in layers.values() if layer.kernel.startswith("conv3d_kgs"))
    pool = next(layer for layer in layers.values() if layer.kind == "pool3d")
    assert "mr3_gm16" in groups.kernel
    assert groups.tuned.startswith("tuned 20")
    assert pool.kernel == f"pool3d_max_f32_v{2 * HOST.vector.floats}"
    assert "2.00x the defaults" in pool.tuned
    assert built.artifact.manifest.check.status == "passed"


@pytest.mark.usefixtures("small_generations")
def test_a_pruned_network_is_tuned_and_built_by_its_records(tmp_path, own_logs, groups_of_16x4, monkeypatch, capsys):
    monkeypatch.setattr(tuner, "DISTURBED", math.inf)  # layers this small take less time than their noise
    monkeypatch.setattr(kernel_log, "MOST_SPREAD", math.inf)
    torch.export.save(torch.export.export(Pruned(0), CLIP), tmp_path / "pruned.pt2")
    command = ["--model", str(tmp_path / "pruned.pt2"), "--trials", "2", "--threads", "1", "--conv", "direct", "--json"]
    with pytest.raises(SystemExit) as left:
        start(tune_command, "tune", command)
    said = capsys.readouterr()
    assert left.value.code in (0, None), said.err
    layers = {layer["family"]: layer for layer in json.loads(said.out)["layers"]}
    assert set(layers) == {POINTWISE, KERNEL_GROUPS, POOL}
    assert all(layer["verified"] and not layer["failed"] for layer in layers.values())
    assert layers[POOL]["share_of_peak"] is None
    for family in (POINTWISE, KERNEL_GROUPS, POOL):
        log = Log.read(log_path(HOST, family))
        assert {found.status for found in log.records()} == {"trial", "verified"}
        assert not log.problems
    options = Options(threads=1, conv="direct")
    built = build_network(Pruned(1), tmp_path / "made", example_inputs=CLIP, options=options, check=True)
    assert [layer.tuned[:8] for layer in built.artifact.manifest.layers] == ["tuned 20"] * 3


def test_records_of_one_family_are_not_taken_for_another(tmp_path):
    append(log_path(HOST, KERNEL_GROUPS, tmp_path), [record(workload(64))])
    from dance_tvm.records.advice import tuned_tiles

    assert tuned_tiles(HOST, tmp_path).advise(pruned_workload()) is None
