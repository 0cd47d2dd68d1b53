"""Zeros where a convolution for a CPU computes nothing but a reader may look."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Protocol

from tvm import tirx

from ..emit import Expr, choose, number, parallel, serial, when, write
from ..geometry import Triple, Window
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


def zero_dead(conv: DeadOutputs, masks: Mapping[str, tirx.Buffer], y: tirx.Buffer, step: Triple = (1, 1, 1)) -> None:
    """Clear what ``conv.zero_dead`` asks for of ``y``, (N, T, H, W, C_out) as one dimension.

    ``masks``, where given: ``out_frames`` (N, T) and ``positions`` in the shape that the plan's ``positions`` gives.
    ``step``: along each axis so many outputs of the convolution are one of ``y``, which is dead where all of them are.
    """
    everything = conv.zero_dead == "all"
    frames, height, width = (extent // size for extent, size in zip(conv.window.out, step, strict=True))
    area = height * width
    with parallel(conv.window.batch * frames) as frame:
        clip, own = tirx.floordiv(frame, frames), tirx.floormod(frame, frames)

        def clear(position: Expr) -> None:
            clear_run(y, (frame * area + position) * conv.channels_out, conv.channels_out, conv.tile.vector_floats)

        def clear_dead_positions() -> None:
            if "positions" not in masks:
                return
            with serial(height) as row, serial(width) as column:
                read = is_read(conv.plan, masks, (clip, own, row, column), step)
                with when(tirx.Not(read)):
                    clear(row * width + column)

        def clear_frame() -> None:
            with serial(area) as position:
                clear(position)

        if everything and conv.live_out:
            clear_frame()
        elif "out_frames" in masks:
            alive = is_read(None, masks, (clip, own, 0, 0), step)
            if everything:
                choose(alive, clear_dead_positions, clear_frame)
            else:
                with when(alive):
                    clear_dead_positions()
        else:
            clear_dead_positions()


def is_read(
    plan: Positions | None, masks: Mapping[str, tirx.Buffer], at: tuple[Expr, Expr, Expr, Expr], step: Triple
) -> Expr:
    """Whether any of ``step`` outputs of a convolution under one place (clip, frame, row, column) is read, by the masks
    of frames and, with its ``plan``, of positions."""
    clip, frame, row, column = at
    positions = plan.positions if plan is not None else None
    found = []
    for in_frame, in_row, in_column in product(*map(range, step if positions else (step[0], 1, 1))):
        own, read = frame * step[0] + in_frame, []
        if "out_frames" in masks:
            read.append(masks["out_frames"][clip, own] != number(0.0))
        if positions is not None:
            samples, told = positions
            sample, of_frame = clip if samples > 1 else 0, own if told > 1 else 0
            place = (sample, of_frame, row * step[1] + in_row, column * step[2] + in_column)
            read.append(masks["positions"][place] != number(0.0))
        found.append(tirx.all(*read) if read else tirx.IntImm("bool", 1))
    return tirx.any(*found)


def clear_run(buffer: tirx.Buffer, start: Expr, length: int, vector_floats: int) -> None:
    """Zeros in ``length`` elements of ``buffer`` from ``start`` on."""
    whole = length // vector_floats
    with serial(whole) as v:
        write(buffer, number(0.0, vector_floats), start + v * vector_floats, vector_floats)
    for index in range(whole * vector_floats, length):
        write(buffer, number(0.0), start + index)
