"""From a channel mask to the list of live channels, on the device: the list of :mod:`..channel_plan`."""

from __future__ import annotations

from tvm import tirx

from ..emit import INT, argument, kernel, number, store, when
from ..plans import channel_list_shape
from .emit import BLOCK, compact, launch


def plan_channels(samples: int, channels: int, name: str = "plan_channels_gpu") -> tirx.PrimFunc:
    """The planner: mask (samples, channels), nonzero meaning alive → the count and the live channels."""
    with kernel(name) as built:
        mask = argument("mask", (samples, channels))
        listed = argument("listed", channel_list_shape(samples, channels), INT)
        with launch(samples, BLOCK) as (sample, thread):
            total = compact(
                thread,
                channels,
                lambda channel: mask[sample, channel] != number(0.0),
                lambda slot, channel: store(listed, channel, sample, 1 + slot),
            )
            with when(thread == 0):
                store(listed, total, sample, 0)
    return built.func
