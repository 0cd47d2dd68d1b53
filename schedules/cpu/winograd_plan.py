"""From masks to the lists that a Winograd kernel walks: which tiles are transformed, multiplied and stored.

The output is cut into tiles of ``m`` positions on each axis. All tiles at one place of one clip, over its frames, are
a *column*; columns in which something is read fill *chunks*, whose transformed inputs and products stay in cache. In
the transformed domain what is left is a convolution over frames alone: a row (frame, column) reads the rows of the
same column in the frames of its live taps. Rows of a chunk with the same taps form a *run* of register tiles, where
each sample lists channels of its own those of one sample: weights are read once for all samples of a chunk.

Where a row reads one source row, its own (``one_source``), rows lie one behind the other whatever their frames, so that
dead frames leave room for further columns in a chunk. Elsewhere all frames of a column have their places.

Where frames are transformed, the first and the last input frame of a tile each reach one plane of the transform alone.
Rows that read nothing else, as those do beside tiles of living frames, form runs whose other planes are zeros.

=========  ================================  ==================================================================
list       shape                             content
=========  ================================  ==================================================================
columns    (chunks, most_columns)            clip · places + place
inputs     (chunks, source_rows)             rows to transform: frame · most_columns + index of the column
rows_in    (chunks, tiles, mr)               source row of the first tap, per row
rows_out   (chunks, tiles, mr)               frame · most_columns + index of the column; -1 where the last row repeats
runs       (chunks, most_runs, 5)            first tap entry, last + 1, first tile, last tile + 1, sample
counts     (chunks + 1, 3)                   inputs, tiles, runs; the last row: chunks
pairs      (samples, 1)                      pairs of row and tap, or of row and plane along frames where dead frames
                                             leave planes out, for counting; the kernel does not take it
=========  ================================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm import tirx

from ..emit import INT, Expr, let, number, scratch, serial, store, when
from ..geometry import Triple, Window, triple
from ..plans import MOST_DYNAMIC_FRAME_TAPS, Plan


@dataclass(frozen=True)
class WinogradPlan(Plan):
    """How the tiles of ``window`` are listed; ``m`` is the tile of outputs, 1 on axes that are not transformed.

    Height and width are transformed where the kernel is 3 long, and may have any stride where it is 1 long; frames are
    transformed where ``m[0] > 1``, and may have any kernel, stride and dilation otherwise. ``samples`` and the masks
    are those of :class:`~.row_plan.RowPlan`.
    """

    name = "plan_winograd"
    window: Window
    m: Triple
    mr: int
    columns: int
    samples: int = 1
    in_frames: bool = False
    out_frames: bool = False
    positions: tuple[int, int] | None = None

    @property
    def transformed(self) -> tuple[bool, bool, bool]:
        """Which axes are transformed."""
        return (self.m[0] > 1, self.window.kernel[1] > 1, self.window.kernel[2] > 1)

    @cached_property
    def alpha(self) -> Triple:
        """Inputs that one tile reads on each axis; 1 where the axis is not transformed."""
        kernel = self.window.kernel
        return triple(m + k - 1 if on else 1 for m, k, on in zip(self.m, kernel, self.transformed, strict=True))

    def input_step(self, axis: int) -> int:
        """Inputs from where one tile begins along ``axis`` to where the next one does."""
        return self.m[axis] if self.transformed[axis] else self.window.stride[axis]

    @property
    def xi(self) -> int:
        """Products per tile: elements of one transformed tile."""
        return self.alpha[0] * self.alpha[1] * self.alpha[2]

    @cached_property
    def tiles(self) -> Triple:
        """Output tiles on each axis."""
        return triple(-(-extent // m) for extent, m in zip(self.window.out, self.m, strict=True))

    @property
    def places(self) -> int:
        """Columns of one clip."""
        return self.tiles[1] * self.tiles[2]

    @property
    def source_frames(self) -> int:
        """Frames of the transformed input: of the clip, or tiles of frames where those are transformed."""
        return self.tiles[0] if self.transformed[0] else self.window.size[0]

    @property
    def taps(self) -> int:
        """Products summed over frames: the kernel's depth where frames are not transformed."""
        return 1 if self.transformed[0] else self.window.kernel[0]

    @property
    def one_source(self) -> bool:
        """Whether each output frame, or tile of them, reads a source row of its own alone."""
        return self.taps == 1

    @property
    def most_columns(self) -> int:
        """Columns that a chunk may hold: ``columns`` with all of their frames, or more where some of those are dead."""
        return self.tiles[0] * self.columns if self.one_source else self.columns

    def live_taps(self, frame: int) -> tuple[int, ...]:
        """Taps of an output frame that lie inside the clip."""
        return (0,) if self.transformed[0] else self.window.live_taps(0, frame)

    @property
    def dynamic_taps(self) -> bool:
        """Whether dead input frames remove taps."""
        return self.in_frames and self.taps <= MOST_DYNAMIC_FRAME_TAPS

    @property
    def thins_planes(self) -> bool:
        """Whether dead input frames leave out planes of the transform along frames."""
        return self.transformed[0] and self.dynamic_taps

    @cached_property
    def plane_sets(self) -> list[tuple[int, ...]]:
        """Of rows of each class, which planes along frames are not zero, where frames are transformed: those that the
        first input frame reaches, the last one, both, and others."""
        last = self.alpha[0] - 1
        return [(), (0,), (last,), (0, last), tuple(range(self.alpha[0]))]

    @cached_property
    def tap_planes(self) -> np.ndarray:
        """int32 (entries,): the planes of each entry of ``tap_entries``, bit by bit."""
        return np.array([sum(1 << plane for plane in planes) for planes in self.plane_sets[1:]], "int32")

    @cached_property
    def tap_sets(self) -> list[tuple[int, ...]]:
        """Live taps of each class: every subset where frames die at run time, else those that padding leaves."""
        if self.thins_planes:
            return [(0,) if planes else () for planes in self.plane_sets]
        if not self.dynamic_taps:
            return list(dict.fromkeys(self.live_taps(frame) for frame in range(self.tiles[0])))
        return [tuple(tap for tap in range(self.taps) if bits >> tap & 1) for bits in range(1 << self.taps)]

    @cached_property
    def tap_starts(self) -> list[int]:
        """Where each class begins in ``tap_entries``."""
        return [int(start) for start in np.cumsum([0, *(len(taps) for taps in self.tap_sets)])]

    @cached_property
    def tap_entries(self) -> np.ndarray:
        """int32 (entries, 2): tap and its offset in source rows, class after class."""
        step = self.columns * self.window.dilation[0]
        entries = [(tap, tap * step) for taps in self.tap_sets for tap in taps]
        return np.array(entries or [(0, 0)], "int32")

    @property
    def source_rows(self) -> int:
        """Rows of transformed input that a chunk has room for."""
        return (self.tiles[0] if self.one_source else self.source_frames) * self.columns

    @cached_property
    def tiles_capacity(self) -> int:
        """Register tiles of one chunk in the worst case: every class may end in one that is not full."""
        rows = self.tiles[0] * self.columns
        return (rows + min(self.most_runs, rows) * (self.mr - 1)) // self.mr

    @property
    def most_runs(self) -> int:
        """Runs of a chunk that has columns of as many samples as may be: each frame of a clip is of one class."""
        frames = self.tiles[0] * min(self.window.batch // self.samples, self.most_columns)
        return min(len(self.tap_sets), frames) * min(self.samples, self.most_columns)

    @property
    def sample_columns(self) -> int:
        """Columns of one sample."""
        return self.window.batch // self.samples * self.places

    def sample_of(self, clip: Expr) -> Expr:
        """The sample whose channel lists a clip has."""
        return tirx.floordiv(clip, self.window.batch // self.samples) if self.samples > 1 else tirx.IntImm(INT, 0)

    @cached_property
    def chunks(self) -> int:
        """Chunks when nothing is left out."""
        return -(-self.window.batch * self.places // self.columns)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the int32 lists, in the order of the planner's outputs."""
        return {
            "columns": (self.chunks, self.most_columns),
            "inputs": (self.chunks, self.source_rows),
            "rows_in": (self.chunks, self.tiles_capacity, self.mr),
            "rows_out": (self.chunks, self.tiles_capacity, self.mr),
            "runs": (self.chunks, self.most_runs, 5),
            "counts": (self.chunks + 1, 3),
            "pairs": (self.samples, 1),
        }

    @property
    def walked(self) -> tuple[str, ...]:
        """All but the pairs, which are for counting alone."""
        return tuple(name for name in self.shapes if name != "pairs")

    @cached_property
    def classes(self) -> np.ndarray:
        """int32 (classes, 3): of each class its first entry in ``tap_entries``, its last + 1, the pairs of a row."""
        sets = self.plane_sets if self.thins_planes else self.tap_sets
        return np.array(list(zip(self.tap_starts, self.tap_starts[1:], map(len, sets), strict=False)), "int32")

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """Constant int32 tables that the planner takes after the masks: the static class of each output frame, the
        classes, and their taps."""
        frame_class = np.zeros(self.tiles[0], "int32")
        if not self.dynamic_taps:
            frame_class[:] = [self.tap_sets.index(self.live_taps(frame)) for frame in range(self.tiles[0])]
        return {"frame_class": frame_class, "classes": self.classes, "taps": self.tap_entries}

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Masks and the tables in, the seven lists out."""
        Planner(self, args).emit()


def _zero() -> Expr:
    return tirx.IntImm(INT, 0)


class Planner:
    """Three passes: the class of every row, columns into chunks, rows of a chunk into tiles.

    What differs between classes is read from tables: code for each of them would take longer to fetch than to run.
    """

    positions = "positions"

    def __init__(self, plan: WinogradPlan, args: Mapping[str, tirx.Buffer]) -> None:
        self.plan, self.masks, self.lists, self.frame_class = plan, args, args, args["frame_class"]
        self.frames = plan.tiles[0]
        #: The mask of positions that decides about tiles, and how many frames it tells apart.
        self.mask: tirx.Buffer | None = args.get(self.positions)
        self.mask_frames = 1 if self.mask is None else int(self.mask.shape[1])

    def emit(self) -> None:
        plan = self.plan
        self.row_class = scratch((plan.window.batch * plan.places, self.frames), INT)
        self.in_chunk = scratch((plan.chunks,), INT)
        self._classify()
        with serial(plan.samples) as sample:
            store(self.lists["pairs"], _zero(), sample, 0)
        self._fill_chunks()
        with serial(self.lists["counts"][plan.chunks, 0]) as chunk:
            self._list_rows(chunk)

    # -- the class of a row ------------------------------------------------------------------------------------------

    def _classify(self) -> None:
        """The tap class of every row, or -1 where it is never read."""
        plan, (clips, (rows, columns)) = self.plan, (self.plan.window.batch, self.plan.tiles[1:])
        of_frame = scratch((clips, self.frames), INT)
        with serial(clips) as clip, serial(self.frames) as frame:
            index = self._live_tap_bits(clip, frame) if plan.dynamic_taps else self.frame_class[frame]
            self._store_class(of_frame, self._frame_is_read(clip, frame), index, clip, frame)
        found = scratch((1,), INT)
        with serial(clips) as clip, serial(rows) as row, serial(columns) as column:
            store(found, tirx.IntImm(INT, self.mask is None), 0)
            if self.mask is not None and self.mask_frames == 1:  # the same in all frames
                self._search_positions(self.mask, (clip, 0, row, column), found)
            with serial(self.frames) as frame:
                if self.mask is not None and self.mask_frames > 1:
                    store(found, _zero(), 0)
                    with serial(plan.m[0]) as within:
                        at = let(frame * plan.m[0] + within)
                        with when(self._is_written(clip, at)):
                            self._search_positions(self.mask, (clip, at, row, column), found)
                place = (clip * rows + row) * columns + column
                self._store_class(self.row_class, found[0] != 0, of_frame[clip, frame], place, frame)

    def _store_class(self, classes: tirx.Buffer, is_read: Expr, index: Expr, *at: Expr) -> None:
        store(classes, tirx.Select(is_read, index, tirx.IntImm(INT, -1)), *at)

    def _live_tap_bits(self, clip: Expr, frame: Expr) -> Expr:
        plan, window = self.plan, self.plan.window
        if plan.transformed[0]:
            start = frame * plan.m[0] - window.padding[0]
            first, *inner, last = (self._frame_alive(clip, start + offset) for offset in range(plan.alpha[0]))
            edges = tirx.Cast(INT, first) + 2 * tirx.Cast(INT, last)
            return tirx.Select(tirx.any(*inner), tirx.IntImm(INT, len(plan.plane_sets) - 1), edges)
        bits: Expr = _zero()
        for tap in range(plan.taps):
            source = frame * window.stride[0] + (tap * window.dilation[0] - window.padding[0])
            bits = bits + tirx.if_then_else(self._frame_alive(clip, source), 1 << tap, 0)
        return bits

    def _frame_alive(self, clip: Expr, frame: Expr) -> Expr:
        last = self.plan.window.size[0] - 1
        safe = tirx.max(tirx.min(frame, last), 0)
        return tirx.all(frame >= 0, frame <= last, self.masks["in_frames"][clip, safe] != number(0.0))

    def _frame_is_read(self, clip: Expr, frame: Expr) -> Expr:
        """Whether some frame of the tile of frames is read."""
        if not self.plan.out_frames:
            return tirx.IntImm("bool", 1)
        size = self.plan.m[0]
        return tirx.any(*(self._is_written(clip, frame * size + within) for within in range(size)))

    def _is_written(self, clip: Expr, frame: Expr) -> Expr:
        """Whether there is such an output frame, and it is read."""
        last = self.plan.window.out[0] - 1
        if not self.plan.out_frames:
            return frame <= last
        return tirx.all(frame <= last, self.masks["out_frames"][clip, tirx.min(frame, last)] != number(0.0))

    def _search_positions(self, mask: tirx.Buffer, tile: tuple[Expr, Expr, Expr, Expr], found: tirx.Buffer) -> None:
        """Set ``found`` where some position of ``tile`` (clip, frame, row, column) is alive in ``mask``."""
        (_, height, width), (clips, frames, *ends), (clip, frame, row, column) = self.plan.m, mask.shape, tile
        at = (clip if int(clips) > 1 else 0, frame if int(frames) > 1 else 0)
        with serial(height) as i, serial(width) as j:
            h, w = tirx.min(row * height + i, ends[0] - 1), tirx.min(column * width + j, ends[1] - 1)
            with when(mask[at[0], at[1], h, w] != number(0.0)):
                store(found, tirx.IntImm(INT, 1), 0)

    # -- chunks ------------------------------------------------------------------------------------------------------

    def _fill_chunks(self) -> None:
        """List the columns that hold a row; a chunk ends when there is no room for the next one."""
        plan = self.plan
        state = scratch((3,), INT)  # chunk, columns in it, the places that these take
        for field in range(3):
            store(state, _zero(), field)

        def close() -> None:
            store(self.in_chunk, state[1], state[0])
            store(state, state[0] + 1, 0)
            store(state, _zero(), 1)
            store(state, _zero(), 2)

        alive = scratch((1,), INT)
        with serial(plan.window.batch * plan.places) as column:
            store(alive, _zero(), 0)
            with serial(self.frames) as frame, when(self.row_class[column, frame] >= 0):
                store(alive, alive[0] + 1, 0)
            with when(alive[0] != 0):
                places = let(alive[0] if plan.one_source else tirx.IntImm(INT, self.frames))
                with when(state[2] + places > plan.columns * self.frames):
                    close()
                store(self.lists["columns"], column, state[0], state[1])
                store(state, state[1] + 1, 1)
                store(state, state[2] + places, 2)
        with when(state[1] > 0):
            close()
        store(self.lists["counts"], state[0], plan.chunks, 0)

    # -- rows of a chunk ---------------------------------------------------------------------------------------------

    def _list_rows(self, chunk: Expr) -> None:
        plan, counts = self.plan, self.lists["counts"]
        needed = None if plan.one_source else scratch((plan.source_rows,), INT)
        if needed is not None:
            with serial(plan.source_rows) as row:
                store(needed, _zero(), row)
        state = scratch((3,), INT)  # rows so far, padded to whole tiles; runs; inputs
        for field in range(3):
            store(state, _zero(), field)
        present = let(self.in_chunk[chunk])
        first, last = (let(self._sample_of(self.lists["columns"][chunk, at])) for at in (0, present - 1))
        with serial(last - first + 1) as offset:
            sample = let(first + offset)
            with serial(len(plan.tap_sets)) as index:
                self._list_class((chunk, present, sample), index, needed, state)
        store(counts, tirx.floordiv(state[0], plan.mr), chunk, 1)
        store(counts, state[1], chunk, 2)
        if needed is not None:
            with serial(plan.source_rows) as row, when(needed[row] != 0):
                store(self.lists["inputs"], row, chunk, state[2])
                store(state, state[2] + 1, 2)
        store(counts, state[2], chunk, 0)

    def _sample_of(self, column: Expr) -> Expr:
        return self.plan.sample_of(tirx.floordiv(column, self.plan.places))

    def _list_class(
        self, place: tuple[Expr, Expr, Expr], index: Expr, needed: tirx.Buffer | None, state: tirx.Buffer
    ) -> None:
        """Of one class the rows of a sample; ``place``: the chunk, how many columns it has, and the sample."""
        plan, window, (chunk, present, sample) = self.plan, self.plan.window, place
        first = let(state[0])
        start, stop, pairs = (let(self.lists["classes"][index, field]) for field in range(3))
        stride, padding = (1, 0) if plan.transformed[0] else (window.stride[0], window.padding[0])
        with serial(self.frames) as frame, serial(present) as local:
            column = let(self.lists["columns"][chunk, local])
            with when(tirx.all(self.row_class[column, frame] == index, self._sample_of(column) == sample)):
                source = let((frame * stride - padding) * plan.most_columns + local)
                at = source if needed is not None else let(state[2])
                self._store_row(chunk, let(state[0]), at, frame * plan.most_columns + local)
                store(state, state[0] + 1, 0)
                with serial(stop - start) as tap:
                    if needed is None:
                        store(self.lists["inputs"], source, chunk, at)
                        store(state, at + 1, 2)
                    else:
                        store(needed, tirx.IntImm(INT, 1), source + self.lists["taps"][start + tap, 1])
        used = let(state[0])
        with when(used > first):
            store(self.lists["pairs"], self.lists["pairs"][sample, 0] + (used - first) * pairs, sample, 0)
            end = let(tirx.floordiv(used + (plan.mr - 1), plan.mr) * plan.mr)
            slot = (chunk, *self._slot(used - 1))
            last = let(self.lists["rows_in"][slot])
            with serial(end - used) as missing:
                self._store_row(chunk, let(used + missing), last, tirx.IntImm(INT, -1))
            store(state, end, 0)
            fields = (start, stop, tirx.floordiv(first, plan.mr), tirx.floordiv(end, plan.mr), sample)
            for field, value in enumerate(fields):
                store(self.lists["runs"], value, chunk, state[1], field)
            store(state, state[1] + 1, 1)

    def _slot(self, row: Expr) -> tuple[Expr, Expr]:
        return tirx.floordiv(row, self.plan.mr), tirx.floormod(row, self.plan.mr)

    def _store_row(self, chunk: Expr, slot: Expr, source: Expr, target: Expr) -> None:
        store(self.lists["rows_in"], source, chunk, *self._slot(slot))
        store(self.lists["rows_out"], target, chunk, *self._slot(slot))
