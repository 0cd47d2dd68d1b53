"""What index lists hold: the shapes of lists, masks and tables that planners write and kernels walk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from .geometry import Window

#: Frames with more taps than this keep their static tap sets: 2**taps classes would cost more than they save.
MOST_DYNAMIC_FRAME_TAPS = 5
#: The same for taps over height and width under a mask of input positions: 3 × 3 makes 512 classes.
MOST_DYNAMIC_POSITION_TAPS = 9


def mask_shapes(
    window: Window, in_frames: bool, out_frames: bool, positions: tuple[int, int] | None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a planner's float32 masks, in the order of its parameters; nonzero means alive.

    ``positions`` is how many clips and frames the position mask tells apart, None where there is none.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if in_frames:
        shapes["in_frames"] = (window.batch, window.size[0])
    if out_frames:
        shapes["out_frames"] = (window.batch, window.out[0])
    if positions is not None:
        shapes["positions"] = (*positions, window.out[1], window.out[2])
    return shapes


@dataclass(frozen=True)
class RowPlan:
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
    def masks(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the float32 masks that the planner takes."""
        shapes = mask_shapes(self.window, self.in_frames, self.out_frames, self.positions)
        if self.in_positions is not None:
            shapes["in_positions"] = (*self.in_positions, *self.window.size[1:])
        return shapes

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
