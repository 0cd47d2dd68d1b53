"""Carry a mask through a sliding window: forward (what a window touches) and backward (what windows read)."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import Window, triple
from .kernel import PLANNER, Kernel, Operand, output

Field = tuple[int, int, int, int]


def grown_shape(window: Window, field: Field, forward: bool) -> Field:
    """Shape of the grown field."""
    source, target = (window.size, window.out) if forward else (window.out, window.size)
    extents = (1 if field[axis + 1] == 1 and source[axis] != 1 else target[axis] for axis in range(3))
    return (field[0], *triple(extents))


@dataclass(frozen=True)
class GrownMask(Kernel):
    """Forward: an output alive where any input that its window reads is, ``field`` (N, T, H, W) → (N, T', H', W').

    Backward: an input read where any living output's window reads it, the other way round. Axes of extent 1 in
    ``field`` that are longer in the window are broadcast axes and stay of extent 1.
    """

    kind = PLANNER
    window: Window
    field: Field
    forward: bool

    @property
    def shape(self) -> Field:
        """Shape of the grown field."""
        return grown_shape(self.window, self.field, self.forward)

    def operands(self) -> list[Operand]:
        """The mask, the grown one."""
        return [Operand("mask", self.field), output("grown", self.shape)]
