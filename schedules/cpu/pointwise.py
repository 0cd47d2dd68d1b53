"""The dense pointwise convolution: a matrix product of all positions with the weights (`docs/kernels.md`).

``Y[row, oc] = act(bias[oc] + Σ X[row, channel] · W[oc, channel] + residual[row, oc])``. Rows lie one behind the other
in memory, so that there is no list and no copy. Sums of a tile stay in registers over all input channels: what they
become is stored at once.

With a gate, as of squeeze and excitation, the input is ``before(x · gate[clip, channel])``: each block of rows becomes
that in memory of its own, which stays in the cache, before it is multiplied by the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx

from ..emit import FLOAT, Expr, big, flat, let, parallel, read, scratch, serial
from ..epilogue import write_activated
from ..geometry import Window
from ..kernel import Count, Operand
from ..past_caches import LINE_FLOATS, fence
from ..space import Space
from ..workload import Workload
from .pointwise_tiles import PointwiseSpace, PointwiseTile, predicted_cycles
from .row_products import Vectors
from .row_tiles import RowConv, RowTiles, panel_widths
from .row_vector import WORTH_LISTING, LiveTerms
from .tiles import Machine


@dataclass(frozen=True)
class PointwiseConv(RowConv):
    """A convolution of one tap that reads every position once, or a linear layer, with what is fused behind it; with
    ``gate``, the input is multiplied by a value for each clip and channel and passes the activation ``before``;
    ``past_caches``: results are to be stored so where a tile's rows are whole cache lines;
    ``far_input``: the rows of the next tile are asked for while one is computed."""

    window: Window
    channels_in: int
    channels_out: int
    tile: PointwiseTile
    residual: bool = False
    activation: str = ""
    gate: bool = False
    before: str = ""
    dtype: str = FLOAT
    past_caches: bool = False
    far_input: bool = False

    @property
    def lists_terms(self) -> bool:
        """Whether there is one row, of which it leaves out the zeros."""
        weights = 4 * self.channels_in * self.vectors * self.tile.vector_floats
        one_row = self.window.positions_out == 1 and self.dtype == FLOAT and not self.gate
        return one_row and weights >= WORTH_LISTING

    @property
    def stores_past(self) -> bool:  # type: ignore[override]  # of others it is a constant of the class
        """Whether results are stored past the caches."""
        floats = [self.channels_out, *(width * self.tile.vector_floats for _, width in self.panels)]
        return self.past_caches and not any(each % LINE_FLOATS for each in floats)

    @property
    def panels(self) -> list[tuple[int, int]]:
        """Panels of output channels and their vectors."""
        return panel_widths(self.vectors, self.tile.vectors)

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"conv3d_pointwise{'_g' if self.gate else ''}_{self.size_name}"

    def operands(self) -> list[Operand]:
        """Those of :class:`RowConv`, the gate behind the constants."""
        found = super().operands()
        gate = [Operand("gate", (self.window.batch, self.channels_in), role="gate")] if self.gate else []
        return [*found[:3], *gate, *found[3:]]

    def space(self, machine: Machine, workload: Workload) -> Space:
        """Register tile, blocks of rows, shares of threads."""
        return PointwiseSpace(machine.storing(self.dtype), workload)

    def predict(
        self, machine: Machine, threads: int, shares: Sequence[float] | None = None, whole_units: bool = False
    ) -> float:
        """As :mod:`~.pointwise_tiles` has it: nothing is listed."""
        return self.seconds_by(predicted_cycles, machine, threads)

    def work(self) -> tuple[Count, Count, Count]:
        """All of it."""
        return Count(self.window.positions_out), Count(self.channels_in), Count(self.channels_out)

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Blocks of rows by panels of output channels."""
        _Emitter(self, args).emit()


class _Emitter(RowTiles):
    """The kernel's loops, down to the tile."""

    def __init__(self, conv: PointwiseConv, args: Mapping[str, tirx.Buffer]) -> None:
        super().__init__(conv, args)
        self.pointwise, self.blocks_of = conv, conv.tile
        self.gate = flat(args["gate"]) if conv.gate else None
        #: Which row ``source`` begins with.
        self.first_row: Expr = 0
        self.ahead = conv.tile.mr * conv.channels_in if conv.far_input and not conv.gate else 0
        #: Of a single row, the values that are not zero, where they are listed.
        self.live: LiveTerms | None = None

    def emit(self) -> None:
        if self.pointwise.lists_terms:
            self.live = LiveTerms(self.x, self.conv.channels_in)
        total, tile = self.conv.window.positions_out, self.blocks_of
        blocks = -(-total // (tile.mr * tile.block_tiles))
        rows = -(-total // blocks)
        with parallel(blocks * tile.splits) as task:
            block, part = let(tirx.floordiv(task, tile.splits)), let(tirx.floormod(task, tile.splits))
            start = let(tirx.min(block * rows, total - rows))  # the last block overlaps the one before
            if self.gate is not None:
                self.source, self.first_row = self._gated(start, rows), start
            self.remember()
            first = 0
            for panels, width in self.pointwise.panels:
                self._panels(start, rows, part, (first, panels, width))
                first += panels * width
            if self.pointwise.stores_past:
                fence()

    def _gated(self, start: Expr, rows: int) -> tirx.Buffer:
        """What the weights are multiplied with, of the rows of a block."""
        conv, depth = self.pointwise, self.conv.channels_in
        assert self.gate is not None
        made = scratch((rows * depth,), conv.dtype)
        count = min(self.count, 1 << (depth.bit_length() - 1))
        of_clip = conv.window.positions_out // conv.window.batch
        with serial(rows) as row:
            here, target = let(big(start + row) * depth), let(row * depth)
            factors = let(tirx.floordiv(start + row, of_clip) * depth)
            with serial(-(-depth // count)) as vector:
                at = let(tirx.min(vector * count, depth - count))  # the last vector overlaps the one before
                value = read(self.x, here + at, count) * read(self.gate, factors + at, count)
                write_activated(made, conv.before, value, target + at, count)
        return made

    def _panels(self, start: Expr, rows: int, part: Expr, shape: tuple[int, int, int]) -> None:
        """Some panels of equal width, ``part`` of the ``splits`` of them, over the rows of a block."""
        first, panels, width = shape
        splits, mr = self.blocks_of.splits, min(self.tile.mr, rows)
        each = -(-panels // splits)
        with serial(each if splits == 1 else tirx.max(0, tirx.min(each, panels - part * each))) as index:
            vector = let(first + (part * each + index) * width)
            with serial(-(-rows // mr)) as piece:
                self._tile(let(start + tirx.min(piece * mr, rows - mr)), vector, mr, width)

    def _tile(self, row: Expr, vector: Expr, mr: int, width: int) -> None:
        """Sums over all input channels, then residual, activation and store."""
        conv = self.conv
        target = let(big(row) * conv.channels_out + vector * self.count)
        self.expect(target, mr, width)
        sums = self.start(vector, mr, width)
        weights = let(big(vector) * self.vector_floats)
        if self.live is not None:
            self.live.multiply(Vectors(self.weights, self.vector_floats, self.count), weights, sums.registers)
        else:
            self.multiply(let(big(row - self.first_row) * conv.channels_in), weights, conv.channels_in, sums)
        self.finish(target, sums)
