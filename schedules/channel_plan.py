"""From a channel mask to the list of live channels.

A list is one int32 row per sample: the count, then the live channels in order.
"""

from __future__ import annotations

from tvm import tirx

from .emit import INT, argument, clear, kernel, let, number, scratch, serial, store, when


def channel_list_shape(samples: int, channels: int) -> tuple[int, int]:
    """Shape of the list: count, channels."""
    return (samples, 1 + channels)


def plan_channels(samples: int, channels: int, name: str = "plan_channels") -> tirx.PrimFunc:
    """The planner: mask (samples, channels), nonzero meaning alive → int32 list (samples, 1 + channels)."""
    with kernel(name) as built:
        mask = argument("mask", (samples, channels))
        listed = argument("listed", channel_list_shape(samples, channels), INT)
        count = scratch((1,), INT)
        clear(listed)
        with serial(samples) as sample:
            store(count, tirx.IntImm(INT, 0), 0)
            with serial(channels) as channel, when(mask[sample, channel] != number(0.0)):
                slot = let(count[0])
                store(listed, channel, sample, 1 + slot)
                store(count, slot + 1, 0)
            store(listed, count[0], sample, 0)
    return built.func
