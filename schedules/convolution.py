"""What every kernel of a convolution has in common, on a CPU and on a GPU."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tvm import tirx

from .emit import FLOAT, INT, Expr, let
from .geometry import GroupedChannels, Window
from .kernel import LAYER, Count, Kernel, Operand, Planned, Weights, constant, listed, output
from .plans import Plan, channel_list_shape
from .preparation import Panels, Preparation


class Panel(Protocol):
    """What a convolution asks of its tile."""

    @property
    def nr(self) -> int:
        """Output channels of one tile."""


class LayerKernel(GroupedChannels, Kernel):
    """A kernel of a convolution or linear layer; subclasses declare the fields."""

    kind = LAYER
    window: Window

    @property
    def samples(self) -> int:
        """Clips whose channel lists differ."""
        return 1

    @property
    def x_shape(self) -> tuple[int, ...]:
        """(N, T, H, W, C_in)."""
        return (self.window.batch, *self.window.size, self.channels_in)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """(N, T', H', W', C_out)."""
        return (self.window.batch, *self.window.out, self.channels_out)

    @abstractmethod
    def work(self) -> tuple[Count, Count, Count]:
        """Pairs of output row and tap, input channels and output channels of each sample: their product is the
        multiply-accumulates executed."""

    def describe(self) -> dict[str, Any]:
        """Also the multiply-accumulates, where no list gives them."""
        counts = self.work()
        if any(count.operand for count in counts):
            return super().describe()
        return {**super().describe(), "macs": math.prod(count.factor for count in counts)}


@dataclass(frozen=True)
class Convolution(LayerKernel):
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
    plan: Plan
    live_in: bool = False
    live_out: bool = False
    residual: bool = False
    activation: str = ""
    zero_dead: str = ""
    #: How activations and weights are stored.
    dtype: str = FLOAT

    @property
    def panels(self) -> int:
        """Blocks of ``nr`` output channels, over all groups."""
        return self.groups * -(-self.group_out // self.tile.nr)

    @property
    def marks(self) -> str:
        """Which channel lists are walked, as the kernel's name says: ``_i``, ``_o``, ``_io`` or nothing."""
        lists = "i" * self.live_in + "o" * self.live_out
        return lists and f"_{lists}"

    @property
    def samples(self) -> int:
        """Clips whose channel lists differ."""
        return self.plan.samples

    # -- operands ----------------------------------------------------------------------------------------------------

    def operands(self) -> list[Operand]:
        """Input, weights, bias, taps, the plan's lists, those of channels or columns, masks, residual, output."""
        return [
            self.source(),
            constant("weights", self.weight_shape, self.weight_dtype),
            constant("bias", (self.bias_size,)),
            constant("tap_entries", self.plan.tap_entries.shape, INT),
            *(listed(key, self.plan.shapes[key]) for key in self.plan.walked),
            *self.channel_operands(),
            *(self.plan.masks[key] for key in self.masks_read),
            *([Operand("residual", self.y_shape, self.dtype, "residual")] if self.residual else []),
            output("y", self.y_shape, self.dtype),
        ]

    def source(self) -> Operand:
        """The input."""
        return Operand("x", self.x_shape, self.dtype)

    def channel_operands(self) -> list[Operand]:
        """What lists live channels."""
        samples, found = self.plan.samples, []
        if self.live_in:
            found.append(listed("in_channels", channel_list_shape(samples, self.depth)))
        if self.live_out:
            found.append(listed("out_channels", channel_list_shape(samples, self.channels_out)))
        return found

    @property
    def masks_read(self) -> list[str]:
        """Which masks of the plan the kernel takes as well: for ``zero_dead``."""
        return [key for key in self.plan.masks if key in ("out_frames", "positions")] if self.zero_dead else []

    def lists(self) -> list[Planned]:
        """The row plan, then what makes the other lists."""
        return [Planned(self.plan, tuple(self.plan.shapes)), *self.channel_lists()]

    def channel_lists(self) -> list[Planned]:
        """The planners of live channels."""
        return [
            Planned(self.channel_planner(axis, channels), (axis,))
            for axis, on, channels in (
                ("in_channels", self.live_in, self.depth),
                ("out_channels", self.live_out, self.channels_out),
            )
            if on
        ]

    @abstractmethod
    def channel_planner(self, axis: str, channels: int) -> Kernel:
        """The planner of one axis's live channels."""

    # -- weights -----------------------------------------------------------------------------------------------------

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: (panels, taps, depth, nr)."""
        return (self.panels, self.window.taps, self.depth, self.tile.nr)

    @property
    def weight_dtype(self) -> str:
        """How the packed weights are stored."""
        return self.dtype

    @property
    def bias_size(self) -> int:
        """Length of the packed bias, which is always float32."""
        return self.channels_out

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Packed weights and bias, and the taps."""
        assert weights is not None
        constants = {"bias": self.pack_bias(weights.bias), "tap_entries": self.plan.tap_entries}
        if weights.weight is not None:
            constants["weights"] = self.pack_weights(weights.weight)
        return constants

    @property
    def preparation(self) -> Preparation | None:
        """How weights become what the kernel reads, where the artifact's library can do it."""
        return self.panelled if self.weight_dtype == FLOAT else None

    @property
    def panelled(self) -> Preparation:
        """How weights are laid out."""
        return Panels(self.groups, self.group_out, self.depth, self.window.taps, self.tile.nr)

    def pack_weights(self, weight: np.ndarray) -> np.ndarray:
        """Pack float32 weights (C_out, C_in / groups, KT, KH, KW) the way the kernel reads them."""
        return self.panelled.apply(weight).astype(self.weight_dtype, copy=False)

    def unpacked(self, at: Expr) -> tuple[Expr, Expr, Expr, Expr] | None:
        """In panels."""
        taps, depth, nr = self.window.taps, self.depth, self.tile.nr
        line, per_group = let(tirx.floordiv(at, nr * depth)), self.panels // self.groups
        channel, lane = let(tirx.floormod(tirx.floordiv(at, nr), depth)), let(tirx.floormod(at, nr))
        panel, tap = let(tirx.floordiv(line, taps)), let(tirx.floormod(line, taps))
        within = let(tirx.floormod(panel, per_group) * nr + lane)
        out = let(tirx.floordiv(panel, per_group) * self.group_out + within)
        return out, tap, channel, within < self.group_out

    def pack_bias(self, bias: np.ndarray) -> np.ndarray:
        """The bias, float32 (C_out,), the way the kernel reads it: as it is."""
        return np.ascontiguousarray(bias, FLOAT)

    # -- what a call executes ----------------------------------------------------------------------------------------

    def work(self) -> tuple[Count, Count, Count]:
        """As the lists of rows and channels have it."""
        return (
            Count(operand="counts", at=(3,)),
            Count(operand="in_channels", at=(0,)) if self.live_in else Count(self.depth),
            Count(operand="out_channels", at=(0,)) if self.live_out else Count(self.channels_out),
        )
