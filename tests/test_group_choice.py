"""Group sizes are chosen by what was measured, and the log can be read by people and by builds."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from dance_tvm import groups
from dance_tvm.core.errors import DanceError
from dance_tvm.liveness.kernel_groups import (
    CANDIDATES,
    choose_kernel_groups,
    find_kernel_groups,
    fitting_groups,
    lane_cost,
)
from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import Target, load_target
from dance_tvm.records import group_choice
from dance_tvm.records.group_choice import (
    Dtype,
    GroupMeasurement,
    SynthesisedLayer,
    best_group,
    efficiencies,
    measure_groups,
    measured_cost,
    require_fitting,
)
from dance_tvm.records.group_log import group_cost, log_path, read_log, write_log

LAYER = SynthesisedLayer(32, 32, (3, 3, 3), (4, 8, 8))


def measured(slowdown: dict[tuple[int, int], float], layers=(LAYER,)) -> list[GroupMeasurement]:
    """Measurements of a device on which a group takes ``slowdown`` times its live weights (2 unless named)."""

    def measure(layer, weight, group):
        return np.count_nonzero(weight) * layer.positions * 1e-9 * (slowdown.get(group, 2.0) if group else 1.0)

    return measure_groups(measure, fingerprint="f00d", device="local", threads=2, layers=layers)


@pytest.mark.parametrize("scheme", ["vanilla", "kgs"])
@pytest.mark.parametrize(("gm", "gn"), CANDIDATES)
def test_synthesised_layers_are_pruned_in_the_group_at_the_rate(scheme, gm, gn):
    groups = find_kernel_groups(SynthesisedLayer(64, 64, (3, 3, 3), (4, 8, 8)).weight(gm, gn, 2.5, scheme), gm, gn)
    assert groups.scheme == scheme
    assert groups.rate == pytest.approx(2.5, rel=0.05)


def test_every_candidate_is_measured_next_to_its_dense_layer():
    found = measured({}, layers=(LAYER, SynthesisedLayer(16, 24, (1, 3, 3), (4, 8, 8))))
    assert len(found) == 2 * (1 + len(CANDIDATES))
    assert set(efficiencies(found)) == set(CANDIDATES)
    assert all(value == pytest.approx(0.5, rel=0.05) for value in efficiencies(found).values())


def test_the_fastest_group_wins_and_the_smallest_of_equally_fast_ones():
    assert best_group(measured({(16, 8): 1.0})) == (16, 8)
    assert best_group(measured({(16, 8): 1.0, (8, 4): 1.02, (4, 4): 1.2})) == (8, 4)
    with pytest.raises(DanceError, match="measure"):
        best_group([])


def test_the_log_keeps_one_line_for_each_case_and_leaves_other_kinds_alone(tmp_path):
    path = tmp_path / "phone.jsonl"
    write_log(path, measured({}))
    write_log(path, measured({(8, 4): 1.0}))
    assert len(path.read_text().splitlines()) == 1 + len(CANDIDATES)
    assert best_group(read_log(path, fingerprint="f00d", threads=2, device="local")) == (8, 4)
    assert read_log(path, fingerprint="other") == []
    assert read_log(tmp_path / "none.jsonl") == []
    with path.open("a") as log:
        log.write(json.dumps({"kind": "tile", "mr": 6}) + "\n")
    write_log(path, measured({}))
    assert json.loads(path.read_text().splitlines()[0]) == {"kind": "tile", "mr": 6}
    assert len(read_log(path)) == 1 + len(CANDIDATES)
    with path.open("a") as log:
        log.write("not json\n")
    with pytest.raises(DanceError, match=f"line {3 + len(CANDIDATES)}"):
        read_log(path)


def test_what_was_measured_decides_the_group_of_a_build():
    weight = LAYER.weight(8, 4, 3.0)
    slow_but_8x1 = measured({(8, 1): 1.0})
    assert choose_kernel_groups(weight, cost=lane_cost(8)).gn == 4
    chosen = choose_kernel_groups(weight, cost=measured_cost(slow_but_8x1, 8))
    assert (chosen.gm, chosen.gn) == (8, 1)
    chosen = choose_kernel_groups(weight, cost=measured_cost([], 8))
    assert (chosen.gm, chosen.gn) == (8, 4)


def test_groups_of_half_precision_are_weighed_by_its_own_vectors(tmp_path):
    """Filters pruned by sixteens are two vectors of halves; as two groups of eight, each would load inputs twice."""
    target = load_target("snapdragon")
    stored = machine_of(target).storing("float16")
    write_log(log_path(target, tmp_path), [measured_on(target, group) for group in (None, (8, 8))])
    cost = group_cost(target, 1, tmp_path, stored)
    weight = LAYER.weight(16, 8, 3.0)
    chosen = choose_kernel_groups(weight, fitting_groups(stored.vector_floats), cost)
    assert (chosen.gm, chosen.gn) == (16, 8)
    write_log(log_path(target, tmp_path), [measured_on(target, group, "float16") for group in (None, (8, 8))])
    chosen = choose_kernel_groups(weight, fitting_groups(stored.vector_floats), group_cost(target, 1, tmp_path, stored))
    assert (chosen.gm, chosen.gn) == (8, 8)
    require_fitting(target, [(4, 4)])
    with pytest.raises(DanceError, match="vectors take 8 filters"):
        require_fitting(target, [(4, 4)], "float16")


def measured_on(target: Target, group: tuple[int, int] | None, dtype: Dtype = "float32") -> GroupMeasurement:
    """A measurement in which ``group`` is as fast as none can be."""
    gm, gn = group or (1, 1)
    about = {"fingerprint": target.fingerprint, "device": "emulator", "threads": 1, "dtype": dtype, **LAYER.__dict__}
    return GroupMeasurement(
        **about,
        scheme="kgs" if group else "dense",
        gm=gm,
        gn=gn,
        rate=3.0 if group else 1.0,
        seconds=1e-4 if group else 1.0,
    )


def test_a_device_on_which_no_group_pays_builds_dense():
    slow = dict.fromkeys(CANDIDATES, 4.0)
    assert choose_kernel_groups(LAYER.weight(8, 4, 3.0), cost=measured_cost(measured(slow), 8)).scheme == "dense"


def test_the_command_measures_the_groups_that_fit_the_machine(tmp_path, monkeypatch):
    layer = SynthesisedLayer(8, 16, (1, 1, 1), (1, 4, 4))
    monkeypatch.setattr(group_choice, "SYNTHESISED", (layer,))
    lanes = load_target("host").vector.floats
    words = ["--layers", "1", "--repeats", "1", "--threads", "1", "--logs", str(tmp_path)]
    found = CliRunner().invoke(groups.app, words)
    assert found.exit_code == 0, found.output
    timed = {(line.gm, line.gn) for line in read_log(log_path(load_target("host"), tmp_path)) if line.scheme == "kgs"}
    assert timed == set(fitting_groups(lanes))
    refused = CliRunner().invoke(groups.app, ["--layers", "1", "--group", f"{lanes + 1}x4"])
    assert isinstance(refused.exception, DanceError)
    assert f"groups of {lanes + 1}x4 do not fit" in str(refused.exception)
