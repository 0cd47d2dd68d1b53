"""Chains over frames: the kernel against the recurrence written out, NaN where nothing may be read."""

from __future__ import annotations

import numpy as np
import pytest
from convolutions import call

from dance_tvm.schedules.cpu.carry_frames import Carry

BOTH = ("positions", "channels")
SHAPE = {"frames": 4, "count": 2, "height": 3, "width": 5, "channels": 11, "vector_floats": 4}

CARRIES = {
    "d-step's clip": Carry(**SHAPE, fresh=BOTH, taken=BOTH),
    "its products behind": Carry(**SHAPE, fresh=BOTH, taken=BOTH, kept=BOTH),
    "its stream": Carry(**{**SHAPE, "frames": 1}, fresh=BOTH, taken=BOTH, before=True),
    "a later part of a clip": Carry(**SHAPE, fresh=BOTH, taken=BOTH, before=True),
    "no tiles": Carry(**SHAPE, fresh=("channels",), taken=("channels",)),
    "no masks on what is fresh": Carry(**SHAPE, fresh=(), taken=("positions",)),
    "whole frames": Carry(**SHAPE, fresh=("frames", "channels"), taken=("frames", "positions"), kept=("frames",)),
    "whole vectors": Carry(**{**SHAPE, "channels": 8}, fresh=BOTH, taken=("channels",), kept=("positions",)),
}


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("carry", CARRIES.values(), ids=CARRIES)
def test_the_kernel_is_the_recurrence(carry: Carry, density: float) -> None:
    rng = np.random.default_rng(3)
    shape = (carry.frames * carry.count, carry.height, carry.width, carry.channels)
    x = rng.integers(-9, 10, shape).astype("float32")
    before = rng.integers(-9, 10, (carry.count, *shape[1:])).astype("float32")
    masks = {key: (rng.random(each.shape) < density).astype("float32") for key, each in carry.masks.items()}

    whole = {of: np.ones(shape, bool) for of in ("fresh", "taken", "kept")}
    for (of, axis), mask in masks.items():
        extents = {"frames": (1, 1, 1), "positions": (*shape[1:3], 1), "channels": (1, 1, carry.channels)}[axis]
        whole[of] &= mask.reshape(len(mask), *extents) != 0
    running = before if carry.before else np.zeros_like(before)
    expected = np.empty_like(x)
    for t in range(carry.frames):
        part = slice(t * carry.count, (t + 1) * carry.count)
        running = np.where(whole["fresh"][part], x[part], 0) + np.where(whole["taken"][part], running, 0)
        expected[part] = np.where(whole["kept"][part], running, 0)

    poisoned = np.where(whole["fresh"], x, np.nan).astype("float32")
    first = np.where(whole["taken"][: carry.count], before, np.nan).astype("float32")
    named = {f"{of}_{axis}": mask for (of, axis), mask in masks.items()}
    np.testing.assert_array_equal(call(carry, poisoned, named, residual=first)[0], expected)
