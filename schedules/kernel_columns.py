"""Which weight columns kernel groups keep, as lists; and patterns made up at random, for measuring.

A column is one (tap, input channel) of a group of ``gm`` filters. Only numpy is used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Columns:
    """``live`` (P, Q, taps): whether the ``gn`` columns of filter group p and channel group q at a tap are kept.

    ``channels`` is N, the layer's input channels; where ``gn`` does not divide them the last group is smaller.
    """

    live: NDArray[np.bool_]
    channels: int
    gn: int

    @cached_property
    def index(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Filter group, tap and channel of each column: by group, then tap, then ascending channel."""
        by_channel = np.repeat(self.live, self.gn, axis=1)[:, : self.channels]
        group, tap, channel = np.nonzero(by_channel.transpose(0, 2, 1))
        return group, tap, channel

    @property
    def count(self) -> int:
        """Columns over all groups."""
        return len(self.index[0])

    @cached_property
    def ptr(self) -> NDArray[np.int32]:
        """int32 (P, taps + 1): columns of filter group p at tap k are those from ``ptr[p, k]`` to ``ptr[p, k + 1]``."""
        groups, _, taps = self.live.shape
        group, tap, _ = self.index
        counts = np.bincount(group * taps + tap, minlength=groups * taps)
        ends = np.cumsum(counts).reshape(groups, taps)
        starts = np.concatenate([[0], ends[:-1, -1]])
        return np.concatenate([starts[:, None], ends], axis=1).astype(np.int32)

    @cached_property
    def channel(self) -> NDArray[np.int32]:
        """int32 (count,): the input channel of each column."""
        return self.index[2].astype(np.int32)


@dataclass(frozen=True, eq=False)
class Nonzero:
    """Which weights of a layer are not zero, where kernels read whole frames of a kernel: bool (C_out, C_in, KT)."""

    alive: NDArray[np.bool_]

    @staticmethod
    def of(weight: NDArray[np.floating]) -> Nonzero:
        """Of weights (C_out, C_in, KT, KH, KW)."""
        return Nonzero((weight != 0).any(axis=(3, 4)))

    def columns(self, gm: int, gn: int, whole: bool) -> Columns:
        """The columns that groups of ``gm`` filters by ``gn`` channels keep, in a kernel of KT taps; of one tap where
        all frames are read together (``whole``)."""
        alive = self.alive.any(axis=2, keepdims=True) if whole else self.alive
        filters, channels, taps = alive.shape
        padded = np.pad(alive, [(0, -filters % gm), (0, -channels % gn), (0, 0)])
        grouped = padded.reshape(-(-filters // gm), gm, -1, gn, taps)
        return Columns(np.asarray(grouped.any(axis=(1, 3))), channels, gn)


def column_run(channels: int, gn: int) -> int:
    """How many columns, of consecutive input channels, always come together."""
    return gn if channels % gn == 0 else 1


def random_columns(
    channels: tuple[int, int], taps: int, group: tuple[int, int], kept: float, whole: bool = False
) -> Columns:
    """Columns of which the share ``kept`` is there, evenly chosen, the same at every call.

    ``channels``: in and out; ``group``: filters and channels of a kernel group. ``whole``: a kernel group keeps all
    taps or none, as vanilla sparsity does.
    """
    (channels_in, channels_out), (gm, gn) = channels, group
    groups = (-(-channels_out // gm), -(-channels_in // gn))
    random = np.random.default_rng([gm, gn, channels_in, channels_out])
    order = random.permutation(groups[0] * groups[1] * (1 if whole else taps))
    live = (order < round(len(order) * kept)).reshape(*groups, -1)
    return Columns(np.ascontiguousarray(np.broadcast_to(live, (*groups, taps))), channels_in, gn)
