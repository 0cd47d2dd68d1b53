"""Register tiles whose rows lie at a constant distance in memory: sums, and what is stored of them.

One address and constant distances reach all rows of a tile, where lists of rows need an address for each. Weights are
packed as single vectors of output channels, so that panels of any width read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from tvm import tirx

from ..convolution import LayerKernel
from ..emit import Expr, choose, flat, lanes, let, scratch, store
from ..epilogue import activate
from ..geometry import Window
from ..kernel import Operand, Weights, constant, output
from ..preparation import Panels
from .conv3d_gather import parts_of
from .row_products import Rows, Sums, Vectors, multiply


@dataclass(frozen=True)
class RowTile:
    """``mr`` rows × at most ``vectors`` vectors of ``vector_floats`` output channels are summed in registers; ``step``
    terms are loaded as one vector per row (1: single values are broadcast from memory)."""

    mr: int
    vectors: int
    vector_floats: int
    step: int


class RowConv(LayerKernel):
    """A dense convolution by such tiles; the fields are those of whoever inherits it."""

    window: Window
    tile: RowTile
    residual: bool
    activation: str
    groups = 1

    @property
    def vectors(self) -> int:
        """Vectors that hold the output channels."""
        return -(-self.channels_out // self.tile.vector_floats)

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
        """How names tell the tile."""
        step = f"_k{self.tile.step}" if self.tile.step > 1 else ""
        return f"mr{self.tile.mr}_nr{self.tile.vectors * self.tile.vector_floats}{step}"

    def operands(self) -> list[Operand]:
        """x (N, T, H, W, C_in), weights (vectors, taps, C_in, lanes), bias in whole vectors, residual, y."""
        return [
            Operand("x", self.x_shape),
            constant("weights", (self.vectors, self.window.taps, self.channels_in, self.tile.vector_floats)),
            constant("bias", (self.vectors * self.tile.vector_floats,)),
            *([Operand("residual", self.y_shape, role="residual")] if self.residual else []),
            output("y", self.y_shape),
        ]

    @property
    def preparation(self) -> Panels:
        """How weights become what the kernel reads: panels of one vector."""
        return Panels(1, self.channels_out, self.channels_in, self.window.taps, self.tile.vector_floats)

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
        count, depth, taps = self.tile.vector_floats, self.channels_in, self.window.taps
        line, channel = let(tirx.floordiv(at, count * depth)), let(tirx.floormod(tirx.floordiv(at, count), depth))
        out = let(tirx.floordiv(line, taps) * count + tirx.floormod(at, count))
        return out, let(tirx.floormod(line, taps)), channel, out < self.channels_out

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
        #: Floats from one vector's packed weights to the next one's.
        self.vector_floats = conv.window.taps * conv.channels_in * self.count

    def start(self, vector: Expr, mr: int, width: int) -> Sums:
        """The sums of ``mr`` rows × ``width`` vectors from ``vector`` on, each the bias so far."""
        count = self.count
        acc = [[scratch((count,)) for _ in range(width)] for _ in range(mr)]
        for v in range(width):
            bias = let(self.bias[lanes((vector + v) * count, count)])
            for r in range(mr):
                store(acc[r][v], bias, lanes(0, count))
        return acc

    def multiply(self, source: Expr, weights: Expr, terms: int, acc: Sums) -> None:
        """``acc[r] += x[r, term] · w[term]`` over so many terms that lie side by side."""
        rows, vectors = Rows(self.source, self.conv.row_floats), Vectors(self.weights, self.vector_floats, self.count)
        multiply(rows, source, vectors, weights, terms, self.tile.step, acc)

    def finish(self, target: Expr, vector: Expr, acc: Sequence[Sequence[tirx.Buffer]]) -> None:
        """Store a tile; where the output channels end inside its last vector, that one in parts."""
        conv, count = self.conv, self.count
        left = conv.channels_out % count
        for r, sums in enumerate(acc):
            for v, total in enumerate(sums):
                at = target + (r * conv.stored_floats + v * count)
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
