"""Attention: the softmax of products of queries with keys, times the values (`docs/kernels.md`).

``Y = softmax(scale · Q Kᵀ + biases) V`` for each head. Keys and values of a head are packed once as vectors; of a few
queries at a time all scores are in the first-level cache, where they become weights, and are never stored elsewhere.
Operands are read where they lie: the projection of all heads side by side needs no copy of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx

from ..emit import Expr, big, flat, lane, lanes, let, number, parallel, scratch, serial, splat, store
from ..kernel import Kernel, Operand, output
from .conv3d_gather import parts_of
from .moments import each_chunk
from .pack_vectors import Packing
from .product import Placed, ProductTile, each_panel, store_tile
from .row_products import Rows

#: Vectors of scores that are looked at side by side.
SIDE_BY_SIDE = 4
LOWEST = float("-inf")


@dataclass(frozen=True)
class Attention(Kernel):
    """``heads`` heads of ``queries`` queries and ``keys`` keys of ``depth`` numbers, values of ``width`` numbers. Keys
    are given as the product has them, a column for each; of queries and results the columns lie side by side.

    ``biases`` are added to scores; columns of theirs lie side by side. ``safe``: a query all of whose scores are
    -infinity gets zeros, as PyTorch's scaled_dot_product_attention has it, in place of NaN.
    """

    kind = "attention"
    heads: int
    queries: int
    keys: int
    depth: int
    width: int
    q: Placed
    k: Placed
    v: Placed
    y: Placed
    tile: ProductTile
    scale: float = 1.0
    biases: tuple[Placed, ...] = ()
    safe: bool = False

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"attention_f32_{self.tile.size_name}"

    def operands(self) -> list[Operand]:
        """Queries, keys, values, biases, output."""
        biases = [Operand(f"bias_{index}", bias.shape) for index, bias in enumerate(self.biases)]
        read = [Operand(name, placed.shape) for name, placed in (("q", self.q), ("k", self.k), ("v", self.v))]
        return [*read, *biases, output("y", self.y.shape)]

    @property
    def scratch_bytes(self) -> int:
        """Packed keys and values of a head, and the scores of a tile of queries."""
        scores = self.tile.mr * self.packed_keys.vectors * self.tile.vector_floats
        return 4 * (self.packed_keys.size + self.packed_values.size + scores)

    @property
    def packed_keys(self) -> Packing:
        """Keys as the scores' tiles read them."""
        return Packing(self.depth, self.keys, self.tile.vector_floats, self.scale)

    @property
    def packed_values(self) -> Packing:
        """Values as the results' tiles read them."""
        return Packing(self.keys, self.width, self.tile.vector_floats)

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Head by head."""
        _Emitter(self, args).emit()


class _Emitter:
    def __init__(self, spec: Attention, args: Mapping[str, tirx.Buffer]) -> None:
        self.spec, self.count = spec, spec.tile.vector_floats
        self.q, self.k, self.v, self.y = (flat(args[name]) for name in ("q", "k", "v", "y"))
        self.biases = [flat(args[f"bias_{index}"]) for index in range(len(spec.biases))]
        #: Scores of a query, the last vector whole.
        self.padded = spec.packed_keys.vectors * self.count
        self.mr = min(spec.tile.mr, spec.queries)

    def emit(self) -> None:
        spec, splits = self.spec, self.spec.tile.splits
        tiles = -(-spec.queries // self.mr)
        each = -(-tiles // splits)
        with parallel(spec.heads * splits) as task:
            head, part = let(tirx.floordiv(task, splits)), let(tirx.floormod(task, splits))
            keys, values = scratch((spec.packed_keys.size,)), scratch((spec.packed_values.size,))
            spec.packed_keys.emit(self.k, spec.k.at, spec.k.at.start(head), keys)
            spec.packed_values.emit(self.v, spec.v.at, spec.v.at.start(head), values)
            with serial(each if splits == 1 else tirx.max(0, tirx.min(each, tiles - part * each))) as index:
                first = let(tirx.min((part * each + index) * self.mr, spec.queries - self.mr))
                scores = scratch((self.mr * self.padded,))
                inverse = scratch((self.mr,))
                self._scores(scores, keys, let(spec.q.at.start(head) + big(first) * spec.q.at.rows))
                self._weights(scores, inverse, head, first)
                self._sums(scores, inverse, values, let(spec.y.at.start(head) + big(first) * spec.y.at.rows))

    # -- one tile of queries -----------------------------------------------------------------------------------------

    def _scores(self, scores: tirx.Buffer, keys: tirx.Buffer, source: Expr) -> None:
        """Products with all keys."""
        rows = Rows(self.q, self.spec.q.at.rows)
        finish = partial(store_tile, scores, 0, self.padded, self.padded)
        each_panel(self.spec.tile, self.mr, rows, source, keys, self.spec.packed_keys, finish)

    def _weights(self, scores: tirx.Buffer, inverse: tirx.Buffer, head: Expr, first: Expr) -> None:
        """Scores become exponentials of what they are below the largest of their query; ``inverse``: one over their
        sums."""
        spec, count = self.spec, self.count
        starts = [let(bias.at.start(head) + big(first) * bias.at.rows) for bias in spec.biases]
        with serial(self.mr) as row:
            top = let(row * self.padded)
            for bias, buffer, start in zip(spec.biases, self.biases, starts, strict=True):
                self._add(scores, top, buffer, let(start + big(row) * bias.at.rows))
            if spec.keys % count:
                at = lanes(top + (self.padded - count), count)
                beyond = tirx.Ramp(0, 1, count) >= splat(spec.keys % count, count)
                store(scores, tirx.Select(beyond, number(LOWEST, count), scores[at]), at)
            largest = self._largest(scores, top)
            if spec.safe:
                largest = let(tirx.Select(largest == number(LOWEST), number(0.0), largest))
            total = self._raise(scores, top, largest)
            factor = number(1.0) / total
            store(inverse, tirx.Select(total == number(0.0), number(0.0), factor) if spec.safe else factor, row)

    def _add(self, scores: tirx.Buffer, top: Expr, bias: tirx.Buffer, start: Expr) -> None:
        """A bias to the scores of one query."""
        keys, count = self.spec.keys, self.count
        with serial(keys // count) as vector:
            at = lanes(top + vector * count, count)
            store(scores, scores[at] + bias[lanes(start + vector * count, count)], at)
        done = keys // count * count
        for begin, size in parts_of(keys - done):
            at = lanes(top + (done + begin), size)
            store(scores, scores[at] + bias[lanes(start + (done + begin), size)], at)

    def _largest(self, scores: tirx.Buffer, top: Expr) -> Expr:
        """The largest score of a query."""
        count = self.count
        best = scratch((count,))
        store(best, number(LOWEST, count), lanes(0, count))

        def visit(first: Expr, offsets: list[int]) -> None:
            values = [scores[lanes(top + first + offset, count)] for offset in offsets]
            while len(values) > 1:
                values = [
                    tirx.max(*values[at : at + 2]) if at + 1 < len(values) else values[at]
                    for at in range(0, len(values), 2)
                ]
            store(best, tirx.max(best[lanes(0, count)], values[0]), lanes(0, count))

        each_chunk(self.padded, count, SIDE_BY_SIDE, visit)
        return self._folded(best, tirx.max)

    def _raise(self, scores: tirx.Buffer, top: Expr, largest: Expr) -> Expr:
        """Exponentials in the place of scores, and their sum."""
        count = self.count
        totals = [scratch((count,)) for _ in range(SIDE_BY_SIDE)]
        for total in totals:
            store(total, number(0.0, count), lanes(0, count))

        def visit(first: Expr, offsets: list[int]) -> None:
            for total, offset in zip(totals, offsets, strict=False):
                at = lanes(top + first + offset, count)
                value = let(tirx.exp(scores[at] - splat(largest, count)))
                store(scores, value, at)
                store(total, total[lanes(0, count)] + value, lanes(0, count))

        each_chunk(self.padded, count, SIDE_BY_SIDE, visit)
        for total in totals[1:]:
            store(totals[0], totals[0][lanes(0, count)] + total[lanes(0, count)], lanes(0, count))
        return self._folded(totals[0], lambda left, right: left + right)

    def _folded(self, buffer: tirx.Buffer, join: Any) -> Expr:
        """All lanes of a vector joined, in halves."""
        vector = let(buffer[lanes(0, self.count)])
        values = [lane(vector, at) for at in range(self.count)]
        while len(values) > 1:
            half = len(values) // 2
            values = [join(left, right) for left, right in zip(values[:half], values[half:], strict=True)]
        return let(values[0])

    def _sums(self, scores: tirx.Buffer, inverse: tirx.Buffer, values: tirx.Buffer, target: Expr) -> None:
        """Products of the weights with all values, divided by the weights' sum and stored."""
        spec, rows = self.spec, Rows(scores, self.padded)
        finish = partial(store_tile, self.y, target, spec.y.at.rows, spec.width, factors=inverse)
        each_panel(spec.tile, self.mr, rows, 0, values, spec.packed_values, finish)
