"""From a channel mask to the list of live channels.

A list is one int32 row per sample: the count, the live channels in order, and for each the offset of its weights in
a packed panel (channel × ``nr``).
"""

from __future__ import annotations

from tvm import tirx

from .emit import INT, argument, clear, kernel, let, number, scratch, serial, store, when


def channel_list_shape(samples: int, channels: int) -> tuple[int, int]:
    """Shape of the list: count, channels, weight offsets."""
    return (samples, 1 + 2 * channels)


def plan_channels(samples: int, channels: int, nr: int, name: str = "plan_channels") -> tirx.PrimFunc:
    """The planner: mask (samples, channels), nonzero meaning alive → int32 list (samples, 1 + 2 · channels)."""
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
                store(listed, channel * nr, sample, 1 + channels + slot)
                store(count, slot + 1, 0)
            store(listed, count[0], sample, 0)
    return built.func
