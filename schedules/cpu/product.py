"""Products of matrices neither of which is known when compiling (`docs/kernels.md`), read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tvm import tirx

from ..emit import Expr, big, choose, flat, lanes, let, parallel, scratch, serial, splat, store
from ..kernel import Kernel, Operand, output
from ..strided import Strided
from .conv3d_gather import parts_of
from .pack_vectors import Packing
from .row_products import Rows, Sums, Vectors, cleared, multiply, rows_beside
from .row_tiles import panel_widths
from .tiles import Machine

#: What is done with the sums of a tile: the first of its vectors, the sums.
Finish = Callable[[Expr, Sums], None]
#: Vectors of a tile: more rows beside them take more from each load than more vectors would.
VECTORS = 2
#: Rows of a tile: with more, rows that lie far apart in memory push each other out of the first-level cache.
MOST_ROWS = 12
#: Matrices for each thread from which on each is one thread's.
SHARED_OUT = 4


@dataclass(frozen=True)
class Placed:
    """A tensor's shape, and where each matrix lies in it."""

    shape: tuple[int, ...]
    at: Strided


@dataclass(frozen=True)
class ProductTile:
    """``mr`` rows × at most ``vectors`` vectors are summed in registers; ``step`` terms are loaded as one vector per
    row (1: single values are broadcast from memory). The rows of a matrix are shared out in ``splits`` parts."""

    mr: int
    vectors: int
    vector_floats: int
    step: int
    splits: int = 1

    def step_of(self, terms: int) -> int:
        """The step of a sum of so many terms."""
        return self.step if terms >= self.step else 1

    @property
    def size_name(self) -> str:
        """The tile as names have it."""
        step = f"_k{self.step}" if self.step > 1 else ""
        return f"mr{self.mr}_nr{self.vectors * self.vector_floats}{step}"


def tile_for(machine: Machine, matrices: int, rows: int, threads: int) -> ProductTile:
    """The tile of products of so many matrices of ``rows`` rows."""
    mr, step = rows_beside(machine, VECTORS)
    mr = max(1, min(mr, MOST_ROWS, rows))
    whole = threads == 1 or matrices % threads == 0 or matrices >= SHARED_OUT * threads
    return ProductTile(mr, VECTORS, machine.vector_floats, step, 1 if whole else min(threads, -(-rows // mr)))


@dataclass(frozen=True)
class Product(Kernel):
    """``y[i] = scale · a[i] b[i]`` for ``matrices`` pairs of (rows, terms) and (terms, columns). Of ``a`` and ``y`` the
    columns lie side by side."""

    kind = "product"
    matrices: int
    rows: int
    terms: int
    columns: int
    a: Placed
    b: Placed
    y: Placed
    tile: ProductTile
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"product_f32_{self.tile.size_name}"

    @property
    def packed(self) -> Packing:
        """The second matrix as tiles read it."""
        return Packing(self.terms, self.columns, self.tile.vector_floats, self.scale)

    @property
    def scratch_bytes(self) -> int:
        """The packed matrix."""
        return 4 * self.packed.size

    def operands(self) -> list[Operand]:
        """Both matrices and their product."""
        return [Operand("a", self.a.shape), Operand("b", self.b.shape), output("y", self.y.shape)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Matrix by matrix."""
        a, b, y = (flat(args[name]) for name in ("a", "b", "y"))
        mr, splits = min(self.tile.mr, self.rows), self.tile.splits
        tiles = -(-self.rows // mr)
        each = -(-tiles // splits)
        with parallel(self.matrices * splits) as task:
            index, part = let(tirx.floordiv(task, splits)), let(tirx.floormod(task, splits))
            packed = scratch((self.packed.size,))
            self.packed.emit(b, self.b.at, self.b.at.start(index), packed)
            source, target = self.a.at.start(index), self.y.at.start(index)
            with serial(each if splits == 1 else tirx.max(0, tirx.min(each, tiles - part * each))) as piece:
                first = let(big(tirx.min((part * each + piece) * mr, self.rows - mr)))
                rows = Rows(a, self.a.at.rows)
                begin, end = let(source + first * self.a.at.rows), let(target + first * self.y.at.rows)
                store_rows = partial(store_tile, y, end, self.y.at.rows, self.columns)
                each_panel(self.tile, mr, rows, begin, packed, self.packed, store_rows)


def each_panel(
    tile: ProductTile, mr: int, rows: Rows, source: Expr, packed: tirx.Buffer, packing: Packing, finish: Finish
) -> None:
    """``finish(vector, sums)`` with the products of ``mr`` rows and all packed vectors, some vectors at a time."""
    first, length = 0, packing.terms * packing.count
    vectors = Vectors(packed, length, packing.count)
    for panels, width in panel_widths(packing.vectors, tile.vectors):
        with serial(panels) as index:
            vector = let(first + index * width)
            acc = cleared(mr, width, packing.count)
            multiply(rows, source, vectors, let(vector * length), packing.terms, tile.step_of(packing.terms), acc)
            finish(vector, acc)
        first += panels * width


def store_tile(
    y: tirx.Buffer,
    target: Expr,
    distance: int,
    columns: int,
    vector: Expr,
    acc: Sums,
    factors: tirx.Buffer | None = None,
) -> None:
    """Sums to rows of ``y`` at a distance from ``target`` on, of the last vector only the columns that there are, times
    a factor for each row where some are given."""
    count = int(acc[0][0].shape[0])
    vectors, left = -(-columns // count), columns % count

    def part(total: tirx.Buffer, at: Expr, row: int, parts: list[tuple[int, int]]) -> None:
        for begin, size in parts:
            value = total[lanes(begin, size)]
            store(y, value if factors is None else value * splat(factors[row], size), lanes(at + begin, size))

    for r, sums in enumerate(acc):
        for v, total in enumerate(sums):
            at = target + (big(vector + v) * count + r * distance)
            whole = partial(part, total, at, r, [(0, count)])
            if not left or v + 1 < len(sums):
                whole()
            else:
                choose(vector + v + 1 < vectors, whole, partial(part, total, at, r, parts_of(left)))
