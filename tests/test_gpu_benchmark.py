"""The GPU benchmark as far as it goes without a GPU: what ptxas says, and its measuring over OpenCL on a processor."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tvm

pytest.importorskip("benchmarks.gpu", reason="benchmarks are not part of an installed package")


from benchmarks import gpu_static, gpu_timing
from benchmarks.kernels import Layer, Masks
from dance_tvm.core.errors import DanceError
from dance_tvm.lowering.machine import gpu_of
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.choice import Advice, decide
from dance_tvm.schedules.gpu.block_space import BlockSpace, decisions_of
from dance_tvm.schedules.gpu.tiles import BlockTile
from dance_tvm.schedules.workload import Workload

TINY = Layer("tiny", 8, 16, (3, 6, 6))


def test_occupancy_follows_from_what_a_block_takes():
    nano, orin = load_target("jetson-nano").gpu, load_target("jetson-orin-nano").gpu
    assert gpu_static.occupancy(nano, 128, 121, 14592) == 4 * 128 / 2048  # by registers and by shared memory
    assert gpu_static.occupancy(nano, 256, 16, 0) == 1.0
    assert gpu_static.occupancy(nano, 64, 73, 11008) == 5 * 64 / 2048  # by shared memory
    assert gpu_static.occupancy(orin, 1024, 8, 0) == 1024 / 1536  # by threads


def test_ptxas_tells_of_every_kernel_of_a_thinned_layer():
    target = load_target("jetson-nano")
    try:
        rows = [
            row
            for functions in gpu_static.sparse_kernels(TINY, target).values()
            for function, func in functions.items()
            for row in gpu_static.static_rows("tiny", function, func, target)
        ]
    except DanceError as error:
        pytest.skip(str(error))
    kernels = " ".join(row.kernel for row in rows)
    for part in ("gather_gpu_i_", "gather_gpu_o_", "gather_gpu_io_", "kgs_gpu_i_", "plan_rows", "plan_columns"):
        assert part in kernels
    for row in rows:
        assert row.spills == 0
        assert 0 < row.registers <= 255
        assert row.shared <= target.gpu.block_shared
        assert 0 < row.occupancy <= 1
        assert row.ptx == "6.5"


def test_a_static_run_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    target, out = load_target("jetson-nano"), tmp_path / "static.json"
    asked: list[str] = []
    limit = [2]

    def rows(network, function, _func, target):
        if len(asked) == limit[0]:
            raise KeyboardInterrupt
        asked.append(function)
        spilled = 8 if function == "c_gpu_f32" else 0
        return [gpu_static.StaticRow(target.name, network, function, function, "6.5", 64, 32, 0, spilled, 0.5)]

    monkeypatch.setattr(gpu_static, "static_rows", rows)
    monkeypatch.setattr(gpu_static, "sparse_kernels", lambda *_: {"all": {"d_gpu_f32": None}})
    kernels = dict.fromkeys(["a_gpu_f32", "b_gpu_f32", "b_gpu_f321", "c_gpu_f32"])
    monkeypatch.setattr(gpu_static, "network_kernels", lambda *_: kernels)
    with pytest.raises(KeyboardInterrupt):
        gpu_static.fill(gpu_static.Standing.at(out), [target], ["net"])
    assert len(gpu_static.Standing.at(out).rows) == 2
    limit[0] = 9
    gpu_static.fill(gpu_static.Standing.at(out), [target], ["net"])
    assert asked == [*kernels, "d_gpu_f32"]
    assert json.loads(out.read_text())["complete"]
    table = out.with_suffix(".md").read_text()
    assert "| jetson-nano | 6.5 | net | b_gpu_f32 | 2 | 64 | 32 | 0 | 0 | 0.50 |" in table
    assert "| net | c_gpu_f32 | 1 | 64 | 32 | 0 | 8 |" in table
    assert not gpu_static.Standing.at(out).rows  # a complete run is begun anew


def test_both_sides_are_measured():
    try:
        device = gpu_timing.opencl_device()
    except DanceError as error:
        pytest.skip(str(error))
    target = load_target("opencl")
    ours = gpu_timing.LayerOnGpu(TINY, target, device, Masks(live_in=np.arange(8) < 4))
    found = gpu_timing.compare(ours, gpu_timing.LayerInTorch(TINY, "cpu", device.seconds), 2)
    assert min(found["ours"], found["theirs"]) > 0
    assert found["share"] == pytest.approx(found["theirs"] / found["ours"])


def test_without_a_gpu_it_says_what_to_do():
    if tvm.device("cuda", 0).exist:
        pytest.skip("there is a GPU")
    with pytest.raises(DanceError, match=r"no NVIDIA GPU here.*--static"):
        gpu_timing.cuda_device(load_target("cuda"))
    with pytest.raises(DanceError, match="host has no GPU"):
        gpu_timing.block_conv(TINY, load_target("host"), Masks())


class Log:
    """A tuning log with one record."""

    def __init__(self, decisions: dict[str, int]) -> None:
        self.decisions = decisions

    def advise(self, workload: Workload) -> Advice:
        return Advice(workload, self.decisions, "a record")


def test_a_record_chooses_the_tile_if_the_gpu_can_hold_it():
    gpu = gpu_of(load_target("jetson-nano"))
    workload = Workload(TINY.window, 8, 16, 1, ())
    space = BlockSpace(gpu, workload)
    assert space.allows(space.default())
    assert space.size > 10
    assert decisions_of(space.tiles[0]) in [space.default(), *map(decisions_of, space.tiles)]
    tile = BlockTile(64, 16, 8, 4, 4)
    assert decide(space, Log(decisions_of(tile))) == (decisions_of(tile), "a record")
    too_large = {**decisions_of(tile), "mr": 1024}
    assert decide(space, Log(too_large)) == (space.default(), "")
