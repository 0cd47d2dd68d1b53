"""What convolutions over the columns of kernel groups have in common, on a CPU and on a GPU (RT3D, section 3)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from .convolution import Convolution
from .emit import INT, Expr
from .kernel import PLANNER, Count, Kernel, Operand, Planned, Weights, channels_mask, constant, listed, output


class KernelGroupLists(Convolution):
    """Lists of weight columns in the place of lists of channels.

    ``tile.nr`` are the filters of a group, ``columns`` the columns over all groups. ``live_out``: a mask (samples,
    C_out) of live output channels is given; groups without any are skipped, and dead channels of other groups are
    stored as zeros.
    """

    skips = ("weight columns",)
    columns: int
    #: How many columns always come together, of consecutive input channels; one list entry stands for all of them.
    run: int = 1

    @property
    @abstractmethod
    def entry_fields(self) -> int:
        """How many numbers each list entry has."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(columns, nr); a layer without any column keeps one run that no list names."""
        return (max(self.run, self.columns), self.tile.nr)

    @property
    def preparation(self) -> None:
        """Columns are listed when the network is built."""

    def unpacked(self, at: Expr) -> None:
        """The columns say which weights there are."""

    @property
    def column_samples(self) -> int:
        """Column lists given: one for each sample where input channels die at run time, else one."""
        return self.plan.samples if self.live_in else 1

    @property
    def entries(self) -> int:
        """List entries, each for ``run`` columns; an empty list keeps one that nothing names."""
        return max(1, self.columns // self.run)

    @property
    def column_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the int32 lists: where each group and tap begins, and what is known of each entry."""
        return {
            "column_starts": (self.column_samples, self.panels, self.window.taps + 1),
            "columns": (self.column_samples, self.entry_fields, self.entries),
        }

    def channel_operands(self) -> list[Operand]:
        """Where each group and tap begins, the columns, and where asked for a mask of live output channels."""
        make = listed if self.live_in else _constant_list
        found = [make(name, shape) for name, shape in self.column_shapes.items()]
        if self.live_out:
            found.append(channels_mask("out_mask", "out_channels", self.plan.samples, self.channels_out))
        return found

    def channel_lists(self) -> list[Planned]:
        """What thins the columns by a mask of live input channels."""
        if not self.live_in:
            return []
        planner = self.column_planner()
        return [Planned(planner, tuple(each.name for each in planner.outputs()))]

    @abstractmethod
    def column_planner(self) -> ColumnPlan:
        """The planner of its columns."""

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Also the lists of columns that no mask thins."""
        assert weights is not None
        assert weights.columns is not None
        constants = super().prepare(replace(weights, weight=None))
        if weights.column_weights is not None:
            packed = np.zeros(self.weight_shape, self.dtype)
            packed[: len(weights.column_weights)] = weights.column_weights
            constants["weights"] = packed
        if not self.live_in:
            starts, columns = self.static_starts(weights.columns.ptr), self.static_columns(weights)
            constants |= {"column_starts": starts, "columns": columns}
        return constants

    def static_starts(self, column_ptr: np.ndarray) -> np.ndarray:
        """The ``column_starts`` list of the weights, from where the columns of each group and tap begin."""
        return (column_ptr[None] // self.run).astype(INT)

    @abstractmethod
    def static_columns(self, weights: Weights) -> np.ndarray:
        """The ``columns`` list of the weights."""

    def column_taps(self, column_ptr: np.ndarray) -> np.ndarray:
        """The tap of each column."""
        return np.tile(np.arange(self.window.taps), len(column_ptr)).repeat(np.diff(column_ptr, axis=1).reshape(-1))

    def work(self) -> tuple[Count, Count, Count]:
        """Multiply-adds of a pair are the mean over the taps, output channels are 1."""
        pairs, _, _ = super().work()
        last, lanes = (self.panels - 1, self.window.taps), self.tile.nr * self.run
        return pairs, Count(lanes, "column_starts", last, self.window.taps), Count(1)


def _constant_list(name: str, shape: tuple[int, ...]) -> Operand:
    return constant(name, shape, INT)


@dataclass(frozen=True)
class ColumnPlan(Kernel):
    """Thin the column lists by a mask of live input channels."""

    kind = PLANNER
    conv: KernelGroupLists

    def operands(self) -> list[Operand]:
        """mask (samples, C_in), the two lists of the weights, those of each sample."""
        conv = self.conv
        entries, static = conv.window.taps + 1, (1, conv.entry_fields, conv.entries)
        return [
            channels_mask("mask", "in_channels", conv.plan.samples, conv.channels_in),
            constant("starts", (1, conv.panels, entries), INT),
            constant("static", static, INT),
            *(output(name, shape, INT) for name, shape in conv.column_shapes.items()),
        ]

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """The lists of the weights."""
        assert weights is not None
        assert weights.columns is not None
        return {
            "starts": self.conv.static_starts(weights.columns.ptr),
            "static": self.conv.static_columns(weights),
        }
