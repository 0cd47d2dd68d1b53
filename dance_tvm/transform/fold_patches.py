"""Convolutions whose windows lie side by side over a network's input, as of transformers' tokens, become products."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, Shape, constant, dtype_of, emit, literal, rewrite, shape_of
from dance_tvm.ir.reasons import Reasons
from dance_tvm.ir.windows import CONVOLUTIONS, planar_window_of
from dance_tvm.schedules.geometry import Window

#: Of a window: fewest columns, which are copied side by side, and values, which outweigh copying them.
FEWEST_COLUMNS, FEWEST_VALUES = 8, 256
#: Share of zero weights from which on they may be left out, which products do not.
ZEROS = 0.01


@tvm.transform.module_pass(opt_level=0, name="FoldPatches")
class FoldPatches:
    """``conv(x)`` becomes ``patches(x) · weights``: a convolution over large windows reads all its weights again for
    every line of outputs, a product once for a block of them."""

    def __init__(self, reasons: Reasons) -> None:
        self.reasons = reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        folded = {var: patches for var in graph.order if (patches := _patches_of(graph, var, self.reasons)) is not None}

        def visit(
            builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr | None:
            if var not in folded:
                return None
            patches, weight = folded[var], folded[var].weight
            apart = builder.emit(relax.op.reshape(value.args[0], patches.split))
            moved = builder.emit(relax.op.permute_dims(apart, patches.order))
            rows = builder.emit(relax.op.reshape(moved, patches.rows))
            columns = np.ascontiguousarray(weight.reshape(len(weight), -1).T)
            product = emit(builder, relax.op.matmul(rows, literal(columns)), var.name)
            rank = len(patches.rows)
            return builder.emit(relax.op.permute_dims(product, [0, rank - 1, *range(1, rank - 1)]))

        return rewrite(mod, visit) if folded else mod


class _Patches(NamedTuple):
    """The input with each axis in patches and their inside, the order of these axes that brings the inside last, and
    that as rows of a product with the weights."""

    split: list[int]
    order: list[int]
    rows: list[int]
    weight: np.ndarray


def _patches_of(graph: Graph, var: relax.Var, reasons: Reasons) -> _Patches | None:
    """The patches that ``var`` is a product of; None where it is none, or a convolution does it as fast."""
    if graph.op(var) not in CONVOLUTIONS or (window := planar_window_of(graph, var)) is None:
        return None
    call = graph.call(var)
    data, weight = call.args[0], constant(call.args[1])
    if data not in graph.params or dtype_of(data) != "float32" or weight is None or weight.dtype != np.float32:
        return None  # masks reach no parameter
    if int(call.attrs.groups) != 1 or window.kernel[-1] < FEWEST_COLUMNS:
        return None
    inside: Shape = weight.shape[2:]
    if why := _why_no_product(window, weight, shape_of(data)[2:]):
        reasons.add(var, f"no product of patches: {why}")
        return None
    patches = [extent // own for extent, own in zip(shape_of(data)[2:], inside, strict=True)]
    values = math.prod(weight.shape[1:])
    axes = range(len(inside))
    split = [*shape_of(data)[:2], *(extent for pair in zip(patches, inside, strict=True) for extent in pair)]
    order = [0, *(2 + 2 * axis for axis in axes), 1, *(3 + 2 * axis for axis in axes)]
    return _Patches(split, order, [shape_of(data)[0], *patches, values], weight)


def _why_no_product(window: Window, weight: np.ndarray, size: Shape) -> str:
    """Why a convolution over large windows is better one; empty if it is better a product."""
    if window.kernel != window.stride or any(window.padding) or set(window.dilation) != {1}:
        return "its windows do not lie side by side"
    if any(extent % own for extent, own in zip(size, weight.shape[2:], strict=True)):
        return "its windows do not cover the input"
    if math.prod(weight.shape[1:]) < FEWEST_VALUES:
        return f"its windows have fewer than {FEWEST_VALUES} values"
    zeros = np.count_nonzero(weight) < (1 - ZEROS) * weight.size
    return "a convolution leaves out the zeros among its weights" if zeros else ""
