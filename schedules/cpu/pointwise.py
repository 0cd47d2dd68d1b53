"""The dense pointwise convolution: a matrix product of all positions with the weights (`docs/kernels.md`).

``Y[row, oc] = act(bias[oc] + Σ X[row, channel] · W[oc, channel] + residual[row, oc])``. Rows lie one behind the other
in memory, so that a tile of ``mr`` rows × some vectors of output channels needs one address for all of its rows, no
list and no copy. Its sums stay in registers over all input channels: what they become is stored at once.

With a gate, as of squeeze and excitation, the input is ``before(x · gate[clip, channel])``: each block of rows becomes
that in memory of its own, which stays in the cache, before it is multiplied by the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from ..convolution import LayerKernel
from ..emit import Expr, big, choose, flat, lane, lanes, let, parallel, scratch, serial, splat, store
from ..epilogue import activate
from ..geometry import Window
from ..kernel import Count, Operand, Weights, constant, output
from ..preparation import Panels
from .conv3d_gather import parts_of


@dataclass(frozen=True)
class PointwiseTile:
    """``mr`` rows × at most ``vectors`` vectors of ``vector_floats`` output channels are summed in registers; ``step``
    input channels are loaded as one vector per row (1: single values are broadcast from memory). At most
    ``block_tiles`` tiles of rows form a block, computed for one panel of output channels after the other; panels are
    shared out in ``splits`` parts, for threads beyond the blocks."""

    mr: int
    vectors: int
    vector_floats: int
    step: int
    block_tiles: int
    splits: int = 1


@dataclass(frozen=True)
class PointwiseConv(LayerKernel):
    """A convolution of one tap that reads every position once, or a linear layer, with what is fused behind it; with
    ``gate``, the input is multiplied by a value for each clip and channel and passes the activation ``before``."""

    window: Window
    channels_in: int
    channels_out: int
    tile: PointwiseTile
    residual: bool = False
    activation: str = ""
    gate: bool = False
    before: str = ""

    groups = 1

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        step = f"_k{self.tile.step}" if self.tile.step > 1 else ""
        gate = "_g" if self.gate else ""
        return f"pointwise{gate}_f32_mr{self.tile.mr}_nr{self.tile.vectors * self.tile.vector_floats}{step}"

    @property
    def vectors(self) -> int:
        """Vectors that hold the output channels."""
        return -(-self.channels_out // self.tile.vector_floats)

    def operands(self) -> list[Operand]:
        """x (N, T, H, W, C_in), weights (vectors, 1, C_in, lanes), bias in whole vectors, gate, residual, y."""
        return [
            Operand("x", self.x_shape),
            constant("weights", (self.vectors, 1, self.channels_in, self.tile.vector_floats)),
            constant("bias", (self.vectors * self.tile.vector_floats,)),
            *([Operand("gate", (self.window.batch, self.channels_in), role="gate")] if self.gate else []),
            *([Operand("residual", self.y_shape, role="residual")] if self.residual else []),
            output("y", self.y_shape),
        ]

    def work(self) -> tuple[Count, Count, Count]:
        """All of it."""
        return Count(self.window.positions_out), Count(self.channels_in), Count(self.channels_out)

    @property
    def preparation(self) -> Panels:
        """How weights become what the kernel reads: panels of one vector."""
        return Panels(1, self.channels_out, self.channels_in, 1, self.tile.vector_floats)

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Packed weights, and the bias with zeros behind it."""
        assert weights is not None
        bias = np.zeros(self.vectors * self.tile.vector_floats, "float32")
        bias[: self.channels_out] = weights.bias
        constants = {"bias": bias}
        if weights.weight is not None:
            constants["weights"] = self.preparation.apply(weights.weight)
        return constants

    def unpacked(self, at: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        """In panels of one vector."""
        count, depth = self.tile.vector_floats, self.channels_in
        vector, channel = let(tirx.floordiv(at, count * depth)), let(tirx.floormod(tirx.floordiv(at, count), depth))
        out = let(vector * count + tirx.floormod(at, count))
        return out, tirx.IntImm("int32", 0), channel, out < self.channels_out

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Blocks of rows by panels of output channels."""
        _Emitter(self, args).emit()


def panel_widths(vectors: int, most: int) -> list[tuple[int, int]]:
    """``vectors`` in panels of at most ``most``, as equal as can be: (panels, vectors of each), wider ones first."""
    panels = -(-vectors // most)
    width, wider = divmod(vectors, panels)
    return [(count, each) for count, each in ((wider, width + 1), (panels - wider, width)) if count]


class _Emitter:
    """The kernel's parts, from its loops down to the multiply-add."""

    def __init__(self, conv: PointwiseConv, args: Mapping[str, tirx.Buffer]) -> None:
        self.conv, self.tile, self.bias = conv, conv.tile, args["bias"]
        self.x, self.weights, self.y = flat(args["x"]), flat(args["weights"]), flat(args["y"])
        self.residual = flat(args["residual"]) if conv.residual else None
        self.gate = flat(args["gate"]) if conv.gate else None
        self.count = conv.tile.vector_floats
        #: What the weights are multiplied with, and which row it begins with.
        self.source: tuple[tirx.Buffer, Expr] = self.x, 0

    def emit(self) -> None:
        conv, total = self.conv, self.conv.window.positions_out
        blocks = -(-total // (self.tile.mr * self.tile.block_tiles))
        rows = -(-total // blocks)
        mr = min(self.tile.mr, rows)
        with parallel(blocks * self.tile.splits) as task:
            block, part = let(tirx.floordiv(task, self.tile.splits)), let(tirx.floormod(task, self.tile.splits))
            start = let(tirx.min(block * rows, total - rows))  # the last block overlaps the one before
            if self.gate is not None:
                self.source = self._gated(start, rows), start
            first = 0
            for panels, width in panel_widths(conv.vectors, self.tile.vectors):
                self._panels(start, rows, mr, part, (first, panels, width))
                first += panels * width

    def _gated(self, start: Expr, rows: int) -> tirx.Buffer:
        """What the weights are multiplied with, of the rows of a block."""
        conv, depth = self.conv, self.conv.channels_in
        assert self.gate is not None
        made = scratch((rows * depth,))
        count = min(self.count, 1 << (depth.bit_length() - 1))
        of_clip = conv.window.positions_out // conv.window.batch
        with serial(rows) as row:
            here, target = let(big(start + row) * depth), let(row * depth)
            factors = let(tirx.floordiv(start + row, of_clip) * depth)
            with serial(-(-depth // count)) as vector:
                at = let(tirx.min(vector * count, depth - count))  # the last vector overlaps the one before
                value = self.x[lanes(here + at, count)] * self.gate[lanes(factors + at, count)]
                store(made, activate(conv.before, value, count), lanes(target + at, count))
        return made

    def _panels(self, start: Expr, rows: int, mr: int, part: Expr, shape: tuple[int, int, int]) -> None:
        """Some panels of equal width, ``part`` of the ``splits`` of them, over the rows of a block."""
        first, panels, width = shape
        splits = self.tile.splits
        each = -(-panels // splits)
        with serial(each if splits == 1 else tirx.max(0, tirx.min(each, panels - part * each))) as index:
            vector = let(first + (part * each + index) * width)
            with serial(-(-rows // mr)) as piece:
                self._tile(let(start + tirx.min(piece * mr, rows - mr)), vector, mr, width)

    def _tile(self, row: Expr, vector: Expr, mr: int, width: int) -> None:
        """Sums over all input channels, then residual, activation and store."""
        conv, count = self.conv, self.count
        acc = [[scratch((count,)) for _ in range(width)] for _ in range(mr)]
        for v in range(width):
            bias = let(self.bias[lanes((vector + v) * count, count)])
            for r in range(mr):
                store(acc[r][v], bias, lanes(0, count))
        source, weights = (
            let(big(row - self.source[1]) * conv.channels_in),
            let(big(vector) * (conv.channels_in * count)),
        )
        self._multiply(source, weights, acc)
        target = let(big(row) * conv.channels_out + vector * count)
        self._finish(target, vector, acc)

    def _multiply(self, source: Expr, weights: Expr, acc: list[list[tirx.Buffer]]) -> None:
        """``acc[r] += x[r, channel] · w[channel]`` over all input channels."""
        depth, step = self.conv.channels_in, self.tile.step
        if step > 1:
            with serial(depth // step) as chunk:
                self._channels(source, weights, let(big(chunk) * step), step, acc)
        rest = depth % step if step > 1 else depth
        if rest:
            with serial(rest) as index:
                self._channels(source, weights, let(big(index) + (depth - rest)), 1, acc)

    def _channels(self, source: Expr, weights: Expr, channel: Expr, step: int, acc: list[list[tirx.Buffer]]) -> None:
        """``step`` input channels from ``channel`` on."""
        count, depth = self.count, self.conv.channels_in
        xs = [self.source[0][lanes(source + channel + r * depth, step)] for r in range(len(acc))]
        xs = [let(x) for x in xs] if step > 1 else xs
        for k in range(step):
            at = weights + (channel + k) * count
            w = [let(self.weights[lanes(at + v * (depth * count), count)]) for v in range(len(acc[0]))]
            for x, sums in zip(xs, acc, strict=True):
                value = let(splat(lane(x, k) if step > 1 else x, count))
                for v, total in enumerate(sums):
                    store(total, total[lanes(0, count)] + value * w[v], lanes(0, count))

    def _finish(self, target: Expr, vector: Expr, acc: list[list[tirx.Buffer]]) -> None:
        """Store a tile; where the output channels end inside its last vector, that one in parts."""
        conv, count = self.conv, self.count
        left = conv.channels_out % count
        for r, sums in enumerate(acc):
            for v, total in enumerate(sums):
                at = target + (r * conv.channels_out + v * count)
                if not left or v + 1 < len(sums):
                    self._store(total, 0, at, count)
                else:
                    self._store_last(total, at, vector + v)

    def _store_last(self, total: tirx.Buffer, at: Expr, vector: Expr) -> None:
        """One vector of a panel's last: all of it, or what there is of the layer's last."""

        def whole() -> None:
            self._store(total, 0, at, self.count)

        def part() -> None:
            for first, size in parts_of(self.conv.channels_out % self.count):
                self._store(total, first, at + first, size)

        choose(vector + 1 < self.conv.vectors, whole, part)

    def _store(self, total: tirx.Buffer, first: int, at: Expr, count: int) -> None:
        value = total[lanes(first, count)]
        if self.residual is not None:
            value = value + self.residual[lanes(at, count)]
        store(self.y, activate(self.conv.activation, value, count), lanes(at, count))
