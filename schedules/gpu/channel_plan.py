"""From a channel mask to the list of live channels, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from .. import plans
from ..emit import number, store, when
from .emit import BLOCK, compact, launch


@dataclass(frozen=True)
class ChannelPlan(plans.ChannelPlan):
    """The planner for a GPU: one block of threads a sample."""

    name = "plan_channels_gpu"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """List them in order."""
        mask, listed = args["mask"], args["listed"]
        with launch(self.samples, BLOCK) as (sample, thread):
            total = compact(
                thread,
                self.channels,
                lambda channel: mask[sample, channel] != number(0.0),
                lambda slot, channel: store(listed, channel, sample, 1 + slot),
            )
            with when(thread == 0):
                store(listed, total, sample, 0)
