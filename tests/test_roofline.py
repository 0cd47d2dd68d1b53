"""What a layer takes at the least: counted exactly, and measured beside it."""

from __future__ import annotations

import math

import pytest
from test_tuning import SERVER

from benchmarks.bounds import Bounds, Loads, Need, loads_per_product
from benchmarks.kernels import Peak
from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.workload import DEPTHWISE, POINTWISE, Workload

DEPTHWISE_LAYER = Workload(
    Window(1, (4, 10, 10), (4, 10, 10), (3, 3, 3), padding=(1, 1, 1)), 32, 32, groups=32, family=DEPTHWISE
)


def test_a_layer_needs_taps_inside_the_clip_and_each_byte_once():
    need = Need.of(DEPTHWISE_LAYER, SERVER)
    assert need.macs == 32 * (4 * 3 - 2) * (10 * 3 - 2) ** 2
    assert need.bytes_out == 4 * 32 * 400
    assert need.bytes_in == need.bytes_out + 4 * 32 * 27
    assert need.loads == pytest.approx(need.macs / SERVER.vector_floats * loads_per_product(DEPTHWISE_LAYER, SERVER))


def test_loads_are_those_of_the_tile_that_needs_the_fewest():
    # 5 outputs in each of 4 frames: 6 frames of 7 inputs and 9 weights for 20 sums of 9 products.
    assert loads_per_product(DEPTHWISE_LAYER, SERVER) <= (6 * 7 + 9) / (20 * 9)
    pointwise = Workload(Window(1, (1, 4, 4), (1, 4, 4), (1, 1, 1)), 64, 64, family=POINTWISE)
    assert 0.3 < loads_per_product(pointwise, SERVER) < 0.6


def test_bounds_are_measured_and_the_longest_one_told():
    target = load_target("host")
    bounds = Bounds(DEPTHWISE_LAYER, machine_of(target), target, Peak(target, 1, steps=100), Loads(target, 1))
    bounds.measure()
    assert set(bounds.seconds) == {"multiply-adds", "loads", "bytes"}
    kind, seconds = bounds.longest
    assert seconds == bounds.seconds[kind] == max(bounds.seconds.values())
    assert 0 < seconds < 1e-2
    assert all(math.isfinite(each) and each > 0 for each in bounds.seconds.values())
