"""From masks to index lists: which output rows are computed, in which tiles, through which taps.

Rows (output positions) that read through the same set of taps form a class: a position at the edge of the clip lacks
the taps that fall on padding, a frame beside a dead frame lacks the taps that read it. Rows of one class fill tiles
of ``mr`` rows; consecutive tiles form blocks whose partial sums stay in cache; a segment is "these taps over these
tiles". A convolution walks segments and never tests a mask. Where a mask tells which positions of the input are alive,
each row's taps are those that read living ones, whatever set they make.

=========  ==============================================  =====================================================
list       shape                                           content
=========  ==============================================  =====================================================
rows_in    (samples, tiles, mr)                            input position of the window's first tap, per row
rows_out   (samples, tiles, mr)                            output position, per row
segments   (samples, segments, 4)                          first tap entry, last + 1, first tile, last tile + 1
blocks     (samples, blocks + 1)                           first segment of each block
counts     (samples, 4)                                    blocks, tiles, rows, pairs of row and tap
=========  ==============================================  =====================================================

Lists have room for the dense case; the counts say how much of them is filled. The last tile of a class repeats its
last row: the same value is then computed and stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from tvm import tirx

from ..emit import INT, Expr, ceil_div, clear, let, number, scratch, serial, store, when
from ..geometry import Window
from ..plan import Plan

#: Frames with more taps than this keep their static tap sets: 2**taps classes would cost more than they save.
MOST_DYNAMIC_FRAME_TAPS = 5
#: The same for taps over height and width under a mask of input positions: 3 × 3 makes 512 classes.
MOST_DYNAMIC_POSITION_TAPS = 9


@dataclass(frozen=True)
class RowPlan(Plan):
    """How the rows of ``window`` are listed.

    ``samples`` is 1 when all clips of a batch share their channel lists (rows of all clips then mix in one list), else
    the batch size. ``in_frames``/``out_frames``/``positions`` say which masks are given: (batch, frames) of the input
    known to be nonzero, (batch, frames) of the output that are read, and (batch or 1, frames or 1, height, width).
    ``in_positions`` is to the input what ``positions`` is to the output; for windows of one frame alone.
    """

    name = "plan_rows"
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

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """One counting sort over the rows of each sample."""
        for name in self.shapes:
            clear(args[name])
        with serial(self.samples) as sample:
            _plan_sample(self, sample, args)


def _plan_sample(plan: RowPlan, sample: Expr, args: Mapping[str, tirx.Buffer]) -> None:
    classes = len(plan.tap_sets)
    frames = plan.window.batch // plan.samples * plan.window.out[0]
    filled = scratch((classes,), INT)
    first_tile = scratch((classes + 1,), INT)
    frame_class = scratch((frames,), INT)
    pairs = scratch((1,), INT)
    with serial(classes) as c:
        store(filled, tirx.IntImm(INT, 0), c)
    with serial(frames) as frame:
        classify_frame(plan, sample, frame, args, frame_class)
    _for_live_rows(plan, sample, args, frame_class, lambda c, *_: store(filled, filled[c] + 1, c))

    store(first_tile, tirx.IntImm(INT, 0), 0)
    store(pairs, tirx.IntImm(INT, 0), 0)
    store(args["counts"], tirx.IntImm(INT, 0), sample, 2)
    starts = args["tap_starts"]
    with serial(classes) as c:
        rows = let(filled[c])
        store(pairs, pairs[0] + rows * (starts[c + 1] - starts[c]), 0)
        store(args["counts"], args["counts"][sample, 2] + rows, sample, 2)
        store(first_tile, first_tile[c] + ceil_div(rows, plan.mr), c + 1)
        store(filled, first_tile[c] * plan.mr, c)
    store(args["counts"], pairs[0], sample, 3)

    def list_row(c: Expr, source: Expr, target: Expr) -> None:
        slot = let(filled[c])
        _store_row(plan, args, sample, slot, source, target)
        store(filled, slot + 1, c)

    _for_live_rows(plan, sample, args, frame_class, list_row)
    with serial(classes) as c:
        _repeat_last_row(plan, sample, c, filled, first_tile, args)
    _list_segments(plan, sample, classes, first_tile, starts, args)


def _store_row(
    plan: RowPlan, args: Mapping[str, tirx.Buffer], sample: Expr, slot: Expr, source: Expr, target: Expr
) -> None:
    tile, row = tirx.floordiv(slot, plan.mr), tirx.floormod(slot, plan.mr)
    store(args["rows_in"], source, sample, tile, row)
    store(args["rows_out"], target, sample, tile, row)


def classify_frame(
    plan: RowPlan, sample: Expr, frame: Expr, args: Mapping[str, tirx.Buffer], frame_class: tirx.Buffer
) -> None:
    """Set ``frame_class[frame]`` to the first class of the frame's tap set, or to -1 where nobody reads the frame."""
    window = plan.window
    clip = let(sample * (window.batch // plan.samples) + tirx.floordiv(frame, window.out[0]))
    out_frame = let(tirx.floormod(frame, window.out[0]))
    index: Expr = args["frame_class"][out_frame]
    if plan.in_positions is not None:  # the class is that of each row
        index = tirx.IntImm(INT, 0)
    elif plan.dynamic_taps:
        index = tirx.IntImm(INT, 0)
        for tap in range(window.kernel[0]):
            source = let(out_frame * window.stride[0] + (tap * window.dilation[0] - window.padding[0]))
            inside = tirx.all(source >= 0, source < window.size[0])
            safe = tirx.max(tirx.min(source, window.size[0] - 1), 0)
            alive = tirx.all(inside, args["in_frames"][clip, safe] != number(0.0))
            index = index + tirx.if_then_else(alive, 1 << tap, 0)
    index = index * (len(window.classes[1]) * len(window.classes[2]))
    if plan.out_frames:
        index = tirx.if_then_else(args["out_frames"][clip, out_frame] != number(0.0), index, -1)
    store(frame_class, index, frame)


def _for_live_rows(
    plan: RowPlan,
    sample: Expr,
    args: Mapping[str, tirx.Buffer],
    frame_class: tirx.Buffer,
    visit: Callable[[Expr, Expr, Expr], None],
) -> None:
    """Call ``visit(class, input position, output position)`` for every row that is read."""
    window = plan.window
    _, height, width = window.size
    _, out_h, out_w = window.out
    frames = window.batch // plan.samples * window.out[0]
    with serial(frames) as frame, when(frame_class[frame] >= 0):
        of_frame = let(frame_class[frame])
        clip = let(sample * (window.batch // plan.samples) + tirx.floordiv(frame, window.out[0]))
        out_frame = let(tirx.floormod(frame, window.out[0]))
        source_frame = let(clip * window.size[0] + out_frame * window.stride[0] - window.padding[0])
        living = None if plan.in_positions is None else _LivingTaps(plan, args, clip, out_frame)
        with serial(out_h) as row:
            of_row: Expr = let(of_frame + args["row_class"][row]) if living is None else None
            source_row = let((source_frame * height + row * window.stride[1] - window.padding[1]) * width)
            target_row = let(((clip * window.out[0] + out_frame) * out_h + row) * out_w)
            with serial(out_w) as column:

                def visit_row(row: Expr = row, column: Expr = column) -> None:
                    source = source_row + column * window.stride[2] - window.padding[2]
                    of_position = living.of(row, column) if living else of_row + args["column_class"][column]
                    visit(let(of_position), source, target_row + column)

                if plan.positions is None:
                    visit_row()
                else:
                    at_clip = clip if plan.positions[0] > 1 else 0
                    at_frame = out_frame if plan.positions[1] > 1 else 0
                    with when(args["positions"][at_clip, at_frame, row, column] != number(0.0)):
                        visit_row()


class _LivingTaps:
    """Through which taps the positions of one output frame read living inputs, as bits.

    Bits along the width are found once for each line of the input and shared by the lines of output that read it.
    """

    def __init__(self, plan: RowPlan, args: Mapping[str, tirx.Buffer], clip: Expr, out_frame: Expr) -> None:
        assert plan.in_positions is not None
        self.window = window = plan.window
        self.across = scratch((window.size[1], window.out[2]), INT)
        at = (clip if plan.in_positions[0] > 1 else 0, out_frame if plan.in_positions[1] > 1 else 0)
        read: Expr = tirx.IntImm("bool", 1)
        if plan.in_frames:
            read = let(args["in_frames"][clip, out_frame] != number(0.0))
        with serial(window.size[1]) as line, serial(window.out[2]) as column:
            bits: Expr = tirx.IntImm(INT, 0)
            for tap in range(window.kernel[2]):
                source = let(column * window.stride[2] + (tap * window.dilation[2] - window.padding[2]))
                safe = tirx.max(tirx.min(source, window.size[2] - 1), 0)
                position = (*at, line, safe)
                inside = tirx.all(read, source >= 0, source < window.size[2])
                alive = tirx.all(inside, args["in_positions"][position] != number(0.0))
                bits = bits + tirx.if_then_else(alive, 1 << tap, 0)
            store(self.across, bits, line, column)

    def of(self, row: Expr, column: Expr) -> Expr:
        """The bits of one position, its class."""
        window = self.window
        bits: Expr = tirx.IntImm(INT, 0)
        for tap in range(window.kernel[1]):
            source = let(row * window.stride[1] + (tap * window.dilation[1] - window.padding[1]))
            safe = tirx.max(tirx.min(source, window.size[1] - 1), 0)
            inside = tirx.all(source >= 0, source < window.size[1])
            bits = bits + tirx.if_then_else(inside, self.across[safe, column] * (1 << tap * window.kernel[2]), 0)
        return bits


def _repeat_last_row(
    plan: RowPlan,
    sample: Expr,
    c: Expr,
    filled: tirx.Buffer,
    first_tile: tirx.Buffer,
    args: Mapping[str, tirx.Buffer],
) -> None:
    end = let(first_tile[c + 1] * plan.mr)
    used = let(filled[c])
    with when(used < end):
        last_tile, last_row = let(tirx.floordiv(used - 1, plan.mr)), let(tirx.floormod(used - 1, plan.mr))
        source = let(args["rows_in"][sample, last_tile, last_row])
        target = let(args["rows_out"][sample, last_tile, last_row])
        with serial(end - used) as missing:
            _store_row(plan, args, sample, used + missing, source, target)


def _list_segments(
    plan: RowPlan,
    sample: Expr,
    classes: int,
    first_tile: tirx.Buffer,
    starts: tirx.Buffer,
    args: Mapping[str, tirx.Buffer],
) -> None:
    tiles = let(first_tile[classes])
    blocks = let(ceil_div(tiles, plan.block_tiles))
    store(args["counts"], blocks, sample, 0)
    store(args["counts"], tiles, sample, 1)
    used = scratch((1,), INT)
    store(used, tirx.IntImm(INT, 0), 0)
    segments = args["segments"]
    with serial(blocks) as block:
        store(args["blocks"], used[0], sample, block)
        with serial(classes) as c:
            low = let(tirx.max(first_tile[c], block * plan.block_tiles))
            high = let(tirx.min(first_tile[c + 1], (block + 1) * plan.block_tiles))
            with when(low < high):
                first, last = let(starts[c]), let(starts[c + 1])
                with serial(ceil_div(last - first, plan.segment_taps)) as group:
                    slot = let(used[0])
                    begin = let(first + group * plan.segment_taps)
                    for field, value in enumerate((begin, tirx.min(begin + plan.segment_taps, last), low, high)):
                        store(segments, value, sample, slot, field)
                    store(used, slot + 1, 0)
    store(args["blocks"], used[0], sample, blocks)
