"""From a channel mask to the list of live channels, on the device: the list of :mod:`..channel_plan`."""

from __future__ import annotations

from tvm import tirx

from ..channel_plan import channel_list_shape
from ..emit import INT, argument, kernel, number, store, when
from .emit import BLOCK, compact, launch


def plan_channels(samples: int, channels: int, nr: int, name: str = "plan_channels_gpu") -> tirx.PrimFunc:
    """The planner: mask (samples, channels), nonzero meaning alive → int32 list (samples, 1 + 2 · channels)."""
    with kernel(name) as built:
        mask = argument("mask", (samples, channels))
        listed = argument("listed", channel_list_shape(samples, channels), INT)
        with launch(samples, BLOCK) as (sample, thread):

            def list_it(slot: object, channel: object) -> None:
                store(listed, channel, sample, 1 + slot)  # type: ignore[operator]
                store(listed, channel * nr, sample, 1 + channels + slot)  # type: ignore[operator]

            total = compact(thread, channels, lambda channel: mask[sample, channel] != number(0.0), list_it)
            with when(thread == 0):
                store(listed, total, sample, 0)
    return built.func
