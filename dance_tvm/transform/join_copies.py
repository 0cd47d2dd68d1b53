"""Turn chains of slices, concatenations, pads and moved axes into one kernel that copies each element once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, dtype_of, emit, is_tensor, replace_each, shape_of, substitute
from dance_tvm.ir.reasons import Reasons
from dance_tvm.schedules.cpu.copies import Piece, copies

RESHAPES = {"reshape", "expand_dims", "squeeze"}
#: A result of more pieces than this is left to TVM: the code grows with them.
MOST_PIECES = 32
#: Smaller results are left to the functions of joined small operators.
FEWEST_ELEMENTS = 512


@tvm.transform.module_pass(opt_level=0, name="JoinCopies")
class JoinCopies:
    """A result that several pieces make up, in float32, is copied from where the pieces are. TVM's own kernels choose
    among the pieces element by element, in every lane. What is one piece is left to whoever reads it."""

    def __init__(self, vector_floats: int, threads: int, reasons: Reasons) -> None:
        self.vector_floats, self.threads, self.reasons = vector_floats, threads, reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        origins = _Origins(graph)
        for var in graph.order:
            origins.look(var)
        chosen = {var: pieces for var, pieces in origins.pieces.items() if self._chosen(graph, origins, var)}

        def make(
            builder: relax.BlockBuilder, var: relax.Var, pieces: list[Piece], new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr:
            shape = shape_of(var)
            numbers = sorted({piece.source for piece in pieces if piece.source is not None})
            pieces = [
                piece if piece.source is None else replace(piece, source=numbers.index(piece.source))
                for piece in pieces
            ]
            read = [origins.sources[number] for number in numbers]
            kernel = copies(pieces, [shape_of(source) for source in read], shape, self.vector_floats, self.threads)
            kernel = kernel.without_attr("global_symbol").with_attr("tirx.is_scheduled", True)
            function = builder.add_func(kernel, "copy_pieces")
            call = relax.call_tir(
                function, [substitute(source, new) for source in read], relax.TensorType(list(shape), "float32")
            )
            return emit(builder, call, var.name)

        return replace_each(mod, chosen, make)

    def _chosen(self, graph: Graph, origins: _Origins, var: relax.Var) -> bool:
        """Whether ``var`` is worth a kernel: several pieces, and read by something that is no part of a larger copy."""
        pieces, shape = origins.pieces[var], shape_of(var)
        inside = var not in graph.outputs and all(reader in origins.pieces for reader in graph.readers[var])
        if len(pieces) < 2 or inside:
            return False
        if why := _why_not(pieces, shape):
            self.reasons.add(var, f"pieces copied by TVM's own kernel: {why}")
        return not why


def _why_not(pieces: Sequence[Piece], shape: Sequence[int]) -> str:
    """Why no kernel copies ``pieces`` into a result of ``shape``; empty if one does."""
    if len(pieces) > MOST_PIECES:
        return f"more than {MOST_PIECES}"
    if math.prod(shape) < FEWEST_ELEMENTS:
        return f"fewer than {FEWEST_ELEMENTS} elements"
    return "" if all(piece.by_runs(shape) for piece in pieces) else "they lie in no runs"


@dataclass
class _Origins:
    """Of each variable that only moves values, the pieces that it is made of."""

    graph: Graph
    pieces: dict[relax.Var, list[Piece]] = field(default_factory=dict)
    sources: list[relax.Expr] = field(default_factory=list)

    def look(self, var: relax.Var) -> None:
        """Find the pieces of ``var``, if all it does is to move values."""
        if not is_tensor(var) or dtype_of(var) != "float32" or 0 in shape_of(var):
            return
        name = self.graph.op(var)
        if name == "concat":
            found = self._joined(self.graph.call(var))
        elif name == "strided_slice":
            found = self._sliced(self.graph.call(var), shape_of(var))
        elif name == "permute_dims":
            found = self._permuted(self.graph.call(var))
        elif name in RESHAPES:
            found = self._reshaped(self.graph.call(var).args[0], shape_of(var))
        elif name == "nn.pad":
            found = self._padded(self.graph.call(var), shape_of(var))
        else:
            found = self._split(self.graph.value[var], shape_of(var))
        if found is not None:
            self.pieces[var] = found

    def _of(self, expr: relax.Expr) -> list[Piece]:
        """The pieces of ``expr``; what moves no values is one piece of itself."""
        if isinstance(expr, relax.Var) and expr in self.pieces:
            return self.pieces[expr]
        value = constant(expr)
        if value is not None and value.size and np.all(value == value.flat[0]):
            return [Piece.whole(shape_of(expr), None, float(value.flat[0]))]
        known = next((at for at, source in enumerate(self.sources) if source.same_as(expr)), len(self.sources))
        if known == len(self.sources):
            self.sources.append(expr)
        return [Piece.whole(shape_of(expr), known)]

    def _joined(self, call: relax.Call) -> list[Piece] | None:
        if not isinstance(call.args[0], relax.Tuple):
            return None
        items, found = list(call.args[0].fields), list[Piece]()
        axis, at = int(call.attrs.axis) % len(shape_of(items[0])), 0
        for item in items:
            by = [at if other == axis else 0 for other in range(len(shape_of(item)))]
            found += [piece.shifted(by) for piece in self._of(item)] if 0 not in shape_of(item) else []
            at += shape_of(item)[axis]
        return found

    def _sliced(self, call: relax.Call, shape: Sequence[int]) -> list[Piece] | None:
        data, axes, begins, ends, *steps = call.args
        listed = [axes, begins, ends, *steps]
        if not all(isinstance(values, relax.Tuple) for values in listed):
            return None
        if any(int(step.value) != 1 for values in steps for step in values.fields):
            return None
        given = shape_of(data)
        low, high = [0] * len(given), list(given)
        for axis, begin, end in zip(axes.fields, begins.fields, ends.fields, strict=True):
            at = int(axis.value) % len(given)
            low[at], high[at], _ = slice(int(begin.value), int(end.value)).indices(given[at])
        if [above - below for below, above in zip(low, high, strict=True)] != list(shape):
            return None
        return self._box(data, low, high)

    def _split(self, value: relax.Expr, shape: Sequence[int]) -> list[Piece] | None:
        if not isinstance(value, relax.TupleGetItem) or self.graph.op(value.tuple_value) != "split":
            return None
        call = self.graph.call(value.tuple_value) if isinstance(value.tuple_value, relax.Var) else value.tuple_value
        data, axis = call.args[0], int(call.attrs.axis) % len(shape)
        parts = [int(part) for part in call.attrs.indices_or_sections] if _listed(call) else None
        begin = value.index * shape[axis] if parts is None else [0, *parts][value.index]
        low, high = [0] * len(shape), list(shape_of(data))
        low[axis], high[axis] = begin, begin + shape[axis]
        return self._box(data, low, high)

    def _box(self, data: relax.Expr, low: Sequence[int], high: Sequence[int]) -> list[Piece]:
        return [part for piece in self._of(data) if (part := piece.within(low, high)) is not None]

    def _permuted(self, call: relax.Call) -> list[Piece]:
        rank = len(shape_of(call.args[0]))
        order = [int(axis) % rank for axis in call.attrs.axes] if call.attrs.axes else list(reversed(range(rank)))
        return [piece.moved(order) for piece in self._of(call.args[0])]

    def _reshaped(self, data: relax.Expr, shape: Sequence[int]) -> list[Piece] | None:
        """Axes of extent one that come and go; None for any other reshape."""
        kept = [axis for axis, extent in enumerate(shape_of(data)) if extent > 1]
        if [shape_of(data)[axis] for axis in kept] != [extent for extent in shape if extent > 1]:
            return None
        waiting = iter(kept)
        order = [next(waiting) if extent > 1 else None for extent in shape]
        return [piece.moved(order) for piece in self._of(data)]

    def _padded(self, call: relax.Call, shape: Sequence[int]) -> list[Piece] | None:
        """The data and the boxes of the value around it: axis by axis, what lies before and behind."""
        data, widths = call.args[0], [int(width) for width in call.attrs.pad_width]
        if str(call.attrs.pad_mode) != "constant" or min(widths) < 0:
            return None
        found = [piece.shifted(widths[::2]) for piece in self._of(data)]
        value, low, high = float(call.attrs.pad_value), [0] * len(shape), list(shape)
        for axis, (before, extent) in enumerate(zip(widths[::2], shape_of(data), strict=True)):
            for begin, end in ((0, before), (before + extent, shape[axis])):
                first, beyond = [*low], [*high]
                first[axis], beyond[axis] = begin, end
                size = [above - below for below, above in zip(first, beyond, strict=True)]
                found += [Piece.whole(size, None, value).shifted(first)] if end > begin else []
            low[axis], high[axis] = before, before + extent
        return found


def _listed(call: relax.Call) -> bool:
    """Whether a split names its places, in place of how many equal parts it makes."""
    return not isinstance(call.attrs.indices_or_sections, int | tvm.tirx.IntImm)
