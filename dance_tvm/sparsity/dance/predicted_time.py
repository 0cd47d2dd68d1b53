"""The time that a masked network is predicted to take, with a gradient: what a budget of time is held against.

`dance-tvm units` predicts for each layer how long it takes where shares of its units are alive along one axis. A unit
is alive where any of its frames, channels or positions is: kernels compute it whole. Between these shares, times are
interpolated linearly, and axes are taken to save independently:

    seconds = dense x √(f(frames read) f(frames written)) x p(positions written) x √(c(channels read) c(written))

with f, p and c the predicted times over the dense one; the roots, because they were predicted with both sides thinned
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional

from dance_tvm.core.errors import DanceError
from dance_tvm.liveness.expressions import Expression
from dance_tvm.liveness.macs import ConvolutionWork, MaskValue
from dance_tvm.sparsity.dance.controller import Masks
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dance.sites import has_units
from dance_tvm.sparsity.units import LayerTimes, Units, own_name

#: Least share of the dense time: roots have no slope at zero.
_LEAST = 1e-3


class TimeCounter:
    """Predicts the time of a network's convolutions from the masks of a forward pass.

    Raises DanceError where `units` gives no times, or those of other layers than `counter` counts.
    """

    def __init__(self, counter: MacCounter, units: Units) -> None:
        if not units.layers:
            raise DanceError("the file of units gives no times: write it anew by `dance-tvm units --out`")
        counted = [layer for layer in counter.layers if has_units(layer.node)]
        for ours, theirs in zip_longest(counted, units.layers):
            found, named = ours and own_name(str(ours.node.target)), theirs and own_name(theirs.layer)
            if found != named:
                raise DanceError(
                    f"the file of units gives the time of {named or 'no layer'} where the network has {found or 'none'}"
                )
        self._counter, shares = counter, torch.tensor(units.live_shares)
        self._layers = [_Layer(layer.work, times, shares) for layer, times in zip(counted, units.layers, strict=True)]
        self.dense = sum(layer.dense for layer in self._layers)

    def seconds(self, decisions: Sequence[Masks], clips: int) -> Tensor:
        """(clips,): of all convolutions, where the sites' masks are `decisions`."""
        masks, one = self._counter.masks(decisions)
        return torch.stack([layer.seconds(masks, clips, one) for layer in self._layers]).sum(0)


@dataclass(frozen=True)
class _Layer:
    """A convolution, its listed times, and at which shares."""

    work: ConvolutionWork
    times: LayerTimes
    shares: Tensor

    @property
    def dense(self) -> float:
        """Seconds with nothing left out."""
        return min(self.times.frames[0], self.times.channels[0], self.times.positions[0])

    def seconds(self, masks: MaskValue, clips: int, one: Tensor) -> Tensor:
        """(clips,)."""
        alive, read, times = self.work.alive, self.work.read, self.times

        def share(mask: Expression | None, unit: tuple[int, int, int], axes: tuple[int, int, int]) -> Tensor:
            """(clips,): of the units along the three ``axes`` of the mask (N, T, H, W, C)."""
            found = one if mask is None else masks(mask)
            found = found.expand(clips, *found.shape[1:]).movedim(axes, (1, 2, 3)).flatten(4)[..., 0]
            sizes = [min(size, extent) for size, extent in zip(unit, found.shape[1:], strict=True)]
            return functional.max_pool3d(found[:, None], sizes, ceil_mode=True).mean(dim=(1, 2, 3, 4))

        in_time = [share(mask, (times.unit_frames, 1, 1), (1, 2, 3)) for mask in (alive.frames, read.frames)]
        in_area = share(read.positions, (1, *times.unit_positions), (1, 2, 3))
        sides = (None, None) if self.work.groups > 1 else (alive.channels, read.channels)
        in_depth = [share(mask, (times.unit_channels, 1, 1), (4, 1, 2)) for mask in sides]
        factors = [self._factor(times.frames, kept).sqrt() for kept in in_time]
        factors += [self._factor(times.channels, kept).sqrt() for kept in in_depth]
        product = self._factor(times.positions, in_area)
        for factor in factors:
            product = product * factor
        return self.dense * product

    def _factor(self, times: tuple[float, ...], kept: Tensor) -> Tensor:
        """The listed times over the dense one where ``kept`` (clips,) of the units are alive."""
        shares = self.shares.to(kept.device)
        values = torch.tensor(times, device=kept.device, dtype=kept.dtype) / times[0]
        shares = torch.cat([shares, shares.new_zeros(1)]).to(kept.dtype)
        slope = (values[-2] - values[-1]) / (shares[-3] - shares[-2])
        values = torch.cat([values, (values[-1] - slope * shares[-2])[None]])
        behind = (kept.detach()[:, None] < shares[None, 1:-1]).sum(1)  # the piece that each clip is in
        low, high = shares[behind + 1], shares[behind]
        slopes = (values[behind] - values[behind + 1]) / (high - low)
        return (values[behind + 1] + slopes * (kept - low)).clamp(min=_LEAST)
