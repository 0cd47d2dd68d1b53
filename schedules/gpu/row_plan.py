"""The row plan of a GPU: tiles of one block of threads, and a planner that runs on the device.

Rows form classes by their live frame taps alone: a tile of a block is large, and classes by the edges of the picture
would leave most tiles nearly empty. Taps that fall on padding beside the picture are read as zeros instead. The lists
are those of :mod:`..row_plan` with one tile per block and one segment per tile, and one list more, which the planner's
first launch leaves for its second:

===========  ======================  ===============================================================================
frame_slots  (samples, frames, 4)    class or -1, slot of the frame's first row, end of its class, end of its tiles
===========  ======================  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm import tirx

from ..cpu.row_plan import classify_frame
from ..emit import INT, Expr, ceil_div, let, number, serial, store, when
from ..geometry import Window
from ..plans import RowPlan
from .emit import BLOCK, barrier, compact, exclusive_scan, integer, launch, registers, shared


@dataclass(frozen=True)
class PredicatedWindow(Window):
    """A window whose taps beside the picture count as live: kernels read zeros there."""

    def live_taps(self, axis: int, index: int) -> tuple[int, ...]:
        """All taps of rows and columns; frame taps as they are."""
        return super().live_taps(axis, index) if axis == 0 else tuple(range(self.kernel[axis]))


def has_border(window: Window) -> bool:
    """Whether any tap falls beside the picture."""
    return any(
        not 0 <= window.source(axis, index, tap) < window.size[axis]
        for axis in (1, 2)
        for index in (0, window.out[axis] - 1)
        for tap in (0, window.kernel[axis] - 1)
    )


@dataclass(frozen=True)
class BlockPlan(RowPlan):
    """A :class:`RowPlan` for blocks of threads: ``mr`` rows a block; its window is a :class:`PredicatedWindow`."""

    name = "plan_rows_gpu"

    @cached_property
    def tap_entries(self) -> np.ndarray:
        """int32 (entries, 4): tap, its offset in positions, and in rows and columns of the picture."""
        taps = super().tap_entries
        _, kernel_h, kernel_w = self.window.kernel
        down = taps[:, 0] // kernel_w % kernel_h * self.window.dilation[1]
        right = taps[:, 0] % kernel_w * self.window.dilation[2]
        return np.stack([taps[:, 0], taps[:, 1], down, right], 1).astype("int32")

    @property
    def frames(self) -> int:
        """Output frames of one sample."""
        return self.window.batch // self.samples * self.window.out[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As for every row plan; the counts stay last."""
        lists = super().shapes
        counts = lists.pop("counts")
        return {**lists, "frame_slots": (self.samples, self.frames, 4), "counts": counts}

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """One launch sizes the tiles, a second lists the rows."""
        planner = _Planner(self, args)
        with launch(self.samples, BLOCK) as (sample, thread):
            planner.size_tiles(sample, thread)
        with launch(self.samples * self.frames, BLOCK) as (block, thread):
            planner.list_rows(let(tirx.floordiv(block, self.frames)), let(tirx.floormod(block, self.frames)), thread)


def block_plan(
    window: Window,
    mr: int,
    samples: int = 1,
    in_frames: bool = False,
    out_frames: bool = False,
    positions: tuple[int, int] | None = None,
) -> BlockPlan:
    """The plan of a convolution whose blocks compute ``mr`` rows each."""
    fields = {name: getattr(window, name) for name in window.__dataclass_fields__}
    seen = PredicatedWindow(**fields)
    return BlockPlan(seen, mr, 1, max(1, window.taps), samples, in_frames, out_frames, positions)


