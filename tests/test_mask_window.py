"""Masks carried through windows on a processor: what a window touches, and what windows read, beside every pair of tap
and output position one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from convolutions import call
from test_depthwise import window_of

from dance_tvm.schedules.cpu.mask_window import GrownMask
from dance_tvm.schedules.geometry import Window

WINDOWS = {
    "clips, strides of two": window_of(2, (5, 7, 9), (3, 3, 3), (1, 2, 2), (1, 1, 1)),
    "dilated, beyond the end": window_of(1, (1, 7, 9), (3, 3, 5), (1, 1, 3), (1, 1, 2), (1, 2, 1)),
    "gaps that no window reads": window_of(1, (4, 6, 6), (1, 1, 1), (1, 2, 2)),
}


def by_pairs(
    mask: np.ndarray, window: Window, spanned: list[bool], shape: tuple[int, ...], forward: bool
) -> np.ndarray:
    """Each tap of each output position along the axes that are ``spanned``; the others stay."""
    grown = np.zeros(shape, "float32")
    outs = product(*(range(n if on else 1) for n, on in zip(window.out, spanned, strict=True)))
    for out in outs:
        for taps in product(*(range(n if on else 1) for n, on in zip(window.kernel, spanned, strict=True))):
            read = [window.source(axis, out[axis], taps[axis]) if spanned[axis] else 0 for axis in range(3)]
            if all(0 <= at < size or not on for at, size, on in zip(read, window.size, spanned, strict=True)):
                source, target = (read, out) if forward else (out, read)
                alive = mask[(slice(None), *source)] != 0
                grown[(slice(None), *target)] = np.maximum(grown[(slice(None), *target)], alive)
    return grown


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("name", WINDOWS)
def test_every_pair_of_tap_and_position_counts(name: str, forward: bool) -> None:
    window = WINDOWS[name]
    ends = window.size if forward else window.out
    for whole in ((), (0,), (1, 2), (0, 1, 2)):  # axes along which the mask is the same everywhere
        field = (window.batch, *(1 if axis in whole else ends[axis] for axis in range(3)))
        kernel = GrownMask(window, field, forward)
        mask = (np.random.default_rng(len(whole)).random(field) < 0.3).astype("float32") * 7
        spanned = [field[axis + 1] != 1 or ends[axis] == 1 for axis in range(3)]
        np.testing.assert_array_equal(call(kernel, mask)[0], by_pairs(mask, window, spanned, kernel.shape, forward))
