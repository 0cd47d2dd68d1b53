"""What masks leave of a layer, counted in the pieces that a kernel leaves out, and what that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tvm import tirx

from ..emit import FLOAT, INT, Expr, ceil_div, let, number, scratch, serial, store, when
from ..geometry import Triple, Window
from ..kernel import Operand, channels_mask
from ..plans import masks_of


@dataclass(frozen=True)
class Grain:
    """In which pieces a kernel leaves work out: tiles of outputs, units of input and of output channels.

    Frames of a tile of several are transformed together: of such a tile count the planes that are not zero. Output
    channels that are left fill panels of ``panel``, of which the last is computed whole.
    """

    tile: Triple = (1, 1, 1)
    unit_in: int = 1
    unit_out: int = 1
    panel: int = 1


@dataclass(frozen=True)
class Costs:
    """Seconds of a kernel where nothing is left out: of its multiplies, of weights that stream in once, and once more
    for each part of the rows, of rows whatever their channels, of reading input channels, of writing output channels,
    of packing weights whatever the rows, and of what masks do not change.

    The longer of multiplies and weights hides a part of the shorter, all but ``exposed``.
    """

    multiply: float
    weights: float
    again: float = 0.0
    rows: float = 0.0
    read: float = 0.0
    write: float = 0.0
    pack: float = 0.0
    always: float = 0.0
    exposed: float = 0.5

    def seconds(
        self, rows: Any, read: Any, written: Any, larger: Callable[..., Any] = max, smaller: Callable[..., Any] = min
    ) -> Any:
        """With shares left of rows and of channels on either side: floats, or expressions with TVM's max and min."""
        both = read * written
        multiply, weights = rows * both * self.multiply, both * (self.weights + rows * self.again)
        hidden = larger(multiply, weights) + self.exposed * smaller(multiply, weights)
        moved = rows * (read * self.read + written * self.write + self.rows)
        return hidden + moved + both * self.pack + self.always

    def microseconds(self, rows: Expr, read: Expr, written: Expr) -> Expr:
        """The same as a float32 expression, which has no room for small seconds' products."""
        terms = {each.name: 1e6 * getattr(self, each.name) for each in fields(self) if each.name != "exposed"}
        return replace(self, **terms).seconds(rows, read, written, tirx.max, tirx.min)


