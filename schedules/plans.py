"""Planners: masks and tables in, index lists out. What those of all machines have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from .emit import INT
from .geometry import Window
from .kernel import PLANNER, Kernel, Operand, Weights, channels_mask, constant, frames_mask, output, positions_mask

#: Frames with more taps than this keep their static tap sets: 2**taps classes would cost more than they save.
MOST_DYNAMIC_FRAME_TAPS = 5
#: The same for taps over height and width under a mask of input positions: 3 × 3 makes 512 classes.
MOST_DYNAMIC_POSITION_TAPS = 9


def masks_of(
    window: Window,
    in_frames: bool,
    out_frames: bool,
    positions: tuple[int, int] | None = None,
    in_positions: tuple[int, int] | None = None,
) -> dict[str, Operand]:
    """The masks of a window by the axes that they thin, in the order in which kernels take them.

    ``positions`` and ``in_positions``: how many clips and frames the mask of output and input positions tells apart,
    None where there is none.
    """
    masks = []
    if in_frames:
        masks.append(frames_mask("in_frames", window.batch, window.size[0]))
    if out_frames:
        masks.append(frames_mask("out_frames", window.batch, window.out[0]))
    if positions is not None:
        masks.append(positions_mask("positions", (*positions, *window.out[1:])))
    if in_positions is not None:
        masks.append(positions_mask("in_positions", (*in_positions, *window.size[1:])))
    return {mask.name: mask for mask in masks}


class Plan(Kernel):
    """A planner: masks and constant tables in, lists out. Subclasses declare the fields."""

    kind = PLANNER
    window: Window
    samples: int
    in_frames: bool
    out_frames: bool
    positions: tuple[int, int] | None
    in_positions: tuple[int, int] | None = None

    @property
    @abstractmethod
    def tap_entries(self) -> np.ndarray:
        """int32 (entries, …): the taps of each class, class after class, as the convolution reads them."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the int32 lists, in the order of the planner's outputs."""

    @property
    @abstractmethod
    def tables(self) -> dict[str, np.ndarray]:
        """Constant int32 tables that the planner takes after the masks."""

    @property
    def walked(self) -> tuple[str, ...]:
        """The lists that the convolution takes."""
        return tuple(self.shapes)

    @property
    def masks(self) -> dict[str, Operand]:
        """The masks that the planner takes."""
        return masks_of(self.window, self.in_frames, self.out_frames, self.positions, self.in_positions)

    def operands(self) -> list[Operand]:
        """Masks, tables, lists."""
        tables = [constant(key, table.shape, INT) for key, table in self.tables.items()]
        return [*self.masks.values(), *tables, *(output(key, shape, INT) for key, shape in self.shapes.items())]

    def prepare(self, weights: Weights | None = None) -> dict[str, np.ndarray]:
        """The tables."""
        return self.tables


