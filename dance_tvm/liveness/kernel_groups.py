"""Find kernel-group sparsity in a convolution's weights and pack what is left of it, column by column.

RT3D (section 3) cuts a weight tensor (M filters, N input channels, taps) into kernel groups of ``gm`` filters by ``gn``
channels. Seen as a matrix with one row a filter, a *column* is one (channel, tap): KGS sparsity removes the ``gn``
columns of a tap together in all ``gm`` rows, vanilla sparsity does so for all taps at once, filter sparsity removes
rows. What was removed is read off the zeros of the weights alone, so it does not matter who pruned them.

Only numpy is used here: the compiler's passes and the training side read the same numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dance_tvm.core.errors import DanceError
from dance_tvm.schedules.kernel_columns import Columns, column_run

Scheme = Literal["dense", "filter", "vanilla", "kgs"]

GROUP_FILTERS = (4, 8, 16)
GROUP_CHANNELS = (8, 4, 1)
CANDIDATES: tuple[tuple[int, int], ...] = tuple(itertools.product(GROUP_FILTERS, GROUP_CHANNELS))

# A gathered kernel pays for its index loads; under this share of saved work a dense kernel is as fast.
BREAK_EVEN = 0.08


@dataclass(frozen=True, eq=False)
class KernelGroups:
    """The sparsity of one convolution's weights for one group size, and its packed form.

    ``weight`` is (M, N, taps), ``live`` is (P, Q, taps) with P = ceil(M / gm), Q = ceil(N / gn): True where any weight
    of the kernel group is nonzero at that tap. ``reason`` says why the scheme is what it is. Packing happens when
    ``columns``, ``column_ptr`` or ``weights`` is first read.
    """

    weight: NDArray[np.float32]
    kernel: tuple[int, ...]
    gm: int
    gn: int
    live: NDArray[np.bool_]
    scheme: Scheme
    reason: str

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def filters(self) -> int:
        """M, the filters of the layer, pruned ones included."""
        return self.weight.shape[0]

    @property
    def channels(self) -> int:
        """N, the input channels of the layer."""
        return self.weight.shape[1]

    @property
    def taps(self) -> int:
        """KD * KH * KW, the kernel offsets in row-major order."""
        return self.weight.shape[2]

    @cached_property
    def live_filters(self) -> NDArray[np.int32]:
        """Filters with any nonzero weight, ascending. The others produce their bias alone."""
        return np.flatnonzero((self.weight != 0).any(axis=(1, 2))).astype(np.int32)

    @cached_property
    def live_channels(self) -> NDArray[np.int32]:
        """Input channels that any filter reads, ascending."""
        return np.flatnonzero((self.weight != 0).any(axis=(0, 2))).astype(np.int32)

    # -- exact accounting ----------------------------------------------------------------------------------------

    @property
    def dense_weights(self) -> int:
        """Weights of the layer before pruning: M * N * taps."""
        return self.weight.size

    @cached_property
    def live_weights(self) -> int:
        """Weights in live columns, without padding: what one output position costs in multiply-accumulates.

        In the filter scheme rows and channels are removed singly, in the others whole columns of kernel groups.
        """
        if self.scheme == "dense":
            return self.dense_weights
        if self.scheme == "filter":
            return len(self.live_filters) * len(self.live_channels) * self.taps
        rows = _lengths(self.filters, self.gm)
        return int(rows @ self._columns_per_group)

    @cached_property
    def lanes(self) -> int:
        """Multiply lanes a kernel runs per output position: columns times filters of a group, zero filters included."""
        if self.scheme == "dense":
            return _round_up(self.filters, self.gm) * self.channels * self.taps
        return int(self._columns_per_group.sum()) * self.gm

    @property
    def rate(self) -> float:
        """Dense over live weights, the pruning rate of the layer; infinite for an all-zero layer."""
        return self.dense_weights / self.live_weights if self.live_weights else math.inf

    @property
    def sparsity(self) -> float:
        """Share of the weights that need not be multiplied, 0 for a dense layer."""
        return 1 - self.live_weights / self.dense_weights

    def macs(self, output_positions: int) -> int:
        """Multiply-accumulates of the layer for N * T * H * W ``output_positions``."""
        return self.live_weights * output_positions

    @property
    def zeros(self) -> float:
        """Share of the weights that are zero, in groups or not."""
        return 1 - np.count_nonzero(self.weight) / self.weight.size

    def __str__(self) -> str:
        if self.scheme == "dense":
            return f"built dense: {self.reason}"
        group = f" {self.gm}x{self.gn}" if self.scheme in ("vanilla", "kgs") else ""
        return f"{self.scheme}{group}, {self.rate:.2f}x fewer MACs: {self.reason}"

    # -- packed form ---------------------------------------------------------------------------------------------

    @cached_property
    def listed(self) -> Columns:
        """The live columns as lists. A live column of a kernel group brings all its ``gn`` channels."""
        return Columns(self.live, self.channels, self.gn)

    @property
    def column_ptr(self) -> NDArray[np.int32]:
        """int32 (P, taps + 1): columns of filter group p at tap k are ``column_ptr[p, k] : column_ptr[p, k + 1]``."""
        return self.listed.ptr

    @property
    def columns(self) -> NDArray[np.int32]:
        """int32 (total,): the input channel of each column, by filter group, then tap, then ascending channel."""
        return self.listed.channel

    @property
    def run(self) -> int:
        """How many columns, of consecutive input channels, always come together."""
        return column_run(self.channels, self.gn)

    @property
    def kept(self) -> float:
        """Share of all columns that is live."""
        return self.listed.count / (len(self.live) * self.channels * self.taps)

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """float32 (total, gm): the weights of each column, one lane a filter; lanes beyond M are zero."""
        group, tap, channel = self.listed.index
        padded = _pad(self.weight, (self.gm, 1))
        grouped = padded.reshape(-1, self.gm, self.channels, self.taps)
        return np.ascontiguousarray(grouped[group, :, channel, tap])

    def unpack(self) -> NDArray[np.float32]:
        """The (M, N, *kernel) weights again, rebuilt from the packed columns."""
        group, tap, channel = self.listed.index
        grouped = np.zeros((len(self.live), self.gm, self.channels, self.taps), np.float32)
        grouped[group, :, channel, tap] = self.weights
        return grouped.reshape(-1, self.channels, self.taps)[: self.filters].reshape(
            self.filters, self.channels, *self.kernel
        )

    def compact(self) -> NDArray[np.float32]:
        """(live filters, live channels, *kernel): the smaller dense weights that filter sparsity leaves."""
        small = self.weight[np.ix_(self.live_filters, self.live_channels)]
        return small.reshape(*small.shape[:2], *self.kernel)

    @cached_property
    def _columns_per_group(self) -> NDArray[np.int64]:
        """(P,): how many columns each filter group keeps, all taps together."""
        return np.einsum("q,pqt->p", _lengths(self.channels, self.gn), self.live.astype(np.int64))


def find_kernel_groups(weight: NDArray[np.floating], gm: int, gn: int) -> KernelGroups:
    """Which columns of (M, N, *kernel) weights are zero in groups of ``gm`` filters by ``gn`` channels.

    A layer that would save less than ``BREAK_EVEN`` of its work is called dense. Raises DanceError for a group size
    under 1 or weights without filters, channels and a kernel.
    """
    if gm < 1 or gn < 1:
        raise DanceError(f"kernel groups need at least one filter and one channel, got {gm}x{gn}")
    flat = _flatten(weight)
    live = _live_columns(flat, gm, gn)
    scheme, reason = _scheme_of(flat, live, gm, gn)
    return KernelGroups(flat, tuple(weight.shape[2:]), gm, gn, live, scheme, reason)


def choose_kernel_groups(
    weight: NDArray[np.floating],
    candidates: Iterable[tuple[int, int]] = CANDIDATES,
    cost: Callable[[KernelGroups], float] | None = None,
) -> KernelGroups:
    """The group size that runs (M, N, *kernel) weights cheapest, or a dense layer where none pays.

    ``cost`` gives the expected cost of one output position, in any unit; without it ``lane_cost`` for 8-lane vectors.
    Among equally cheap candidates the first wins.
    """
    cost = cost or lane_cost(8)
    candidates = tuple(candidates)
    if not candidates:
        raise DanceError("no candidate group size was given; name at least one (filters, channels) pair")
    zeros = 1 - np.count_nonzero(weight) / max(weight.size, 1)
    if zeros < BREAK_EVEN:
        return _as_dense(weight, *candidates[0], f"{zeros:.1%} of the weights are zero, under the break-even")
    found = [groups_of_size(weight, gm, gn) for gm, gn in candidates]
    sparse = [groups for groups in found if groups.scheme != "dense"]
    if not sparse:
        return min(found, key=lambda groups: groups.lanes)
    best = min(sparse, key=cost)
    dense = min((_as_dense(weight, gm, gn, "") for gm, gn in candidates), key=cost)
    saved = 1 - cost(best) / cost(dense)
    if saved < BREAK_EVEN:
        return _as_dense(weight, dense.gm, dense.gn, f"the best groups ({best.gm}x{best.gn}) save {max(saved, 0):.1%}")
    return best


def fitting_groups(lanes: int) -> list[tuple[int, int]]:
    """The candidates whose filters fill vectors of ``lanes`` floats; at the least groups of one vector."""
    return [(gm, gn) for gm, gn in CANDIDATES if gm % lanes == 0] or [(lanes, gn) for gn in GROUP_CHANNELS]


def groups_of_size(weight: NDArray[np.floating], gm: int, gn: int) -> KernelGroups:
    """The weights in groups of ``gm`` filters by ``gn`` channels, whatever they cost.

    Filter sparsity is taken in groups of one channel: zero channels lie singly, and one live channel keeps its group.
    """
    groups = find_kernel_groups(weight, gm, gn)
    if groups.scheme != "filter" or groups.gn == 1:
        return groups
    return replace(groups, gn=1, live=_live_columns(groups.weight, groups.gm, 1))


def lane_cost(
    vector: int, run_overhead: float = 1.0, excess: Callable[[int], float] | None = None
) -> Callable[[KernelGroups], float]:
    """A cost in multiply lanes for registers of ``vector`` floats that hold the filters of a kernel group.

    Filters beyond the register are padding, and each run of ``gn`` channels costs one index load, which vanilla
    sparsity shares between the taps and a dense or filter-pruned layer does not need. ``excess``: what
    tiles of so many vectors take over their multiply-adds, because few filters use each input but little.
    """

    def cost(groups: KernelGroups) -> float:
        lanes = groups.lanes * _round_up(groups.gm, vector) / groups.gm
        if excess is not None:
            lanes *= excess(-(-groups.gm // vector))
        if groups.scheme in ("dense", "filter"):
            return lanes
        shared = groups.taps if groups.scheme == "vanilla" else 1
        return lanes + run_overhead * float(groups.live.sum()) / shared

    return cost


def _flatten(weight: NDArray[np.floating]) -> NDArray[np.float32]:
    if weight.ndim < 2 or 0 in weight.shape:
        raise DanceError(f"kernel groups need weights (filters, channels, kernel...), got the shape {weight.shape}")
    return np.ascontiguousarray(weight, np.float32).reshape(*weight.shape[:2], -1)


def _pad(weight: NDArray[Any], groups: tuple[int, int]) -> NDArray[Any]:
    """Grow filters and channels with zeros to multiples of the group."""
    grow = [(0, _round_up(size, group) - size) for size, group in zip(weight.shape[:2], groups, strict=True)]
    return np.pad(weight, [*grow, (0, 0)])


def _live_columns(weight: NDArray[np.float32], gm: int, gn: int) -> NDArray[np.bool_]:
    nonzero = _pad(weight != 0, (gm, gn))
    filters, channels, taps = nonzero.shape
    return np.asarray(nonzero.reshape(filters // gm, gm, channels // gn, gn, taps).any(axis=(1, 3)))


def _zero_share(weight: NDArray[np.float32], live: NDArray[np.bool_], gm: int, gn: int) -> float:
    """The share of the weights that lies in zero columns; groups cut short by the layer's edge count for less."""
    filters, channels, taps = weight.shape
    kept = np.einsum("p,q,pqt->", _lengths(filters, gm), _lengths(channels, gn), live.astype(np.int64))
    return 1 - float(kept) / (filters * channels * taps)


