"""How a norm or reduction lies in memory: runs of axes that are reduced or kept, and what its kernel sees them as."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from tvm import relax

from dance_tvm.ir.graph import Shape, shape_of

#: Elements of one line from which on several threads share it.
LONG_LINE = 1 << 17
#: Lanes as which such a line is seen.
LINE_LANES = 64


@dataclass(frozen=True)
class Span:
    """Adjacent axes that are all reduced, or all kept."""

    reduced: bool
    first: int
    axes: int


def runs_of(shape: Shape, reduced: set[int]) -> list[Span]:
    """The axes as alternating runs; an axis of extent 1 belongs to the run that it stands in."""
    real = [axis for axis in range(len(shape)) if shape[axis] != 1]
    runs = []
    for is_reduced, axes in groupby(real, key=lambda axis: axis in reduced):
        members = list(axes)
        runs.append(Span(is_reduced, members[0], members[-1] - members[0] + 1))
    return runs


def without(shape: Shape, reduced: set[int], keepdims: bool) -> Shape:
    """What is left of ``shape`` when the axes ``reduced`` are."""
    if keepdims:
        return tuple(1 if axis in reduced else extent for axis, extent in enumerate(shape))
    return tuple(extent for axis, extent in enumerate(shape) if axis not in reduced)


def folded(shape: Shape, span: Span) -> Shape:
    """``shape`` with the axes of ``span`` reduced, each left as one of extent 1."""
    return tuple(1 if span.first <= axis < span.first + span.axes else extent for axis, extent in enumerate(shape))


@dataclass(frozen=True)
class Form:
    """A norm's axes: over which of ``split`` (None: the data's shape) it goes, and how gamma and beta broadcast."""

    axes: list[int]
    affine: Shape
    split: Shape | None = None
    centred: bool = True


def form_of(call: relax.Call) -> Form:
    """The axes of a norm of any kind."""
    name, attrs = call.op.name.removeprefix("relax."), call.attrs
    shape = shape_of(call.args[0])
    rank = len(shape)
    axes = sorted(int(axis) % rank for axis in attrs.axes)
    if name in ("nn.layer_norm", "nn.rms_norm"):
        affine = tuple(extent if axis in axes else 1 for axis, extent in enumerate(shape))
        return Form(axes, affine, centred=name == "nn.layer_norm")
    channel = int(attrs.channel_axis) % rank
    affine = tuple(extent if axis == channel else 1 for axis, extent in enumerate(shape))
    if name == "nn.instance_norm":
        return Form(axes, affine)
    groups = int(attrs.num_groups)
    split = (*shape[:channel], groups, shape[channel] // groups, *shape[channel + 1 :])
    moved = [channel + 1, *(axis + (axis > channel) for axis in axes if axis != channel)]
    return Form(sorted(moved), affine, split)


class Seen(NamedTuple):
    """The shape in which a norm's kernel reads its data, and what gamma and beta vary along: see
    :class:`~..schedules.cpu.norm.Norm`."""

    outer: int
    rows: int
    lanes: int
    group: int
    affine: str = ""


def seen_as(form: Form, shape: Shape, threads: int, scales: int) -> Seen | None:
    """The form in which a kernel can process data of ``shape``; None if there is none. ``scales``: the number of
    elements of gamma and of beta (0: not given)."""
    split = form.split or shape
    runs = runs_of(split, set(form.axes))
    extents = [math.prod(split[run.first : run.first + run.axes]) for run in runs]
    outer = extents.pop(0) if runs and not runs[0].reduced else 1
    kept = [axis for axis, extent in enumerate(form.affine) if extent != 1]
    along_last = not scales or kept in ([], [len(shape) - 1])
    by_lane = "lanes" if scales else ""
    if len(extents) == 1:
        return _seen_as_lines(form, shape, outer, extents[0], threads, scales, kept)
    if len(extents) in (2, 3) and along_last:
        rows, lanes, group = extents[0], math.prod(extents[1:]), math.prod(extents[2:])
        return Seen(outer, rows, lanes, group, by_lane) if not scales or scales == lanes else None
    return None


def _seen_as_lines(
    form: Form, shape: Shape, outer: int, length: int, threads: int, scales: int, kept: list[int]
) -> Seen | None:
    """The same where statistics are those of whole lines."""
    if not scales:
        if length >= LONG_LINE and outer < threads and length % LINE_LANES == 0:
            return Seen(outer, length // LINE_LANES, LINE_LANES, LINE_LANES)
        return Seen(outer, 1, length, length)
    if scales == 1:
        return Seen(outer, 1, length, length, "lines")
    if scales == length and form.split is None and set(kept) <= set(form.axes):
        return Seen(outer, 1, length, length, "lanes")
    if len(kept) == 1 and math.prod(shape[: kept[0] + 1]) == outer:
        return Seen(outer, 1, length, length, "lines")
    if kept == [len(shape) - 1] and length % scales == 0:
        return Seen(outer, length // scales, scales, scales, "lanes")
    return None