@dataclass(frozen=True)
class RowPlan(Plan):
    """How the rows of ``window`` are listed.

    ``samples`` is 1 when all clips of a batch share their channel lists (rows of all clips then mix in one list), else
    the batch size. ``in_frames``/``out_frames``/``positions`` say which masks are given: (batch, frames) of the input
    known to be nonzero, (batch, frames) of the output that are read, and (batch or 1, frames or 1, height, width).
    ``in_positions`` is to the input what ``positions`` is to the output; for windows of one frame alone.
    """

    window: Window
    mr: int
    block_tiles: int
    segment_taps: int
    samples: int = 1
    in_frames: bool = False
    out_frames: bool = False
    positions: tuple[int, int] | None = None
    in_positions: tuple[int, int] | None = None

    @cached_property
    def dynamic_taps(self) -> bool:
        """Whether dead input frames remove taps (they are read as zeros otherwise)."""
        return self.in_frames and self.window.kernel[0] <= MOST_DYNAMIC_FRAME_TAPS

    @cached_property
    def frame_classes(self) -> tuple[tuple[int, ...], ...]:
        """Sets of frame taps: every subset where frames die at run time, else those that padding leaves."""
        if not self.dynamic_taps:
            return self.window.classes[0]
        taps = range(self.window.kernel[0])
        return tuple(tuple(tap for tap in taps if bits >> tap & 1) for bits in range(1 << len(taps)))

    @cached_property
    def tap_sets(self) -> list[list[int]]:
        """Live taps of each class; a class is a set of frame taps × a set of row taps × a set of column taps.

        Under a mask of input positions it is any set of taps, class ``c`` that of the bits of ``c``.
        """
        _, kernel_h, kernel_w = self.window.kernel
        if self.in_positions is not None:
            taps = range(kernel_h * kernel_w)
            return [[tap for tap in taps if bits >> tap & 1] for bits in range(1 << len(taps))]
        return [
            [(frame * kernel_h + row) * kernel_w + column for frame, row, column in product(frames, rows, columns)]
            for frames, rows, columns in product(self.frame_classes, *self.window.classes[1:])
        ]

    @cached_property
    def tap_entries(self) -> np.ndarray:
        """int32 (entries, 2): tap and its offset in positions, class after class."""
        entries = [(tap, self.window.offset(tap)) for taps in self.tap_sets for tap in taps]
        return np.array(entries or [(0, 0)], "int32")

    @cached_property
    def tap_starts(self) -> np.ndarray:
        """int32 (classes + 1,): where each class begins in ``tap_entries``."""
        return np.cumsum([0, *(len(taps) for taps in self.tap_sets)]).astype("int32")

    @property
    def rows_capacity(self) -> int:
        """Rows of one sample when nothing is left out."""
        return self.window.positions_out // self.samples

    @cached_property
    def tiles_capacity(self) -> int:
        """Tiles of one sample in the worst case: every class may end in a tile that is not full."""
        most_classes = min(len(self.tap_sets), self.rows_capacity)
        return (self.rows_capacity + most_classes * (self.mr - 1)) // self.mr

    @property
    def blocks_capacity(self) -> int:
        """Blocks of one sample in the worst case."""
        return -(-self.tiles_capacity // self.block_tiles)

    @property
    def segments_capacity(self) -> int:
        """Segments of one sample in the worst case: each pair of class and block needs its taps once."""
        pairs = min(len(self.tap_sets), self.rows_capacity) + self.blocks_capacity
        return pairs * -(-max(1, self.window.taps) // self.segment_taps)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the five int32 lists, in the order of the planner's outputs."""
        return {
            "rows_in": (self.samples, self.tiles_capacity, self.mr),
            "rows_out": (self.samples, self.tiles_capacity, self.mr),
            "segments": (self.samples, self.segments_capacity, 4),
            "blocks": (self.samples, self.blocks_capacity + 1),
            "counts": (self.samples, 4),
        }

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """Constant int32 tables that the planner takes after the masks."""
        window = self.window
        columns = len(window.classes[2])
        frame_class = [0 if self.dynamic_taps else window.class_of(0, t) for t in range(window.out[0])]
        return {
            "tap_starts": self.tap_starts,
            "frame_class": np.array(frame_class, "int32"),
            "row_class": np.array([window.class_of(1, h) * columns for h in range(window.out[1])], "int32"),
            "column_class": np.array([window.class_of(2, w) for w in range(window.out[2])], "int32"),
        }


def channel_list_shape(samples: int, channels: int) -> tuple[int, int]:
    """Shape of the list: count, channels."""
    return (samples, 1 + channels)


@dataclass(frozen=True)
class ChannelPlan(Kernel):
    """The planner of live channels: mask (samples, channels), nonzero meaning alive → int32 (samples, 1 + channels).

    A list is one row per sample: the count, then the live channels in order.

    ``axis`` says whose mask it is; the same list serves the layer that writes channels and the one that reads them.
    """

    kind = PLANNER
    samples: int
    channels: int
    axis: str = field(default="", compare=False)

    def operands(self) -> list[Operand]:
        """The mask, the list."""
        shape = channel_list_shape(self.samples, self.channels)
        return [channels_mask("mask", self.axis, self.samples, self.channels), output("listed", shape, INT)]
