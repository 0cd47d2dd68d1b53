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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tvm import tirx

from ..convolution import LayerKernel
from ..emit import (
    FLOAT,
    Expr,
    big,
    cast,
    choose,
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
        return f"depthwise3d_{short(self.dtype)}_mr{self.tile.mr}_nr{self.tile.vectors * self.lanes}"

    @property
    def sums(self) -> str:
        """What adds up the products of one output."""
        return self.dtype if self.window.taps <= HALF_TERMS else FLOAT

    @property
    def lanes(self) -> int:
        """Channels of one vector: no more than there are."""
        return min(self.tile.vector_floats, 1 << (self.channels_out.bit_length() - 1))

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
        """Channels are innermost."""
        out, tap = let(tirx.floormod(at, self.channels_out)), let(tirx.floordiv(at, self.channels_out))
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
        """Shape of the weights: (taps, C_out)."""
        return (self.window.taps, self.channels_out)

    def pack_weights(self, weight: np.ndarray) -> np.ndarray:
        """Float32 weights (C_out, 1, KT, KH, KW) with channels innermost, as the kernel reads them."""
        return np.ascontiguousarray(weight.reshape(self.channels_out, self.window.taps).T, self.dtype)

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
    """A line of outputs: its indices on the two other axes, and the taps inside the clip there as (first source,
    first tap, past the last tap)."""

    clip: Expr
    at: tuple[Expr, Expr]
    spans: tuple[tuple[Expr, Expr, Expr], tuple[Expr, Expr, Expr]]


class _Piece(NamedTuple):
    """``mr`` outputs of a line from ``first`` on; ``inside``: the taps of each that read inside the clip."""

    first: Expr
    inside: list[list[int]]


class _Emitter:
    """The kernel's parts, from its loops down to the multiply-add."""

    def __init__(self, conv: DepthwiseConv, args: Mapping[str, tirx.Buffer]) -> None:
        self.bias, self.masks = args["bias"], args
        self.x, self.weights, self.y = flat(args["x"]), flat(args["weights"]), flat(args["y"])
        self.residual = flat(args["residual"]) if conv.residual else None
        self.conv, self.window, self.tile = conv, conv.window, conv.tile
        self.axis = conv.line_axis
        self.outer = (HEIGHT, WIDTH) if self.axis == TIME else (TIME, HEIGHT)
        self.count = conv.lanes
        self.vectors = -(-conv.channels_out // self.count)
        self.abreast = min(self.tile.vectors, self.vectors)
        window = self.window
        #: Positions from one index to the next on each axis, of input and output.
        self.steps_in = (window.size[1] * window.size[2], window.size[2], 1)
        self.steps_out = (window.out[1] * window.out[2], window.out[2], 1)
        kernel_h, kernel_w = window.kernel[1:]
        self.tap_steps = (kernel_h * kernel_w, kernel_w, 1)

    def emit(self) -> None:
        window = self.window
        first, second = (window.out[axis] for axis in self.outer)
        rows = min(self.tile.rows, second)
        blocks = -(-second // rows)
        with parallel(window.batch * blocks) as task, serial(first) as index:
            clip, block = let(tirx.floordiv(task, blocks)), let(tirx.floormod(task, blocks))
            start = let(tirx.min(block * rows, second - rows))  # the last block overlaps the one before
            self._live(clip, index, lambda: self._rows(clip, index, start, rows))

    def _live(self, clip: Expr, frame: Expr, body: Callable[[], None]) -> None:
        """Run ``body`` where somebody reads the frame; ``frame`` is one where masks of frames are given."""
        if "out_frames" not in self.masks:
            body()
            return
        alive = self.masks["out_frames"][clip, frame] != number(0.0)
        if self.conv.zero_dead:
            choose(alive, body, lambda: self._clear(clip, frame))
        else:
            with when(alive):
                body()

    def _clear(self, clip: Expr, frame: Expr) -> None:
        """Zeros for one output frame."""
        size = self.steps_out[TIME] * self.conv.channels_out
        top = let(big(clip * self.window.out[TIME] + frame) * size)
        with serial(size) as index:
            write(self.y, number(0.0), top + index)

    def _rows(self, clip: Expr, index: Expr, start: Expr, rows: int) -> None:
        """A block of lines, one pass of channels after the other."""
        with serial(-(-self.vectors // self.abreast)) as turn:
            channels = [self._channel(turn * self.abreast + v) for v in range(self.abreast)]
            with serial(rows) as row:
                at = (index, let(start + row))
                first, second = (span(self.window, axis, place) for axis, place in zip(self.outer, at, strict=True))
                self._line(_Line(clip, at, (first, second)), channels)

    def _channel(self, vector: Expr) -> Expr:
        """Where a vector of output channels begins; the last one overlaps."""
        return let(big(tirx.min(vector * self.count, self.conv.channels_out - self.count)))

    def _line(self, line: _Line, channels: list[Expr]) -> None:
        """One line of outputs: the tiles at its ends, which know what lies outside, and those between."""

        def tile(first: Expr, inside: list[list[int]]) -> None:
            self._tile(line, _Piece(first, inside), channels)

        each_piece(self.window, self.axis, self.tile.mr, tile)

    def _tile(self, line: _Line, piece: _Piece, channels: list[Expr]) -> None:
        """``mr`` outputs of a line, all their taps."""
        window, axis = self.window, self.axis
        mr, count = len(piece.inside), self.count
        dtype = self.conv.sums
        acc = [[scratch((count,), dtype) for _ in channels] for _ in range(mr)]
        for v, channel in enumerate(channels):
            bias = let(self.bias[lanes(channel, count)])
            if dtype != FLOAT:
                bias = let(cast(bias, dtype, count))
            for r in range(mr):
                store(acc[r][v], bias, lanes(0, count))
        start = let(piece.first * window.stride[axis] - window.padding[axis])
        (source0, first0, past0), (source1, first1, past1) = line.spans
        with serial(past0 - first0) as index0:
            tap0 = let(first0 + index0)
            place0 = let(source0 + tap0 * window.dilation[self.outer[0]])

            def multiply() -> None:
                with serial(past1 - first1) as index1:
                    tap1 = let(first1 + index1)
                    place1 = let(source1 + tap1 * window.dilation[self.outer[1]])
                    places = (place0, place1, start)
                    top = line.clip * (window.size[0] * self.steps_in[0])
                    for at, along in zip(places, (*self.outer, axis), strict=True):
                        top = top + at * self.steps_in[along]
                    tap = tap0 * self.tap_steps[self.outer[0]] + tap1 * self.tap_steps[self.outer[1]]
                    self._multiply(let(big(top) * self.conv.channels_in), let(tap), piece.inside, channels, acc)

            if "in_frames" in self.masks:
                with when(self.masks["in_frames"][line.clip, place0] != number(0.0)):
                    multiply()
            else:
                multiply()
        self._finish(line, piece, channels, acc)

    def _multiply(
        self, top: Expr, tap: Expr, inside: list[list[int]], channels: list[Expr], acc: list[list[tirx.Buffer]]
    ) -> None:
        """One line of taps: every input is read once for all outputs of the tile that use it."""
        window, axis, count = self.window, self.axis, self.count
        users: dict[int, list[tuple[int, int]]] = {}
        for r, taps in enumerate(inside):
            for k in taps:
                users.setdefault(r * window.stride[axis] + k * window.dilation[axis], []).append((r, k))
        used = sorted({k for taps in inside for k in taps})
        each = self.conv.group_out
        for v, channel in enumerate(channels):
            weights = {}
            for k in used:
                row = (tap + k * self.tap_steps[axis]) * self.conv.channels_out
                weights[k] = let(self._summed(self.weights[lanes(channel + row, count)]))
            source = top + (channel if each == 1 else tirx.floordiv(channel, each))
            for distance in sorted(users):
                at = let(source + distance * self.steps_in[axis] * self.conv.channels_in)
                x = let(self._summed(self._inputs(at)))
                for r, k in users[distance]:
                    store(acc[r][v], acc[r][v][lanes(0, count)] + x * weights[k], lanes(0, count))

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

    def _finish(self, line: _Line, piece: _Piece, channels: list[Expr], acc: list[list[tirx.Buffer]]) -> None:
        """Residual, activation and store."""
        conv, count = self.conv, self.count
        top = line.clip * (self.window.out[0] * self.steps_out[0])
        for at, along in zip((*line.at, piece.first), (*self.outer, self.axis), strict=True):
            top = top + at * self.steps_out[along]
        top = let(big(top) * conv.channels_out)
        for v, channel in enumerate(channels):
            for r, row in enumerate(acc):
                at = top + channel + r * self.steps_out[self.axis] * conv.channels_out
                value = read(row[v], 0, count)
                if self.residual is not None:
                    value = value + read(self.residual, at, count)
                write_activated(self.y, conv.activation, value, at, count)
