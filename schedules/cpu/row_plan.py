"""From masks to index lists: which output rows are computed, in which tiles, through which taps.

Rows (output positions) that read through the same set of taps form a class: a position at the edge of the clip lacks
the taps that fall on padding, a frame beside a dead frame lacks the taps that read it. Rows of one class fill tiles
of ``mr`` rows; consecutive tiles form blocks whose partial sums stay in cache; a segment is "these taps over these
tiles". A convolution walks segments and never tests a mask. Where a mask says which positions of the input are alive,
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

from tvm import tirx

from .. import plans
from ..emit import INT, Expr, ceil_div, clear, let, number, scratch, serial, store, when


@dataclass(frozen=True)
class RowPlan(plans.RowPlan):
    """The planner for a processor."""

    name = "plan_rows"

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """One counting sort over the rows of each sample."""
        for name in self.shapes:
            clear(args[name])
        with serial(self.samples) as sample:
            _plan_sample(self, sample, args)


def _plan_sample(plan: plans.RowPlan, sample: Expr, args: Mapping[str, tirx.Buffer]) -> None:
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
    plan: plans.RowPlan, args: Mapping[str, tirx.Buffer], sample: Expr, slot: Expr, source: Expr, target: Expr
) -> None:
    tile, row = tirx.floordiv(slot, plan.mr), tirx.floormod(slot, plan.mr)
    store(args["rows_in"], source, sample, tile, row)
    store(args["rows_out"], target, sample, tile, row)


def classify_frame(
    plan: plans.RowPlan, sample: Expr, frame: Expr, args: Mapping[str, tirx.Buffer], frame_class: tirx.Buffer
) -> None:
    """Set ``frame_class[frame]`` to the first class of the frame's tap set, or to -1 where the frame is never read."""
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
    plan: plans.RowPlan,
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

    def __init__(self, plan: plans.RowPlan, args: Mapping[str, tirx.Buffer], clip: Expr, out_frame: Expr) -> None:
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
    plan: plans.RowPlan,
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
    plan: plans.RowPlan,
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
