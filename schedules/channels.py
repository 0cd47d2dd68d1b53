"""Lists of live channels.

A list is one int32 row per sample: the count, then the live channels in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .emit import INT
from .kernel import Kernel, Operand, channels_mask, output


def channel_list_shape(samples: int, channels: int) -> tuple[int, int]:
    """Shape of the list: count, channels."""
    return (samples, 1 + channels)


@dataclass(frozen=True)
class ChannelPlan(Kernel):
    """The planner: mask (samples, channels), nonzero meaning alive → int32 list (samples, 1 + channels).

    ``axis`` tells whose mask it is; the same list serves the layer that writes channels and the one that reads them.
    """

    kind = "planner"
    samples: int
    channels: int
    axis: str = field(default="", compare=False)

    def operands(self) -> list[Operand]:
        """The mask, the list."""
        shape = channel_list_shape(self.samples, self.channels)
        return [channels_mask("mask", self.axis, self.samples, self.channels), output("listed", shape, INT)]
