"""Values in order on a processor: a stable merge sort of each line, the lines shared out over the threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx

from ..emit import INT, Expr, big, flat, let, parallel, scratch, serial, store
from ..sort import Sort


@dataclass(frozen=True)
class MergeSort(Sort):
    """As :class:`..sort.Sort`."""

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Line by line: runs of twice the length in each sweep, from one pair of buffers into the other."""
        memory = {name: flat(buffer) for name, buffer in args.items()}
        with parallel(self.lines) as line:
            before, at = let(tirx.floordiv(line, self.inner)), let(tirx.floormod(line, self.inner))
            one, other = (_Line(scratch((self.extent,), self.compared), scratch((self.extent,), INT)) for _ in range(2))
            first = let(big(before) * (self.extent * self.inner) + at)
            with serial(self.extent) as i:
                one.put(i, tirx.Cast(self.compared, memory["x"][first + big(i) * self.inner]), i)
            run = 1
            while run < self.extent:
                self._merge_runs(one, other, run)
                one, other, run = other, one, 2 * run
            target = let(big(before) * (self.kept * self.inner) + at)
            with serial(self.kept) as i:
                here = let(target + big(i) * self.inner)
                if self.values:
                    store(memory["values"], tirx.Cast(self.dtype, one.keys[i]), here)
                if self.places:
                    store(memory["places"], tirx.Cast(self.places, one.places[i]), here)

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
