"""Which lists a layer walks where every sample of a batch has its own."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from dance_tvm.liveness.expressions import EVERYWHERE, Factor, Live
from dance_tvm.lowering.machine import machine_of
from dance_tvm.lowering.sample_lists import SampleLists
from dance_tvm.lowering.sites import Site, SiteLists
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.geometry import Window

LISTS = SampleLists(Machine(16, 32, 49152, 1 << 20, True, 32 << 20, 166.4, 25.0), 1, "auto")
FRAMES, SIZE, CHANNELS = 8, 7, 512
MASKS = {
    "frames": (FRAMES, 1, 1, 1, 1),
    "positions": (FRAMES, 1, SIZE, SIZE, 1),
    "channels": (FRAMES, 1, 1, 1, CHANNELS),
}


def live(*axes: str) -> Live:
    return Live(**{axis: Factor(relax.Var(axis), MASKS[axis]) for axis in axes})


def site(batch: int = FRAMES, channels_in: int = CHANNELS, stride: int = 1) -> Site:
    """A 3×3 convolution to a map of ``SIZE`` squared and ``CHANNELS``."""
    size = (1, SIZE * stride, SIZE * stride)
    window = Window(batch, size, (1, SIZE, SIZE), (1, 3, 3), (1, stride, stride), (0, 1, 1))
    data, end = relax.Var("data"), relax.Var("end")
    return Site(end, end, data, np.zeros((CHANNELS, channels_in, 1, 3, 3), "float32"), window)


@pytest.mark.parametrize("others", [(), ("frames",), ("positions",), ("frames", "positions")])
def test_lists_of_channels_that_pay_alone_stay_beside_other_masks(others: tuple[str, ...]) -> None:
    assert LISTS(site(), EVERYWHERE, live("channels", *others)) == SiteLists(False, True)
    assert LISTS(site(), live("channels", *others), EVERYWHERE) == SiteLists(True, False, "positions" in others)


def test_lists_of_channels_that_do_not_pay_alone_are_left_out() -> None:
    assert LISTS(site(channels_in=CHANNELS // 2, stride=2), EVERYWHERE, live("channels", "frames")) == (False,) * 3
    assert LISTS(site(), live("frames"), live("frames", "positions")) == (False,) * 3


def test_one_samples_lists_of_channels_are_always_walked() -> None:
    thinned = live("channels", "frames")
    assert LISTS(site(batch=1, channels_in=CHANNELS // 2, stride=2), thinned, thinned) == SiteLists(True, True)


def test_lists_are_judged_by_the_arithmetic_of_the_type() -> None:
    """Half precision halves the arithmetic that living positions of the input save, and not the listing of rows."""
    size, frames, channels = (1, 16, 16), 8, 16
    window = Window(frames, size, size, (1, 3, 3), padding=(0, 1, 1))
    data, end = relax.Var("data"), relax.Var("end")
    layer = Site(end, end, data, np.zeros((channels, channels, 1, 3, 3), "float32"), window)
    shapes = {"positions": (frames, 1, *size[1:], 1), "channels": (frames, 1, 1, 1, channels)}
    alive = Live(**{axis: Factor(relax.Var(axis), shape) for axis, shape in shapes.items()})
    whole, half = (SampleLists(machine_of(load_target("snapdragon")), 1, "direct", of) for of in ("float32", "float16"))
    assert whole(layer, alive, EVERYWHERE) == SiteLists(True, False, True)
    assert half(layer, alive, EVERYWHERE) == SiteLists(True, False, False)
