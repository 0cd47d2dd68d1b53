"""From masks to the lists of rows that convolutions walk: what the planners of all machines have in common."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from .emit import INT
from .geometry import Window
from .kernel import Kernel, Operand, Weights, constant, frames_mask, output, positions_mask


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
    """A planner: masks and constant tables in, lists out. The fields are those of whoever inherits it."""

    kind = "planner"
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
