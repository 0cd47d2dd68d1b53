"""Multiply-accumulates of a convolution, counted as a kernel that walks index lists executes them.

    rows of output that somebody reads  x  taps whose input is alive  x  live input channels  x  live output channels

*Alive* is what the masks before it leave, *read* what the masks after it leave and what the windows of later layers
reach of that. Taps that fall on padding are on no list, so they are never counted, dense or thinned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dance_tvm.schedules.geometry import Window

from .expressions import EVERYWHERE, Expression, Live

#: Gives a mask (N, T, H, W, C) of what is alive, extent 1 where it does not vary.
MaskValue = Callable[[Expression], Tensor]


@dataclass(frozen=True)
class ConvolutionWork:
    """A convolution, and where its input is alive and its output read, as expressions of masks.

    ``lists_inputs``: whether a kernel takes dead positions of the input off its lists, as those do whose windows lie
    within one frame.
    """

    window: Window
    channels_in: int
    channels_out: int
    groups: int = 1
    alive: Live = EVERYWHERE
    read: Live = EVERYWHERE
    lists_inputs: bool = False

    def macs(self, masks: MaskValue, clips: int, one: Tensor) -> Tensor:
        """(clips,): what is executed where ``masks`` gives the masks; ``one`` (1, 1, 1, 1, 1) leaves everything."""

        def of(mask: Expression | None, *shape: int) -> Tensor:
            """The mask (clips, T, H, W, C), seen in ``shape``; extents that it does not vary along are left at 1."""
            found = one if mask is None else masks(mask)
            return found.expand(*(own if size == -1 else size for own, size in zip(found.shape, shape, strict=True)))

        window = self.window
        alive = of(self.alive.frames, clips, window.size[0], 1, 1, 1)[:, :, 0, 0, 0]
        frames = of(self.read.frames, clips, window.out[0], 1, 1, 1)[:, :, 0, 0, 0] * live_taps(window, 0, alive)
        inputs = of(self.alive.positions if self.lists_inputs else None, clips, -1, *window.size[1:], 1)[..., 0]
        taps = live_area(window, inputs)
        positions = of(self.read.positions, clips, -1, *window.out[1:], 1)[..., 0] * taps
        if positions.shape[1] == 1:
            pairs = frames.sum(1) * positions.sum(dim=(1, 2, 3))
        else:
            pairs = (frames[:, :, None, None] * positions).sum(dim=(1, 2, 3))
        # Kernels of grouped convolutions take all their channels.
        reads, writes = (None, None) if self.groups > 1 else (self.alive.channels, self.read.channels)
        channels = of(reads, clips, 1, 1, 1, self.channels_in).sum((1, 2, 3, 4))
        return pairs * channels * of(writes, clips, 1, 1, 1, self.channels_out).sum((1, 2, 3, 4)) / self.groups

    @property
    def dense(self) -> int:
        """Without masks."""
        return self.window.tap_positions // self.window.batch * self.channels_in * self.channels_out // self.groups


def live_taps(window: Window, axis: int, alive: Tensor) -> Tensor:
    """How many taps along ``axis`` read a live coordinate (N, inputs), for each output coordinate: (N, outputs)."""
    size, stride, dilation = window.kernel[axis], window.stride[axis], window.dilation[axis]
    padded = functional.pad(alive[:, None], _pads(window, axis, alive.shape[1]))
    kernel = torch.ones(1, 1, size, device=alive.device, dtype=alive.dtype)
    return functional.conv1d(padded, kernel, None, stride, 0, dilation)[:, 0]


def live_area(window: Window, alive: Tensor) -> Tensor:
    """How many taps over height and width read a live position (N, T, H, W), for each output: (N, T, rows, columns)."""
    height, width = (_pads(window, axis, alive.shape[axis + 1]) for axis in (1, 2))
    padded = functional.pad(alive.flatten(0, 1)[:, None], (*width, *height))
    kernel = torch.ones(1, 1, *window.kernel[1:], device=alive.device, dtype=alive.dtype)
    counted = functional.conv2d(padded, kernel, None, window.stride[1:], 0, window.dilation[1:])
    return counted.unflatten(0, alive.shape[:2])[:, :, 0]


def _pads(window: Window, axis: int, extent: int) -> tuple[int, int]:
    """Zeros before and behind ``extent`` coordinates, so that each output has all its taps and none is left over."""
    covered = (window.out[axis] - 1) * window.stride[axis] + (window.kernel[axis] - 1) * window.dilation[axis] + 1
    return window.padding[axis], covered - window.padding[axis] - extent


def pairs_by_tap(window: Window) -> NDArray[np.int64]:
    """(KT, KH, KW): at how many outputs of the batch each tap falls inside the clip."""
    axes = []
    for axis in range(3):
        counted = [0] * window.kernel[axis]
        for index in range(window.out[axis]):
            for tap in window.live_taps(axis, index):
                counted[tap] += 1
        axes.append(np.array(counted, "int64"))
    return window.batch * math.prod((axes[0][:, None, None], axes[1][:, None], axes[2]), start=np.int64(1))
