"""From a channel mask to the list of live channels, on a processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from .. import plans
from ..emit import INT, Expr, clear, let, number, scratch, serial, store, when


@dataclass(frozen=True)
class ChannelPlan(plans.ChannelPlan):
    """The planner for a processor. Channels are listed by whole units of ``unit``, in which some channel is alive."""

    unit: int = 1

    @property
    def name(self) -> str:
        """With the unit, where there is one."""
        return f"plan_channels_u{self.unit}" if self.unit > 1 else "plan_channels"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """List them in one sweep."""
        mask, listed = args["mask"], args["listed"]
        count = scratch((2,), INT)  # channels listed, and of the unit those alive
        clear(listed)
        with serial(self.samples) as sample:
            store(count, tirx.IntImm(INT, 0), 0)
            with serial(-(-self.channels // self.unit)) as unit:
                first = let(unit * self.unit)
                size = self.unit
                if self.channels % self.unit:
                    size = let(tirx.min(self.channels - first, self.unit))
                store(count, tirx.IntImm(INT, 0), 1)
                with serial(size) as index, when(mask[sample, first + index] != number(0.0)):
                    store(count, tirx.IntImm(INT, 1), 1)
                with when(count[1] != 0):
                    slot = let(count[0])
                    with serial(size) as index:
                        store(listed, first + index, sample, 1 + slot + index)
                    store(count, slot + size, 0)
            store(listed, count[0], sample, 0)


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
