"""What every kernel of a gathered convolution has in common, on a CPU and on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .geometry import GroupedChannels, Window
from .plans import RowPlan
from .preparation import Panels, Preparation


class Panel(Protocol):
    """What a convolution asks of its tile."""

    @property
    def nr(self) -> int:
        """Output channels of one tile."""


def list_marks(live_in: bool, live_out: bool) -> str:
    """Which channel lists a kernel walks, as its name tells: ``_i``, ``_o``, ``_io`` or nothing."""
    lists = "i" * live_in + "o" * live_out
    return lists and f"_{lists}"


@dataclass(frozen=True)
class Convolution(GroupedChannels, ABC):
    """One convolution kernel: shapes, which lists it walks, and what is fused behind it.

    ``live_in``, ``live_out``: a list of live input or output channels per sample is given. ``zero_dead``: rows of live
    frames that are not computed are set to zero (``"rows"``), everything that is not computed is (``"all"``), or
    nothing is (``""``).
    """

    window: Window
    channels_in: int
    channels_out: int
    groups: int
    tile: Panel
    plan: RowPlan
    live_in: bool = False
    live_out: bool = False
    residual: bool = False
    activation: str = ""
    zero_dead: str = ""

    @property
    @abstractmethod
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""

    @property
    def panels(self) -> int:
        """Blocks of ``nr`` output channels, over all groups."""
        return self.groups * -(-self.group_out // self.tile.nr)

    @property
    def marks(self) -> str:
        """Which channel lists are walked, for the kernel's name."""
        return list_marks(self.live_in, self.live_out)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: (panels, taps, depth, nr)."""
        return (self.panels, self.window.taps, self.depth, self.tile.nr)

    @property
    def preparation(self) -> Preparation:
        """How weights become what the kernel reads."""
        return Panels(self.groups, self.group_out, self.depth, self.window.taps, self.tile.nr)

    def pack_weights(self, weight: np.ndarray) -> np.ndarray:
        """Pack float32 weights (C_out, C_in / groups, KT, KH, KW) the way the kernel reads them."""
        return self.preparation.apply(weight)

    @abstractmethod
    def pack_bias(self, bias: np.ndarray) -> np.ndarray:
        """The bias, float32 (C_out,), the way the kernel reads it."""
