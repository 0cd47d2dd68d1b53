"""Register tiles whose rows lie at a constant distance in memory: sums, and what is stored of them.

One address and constant distances reach all rows of a tile, where lists of rows need an address for each. Weights are
packed as single vectors of output channels, so that panels of any width read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from tvm import tirx

from ..convolution import LayerKernel
from ..emit import (
    FLOAT,
    INT,
    Expr,
    big,
    cast,
    choose,
    flat,
    lanes,
    let,
    number,
    prefetch,
    read,
    scratch,
    serial,
    short,
    store,
)
from ..epilogue import activate_for, has_functions, write_activated
from ..geometry import Window
from ..kernel import Operand, Weights, constant, output
from ..past_caches import LINE_FLOATS, store_past_caches
from ..preparation import Panels
from .conv3d_gather import parts_of
from .cost import seconds_per_cycle
from .row_products import Rows, Sums, Vectors, multiply
from .tiles import HALF_TERMS, Machine

#: Up to this many bytes, memory of a kernel is on the stack, where LLVM takes it apart into registers.
STACK_BYTES = 1024
#: Floats before the sums in such memory.
SPARE = 4


@dataclass(frozen=True)
class TileSums:
    """The sums of a tile: a buffer of one vector for each row and vector, the ``registers`` that products are added to,
    and where each of them is ``put``, which is the same, or another in float32 of one in half precision; ``vector`` is
    the first of the layer's."""

    registers: Sums
    put: list[list[tuple[tirx.Buffer, int]]]
    vector: Expr

    def rows(self, begin: int, end: int) -> TileSums:
        """Those of some rows."""
        return TileSums(self.registers[begin:end], self.put[begin:end], self.vector)


@dataclass(frozen=True)
class RowTile:
    """``mr`` rows × at most ``vectors`` vectors of ``vector_floats`` output channels are summed in registers; ``step``
    terms are loaded as one vector per row (1: single values are broadcast from memory)."""

    mr: int
    vectors: int
    vector_floats: int
    step: int


def joined(groups: int, group_out: int, lanes: int) -> int:
    """How many convolution groups are computed as one, with zeros between them: so few that their output channels fill
    whole vectors of ``lanes``, or all where no such number divides them."""
    fewest = lanes // math.gcd(lanes, group_out)
    return groups if groups % fewest else fewest


