"""The dense pointwise convolution of tensors with channels first (`docs/kernels.md`).

``Y[clip, oc, p] = act(bias[oc] + Σ W[oc, channel] · X[clip, channel, p] + residual[clip, oc, p])`` for positions p.
Output channels are the rows of a tile and positions its lanes, so that no layout changes. Positions that a tile reads
lie far apart from channel to channel: a block of them is copied side by side first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx

from ..convolution import LayerKernel
from ..emit import Expr, big, flat, lanes, let, parallel, read, scratch, serial, splat, store
from ..epilogue import write_activated
from ..geometry import Window
from ..kernel import Count, Operand, Weights, constant, output
from ..preparation import Panels
from ..space import Space
from ..workload import Workload
from .cost import seconds_per_cycle
from .planar_tiles import PlanarSpace, PlanarTile, mirrored
from .pointwise_tiles import predicted_cycles
from .row_products import Rows, Sums, Vectors, multiply
from .row_tiles import panel_widths
from .tiles import Machine


@dataclass(frozen=True)
class PlanarConv(LayerKernel):
    """A convolution of one tap over tensors (N, C, T, H, W), with what is fused behind it."""

    window: Window
    channels_in: int
    channels_out: int
    tile: PlanarTile
    residual: bool = False
    activation: str = ""
    groups = 1

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        tile = self.tile
        step = f"_k{tile.step}" if tile.step > 1 else ""
        return f"conv3d_planar_f32_mr{tile.mr}_nr{tile.vectors * tile.vector_floats}{step}"

    @property
    def x_shape(self) -> tuple[int, ...]:
        """(N, C_in, T, H, W)."""
        return (self.window.batch, self.channels_in, *self.window.size)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """(N, C_out, T, H, W)."""
        return (self.window.batch, self.channels_out, *self.window.out)

    @property
    def positions(self) -> int:
        """Those of one clip."""
        return math.prod(self.window.out)

    @property
    def blocks(self) -> tuple[int, int]:
        """Into how many blocks a clip's vectors of positions are cut, and how many vectors each has."""
        vectors = -(-self.positions // self.tile.vector_floats)
        blocks = -(-vectors // self.tile.block)
        return blocks, -(-vectors // blocks)

    @property
    def rows_together(self) -> int:
        """Output channels whose weights lie side by side: those of a tile, which a single stream then brings; one where
        weights are loaded by the vector."""
        return self.tile.mr if self.tile.step == 1 else 1

    @property
    def scratch_bytes(self) -> int:
        """The positions of a block."""
        return 4 * self.blocks[1] * self.channels_in * self.tile.vector_floats

    def operands(self) -> list[Operand]:
        """x, weights (panels, 1, C_in, rows of a panel), bias, residual, y."""
        panels = -(-self.channels_out // self.rows_together)
        return [
            Operand("x", self.x_shape),
            constant("weights", (panels, 1, self.channels_in, self.rows_together)),
            constant("bias", (self.channels_out,)),
            *([Operand("residual", self.y_shape, role="residual")] if self.residual else []),
            output("y", self.y_shape),
        ]

    @property
    def preparation(self) -> Panels:
        """Panels of the output channels of a tile."""
        return Panels(1, self.channels_out, self.channels_in, 1, self.rows_together)

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Weights and bias."""
        assert weights is not None
        constants = {"bias": np.ascontiguousarray(weights.bias, "float32")}
        if weights.weight is not None:
            constants["weights"] = self.preparation.apply(weights.weight)
        return constants

    def unpacked(self, at: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        """In panels."""
        depth, together = self.channels_in, self.rows_together
        panel, channel = tirx.floordiv(at, depth * together), tirx.floormod(tirx.floordiv(at, together), depth)
        out = let(panel * together + tirx.floormod(at, together))
        return out, 0, let(channel), out < self.channels_out

    def describe(self) -> dict[str, Any]:
        """Also that channels come first."""
        return {**super().describe(), "planar": True}

    def work(self) -> tuple[Count, Count, Count]:
        """All of it."""
        return Count(self.window.positions_out), Count(self.channels_in), Count(self.channels_out)

    def predict(
        self, machine: Machine, threads: int, shares: Sequence[float] | None = None, whole_units: bool = False
    ) -> float:
        """As a pointwise layer whose positions are its channels and whose channels its positions."""
        like, tile = mirrored(self.window, self.channels_out), self.tile
        needed = predicted_cycles(machine, like, (self.channels_in, self.positions), (tile.mr, tile.vectors, tile.step))
        return self.window.batch * needed * seconds_per_cycle(machine) / threads

    def space(self, machine: Machine, workload: Workload) -> Space:
        """The register tile and its blocks."""
        return PlanarSpace(machine, workload)

    def sized(self, decisions: Mapping[str, int]) -> PlanarConv:
        """With this tile."""
        return replace(self, tile=replace(self.tile, **decisions))

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Clip by clip, blocks of positions by tiles of output channels."""
        tile, depth = self.tile, self.channels_in
        x = flat(args["x"])
        count, (blocks, vectors) = tile.vector_floats, self.blocks
        most = -(-self.positions // count) - vectors
        mr = min(tile.mr, self.channels_out)
        with parallel(self.window.batch * blocks) as task:
            clip, block = let(tirx.floordiv(task, blocks)), let(tirx.floormod(task, blocks))
            first = let(tirx.min(block * vectors, most))  # the last block overlaps the one before
            packed = scratch((vectors * depth * count,))
            with serial(depth) as channel:
                line = let(big(clip * depth + channel) * self.positions)
                with serial(vectors) as index:
                    at = line + self._begin(first + index)
                    store(packed, x[lanes(at, count)], lanes((index * depth + channel) * count, count))
            whole, rest = divmod(self.channels_out, mr)
            for pieces, begin, rows in ((whole, 0, mr), (1, whole * mr, rest)):
                if not rows:
                    continue
                with serial(pieces) as piece:
                    self._piece(args, packed, clip, let(begin + piece * mr), rows, first)

    def _piece(
        self, args: Mapping[str, tirx.Buffer], packed: tirx.Buffer, clip: Expr, out: Expr, mr: int, first: Expr
    ) -> None:
        """``mr`` output channels from ``out`` on of a block's positions."""
        tile, depth, count, done = self.tile, self.channels_in, self.tile.vector_floats, 0
        together = self.rows_together
        rows = Rows(flat(args["weights"]), *((1, together) if together > 1 else (depth, 1)))
        source = let(big(out) * depth)
        target = let(big(clip * self.channels_out + out) * self.positions)
        for panels, width in panel_widths(self.blocks[1], tile.vectors):
            with serial(panels) as index:
                vector = let(done + index * width)
                acc = self._started(args["bias"], out, mr, width)
                columns = Vectors(packed, depth * count, count)
                multiply(rows, source, columns, let(vector * (depth * count)), depth, tile.step, acc)
                self._finish(args, target, first + vector, acc)
            done += panels * width

    def _begin(self, vector: Expr) -> Expr:
        """The first position of a vector; a clip's last one overlaps the one before."""
        count = self.tile.vector_floats
        return tirx.min(vector * count, self.positions - count)

    def _started(self, bias: tirx.Buffer, out: Expr, mr: int, width: int) -> Sums:
        """Sums that are the bias of their row."""
        count = self.tile.vector_floats
        acc = [[scratch((count,)) for _ in range(width)] for _ in range(mr)]
        for row, sums in enumerate(acc):
            value = let(splat(bias[out + row], count))
            for total in sums:
                store(total, value, lanes(0, count))
        return acc

    def _finish(self, args: Mapping[str, tirx.Buffer], target: Expr, vector: Expr, acc: Sums) -> None:
        """Residual, activation and store; ``target`` is where the first row's channel begins."""
        y, count = flat(args["y"]), self.tile.vector_floats
        residual = flat(args["residual"]) if self.residual else None
        begins = [let(self._begin(vector + index)) for index in range(len(acc[0]))]
        for row, sums in enumerate(acc):
            for begin, total in zip(begins, sums, strict=True):
                at = target + (row * self.positions + begin)
                value = total[lanes(0, count)]
                if residual is not None:
                    value = value + read(residual, at, count)
                write_activated(y, self.activation, value, at, count)
