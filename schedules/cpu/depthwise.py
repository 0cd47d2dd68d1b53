"""The depthwise convolution: every output channel reads one input channel (`docs/kernels.md`).

Channels are lanes. A tile holds ``mr`` outputs along one axis, times some vectors of channels, in registers: along the
width, or along the frames where taps go along the frames alone. Of each line of taps the tile reads every input once,
whatever number of its outputs use it. Weights and input are read where they are, nothing is packed or padded: the tiles
at both ends of a line leave out the taps outside the clip when the kernel is emitted, and frames and rows outside it
are never visited.

The last vector of channels overlaps the one before where channels fill no whole number of vectors, and the last tile of
a line the one before it likewise: what is computed twice is stored twice, the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from tvm import tirx

from ..convolution import LayerKernel
from ..emit import (
    FLOAT,
    Expr,
    big,
    cast,
    flat,
    lanes,
    let,
    number,
    parallel,
    read,
    scratch,
    serial,
    short,
    splat,
    store,
    when,
    write,
)
from ..epilogue import write_activated
from ..geometry import HEIGHT, TIME, WIDTH, Window
from ..kernel import Count, Operand, Planned, Weights, constant, output
from ..space import Space
from ..taps import span
from ..workload import Workload
from .depthwise_tiles import DepthwiseSpace, DepthwiseTile, line_axis
from .lines import each_piece
from .row_plan import RowPlan
from .tiles import HALF_TERMS, Machine


@dataclass(frozen=True)
class DepthwiseConv(LayerKernel):
    """A depthwise convolution with what is fused behind it.

    ``groups`` is the number of input channels; each makes ``group_out`` output channels. ``in_frames`` and
    ``out_frames`` say which masks are given, as in the row plan: dead input frames are not read and count as zeros; an
    output frame that nobody reads is set to zero if ``zero_dead``, else left alone.
    """

    window: Window
    channels_in: int
    channels_out: int
    tile: DepthwiseTile
    in_frames: bool = False
    out_frames: bool = False
    residual: bool = False
    activation: str = ""
    zero_dead: bool = False
    #: How activations and weights are stored.
    dtype: str = FLOAT

    @property
    def groups(self) -> int:  # type: ignore[override]  # a field of others
        """Convolution groups: one for each input channel."""
        return self.channels_in

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        frames = f"x{self.frames_abreast}" if self.frames_abreast > 1 else ""
        return f"depthwise3d_{short(self.dtype)}_mr{self.tile.mr}{frames}_nr{self.tile.vectors * self.lanes}"

    @property
    def sums(self) -> str:
        """What adds up the products of one output."""
        return self.dtype if self.window.taps <= HALF_TERMS else FLOAT

    @property
    def lanes(self) -> int:
        """Channels of one vector: no more than there are."""
        return min(self.tile.vector_floats, 1 << (self.channels_out.bit_length() - 1))

    @property
    def vectors(self) -> int:
        """Vectors that hold the output channels."""
        return -(-self.channels_out // self.lanes)

    @property
    def frames_abreast(self) -> int:
        """Output frames of one tile: masks leave out single ones, and what lies along the frames has no others."""
        alone = self.in_frames or self.out_frames or self.line_axis == TIME
        return 1 if alone else min(self.tile.frames, self.window.out[TIME])

    @property
    def plan(self) -> RowPlan:
        """Its rows, which are planned for their counts alone."""
        return RowPlan(self.window, 1, 1, self.window.taps, 1, self.in_frames, self.out_frames)

    def operands(self) -> list[Operand]:
        """x (N, T, H, W, C_in), weights (taps, C_out), bias, the masks, residual where asked for, y."""
        return [
            Operand("x", self.x_shape, self.dtype),
            constant("weights", self.weight_shape, self.dtype),
            constant("bias", (self.channels_out,)),
            *self.plan.masks.values(),
            *([Operand("residual", self.y_shape, self.dtype, "residual")] if self.residual else []),
            output("y", self.y_shape, self.dtype),
        ]

    def lists(self) -> list[Planned]:
        """What counts its rows, where masks leave some out."""
        return [Planned(self.plan, tuple(self.plan.shapes))] if self.plan.masks else []

    def work(self) -> tuple[Count, Count, Count]:
        """One input channel for each output channel."""
        pairs = Count(operand="counts", at=(3,)) if self.plan.masks else Count(self.window.tap_positions)
        return pairs, Count(1), Count(self.channels_out)

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Weights with channels innermost, and the bias as it is."""
        assert weights is not None
        constants = {"bias": np.ascontiguousarray(weights.bias, "float32")}
        if weights.weight is not None:
            constants["weights"] = self.pack_weights(weights.weight)
        return constants

    def unpacked(self, at: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        """Channels are innermost, in whole vectors."""
        count, row = self.lanes, self.vectors * self.lanes
        vector, tap = let(tirx.floordiv(tirx.floormod(at, row), count)), let(tirx.floordiv(at, row))
        out = let(tirx.min(vector * count, self.channels_out - count) + tirx.floormod(at, count))
        return out, tap, tirx.IntImm("int32", 0), tirx.IntImm("bool", 1)

    def space(self, machine: Machine, workload: Workload) -> Space:
        """Outputs and vectors of the register tile, rows of a block."""
        return DepthwiseSpace(machine.storing(self.dtype), workload)

    def sized(self, decisions: Mapping[str, int]) -> DepthwiseConv:
        """With this tile."""
        return replace(self, tile=replace(self.tile, **decisions))

    @property
    def line_axis(self) -> int:
        """Along which axis a tile lies."""
        return line_axis(self.window, self.in_frames or self.out_frames)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weights: (taps, channels in whole vectors)."""
        return (self.window.taps, self.vectors * self.lanes)

    def pack_weights(self, weight: np.ndarray) -> np.ndarray:
        """Float32 weights (C_out, 1, KT, KH, KW) vector by vector, so that none crosses two cache lines: the last holds
        channels of the one before again."""
        begins = np.minimum(np.arange(self.vectors) * self.lanes, self.channels_out - self.lanes)
        channels = (begins[:, None] + np.arange(self.lanes)).ravel()
        return np.ascontiguousarray(weight.reshape(self.channels_out, self.window.taps)[channels].T, self.dtype)

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Blocks of rows, tile by tile."""
        _Emitter(self, args).emit()


def why_no_depthwise(window: Window, channels_in: int, channels_out: int, groups: int, vector_floats: int) -> str:
    """Why the kernel cannot compute a layer; empty where it can."""
    if groups != channels_in or channels_out % channels_in:
        return "groups of several input channels"
    each = channels_out // channels_in
    count = min(vector_floats, 1 << (channels_out.bit_length() - 1))
    if count % each:
        return f"{each} output channels for each input channel, which fill no vector of {count}"
    return ""


class _Line(NamedTuple):
    """A line of outputs: its index on the second of the other axes, and the taps inside the clip there as (first
    source, first tap, past the last tap)."""

    clip: Expr
    at: Expr
    span: tuple[Expr, Expr, Expr]


class _Channel(NamedTuple):
    """A vector of output channels: the first of them, and where its weights begin in those of one tap."""

    start: Expr
    packed: Expr


class _Piece(NamedTuple):
    """Some outputs along an axis from ``first`` on; ``inside``: the taps of each that read inside the clip, counted
    from each tap of ``span``, where that is given: (first source, first tap, past the last tap)."""

    first: Expr
    inside: list[list[int]]
    span: tuple[Expr, Expr, Expr] = (0, 0, 1)


#: The sums of each output of a tile, by its index along both axes, one for each vector of channels.
_Sums = dict[tuple[int, int], list[tirx.Buffer]]
#: What is done with a piece of a line for some vectors of channels.
_Tiles = Callable[[_Line, _Piece, list[_Channel]], None]


class _Emitter:
    """The kernel's parts, from its loops down to the multiply-add."""

    def __init__(self, conv: DepthwiseConv, args: Mapping[str, tirx.Buffer]) -> None:
        self.bias, self.masks = args["bias"], args
        self.x, self.weights, self.y = flat(args["x"]), flat(args["weights"]), flat(args["y"])
        self.residual = flat(args["residual"]) if conv.residual else None
        self.conv, self.window, self.tile = conv, conv.window, conv.tile
        self.axis = conv.line_axis
        self.outer = (HEIGHT, WIDTH) if self.axis == TIME else (TIME, HEIGHT)
        self.axes = (*self.outer, self.axis)
        self.count, self.vectors = conv.lanes, conv.vectors
        self.abreast = min(self.tile.vectors, self.vectors)
        window = self.window
        #: Positions from one index to the next on each axis, of input and output.
        self.steps_in = (window.size[1] * window.size[2], window.size[2], 1)
        self.steps_out = (window.out[1] * window.out[2], window.out[2], 1)
        kernel_h, kernel_w = window.kernel[1:]
        self.tap_steps = (kernel_h * kernel_w, kernel_w, 1)

    def emit(self) -> None:
        window = self.window
        second = window.out[self.outer[1]]
        rows = min(self.tile.rows, second)
        blocks = -(-second // rows)
        with parallel(window.batch * blocks) as task:
            clip, block = let(tirx.floordiv(task, blocks)), let(tirx.floormod(task, blocks))
            start = let(tirx.min(block * rows, second - rows))  # the last block overlaps the one before
            if self.axis == TIME:
                with serial(window.out[HEIGHT]) as index:
                    self._rows(clip, start, rows, partial(self._single, index))
                return
            if "out_frames" in self.masks and self.conv.zero_dead:
                self._clear(clip)
            self._rows(clip, start, rows, self._frames)

    def _clear(self, clip: Expr) -> None:
        """Zeros for output frames that nobody reads."""
        size = self.steps_out[TIME] * self.conv.channels_out
        with serial(self.window.out[TIME]) as frame, when(self.masks["out_frames"][clip, frame] == number(0.0)):
            top = let(big(clip * self.window.out[TIME] + frame) * size)
            with serial(size) as index:
                write(self.y, number(0.0), top + index)

    def _rows(self, clip: Expr, start: Expr, rows: int, tiles: _Tiles) -> None:
        """A block of lines; of each piece of a line come all ``tiles``. One pass over the channels after the other is
        made of the whole block, or of each piece, whose inputs are then read from the first-level cache again."""

        def lines(channels: list[_Channel]) -> None:
            with serial(rows) as row:
                place = let(start + row)
                line = _Line(clip, place, span(self.window, self.outer[1], place))

                def piece(first: Expr, inside: list[list[int]]) -> None:
                    found = _Piece(first, inside)
                    if channels:
                        tiles(line, found, channels)
                    else:
                        self._passes(lambda some: tiles(line, found, some))

                each_piece(self.window, self.axis, self.tile.mr, piece)

        if self.tile.inner:
            lines([])
        else:
            self._passes(lines)

    def _passes(self, body: Callable[[list[_Channel]], None]) -> None:
        """``body`` for some vectors of channels after the others."""
        with serial(-(-self.vectors // self.abreast)) as turn:
            body([self._channel(turn * self.abreast + v) for v in range(self.abreast)])

    def _frames(self, line: _Line, piece: _Piece, channels: list[_Channel]) -> None:
        """The same piece in all frames, one after the other, so that the lines that they share stay in the cache."""
        window = self.window
        if self.conv.frames_abreast > 1:

            def tile(first: Expr, inside: list[list[int]]) -> None:
                source = let(first * window.stride[TIME] - window.padding[TIME])
                self._tile(line, (_Piece(first, inside, (source, 0, 1)), piece), channels)

            each_piece(window, TIME, self.conv.frames_abreast, tile)
            return
        with serial(window.out[TIME]) as frame:
            if "out_frames" not in self.masks:
                self._single(frame, line, piece, channels)
                return
            with when(self.masks["out_frames"][line.clip, frame] != number(0.0)):
                self._single(frame, line, piece, channels)

    def _single(self, index: Expr, line: _Line, piece: _Piece, channels: list[_Channel]) -> None:
        """The piece at one index of the first of the other axes, whose taps are walked when the kernel runs."""
        self._tile(line, (_Piece(index, [[0]], span(self.window, self.outer[0], index)), piece), channels)

    def _channel(self, vector: Expr) -> _Channel:
        """A vector of output channels; the last one overlaps the one before."""
        vector = let(tirx.min(vector, self.vectors - 1))
        start = let(big(tirx.min(vector * self.count, self.conv.channels_out - self.count)))
        return _Channel(start, let(vector * self.count))

    def _tile(self, line: _Line, pieces: tuple[_Piece, _Piece], channels: list[_Channel]) -> None:
        """Outputs of one tile, along the first of the other axes and along the line, with all their taps."""
        window, (ahead, along) = self.window, pieces
        acc = self._biases(channels, [(s, r) for s in range(len(ahead.inside)) for r in range(len(along.inside))])
        start = let(along.first * window.stride[self.axis] - window.padding[self.axis])
        (source0, first0, past0), (source1, first1, past1) = ahead.span, line.span
        with serial(past0 - first0) as index0:
            tap0 = let(first0 + index0)
            place0 = let(source0 + tap0 * window.dilation[self.outer[0]])

            def multiply() -> None:
                with serial(past1 - first1) as index1:
                    tap1 = let(first1 + index1)
                    place1 = let(source1 + tap1 * window.dilation[self.outer[1]])
                    top = line.clip * (window.size[0] * self.steps_in[0])
                    for at, axis in zip((place0, place1, start), self.axes, strict=True):
                        top = top + at * self.steps_in[axis]
                    tap = tap0 * self.tap_steps[self.outer[0]] + tap1 * self.tap_steps[self.outer[1]]
                    self._multiply(let(big(top) * self.conv.channels_in), let(tap), pieces, channels, acc)

            if "in_frames" in self.masks:
                with when(self.masks["in_frames"][line.clip, place0] != number(0.0)):
                    multiply()
            else:
                multiply()
        self._finish(line, pieces, channels, acc)

    def _biases(self, channels: list[_Channel], outputs: list[tuple[int, int]]) -> _Sums:
        """The sums of each output, one for each vector, to begin with."""
        count, dtype = self.count, self.conv.sums
        acc = {output: [scratch((count,), dtype) for _ in channels] for output in outputs}
        for v, channel in enumerate(channels):
            bias = let(self.bias[lanes(channel.start, count)])
            if dtype != FLOAT:
                bias = let(cast(bias, dtype, count))
            for sums in acc.values():
                store(sums[v], bias, lanes(0, count))
        return acc

    def _multiply(
        self, top: Expr, tap: Expr, pieces: tuple[_Piece, _Piece], channels: list[_Channel], acc: _Sums
    ) -> None:
        """The taps in registers: every input is read once for all outputs of the tile that use it."""
        count = self.count
        ahead, along = ([*self._reads(*each)] for each in zip((self.outer[0], self.axis), pieces, strict=True))
        users: dict[int, list[tuple[tuple[int, int], int]]] = {}
        for (s, distance0, tap0), (r, distance1, tap1) in product(ahead, along):
            users.setdefault(distance0 + distance1, []).append(((s, r), tap0 + tap1))
        used = sorted({of_tap for found in users.values() for _, of_tap in found})
        each = self.conv.group_out
        for v, channel in enumerate(channels):
            weights = {}
            for of_tap in used:
                at = (tap + of_tap) * (self.vectors * count) + channel.packed
                weights[of_tap] = let(self._summed(self.weights[lanes(at, count)]))
            source = top + (channel.start if each == 1 else tirx.floordiv(channel.start, each))
            for distance in sorted(users):
                x = let(self._summed(self._inputs(let(source + distance * self.conv.channels_in))))
                for output_at, of_tap in users[distance]:
                    sums = acc[output_at][v]
                    store(sums, sums[lanes(0, count)] + x * weights[of_tap], lanes(0, count))

    def _reads(self, axis: int, piece: _Piece) -> Iterator[tuple[int, int, int]]:
        """Each output of a piece with each of its taps in registers: the distances of the input that it reads, in
        positions, and of the tap."""
        window = self.window
        for index, taps in enumerate(piece.inside):
            for tap in taps:
                away = index * window.stride[axis] + tap * window.dilation[axis]
                yield index, away * self.steps_in[axis], tap * self.tap_steps[axis]

    def _summed(self, value: Expr) -> Expr:
        """What is stored, in the type that sums it up."""
        return value if self.conv.sums == self.conv.dtype else cast(value, self.conv.sums, self.count)

    def _inputs(self, at: Expr) -> Expr:
        """The inputs of one vector of output channels, each repeated for the output channels that read it."""
        count, each = self.count, self.conv.group_out
        if each == 1:
            return self.x[lanes(at, count)]
        if each == count:
            return splat(self.x[at], count)
        some = let(self.x[lanes(at, count // each)])
        return tirx.Shuffle(
            [some] * each, [lane // each for lane in range(count)]
        )  # TVM wants as many lanes as it gives

    def _finish(self, line: _Line, pieces: tuple[_Piece, _Piece], channels: list[_Channel], acc: _Sums) -> None:
        """Residual, activation and store."""
        conv, count = self.conv, self.count
        top = line.clip * (self.window.out[0] * self.steps_out[0])
        for at, axis in zip((pieces[0].first, line.at, pieces[1].first), self.axes, strict=True):
            top = top + at * self.steps_out[axis]
        top = let(big(top) * conv.channels_out)
        for v, channel in enumerate(channels):
            for (s, r), sums in acc.items():
                away = s * self.steps_out[self.outer[0]] + r * self.steps_out[self.axis]
                at = top + channel.start + away * conv.channels_out
                value = read(sums[v], 0, count)
                if self.residual is not None:
                    value = value + read(self.residual, at, count)
                write_activated(self.y, conv.activation, value, at, count)
