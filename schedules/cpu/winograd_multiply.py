"""The products of a Winograd kernel: for each of the ξ planes and each panel of output channels, rows times weights.

Weights (ξ, vectors, taps, C_in, lanes) are read where they are: those of one vector of output channels lie by
themselves, so that none of a dead vector come along. Live output channels are whole vectors, which any panel may hold;
live input channels are whole units, of which one after the other is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tvm import tirx

from ..emit import (
    INT,
    Expr,
    big,
    ceil_div,
    choose,
    lane,
    lanes,
    let,
    number,
    prefetch,
    scratch,
    serial,
    splat,
    store,
    when,
)
from .tiles import Tile
from .winograd_plan import WinogradPlan
from .winograd_space import widths

#: Floats of a cache line: one prefetch for each is enough.
LINE_FLOATS = 16


@dataclass(frozen=True)
class Panel:
    """Where the weights of each vector of a panel begin, how many floats lie between two taps, and between two rows of
    a vector; ``jumps``: rows from the end of each vector to what is multiplied next in its place."""

    weights: tirx.Buffer
    starts: Sequence[Expr]
    tap_floats: int
    row_floats: int
    jumps: Sequence[Expr] = ()

    def at(self, tap: Expr) -> Panel:
        """The panel at one tap."""
        moved = let(big(tap) * self.tap_floats)
        return replace(self, starts=[let(start + moved) for start in self.starts])


@dataclass(frozen=True)
class Channels:
    """``count`` input channels: where they begin in V, in a panel's weights, and by vector of the panel those whose
    weights come next."""

    source: Expr
    row: Expr
    count: Expr
    ahead: Sequence[Expr]


class Transformed(Protocol):
    """What the products ask of their convolution."""

    @property
    def channels_in(self) -> int:
        """Input channels."""

    @property
    def channels_out(self) -> int:
        """Output channels."""

    @property
    def live_in(self) -> bool:
        """Whether live input channels are listed."""

    @property
    def tile(self) -> Tile:
        """The register tile."""

    @property
    def plan(self) -> WinogradPlan:
        """What is transformed, and the lists."""

    @property
    def panels(self) -> int:
        """Blocks of output channels."""

    @property
    def unit(self) -> int:
        """Input channels that come and go together."""

    @property
    def source_plane(self) -> int:
        """Floats of one plane of V."""

    @property
    def product_plane(self) -> int:
        """Floats of one plane of M."""


class Products:
    """Emits ``M[ξ][row][oc] = Σ_tap Σ_channel V · U``; ``sources`` is V, ``products`` M."""

    def __init__(
        self, conv: Transformed, args: Mapping[str, tirx.Buffer], weights: tirx.Buffer,
        sources: tirx.Buffer, products: tirx.Buffer,
    ) -> None:  # fmt: skip
        self.conv, self.tile, self.weights = conv, conv.tile, weights
        self.sources, self.products = sources, products
        self.taps, self.runs, self.rows_in, self.counts = (
            args[name] for name in ("tap_entries", "runs", "rows_in", "counts")
        )
        self.planes = args.get("tap_planes")
        self.in_channels = args.get("in_channels")
        self.out_channels = args.get("out_channels")

    # -- what is alive -----------------------------------------------------------------------------------------------

    def live_in(self, sample: Expr) -> Expr:
        """How many input channels V holds."""
        return self.conv.channels_in if self.in_channels is None else let(self.in_channels[sample, 0])

    def live_out(self, sample: Expr) -> Expr:
        """How many output channels M holds."""
        return self.conv.channels_out if self.out_channels is None else let(self.out_channels[sample, 0])

    def live_panels(self, sample: Expr) -> Expr:
        """How many panels the live output channels fill."""
        return self.conv.panels if self.out_channels is None else let(ceil_div(self.live_out(sample), self.tile.nr))

    @property
    def most_panels(self) -> Expr:
        """As many as those of one sample fill, where there are several all."""
        return self.live_panels(tirx.IntImm(INT, 0)) if self.conv.plan.samples == 1 else self.conv.panels

    def _panel(self, sample: Expr, xi: Expr, panel: Expr) -> Panel:
        """Past the last vector that there is, or is listed, that one again."""
        conv, tile = self.conv, self.tile
        floats, tap_floats = tile.vector_floats, conv.channels_in * tile.vector_floats
        vectors, vector_floats = -(-conv.channels_out // floats), conv.plan.taps * tap_floats
        plane, first = let(big(xi) * (vectors * vector_floats)), let(panel * tile.vectors)
        starts = []
        for v in range(tile.vectors):
            vector: Expr = first + v
            if self.out_channels is not None:
                vector = self._listed_vector(sample, vector)
            elif vectors % tile.vectors:
                vector = tirx.min(vector, vectors - 1)
            starts.append(let(plane + big(vector) * vector_floats))
        return Panel(self.weights, starts, tap_floats, floats)

    def _listed_vector(self, sample: Expr, index: Expr) -> Expr:
        """The ``index``-th live vector of output channels, or the last one."""
        assert self.out_channels is not None
        floats = self.tile.vector_floats
        last = tirx.floordiv(self.out_channels[sample, 0] - 1, floats)
        return tirx.floordiv(self.out_channels[sample, 1 + tirx.min(index, last) * floats], floats)

    def _to_next_panel(self, sample: Expr, panel: Expr, width: int) -> list[Expr]:
        """By vector of a panel of ``width``, rows of weights from its end to where what is multiplied next begins: the
        next panel, or behind the last one the first of the next plane."""
        conv, tile = self.conv, self.tile
        rows = conv.plan.taps * conv.channels_in
        if self.out_channels is None:
            return [tirx.IntImm(INT, (width - 1) * rows)] * width
        vectors, panels, first = (
            -(-conv.channels_out // tile.vector_floats),
            self.live_panels(sample),
            panel * tile.vectors,
        )
        last = let(panel + 1 == panels)
        jumps = []
        for v in range(width):
            coming = self._listed_vector(sample, tirx.Select(last, v, first + tile.vectors + v))
            here = self._listed_vector(sample, first + v)
            jumps.append(let((coming + tirx.Select(last, vectors, 0) - here - 1) * rows))
        return jumps

    # -- loops -------------------------------------------------------------------------------------------------------

    def multiply_panel(self, chunk: Expr, xi: Expr, panel: Expr) -> None:
        """One ξ, one panel of output channels, all rows of the chunk."""
        if self.conv.plan.samples == 1:
            self._multiply_runs(chunk, tirx.IntImm(INT, 0), (0, self.counts[chunk, 2]), xi, panel)
            return
        with serial(self.counts[chunk, 2]) as run:
            sample = let(self.runs[chunk, run, 4])
            with when(panel < self.live_panels(sample)):
                self._multiply_runs(chunk, sample, (run, 1), xi, panel)

    def _multiply_runs(self, chunk: Expr, sample: Expr, runs: tuple[Expr, Expr], xi: Expr, panel: Expr) -> None:
        """So many ``runs``, from the first on, of one sample."""
        conv, tile = self.conv, self.tile
        columns = self._panel(sample, xi, panel)

        def multiply(width: int) -> None:
            some = replace(columns, starts=columns.starts[:width], jumps=self._to_next_panel(sample, panel, width))
            if not conv.live_in:
                self._multiply_rows(chunk, sample, runs, xi, panel, some, listed=False)
                return
            choose(
                self.live_in(sample) == conv.channels_in,
                lambda: self._multiply_rows(chunk, sample, runs, xi, panel, some, listed=False),
                lambda: self._multiply_rows(chunk, sample, runs, xi, panel, some, listed=True),
            )

        def narrowest(vectors: Expr, widths: list[int]) -> None:
            width, *wider = widths
            if wider:
                choose(vectors <= width, lambda: multiply(width), lambda: narrowest(vectors, wider))
            else:
                multiply(width)

        if len(self._widths) == 1:
            multiply(tile.vectors)
        else:
            narrowest(let(ceil_div(self.live_out(sample) - panel * tile.nr, tile.vector_floats)), self._widths)

    @property
    def _widths(self) -> list[int]:
        """Vectors of a panel that there is code for, ascending: the last one that lists fill may be narrower."""
        tile = self.tile
        if self.out_channels is None:
            return [tile.vectors]
        return widths((tile.mr, tile.vectors, tile.step))

    def _multiply_rows(
        self, chunk: Expr, sample: Expr, runs: tuple[Expr, Expr], xi: Expr, panel: Expr, columns: Panel, *, listed: bool
    ) -> None:
        """All rows of the runs times ``columns`` of the weights, run by run."""
        conv, tile, depth = self.conv, self.tile, self.conv.channels_in
        live = self.live_in(sample) if listed else depth
        source = let(big(xi) * conv.source_plane)
        target = let(big(xi) * conv.product_plane + panel * tile.nr)
        most = max(1, tile.depth_block // conv.unit) * conv.unit if listed else tile.depth_block
        with serial(runs[1]) as index:
            run = let(runs[0] + index)
            tap, last_tap, low, high = (let(self.runs[chunk, run, field]) for field in range(4))
            last_tap = self._last_tap(xi, tap, last_tap)
            with when(tirx.any(tap == last_tap, live == 0) if listed else tap == last_tap):
                self._zero_products(target, low, high, len(columns.starts))
            with serial(ceil_div(last_tap - tap, tile.segment_taps)) as segment, serial(ceil_div(live, most)) as block:
                first_tap = let(tap + segment * tile.segment_taps)
                taps = (first_tap, let(tirx.min(first_tap + tile.segment_taps, last_tap)))
                first = let(block * most)
                count = let(tirx.min(live - first, most)) if depth > most or listed else live
                fresh = let(tirx.all(segment == 0, block == 0))
                with serial(high - low) as offset:
                    current = let(low + offset)
                    rows = [let(self.rows_in[chunk, current, r]) for r in range(tile.mr)]
                    place = let(target + big(current) * (tile.mr * conv.panels * tile.nr))
                    self._register_tile(
                        rows, source, place, columns, taps, (sample if listed else None, first, count), fresh
                    )

    def _last_tap(self, xi: Expr, tap: Expr, last: Expr) -> Expr:
        """``last``, or ``tap`` itself where rows that read from ``tap`` on have nothing but zeros in plane ``xi``."""
        if self.planes is None:
            return last
        _, height, width = self.conv.plan.alpha
        planes = self.planes[tirx.min(tap, int(self.planes.shape[0]) - 1)]
        return let(tirx.Select((planes >> tirx.floordiv(xi, height * width)) & 1 == 0, tap, last))

    def _zero_products(self, target: Expr, low: Expr, high: Expr, width: int) -> None:
        """Rows that read no live frame or channel: their sums are empty."""
        tile, row_floats = self.tile, self.conv.panels * self.tile.nr
        with serial((high - low) * tile.mr) as row:
            place = let(target + big(low * tile.mr + row) * row_floats)
            for v in range(width):
                store(self.products, number(0.0, tile.vector_floats), self._vector(place, v))

    def _vector(self, start: Expr, v: int) -> Expr:
        return lanes(start + v * self.tile.vector_floats, self.tile.vector_floats)

    def _register_tile(
        self,
        rows: list[Expr],
        source: Expr,
        place: Expr,
        columns: Panel,
        taps: tuple[Expr, Expr],
        channels: tuple[Expr, Expr, Expr],
        fresh: Expr,
    ) -> None:
        """Accumulate ``taps`` × ``channels`` of one tile of rows and put it (back) at ``place``.

        ``channels``: the sample whose list they are taken from (None: they are all alive), the first in V, how many.
        """
        conv, tile = self.conv, self.tile
        acc = self._started(place, len(columns.starts), fresh)
        sample, first, depth = channels
        with serial(taps[1] - taps[0]) as offset:
            entry = let(taps[0] + offset)
            shift = let(self.taps[entry, 1])
            sources = [let(source + big(row + shift) * conv.channels_in) for row in rows]
            tap = let(self.taps[entry, 0])
            at_tap, jumps = columns.at(tap), self._behind(tap, columns.jumps)
            if sample is None:
                later = let(first + min(tile.depth_block, conv.channels_in))
                ahead = [let(later + tirx.Select(later >= conv.channels_in, jump, 0)) for jump in jumps]
                self._multiply(sources, at_tap, Channels(first, first, depth, ahead), acc)
            else:
                self._multiply_units(sources, at_tap, (sample, first, depth), jumps, acc)
        self._put_back(acc, place)

    def _started(self, place: Expr, width: int, fresh: Expr) -> list[list[tirx.Buffer]]:
        """The sums of one tile of rows in registers: zeros if ``fresh``, else those at ``place``."""
        count, rows = self.tile.vector_floats, range(self.tile.mr)
        acc = [[scratch((count,)) for _ in range(width)] for _ in rows]

        def clear() -> None:
            for r in rows:
                for v in range(width):
                    store(acc[r][v], number(0.0, count), lanes(0, count))

        def resume() -> None:
            for r in rows:
                for v in range(width):
                    store(acc[r][v], self.products[self._product(place, r, v)], lanes(0, count))

        choose(fresh, clear, resume)
        return acc

    def _put_back(self, acc: list[list[tirx.Buffer]], place: Expr) -> None:
        for r, row in enumerate(acc):
            for v, sums in enumerate(row):
                store(self.products, sums[lanes(0, self.tile.vector_floats)], self._product(place, r, v))

    def _product(self, place: Expr, r: int, v: int) -> Expr:
        """The ``v``-th vector of row ``r`` of a tile at ``place``."""
        return self._vector(place + r * (self.conv.panels * self.tile.nr), v)

    def _behind(self, tap: Expr, jumps: Sequence[Expr]) -> Sequence[Expr]:
        """Rows of weights from the end of each vector's ``tap`` to what is read next: its next tap, which lies there,
        or after the last one what ``jumps`` lead to."""
        taps = self.conv.plan.taps
        return [tirx.Select(tap == taps - 1, jump, 0) for jump in jumps] if taps > 1 else jumps

    def _multiply_units(
        self,
        sources: list[Expr],
        columns: Panel,
        channels: tuple[Expr, Expr, Expr],
        jumps: Sequence[Expr],
        acc: list[list[tirx.Buffer]],
    ) -> None:
        """Unit after unit of the live channels of a sample, so many from the first on; ``jumps``: rows of weights
        between the last channel's and what is read next, by vector."""
        conv, unit, (sample, first, depth) = self.conv, self.conv.unit, channels
        assert self.in_channels is not None
        live = self.live_in(sample)
        with serial(ceil_div(depth, unit)) as index:
            start = let(first + index * unit)
            size = let(tirx.min(first + depth - start, unit)) if conv.channels_in % unit else unit
            # What comes next is the block after this one, or the first channels of the panel behind.
            whole = let(ceil_div(live, unit) * unit)
            later = let(start + tirx.min(whole, max(unit, self.tile.depth_block // unit * unit)))
            wraps = let(later >= whole)
            place = let(tirx.Select(wraps, later - whole, later))
            row = let(self.in_channels[sample, 1 + place])
            ahead = [let(row + tirx.Select(wraps, conv.channels_in + jump, 0)) for jump in jumps]
            self._multiply(
                sources, columns, Channels(start, let(self.in_channels[sample, 1 + start]), size, ahead), acc
            )

    # -- the innermost loop ------------------------------------------------------------------------------------------

    def _multiply(self, sources: list[Expr], columns: Panel, channels: Channels, acc: list[list[tirx.Buffer]]) -> None:
        """``acc[r] += v[r, k] · u[k]`` over ``channels``."""
        tile, count = self.tile, channels.count
        whole = let(tirx.floordiv(count, tile.step)) if tile.step > 1 else 0
        if tile.step > 1:
            with serial(whole) as chunk:
                start = let(chunk * tile.step)
                values = [let(self.sources[lanes(at + channels.source + start, tile.step)]) for at in sources]
                for k in range(tile.step):
                    spread = [splat(lane(value, k), tile.vector_floats) for value in values]
                    floats = columns.row_floats
                    new_line = k * floats // LINE_FLOATS != (k - 1) * floats // LINE_FLOATS
                    self._multiply_add(spread, columns, channels, start + k, acc, new_line)
        if tile.step == 1 or not isinstance(count, int) or count % tile.step:
            with serial(count - whole * tile.step) as rest:
                k = let(whole * tile.step + rest)
                spread = [splat(self.sources[at + big(channels.source + k)], tile.vector_floats) for at in sources]
                self._multiply_add(spread, columns, channels, k, acc)

    def _multiply_add(
        self,
        values: list[Expr],
        columns: Panel,
        channels: Channels,
        k: Expr,
        acc: list[list[tirx.Buffer]],
        ahead: bool = True,
    ) -> None:
        """One channel, the ``k``-th of ``channels``; ``ahead``: ask for weights to come too."""
        count = self.tile.vector_floats
        row = let(big(channels.row + k) * columns.row_floats)
        w = [let(columns.weights[lanes(start + row, count)]) for start in columns.starts]
        if ahead:
            for start, coming in zip(columns.starts, channels.ahead, strict=True):
                prefetch(columns.weights, start + big(coming + k) * columns.row_floats)
        for r, value in enumerate(values):
            x = let(value)
            for v in range(len(w)):
                store(acc[r][v], acc[r][v][lanes(0, count)] + x * w[v], lanes(0, count))
