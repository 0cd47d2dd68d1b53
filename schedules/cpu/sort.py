"""Values in order on a processor, the lines shared out over the threads: a stable merge sort of each, or, where few of
many are kept, a list of the best so far into which later ones are put."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import INT, Expr, big, flat, let, parallel, scratch, serial, store, when
from ..sort import Sort

#: At most so many values of a line are kept in a list, of a line so many times as long.
MOST_LISTED, TIMES_LONGER = 64, 4


@dataclass(frozen=True)
class MergeSort(Sort):
    """As :class:`..sort.Sort`."""

    @property
    def listed(self) -> bool:
        """Whether the best so far are listed; else all are sorted."""
        return self.kept <= MOST_LISTED and TIMES_LONGER * self.kept <= self.extent

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Line by line."""
        memory = {name: flat(buffer) for name, buffer in args.items()}
        with parallel(self.lines) as line:
            before, at = let(tirx.floordiv(line, self.inner)), let(tirx.floormod(line, self.inner))
            first = let(big(before) * (self.extent * self.inner) + at)
            one = (self._listed if self.listed else self._sorted)(memory["x"], first)
            target = let(big(before) * (self.kept * self.inner) + at)
            with serial(self.kept) as i:
                here = let(target + big(i) * self.inner)
                if self.values:
                    store(memory["values"], tirx.Cast(self.dtype, one.keys[i]), here)
                if self.places:
                    store(memory["places"], tirx.Cast(self.places, one.places[i]), here)

    def _line(self, length: int) -> _Line:
        return _Line(scratch((length,), self.compared), scratch((length,), INT))

    def _listed(self, x: tirx.Buffer, first: Expr) -> _Line:
        """The best of the line from ``x[first]`` on: each value that stands before the last of the list is put into it,
        and those behind its place move on by one."""
        best, last = self._line(self.kept), self.kept - 1
        with serial(self.extent) as i:
            value = let(tirx.Cast(self.compared, x[first + big(i) * self.inner]))
            with when(tirx.any(i <= last, self.precedes(value, best.keys[last]))):
                with serial(last) as step:
                    at = let(last - step)
                    moves = let(tirx.any(at > i, self.precedes(value, best.keys[at - 1])))
                    comes = let(tirx.any(at >= i, self.precedes(value, best.keys[at])))
                    key = tirx.Select(comes, value, best.keys[at])
                    place = tirx.Select(comes, i, best.places[at])
                    best.put(
                        at, tirx.Select(moves, best.keys[at - 1], key), tirx.Select(moves, best.places[at - 1], place)
                    )
                comes = let(tirx.any(i == 0, self.precedes(value, best.keys[0])))
                best.put(0, tirx.Select(comes, value, best.keys[0]), tirx.Select(comes, i, best.places[0]))
        return best

    def _sorted(self, x: tirx.Buffer, first: Expr) -> _Line:
        """The line from ``x[first]`` on: runs of twice the length in each sweep, from one pair of buffers into the
        other."""
        one, other = self._line(self.extent), self._line(self.extent)
        with serial(self.extent) as i:
            one.put(i, tirx.Cast(self.compared, x[first + big(i) * self.inner]), i)
        run = 1
        while run < self.extent:
            self._merge_runs(one, other, run)
            one, other, run = other, one, 2 * run
        return one

    def _merge_runs(self, source: _Line, target: _Line, run: int) -> None:
        """Each two neighbouring runs of ``run`` sorted values become one."""
        extent, last = self.extent, self.extent - 1
        cursors = scratch((2,), INT)
        with serial(-(extent // -(2 * run))) as pair:
            start = let(pair * (2 * run))
            middle, end = let(tirx.min(start + run, extent)), let(tirx.min(start + 2 * run, extent))
            store(cursors, start, 0)
            store(cursors, middle, 1)
            with serial(end - start) as step:
                left, right = let(cursors[0]), let(cursors[1])
                # A run that has ended is read at a place that exists; what is there does not matter.
                at_left, at_right = let(tirx.min(left, last)), let(tirx.min(right, last))
                a, b = let(source.keys[at_left]), let(source.keys[at_right])
                from_left = let(tirx.any(right >= end, tirx.all(left < middle, self.stays_before(a, b))))
                place = tirx.Select(from_left, source.places[at_left], source.places[at_right])
                target.put(start + step, tirx.Select(from_left, a, b), place)
                store(cursors, left + tirx.Cast(INT, from_left), 0)
                store(cursors, right + 1 - tirx.Cast(INT, from_left), 1)


@dataclass(frozen=True)
class _Line:
    """A line of values and where each stood."""

    keys: tirx.Buffer
    places: tirx.Buffer

    def put(self, at: Expr, key: Expr, place: Expr) -> None:
        store(self.keys, key, at)
        store(self.places, place, at)