class RowConv(LayerKernel):
    """A convolution by such tiles that leaves no channels out; subclasses declare the fields."""

    window: Window
    tile: RowTile
    residual: bool
    activation: str
    #: How activations and weights are stored.
    dtype: str
    groups: int = 1
    #: Whether results are stored past the caches.
    stores_past = False

    @property
    def vectors(self) -> int:
        """Vectors that hold the output channels."""
        return -(-self.channels_out // self.tile.vector_floats)

    @property
    def blocks(self) -> int:
        """Blocks of groups that are computed as one: each has vectors of its own."""
        return self.groups // joined(self.groups, self.group_out, self.tile.vector_floats)

    @property
    def block_in(self) -> int:
        """Input channels of a block."""
        return self.channels_in // self.blocks

    @property
    def row_floats(self) -> int:
        """Floats from the input of one row of a tile to that of the next."""
        return self.channels_in

    @property
    def stored_floats(self) -> int:
        """Floats from the result of one row of a tile to that of the next."""
        return self.channels_out

    @property
    def size_name(self) -> str:
        """The type and the tile as names have them."""
        step = f"_k{self.tile.step}" if self.tile.step > 1 else ""
        return f"{short(self.dtype)}_mr{self.tile.mr}_nr{self.tile.vectors * self.tile.vector_floats}{step}"

    def operands(self) -> list[Operand]:
        """x (N, T, H, W, C_in), weights (vectors, taps, block's C_in, lanes), bias in whole vectors, residual, y."""
        packed = (self.vectors, self.window.taps, self.block_in, self.tile.vector_floats)
        return [
            Operand("x", self.x_shape, self.dtype),
            constant("weights", packed, self.dtype),
            constant("bias", (self.vectors * self.tile.vector_floats,)),
            *([Operand("residual", self.y_shape, self.dtype, "residual")] if self.residual else []),
            output("y", self.y_shape, self.dtype),
        ]

    @property
    def preparation(self) -> Panels | None:
        """How weights become what the kernel reads, where the artifact's library can do it."""
        return self.panelled if self.dtype == FLOAT else None

    @property
    def panelled(self) -> Panels:
        """How weights are laid out: panels of one vector."""
        block_out = self.channels_out // self.blocks
        return Panels(self.blocks, block_out, self.block_in, self.window.taps, self.tile.vector_floats)

    def unprepared(self, weight: np.ndarray) -> np.ndarray:
        """(C_out, C_in / groups, …) as (C_out, block's C_in, …), zero between the groups of a block."""
        if self.blocks == self.groups:
            return weight
        blocks, together = self.blocks, self.groups // self.blocks
        sizes, each = (self.group_out, self.depth, self.window.taps), np.arange(together)
        whole = np.zeros((blocks, together, sizes[0], together, *sizes[1:]), weight.dtype)
        whole[:, each, :, each] = np.moveaxis(weight.reshape(blocks, together, *sizes), 1, 0)
        return whole.reshape(self.channels_out, self.block_in, *weight.shape[2:])

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Packed weights, and the bias with zeros behind it."""
        assert weights is not None
        bias = np.zeros(self.vectors * self.tile.vector_floats, "float32")
        bias[: self.channels_out] = weights.bias
        constants = {"bias": bias}
        if weights.weight is not None:
            packed = self.panelled.apply(self.unprepared(weights.weight))
            constants["weights"] = packed.astype(self.dtype, copy=False)
        return constants

    def unpacked(self, at: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        """In panels of one vector."""
        count, depth, taps = self.tile.vector_floats, self.block_in, self.window.taps
        line, channel = let(tirx.floordiv(at, count * depth)), let(tirx.floormod(tirx.floordiv(at, count), depth))
        out = let(tirx.floordiv(line, taps) * count + tirx.floormod(at, count))
        there = out < self.channels_out
        if self.blocks < self.groups:
            group = tirx.floormod(tirx.floordiv(out, self.group_out), self.groups // self.blocks)
            there = tirx.all(there, group == tirx.floordiv(channel, self.depth))
        return out, let(tirx.floormod(line, taps)), let(tirx.floormod(channel, self.depth)), there

    def seconds_by(self, cycles: Callable[..., float], machine: Machine, threads: int) -> float:
        """Of ``cycles`` (stored, window, channels on either side, tile), shared out over the threads."""
        tile, stored = (self.tile.mr, self.tile.vectors, self.tile.step), machine.storing(self.dtype)
        needed = cycles(stored, self.window, (self.channels_in, self.channels_out), tile)
        return needed * seconds_per_cycle(stored) / threads

    def sized(self: R, decisions: Mapping[str, int]) -> R:
        """With this tile."""
        changes: dict[str, Any] = {"tile": replace(self.tile, **decisions)}
        return replace(self, **changes)  # type: ignore[type-var]  # whoever inherits it is a dataclass


R = TypeVar("R", bound=RowConv)


def panel_widths(vectors: int, most: int) -> list[tuple[int, int]]:
    """``vectors`` in panels of at most ``most``, as equal as can be: (panels, vectors of each), wider ones first."""
    panels = -(-vectors // most)
    width, wider = divmod(vectors, panels)
    return [(count, each) for count, each in ((wider, width + 1), (panels - wider, width)) if count]


class RowTiles:
    """The parts of a kernel that work on one tile."""

    def __init__(self, conv: RowConv, args: Mapping[str, tirx.Buffer]) -> None:
        self.conv, self.tile, self.bias = conv, conv.tile, args["bias"]
        self.x, self.weights, self.y = flat(args["x"]), flat(args["weights"]), flat(args["y"])
        self.residual = flat(args["residual"]) if conv.residual else None
        self.count = conv.tile.vector_floats
        #: What the weights are multiplied with.
        self.source = self.x
        #: How many floats ahead of a row what is read next is asked for (0: not at all).
        self.ahead = 0
        #: Where sums in half precision are put that take several passes.
        self.memory: tirx.Buffer | None = None
        #: Where sums of a single pass wait for an activation to which rows come one after the other.
        self.waiting: tirx.Buffer | None = None
        #: Floats from one vector's packed weights to the next one's.
        self.vector_floats = conv.window.taps * conv.block_in * self.count

    def start(self, vector: Expr, mr: int, width: int) -> TileSums:
        """The sums of ``mr`` rows × ``width`` vectors from ``vector`` on, each the bias so far."""
        count, dtype = self.count, self.conv.dtype
        registers = [[scratch((count,), dtype) for _ in range(width)] for _ in range(mr)]
        if dtype == FLOAT:
            put = [[(register, 0) for register in row] for row in registers]
        elif self.memory is None:  # begun by the only pass
            put = [[(register if self.ends_in_half else scratch((count,)), 0) for register in row] for row in registers]
            return TileSums(registers, put, vector)
        else:
            put = [[(self.memory, SPARE + (r * width + v) * count) for v in range(width)] for r in range(mr)]
        for v in range(width):
            bias = self._bias(vector + v)
            for r in range(mr):
                buffer, at = put[r][v]
                store(buffer, bias, lanes(at, count))
        return TileSums(registers, put, vector)

    @property
    def ends_in_half(self) -> bool:
        """Whether sums in half precision stay there to the end: those of a single pass, with a bias and no more than a
        rectifier behind it. Through float32 each vector would take six conversions and additions."""
        bare = self.memory is None and self.residual is None and self.conv.activation in ("", "relu")
        return bare and self.conv.dtype != FLOAT

    def _bias(self, vector: Expr) -> Expr:
        bias = let(self.bias[lanes(vector * self.count, self.count)])
        return let(cast(bias, self.conv.dtype, self.count)) if self.ends_in_half else bias

    def remember(self, passes: bool = False) -> None:
        """Give the sums of the tiles to come memory where they take several ``passes``, as many terms do: registers
        would not do for them beside those that products are added to."""
        tile, terms = self.tile, self.conv.window.taps * self.conv.block_in
        if self.conv.dtype != FLOAT and (passes or terms > HALF_TERMS):
            self.memory = scratch((max(SPARE + tile.mr * tile.vectors * self.count, 1 + STACK_BYTES // 4),))
            store(self.memory, number(0.0), 0)
        elif self.conv.dtype != FLOAT and has_functions(self.conv.activation):
            self.waiting = scratch((tile.mr * tile.vectors * self.count,))

    @contextmanager
    def one_pass(self, sums: TileSums) -> Iterator[None]:
        """What is added to the registers within it is put into the sums behind it."""
        if self.conv.dtype == FLOAT:
            yield
            return
        count = self.count
        for total in chain(*sums.registers):
            store(total, number(0.0, count, self.conv.dtype), lanes(0, count))
        yield
        # To LLVM this zero may be another one in each pass, and so the sums another place: else it would take them into
        # registers, of which there are none left.
        moved = 0 if self.memory is None else let(cast(self.memory[0], INT))
        for v in range(len(sums.put[0])):
            bias = self._bias(sums.vector + v) if self.memory is None else None
            for registers, put in zip(sums.registers, sums.put, strict=True):
                buffer, at = put[v]
                place = lanes(at + moved, count)
                total = registers[v][lanes(0, count)] if self.ends_in_half else read(registers[v], 0, count)
                store(buffer, (buffer[place] if bias is None else bias) + total, place)

    def expect(self, target: Expr, mr: int, width: int) -> None:
        """Ask for the residual of a tile of ``mr`` rows × ``width`` vectors before its sums are made: what lies in rows
        far apart, the processor does not foresee."""
        if self.residual is not None:
            for r in range(mr):
                for first in range(0, width * self.count, LINE_FLOATS):
                    prefetch(self.residual, target + (r * self.conv.stored_floats + first))

    def multiply(self, source: Expr, weights: Expr, terms: int, sums: TileSums) -> None:
        """``sums[r] += x[r, term] · w[term]`` over so many terms that lie side by side, in passes."""
        if self.conv.dtype == FLOAT:
            self.add(source, weights, terms, sums)
            return
        passes, step = -(-terms // HALF_TERMS), self.tile.step
        each = -(-terms // (passes * step)) * step
        with serial(terms // each) as index, self.one_pass(sums):
            first = let(big(index) * each)
            self.add(let(source + first), let(weights + first * self.count), each, sums)
        if rest := terms % each:
            with self.one_pass(sums):
                self.add(source + (terms - rest), weights + (terms - rest) * self.count, rest, sums)

    def add(self, source: Expr, weights: Expr, terms: int, sums: TileSums) -> None:
        """The same within a pass."""
        rows, vectors = Rows(self.source, self.conv.row_floats), Vectors(self.weights, self.vector_floats, self.count)
        multiply(rows, source, vectors, weights, terms, self.tile.step, sums.registers, self.ahead)

    def finish(self, target: Expr, sums: TileSums) -> None:
        """Store a tile. Sums that are in registers wait in memory for activations of tens of instructions: of all rows
        at once LLVM puts off the divisions, and runs out of registers in the products' loop too."""
        stored, count, width = self.conv.stored_floats, self.count, len(sums.put[0])
        if self.waiting is None or len(sums.put) == 1:
            for r, row in enumerate(sums.put):
                self._store_row(row, target, r * stored, sums.vector)
            return
        for index, (buffer, at) in enumerate(chain(*sums.put)):
            store(self.waiting, buffer[lanes(at, count)], lanes(index * count, count))
        with serial(len(sums.put)) as r:
            begin = let(big(r) * (width * count))
            waiting = [(self.waiting, begin + v * count) for v in range(width)]
            self._store_row(waiting, target, r * stored, sums.vector)

    def _store_row(self, row: Sequence[tuple[tirx.Buffer, Expr]], target: Expr, first: Expr, vector: Expr) -> None:
        """One row of a tile, ``first`` floats behind ``target``; where the output channels end inside its last
        vector, that one in parts."""
        for v, total in enumerate(row):
            at = target + (first + v * self.count)
            if not self.conv.channels_out % self.count or v + 1 < len(row):
                self._store(total, 0, at, self.count)
            else:
                self._store_last(total, at, vector + v)

    def _store_last(self, total: tuple[tirx.Buffer, Expr], at: Expr, vector: Expr) -> None:
        """One vector of a panel's last: all of it, or what there is of the layer's last."""

        def whole() -> None:
            self._store(total, 0, at, self.count)

        def part() -> None:
            for first, size in parts_of(self.conv.channels_out % self.count):
                self._store(total, first, at + first, size)

        choose(vector + 1 < self.conv.vectors, whole, part)

    def _store(self, total: tuple[tirx.Buffer, Expr], first: int, at: Expr, count: int) -> None:
        buffer, begin = total
        value = read(buffer, begin + first, count)
        if self.residual is not None:
            value = value + read(self.residual, at, count)
        if self.conv.stores_past:
            store_past_caches(self.y, activate_for(FLOAT, self.conv.activation, value, count), at)
        else:
            write_activated(self.y, self.conv.activation, value, at, count)