def _scheme_of(weight: NDArray[np.float32], live: NDArray[np.bool_], gm: int, gn: int) -> tuple[Scheme, str]:
    """The narrowest scheme that explains the zeros, and why."""
    kept_filters = (weight != 0).any(axis=(1, 2))
    kept_channels = (weight != 0).any(axis=(0, 2))
    kept = kept_filters.mean() * kept_channels.mean()
    small = weight[np.ix_(kept_filters, kept_channels)]
    rest_dense = small.size == 0 or _zero_share(small, _live_columns(small, gm, gn), gm, gn) < BREAK_EVEN
    if 1 - kept >= BREAK_EVEN and rest_dense:
        gone = f"{(~kept_filters).sum()} of {len(kept_filters)} filters"
        return "filter", f"{gone} and {(~kept_channels).sum()} of {len(kept_channels)} input channels are zero"
    zeros = _zero_share(weight, live, gm, gn)
    if zeros < BREAK_EVEN:
        return "dense", f"{zeros:.1%} of the {gm}x{gn} columns are zero, under the break-even of {BREAK_EVEN:.0%}"
    whole = np.array_equal(live.any(axis=2), live.all(axis=2))
    what = "kernel groups" if whole else "columns"
    return "vanilla" if whole else "kgs", f"{zeros:.1%} of the {gm}x{gn} {what} are zero"


def _as_dense(weight: NDArray[np.floating], gm: int, gn: int, reason: str) -> KernelGroups:
    flat = _flatten(weight)
    live = np.ones((-(-flat.shape[0] // gm), -(-flat.shape[1] // gn), flat.shape[2]), np.bool_)
    return KernelGroups(flat, tuple(weight.shape[2:]), gm, gn, live, "dense", reason)


def _lengths(size: int, group: int) -> NDArray[np.int64]:
    """How many of ``size`` members each group really has: the last one may be short."""
    lengths = np.full(-(-size // group), group, np.int64)
    lengths[-1] = size - group * (len(lengths) - 1)
    return lengths


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