@dataclass(frozen=True)
class LiveCounts:
    """Counts what masks leave; the fields are those of a convolution and its plan."""

    window: Window
    channels_in: int
    channels_out: int
    samples: int = 1
    in_frames: bool = False
    out_frames: bool = False
    positions: tuple[int, int] | None = None
    live_in: bool = False
    live_out: bool = False

    def masks(self) -> list[Operand]:
        """The masks that are counted."""
        found = list(masks_of(self.window, self.in_frames, self.out_frames, self.positions).values())
        for axis, on, channels in (
            ("in_channels", self.live_in, self.channels_in),
            ("out_channels", self.live_out, self.channels_out),
        ):
            if on:
                found.append(channels_mask(axis, axis, self.samples, channels))
        return found

    def emit(self, args: Mapping[str, tirx.Buffer], grains: Sequence[Grain]) -> list[tuple[Expr, Expr, Expr]]:
        """For each grain the shares of rows, of input channels and of output channels that are left."""
        return [
            (
                self._rows(args, grain),
                self._channels(args.get("in_channels"), self.channels_in, grain.unit_in),
                self._channels(args.get("out_channels"), self.channels_out, grain.unit_out, grain.panel),
            )
            for grain in grains
        ]

    # -- channels ----------------------------------------------------------------------------------------------------

    def _channels(self, mask: Any, channels: int, unit: int, panel: int = 1) -> Expr:
        if mask is None:
            return number(1.0)
        found, units = _counter(), -(-channels // unit)
        with serial(self.samples) as sample:
            of_sample = _counter()
            with serial(units) as index:
                alive = _counter()
                with serial(unit) as within:
                    channel = let(tirx.min(index * unit + within, channels - 1))
                    with when(mask[sample, channel] != number(0.0)):
                        store(alive, _int(1), 0)
                store(of_sample, of_sample[0] + alive[0], 0)
            store(found, found[0] + ceil_div(of_sample[0], panel), 0)
        return let(tirx.Cast(FLOAT, found[0]) * number(1 / (self.samples * -(-units // panel))))

    # -- rows --------------------------------------------------------------------------------------------------------

    def _rows(self, args: Mapping[str, tirx.Buffer], grain: Grain) -> Expr:
        """Of all pairs of tile and tap over frames."""
        window, found = self.window, _counter()
        tiles = [-(-extent // size) for extent, size in zip(window.out, grain.tile, strict=True)]
        same = None
        if "positions" in args and self.positions == (1, 1):
            same = self._tiles(args["positions"], 0, 0, grain)
        with serial(window.batch) as clip, serial(tiles[0]) as place:
            taps = let(self._taps(args, clip, place, grain))
            with when(taps > 0):
                area: Expr = tiles[1] * tiles[2] if same is None else same
                if "positions" in args and same is None:
                    area = self._most_tiles(args["positions"], clip, place, grain)
                store(found, found[0] + taps * area, 0)
        total = window.batch * tiles[1] * tiles[2] * self._all_taps(grain, tiles[0])
        return let(tirx.Cast(FLOAT, found[0]) * number(1 / total))

    def _all_taps(self, grain: Grain, tiles: int) -> int:
        if grain.tile[0] > 1:
            return tiles * (grain.tile[0] + self.window.kernel[0] - 1)
        return max(1, sum(len(self.window.live_taps(0, frame)) for frame in range(self.window.out[0])))

    def _taps(self, args: Mapping[str, tirx.Buffer], clip: Expr, place: Expr, grain: Grain) -> Expr:
        """Taps over frames that a tile of frames reads, or planes of the frames that it transforms; 0 where the tile is
        never read."""
        window, taps, size = self.window, _counter(), grain.tile[0]
        wanted = _counter()
        with serial(size) as within:
            frame = let(tirx.min(place * size + within, window.out[0] - 1))
            alive: Expr = tirx.IntImm("bool", 1)
            if "out_frames" in args:
                alive = args["out_frames"][clip, frame] != number(0.0)
            with when(alive):
                store(wanted, _int(1), 0)
        with when(wanted[0] != 0):
            if size > 1:
                store(taps, self._planes(args, clip, place, size), 0)
            else:
                self._count_taps(args, clip, place, taps)
        return taps[0]

    def _planes(self, args: Mapping[str, tirx.Buffer], clip: Expr, place: Expr, size: int) -> Expr:
        """Planes of a tile of frames: its first and its last input frame alone reach one each, any other one all."""
        window, planes = self.window, size + self.window.kernel[0] - 1
        if "in_frames" not in args:
            return _int(planes)
        start, last = let(place * size - window.padding[0]), window.size[0] - 1

        def alive(source: Expr) -> Expr:
            safe = tirx.max(tirx.min(source, last), 0)
            return tirx.all(source >= 0, source <= last, args["in_frames"][clip, safe] != number(0.0))

        first, *inner, end = (alive(start + offset) for offset in range(planes))
        return tirx.Select(tirx.any(*inner), _int(planes), tirx.Cast(INT, first) + tirx.Cast(INT, end))

    def _count_taps(self, args: Mapping[str, tirx.Buffer], clip: Expr, frame: Expr, taps: tirx.Buffer) -> None:
        window = self.window
        with serial(window.kernel[0]) as tap:
            source = let(frame * window.stride[0] + tap * window.dilation[0] - window.padding[0])
            with when(tirx.all(source >= 0, source < window.size[0])):
                alive: Expr = _int(1)
                if "in_frames" in args:
                    alive = tirx.Cast(INT, args["in_frames"][clip, source] != number(0.0))
                store(taps, taps[0] + alive, 0)

    def _most_tiles(self, mask: tirx.Buffer, clip: Expr, place: Expr, grain: Grain) -> Expr:
        """Most tiles alive in any frame of a tile of frames."""
        assert self.positions is not None
        most, (clips, frames), size = _counter(), self.positions, grain.tile[0]
        with serial(size if frames > 1 else 1) as within:
            frame = let(tirx.min(place * size + within, self.window.out[0] - 1)) if frames > 1 else 0
            tiles = self._tiles(mask, clip if clips > 1 else 0, frame, grain)
            store(most, tirx.max(most[0], tiles), 0)
        return most[0]

    def _tiles(self, mask: tirx.Buffer, clip: Expr, frame: Expr, grain: Grain) -> Expr:
        """Tiles of one frame in which some position is alive."""
        _, height, width = self.window.out
        _, rows, columns = grain.tile
        found = _counter()
        with serial(-(-height // rows)) as row, serial(-(-width // columns)) as column:
            alive = _counter()
            with serial(rows) as i, serial(columns) as j:
                at = (clip, frame, tirx.min(row * rows + i, height - 1), tirx.min(column * columns + j, width - 1))
                with when(mask[at] != number(0.0)):
                    store(alive, _int(1), 0)
            store(found, found[0] + alive[0], 0)
        return let(found[0])


def _int(value: int) -> Expr:
    return tirx.IntImm(INT, value)


def _counter() -> tirx.Buffer:
    """A number that begins at zero."""
    found = scratch((1,), INT)
    store(found, _int(0), 0)
    return found
