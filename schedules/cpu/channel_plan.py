"""From a channel mask to the list of live channels.

A list is one int32 row per sample: the count, then the live channels in order.
"""

from __future__ import annotations

from tvm import tirx

from ..emit import INT, Expr, argument, clear, kernel, let, number, scratch, serial, store, when
from ..plans import channel_list_shape


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


def in_whole_vectors(listed: tirx.Buffer, sample: Expr, floats: int) -> Expr:
    """Whether the sample's live channels are whole vectors of ``floats`` of all channels, found out when it runs."""
    live = let(listed[sample, 0])
    apart = scratch((1,), INT)
    store(apart, tirx.floormod(live, floats), 0)
    with serial(tirx.floordiv(live, floats)) as vector:
        first, last = (let(listed[sample, 1 + vector * floats + index]) for index in (0, floats - 1))
        beside = let(tirx.all(tirx.floormod(first, floats) == 0, last - first == floats - 1))
        store(apart, apart[0] + tirx.Select(beside, tirx.IntImm(INT, 0), tirx.IntImm(INT, 1)), 0)
    return let(apart[0] == 0)