class _Planner:
    def __init__(self, plan: BlockPlan, args: Mapping[str, tirx.Buffer]) -> None:
        self.plan, self.args = plan, args
        self.area = plan.window.out[1] * plan.window.out[2]
        self.classes = len(plan.tap_sets)

    def size_tiles(self, sample: Expr, thread: Expr) -> None:
        """Rows of each frame, tiles of each class, and what follows from them."""
        plan = self.plan
        frame_class, frame_rows = shared((plan.frames,), INT), shared((plan.frames,), INT)
        first_tile, first_segment = shared((self.classes + 1,), INT), shared((self.classes + 1,), INT)
        with serial(ceil_div(plan.frames, BLOCK)) as turn:
            frame = let(turn * BLOCK + thread)
            with when(frame < plan.frames):
                classify_frame(plan, sample, frame, self.args, frame_class)
        barrier()
        self._count_rows(sample, thread, frame_class, frame_rows)
        barrier()
        with when(thread == 0):
            self._deal_slots(sample, frame_class, frame_rows, first_tile, first_segment)
        barrier()
        self._list_segments(sample, thread, first_tile, first_segment)

    def _count_rows(self, sample: Expr, thread: Expr, frame_class: tirx.Buffer, frame_rows: tirx.Buffer) -> None:
        plan = self.plan
        if plan.positions is None:
            with serial(ceil_div(plan.frames, BLOCK)) as turn:
                frame = let(turn * BLOCK + thread)
                with when(frame < plan.frames):
                    store(frame_rows, integer(self.area), frame)
            return
        memory, mine = shared((BLOCK,), INT), registers((1,), INT)
        with serial(plan.frames) as frame:
            store(mine, integer(0), 0)
            with serial(ceil_div(self.area, BLOCK)) as turn:
                place = let(turn * BLOCK + thread)
                with when(place < self.area), when(self._alive(sample, frame, place)):
                    store(mine, mine[0] + 1, 0)
            _, total = exclusive_scan(thread, let(mine[0]), memory)
            with when(thread == 0):
                store(frame_rows, total, frame)
            barrier()

    def _alive(self, sample: Expr, frame: Expr, place: Expr) -> Expr:
        """Whether position ``place`` of the frame is computed."""
        plan = self.plan
        clips, frames = plan.positions or (1, 1)
        out_t = plan.window.out[0]
        clip = sample * (plan.window.batch // plan.samples) + tirx.floordiv(frame, out_t)
        row, column = tirx.floordiv(place, plan.window.out[2]), tirx.floormod(place, plan.window.out[2])
        at = (clip if clips > 1 else 0, tirx.floormod(frame, out_t) if frames > 1 else 0, row, column)
        return self.args["positions"][at] != number(0.0)

    def _deal_slots(
        self,
        sample: Expr,
        frame_class: tirx.Buffer,
        frame_rows: tirx.Buffer,
        first_tile: tirx.Buffer,
        first_segment: tirx.Buffer,
    ) -> None:
        """One thread: classes one after the other, each in whole tiles; its frames in order."""
        plan, lists = self.plan, self.args
        starts, slots = self.args["tap_starts"], lists["frame_slots"]
        sums = registers((3,), INT)  # slot, rows, pairs
        for index in range(3):
            store(sums, integer(0), index)
        store(first_tile, integer(0), 0)
        store(first_segment, integer(0), 0)
        with serial(plan.frames) as frame:
            store(slots, integer(-1), sample, frame, 0)
        with serial(self.classes) as c:
            begin = let(first_tile[c] * plan.mr)
            store(sums, begin, 0)
            self._each_frame(c, frame_class, lambda frame: self._deal_frame(sample, frame, c, frame_rows, sums))
            end = let(sums[0])
            taps = let(starts[c + 1] - starts[c])
            tiles = let(ceil_div(end - begin, plan.mr))
            store(sums, sums[1] + (end - begin), 1)
            store(sums, sums[2] + (end - begin) * taps, 2)
            store(first_tile, first_tile[c] + tiles, c + 1)
            store(first_segment, first_segment[c] + tirx.if_then_else(taps > 0, tiles, 0), c + 1)

            def close(frame: Expr, c: Expr = c, end: Expr = end) -> None:
                store(slots, end, sample, frame, 2)
                store(slots, first_tile[c + 1] * plan.mr, sample, frame, 3)

            self._each_frame(c, frame_class, close)
        tiles = first_tile[self.classes]
        for field, value in enumerate((tiles, tiles, sums[1], sums[2])):
            store(lists["counts"], value, sample, field)

    def _each_frame(self, c: Expr, frame_class: tirx.Buffer, visit: Callable[[Expr], None]) -> None:
        with serial(self.plan.frames) as frame, when(frame_class[frame] == c):
            visit(frame)

    def _deal_frame(self, sample: Expr, frame: Expr, c: Expr, frame_rows: tirx.Buffer, sums: tirx.Buffer) -> None:
        slots = self.args["frame_slots"]
        store(slots, c, sample, frame, 0)
        store(slots, sums[0], sample, frame, 1)
        store(sums, sums[0] + frame_rows[frame], 0)

    def _list_segments(self, sample: Expr, thread: Expr, first_tile: tirx.Buffer, first_segment: tirx.Buffer) -> None:
        """One segment for each tile of a class that has taps."""
        lists, starts = self.args, self.args["tap_starts"]
        with serial(self.classes) as c:
            tiles = let(first_tile[c + 1] - first_tile[c])
            some = let(tirx.if_then_else(starts[c + 1] > starts[c], 1, 0))
            with serial(ceil_div(tiles, BLOCK)) as turn:
                index = let(turn * BLOCK + thread)
                with when(index < tiles):
                    tile, segment = let(first_tile[c] + index), let(first_segment[c] + index * some)
                    store(lists["blocks"], segment, sample, tile)
                    with when(some > 0):
                        for field, value in enumerate((starts[c], starts[c + 1], tile, tile + 1)):
                            store(lists["segments"], value, sample, segment, field)
        with when(thread == 0):
            store(lists["blocks"], first_segment[self.classes], sample, first_tile[self.classes])

    def list_rows(self, sample: Expr, frame: Expr, thread: Expr) -> None:
        """The rows of one frame."""
        slots = self.args["frame_slots"]
        with when(slots[sample, frame, 0] >= 0):
            first = let(slots[sample, frame, 1])
            if self.plan.positions is None:
                with serial(ceil_div(self.area, BLOCK)) as turn:
                    place = let(turn * BLOCK + thread)
                    with when(place < self.area):
                        self._list_row(sample, frame, first + place, place)
            else:
                compact(
                    thread,
                    self.area,
                    lambda place: self._alive(sample, frame, place),
                    lambda slot, place: self._list_row(sample, frame, first + slot, place),
                )

    def _list_row(self, sample: Expr, frame: Expr, at: Expr, place: Expr) -> None:
        plan, window, slots = self.plan, self.plan.window, self.args["frame_slots"]
        _, height, width = window.size
        _, out_h, out_w = window.out
        clip = let(sample * (window.batch // plan.samples) + tirx.floordiv(frame, window.out[0]))
        out_frame = let(tirx.floormod(frame, window.out[0]))
        row, column = let(tirx.floordiv(place, out_w)), let(tirx.floormod(place, out_w))
        in_frame = clip * window.size[0] + out_frame * window.stride[0] - window.padding[0]
        in_row = in_frame * height + row * window.stride[1] - window.padding[1]
        source = let(in_row * width + column * window.stride[2] - window.padding[2])
        target = let((clip * window.out[0] + out_frame) * (out_h * out_w) + place)
        slot = let(at)
        self._store(sample, slot, source, target)
        with when(slot == slots[sample, frame, 2] - 1), serial(slots[sample, frame, 3] - slot - 1) as missing:
            self._store(sample, slot + 1 + missing, source, target)

    def _store(self, sample: Expr, slot: Expr, source: Expr, target: Expr) -> None:
        tile, row = tirx.floordiv(slot, self.plan.mr), tirx.floormod(slot, self.plan.mr)
        store(self.args["rows_in"], source, sample, tile, row)
        store(self.args["rows_out"], target, sample, tile, row)
