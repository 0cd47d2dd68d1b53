"""Weights of one panel of output channels: read in place, or gathered by the lists of live channels first.

Packed weights are panels of rows of ``nr`` output channels, one row for each tap and input channel. Where lists leave
all input channels and whole vectors of output channels, a panel's weights are read where they are; else its rows are
copied side by side, live input channels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tvm import tirx

from ..emit import INT, Expr, big, ceil_div, choose, lanes, let, scratch, serial, store, when

if TYPE_CHECKING:
    from .tiles import Tile


@dataclass(frozen=True)
class WeightPanel:
    """The weights of one panel: where each of its vectors begins, and how many floats lie between two taps."""

    weights: tirx.Buffer
    starts: Sequence[Expr]
    tap_floats: Expr

    def prepare(self, first: Expr, last: Expr) -> None:
        """Bring the tap entries ``first`` to ``last``; here they are all there."""

    def at(self, tap: Expr) -> WeightPanel:
        """The panel at one tap."""
        moved = let(big(tap) * self.tap_floats)
        return replace(self, starts=[let(start + moved) for start in self.starts])


@dataclass(frozen=True)
class LazyWeightPanel(WeightPanel):
    """A gathered panel whose taps are gathered one by one, when a segment first needs them.

    Segments of different rows need the same taps; taps that only dead frames would be read through are never needed.
    """

    entries: tirx.Buffer
    done: tirx.Buffer
    gather: Callable[[Expr], None]

    def prepare(self, first: Expr, last: Expr) -> None:
        """Gather what is missing of the tap entries ``first`` to ``last``."""
        with serial(last - first) as offset:
            tap = let(self.entries[first + offset, 0])
            with when(self.done[tap] == 0):
                self.gather(tap)
                store(self.done, tirx.IntImm(INT, 1), tap)


@dataclass(frozen=True)
class PanelWeights:
    """Packed weights of ``taps`` × ``depth`` rows a panel, and the lists (sample, 1 + channels) that thin them."""

    weights: tirx.Buffer
    tile: Tile
    taps: int
    depth: int
    in_channels: tirx.Buffer | None
    out_channels: tirx.Buffer | None

    @property
    def panel_floats(self) -> int:
        """Floats of one packed panel."""
        return self.taps * self.depth * self.tile.nr

    def live_in(self, sample: Expr) -> Expr:
        """How many input channels are alive."""
        return self.depth if self.in_channels is None else let(self.in_channels[sample, 0])

    def out_channel(self, sample: Expr, index: Expr) -> Expr:
        """The ``index``-th live output channel; the last one again past the end."""
        assert self.out_channels is not None
        return self.out_channels[sample, 1 + tirx.min(index, self.out_channels[sample, 0] - 1)]

    def live_panels(self, sample: Expr, packed: int) -> Expr:
        """How many panels the live output channels fill; ``packed`` ones where all are alive."""
        if self.out_channels is None:
            return packed
        return let(ceil_div(self.out_channels[sample, 0], self.tile.nr))

    def columns(self, sample: Expr, panel: Expr) -> list[Expr]:
        """The listed output channels of panel ``panel``."""
        return [self.out_channel(sample, panel * self.tile.nr + index) for index in range(self.tile.nr)]

    def use(
        self,
        sample: Expr,
        panel: Expr,
        plane: Expr,
        gathered: Callable[[], WeightPanel],
        multiply: Callable[[WeightPanel], None],
    ) -> None:
        """``multiply`` with the panel's weights, which begin at ``plane``; as ``gathered`` where they must be."""
        reasons = [] if self.in_channels is None else [self.live_in(sample) == self.depth]
        if self.out_channels is not None:
            firsts = range(0, self.tile.nr, self.tile.vector_floats)
            reasons += [self._is_packed(sample, panel * self.tile.nr + first) for first in firsts]

        def in_place() -> None:
            multiply(self._in_place(sample, panel, plane))

        if reasons:
            choose(tirx.all(*reasons), in_place, lambda: multiply(gathered()))
        else:
            in_place()

    def _in_place(self, sample: Expr, panel: Expr, plane: Expr) -> WeightPanel:
        tile = self.tile
        lanes_of = range(0, tile.nr, tile.vector_floats)
        tap_floats = self.depth * tile.nr
        if self.out_channels is None:
            start = let(plane + big(panel) * self.panel_floats)
            return WeightPanel(self.weights, [start + lane for lane in lanes_of], tap_floats)
        # Whole vectors, those past the end of the list too: a read from the last channel on could leave the weights.
        vectors = [tirx.floordiv(self.out_channel(sample, panel * tile.nr + v), tile.vector_floats) for v in lanes_of]
        firsts = [let(vector * tile.vector_floats) for vector in vectors]
        panels = [big(tirx.floordiv(first, tile.nr)) * self.panel_floats for first in firsts]
        starts = [let(plane + at + tirx.floormod(first, tile.nr)) for at, first in zip(panels, firsts, strict=True)]
        return WeightPanel(self.weights, starts, tap_floats)

    def _is_packed(self, sample: Expr, first: Expr) -> Expr:
        """Whether the vector of listed output channels from the ``first`` on is one of the packed weights' vectors."""
        assert self.out_channels is not None
        floats = self.tile.vector_floats
        first, live = let(first), let(self.out_channels[sample, 0])
        last = let(tirx.min(first + floats, live) - 1)
        channel = let(self.out_channel(sample, first))
        side_by_side = self.out_channel(sample, last) - channel == last - first
        return let(tirx.any(first >= live, tirx.all(tirx.floormod(channel, floats) == 0, side_by_side)))

    def gather(self, sample: Expr, panel: Expr, plane: Expr, entries: tirx.Buffer | None = None) -> WeightPanel:
        """The panel's weights side by side: all taps now, or, with tap ``entries``, each when it is prepared."""
        live = self.live_in(sample)
        gathered = scratch((self.panel_floats,), str(self.weights.dtype))
        copy_row = self._copy_columns(sample, panel) if self.out_channels is not None else self._copy_panel(panel)

        def gather_tap(tap: Expr) -> None:
            with serial(live) as k:
                channel = self.in_channels[sample, 1 + k] if self.in_channels is not None else k
                row = let(plane + big(tap * self.depth + channel) * self.tile.nr)
                copy_row(row, gathered, let((tap * live + k) * self.tile.nr))

        starts = [big(lane) for lane in range(0, self.tile.nr, self.tile.vector_floats)]
        if entries is None:
            with serial(self.taps) as tap:
                gather_tap(tap)
            return WeightPanel(gathered, starts, live * self.tile.nr)
        done = scratch((self.taps,), INT)
        with serial(self.taps) as tap:
            store(done, tirx.IntImm(INT, 0), tap)
        return LazyWeightPanel(gathered, starts, live * self.tile.nr, entries, done, gather_tap)

    def _copy_panel(self, panel: Expr) -> Callable[[Expr, tirx.Buffer, Expr], None]:
        """Copies a row (its offset in any panel, buffer, offset in it) of panel ``panel``."""
        start, floats = let(big(panel) * self.panel_floats), self.tile.vector_floats

        def copy(row: Expr, gathered: tirx.Buffer, at: Expr) -> None:
            for lane in range(0, self.tile.nr, floats):
                store(gathered, self.weights[lanes(start + row + lane, floats)], lanes(at + lane, floats))

        return copy

    def _copy_columns(self, sample: Expr, panel: Expr) -> Callable[[Expr, tirx.Buffer, Expr], None]:
        """The same for listed output channels, from wherever in the packed weights their columns are.

        Each column is read along one panel, which the processor foresees; vectors of channels that lie side by side in
        one panel are copied whole.
        """
        nr, floats = self.tile.nr, self.tile.vector_floats
        named = [let(channel) for channel in self.columns(sample, panel)]
        starts = [let(big(tirx.floordiv(c, nr)) * self.panel_floats + tirx.floormod(c, nr)) for c in named]
        whole = [
            let(tirx.all(are_consecutive(named[v : v + floats]), tirx.floormod(named[v], floats) == 0))
            for v in range(0, nr, floats)
        ]

        def copy(row: Expr, gathered: tirx.Buffer, at: Expr) -> None:
            for v in range(self.tile.vectors):
                lane = v * floats

                def vector(lane: int = lane) -> None:
                    store(gathered, self.weights[lanes(starts[lane] + row, floats)], lanes(at + lane, floats))

                def singles(lane: int = lane) -> None:
                    for index in range(lane, lane + floats):
                        store(gathered, self.weights[starts[index] + row], at + index)

                choose(whole[v], vector, singles)

        return copy


def are_consecutive(channels: list[Expr]) -> Expr:
    """Whether ascending channels are. Past the end of a list its last one is repeated: repeats are not."""
    return tirx.all(channels[-1] - channels[0] == len(channels) - 1, channels[-1] != channels[-2])
