"""Zeros where a convolution for a CPU computes nothing but a reader may look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from tvm import tirx

from ..emit import Expr, choose, number, parallel, serial, when, write
from ..geometry import Window
from .tiles import Tile


class Positions(Protocol):
    """The lists of a convolution, as far as its output's positions go."""

    @property
    def positions(self) -> tuple[int, int] | None:
        """How many clips and frames the mask of output positions tells apart, None where there is none."""


class DeadOutputs(Protocol):
    """A convolution that leaves outputs out."""

    @property
    def window(self) -> Window:
        """Its geometry."""

    @property
    def channels_out(self) -> int:
        """Output channels."""

    @property
    def tile(self) -> Tile:
        """Its tile."""

    @property
    def plan(self) -> Positions:
        """Its lists."""

    @property
    def live_out(self) -> bool:
        """Whether it walks a list of output channels."""

    @property
    def zero_dead(self) -> str:
        """What is set to zero: ``"rows"``, ``"all"`` or nothing."""


def zero_dead(conv: DeadOutputs, masks: Mapping[str, tirx.Buffer], y: tirx.Buffer) -> None:
    """Clear what ``conv.zero_dead`` asks for of ``y``, (N, T, H, W, C_out) as one dimension.

    ``masks``, where given: ``out_frames`` (N, T) and ``positions`` in the shape that the plan's ``positions`` gives.
    """
    window, everything = conv.window, conv.zero_dead == "all"
    area = window.out[1] * window.out[2]
    with parallel(window.batch * window.out[0]) as frame:
        clip, out_frame = tirx.floordiv(frame, window.out[0]), tirx.floormod(frame, window.out[0])

        def clear(position: Expr) -> None:
            clear_run(y, (frame * area + position) * conv.channels_out, conv.channels_out, conv.tile.vector_floats)

        def clear_dead_positions() -> None:
            if "positions" not in masks:
                return
            samples, frames = conv.plan.positions or (1, 1)
            with serial(window.out[1]) as row, serial(window.out[2]) as column:
                at = (clip if samples > 1 else 0, out_frame if frames > 1 else 0, row, column)
                with when(masks["positions"][at] == number(0.0)):
                    clear(row * window.out[2] + column)

        def clear_frame() -> None:
            with serial(area) as position:
                clear(position)

        if everything and conv.live_out:
            clear_frame()
        elif "out_frames" in masks:
            alive = masks["out_frames"][clip, out_frame] != number(0.0)
            if everything:
                choose(alive, clear_dead_positions, clear_frame)
            else:
                with when(alive):
                    clear_dead_positions()
        else:
            clear_dead_positions()


def clear_run(buffer: tirx.Buffer, start: Expr, length: int, vector_floats: int) -> None:
    """Zeros in ``length`` elements of ``buffer`` from ``start`` on."""
    whole = length // vector_floats
    with serial(whole) as v:
        write(buffer, number(0.0, vector_floats), start + v * vector_floats, vector_floats)
    for index in range(whole * vector_floats, length):
        write(buffer, number(0.0), start + index)
