"""Replace operators that order values: TVM's put NaN anywhere, and call a library for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import tvm
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.ir.graph import Graph, dtype_of, rewrite, shape_of
from dance_tvm.schedules.cpu.places import PlaceOfExtreme
from dance_tvm.schedules.cpu.sort import MergeSort
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.emit import FLOAT
from dance_tvm.schedules.gpu.sort import CountingSort
from dance_tvm.schedules.gpu.tiles import Gpu
from dance_tvm.schedules.sort import Sort

from .calls import call_kernel

SORTS = ("sort", "argsort", "topk")
#: Places of extremes, by the operator that finds the extreme itself.
PLACES: dict[str, Callable[..., relax.Expr]] = {"argmax": relax.op.max, "argmin": relax.op.min}

#: Comparisons that ordering may take on a GPU, where each value is compared with all others of its line.
MOST_COMPARISONS = 2**34


@tvm.transform.module_pass(opt_level=0, name="LowerSorts")
class LowerSorts:
    """Every ``sort``, ``argsort`` and ``topk`` of ``main`` becomes a stable sort in PyTorch's order; ``argmax`` and
    ``argmin`` become kernels, or comparisons with the extreme."""

    def __init__(self, machine: Machine | Gpu, threads: int = 1) -> None:
        self.machine, self.threads = machine, threads

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``. Raises DanceError for lines too long for a GPU."""
        graph = Graph.of(mod["main"])
        if not any(graph.op(var) in (*SORTS, *PLACES) for var in graph.order):
            return mod

        def visit(
            builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr | None:
            if graph.op(var) in PLACES:
                return self._place_of_extreme(builder, value, shape_of(var))
            if graph.op(var) not in SORTS:
                return None
            on_gpu = isinstance(self.machine, Gpu)
            found = _wanted(value, CountingSort if on_gpu else MergeSort)
            if math.prod(found.shape) == 0:
                return _nothing(builder, found)
            if on_gpu and found.comparisons > MOST_COMPARISONS:
                raise DanceError(
                    f"ordering lines of {found.extent} values is not supported on a GPU: order fewer at a time"
                )
            return call_kernel(builder, found, {"x": value.args[0]}, self.threads)

        return rewrite(mod, visit)

    def _place_of_extreme(self, builder: relax.BlockBuilder, call: relax.Call, out: Sequence[int]) -> relax.Expr:
        """One kernel for floats on a processor, else a comparison with the extreme."""
        x, axis = call.args[0], call.attrs.axis
        shape = shape_of(x)
        if not isinstance(self.machine, Machine) or dtype_of(x) != FLOAT or 0 in shape:
            return _place_by_comparison(builder, call, out)
        axis = None if axis is None else int(axis) % len(shape)
        sizes = (1, math.prod(shape), 1)
        if axis is not None:
            sizes = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        name: Literal["max", "min"] = "max" if call.op.name.endswith("argmax") else "min"
        found = PlaceOfExtreme(tuple(shape), tuple(out), *sizes, name, vector_floats=self.machine.vector_floats)
        return call_kernel(builder, found, {"x": x}, self.threads)


def _wanted(call: relax.Call, kernel: type[Sort]) -> Sort:
    """The kernel that does what the call asks for."""
    (x, *_), attrs, name = call.args, call.attrs, call.op.name.rpartition(".")[2]
    shape = tuple(shape_of(x))
    axis = int(attrs.axis) % len(shape)
    if name == "topk":
        kept, kind = int(attrs.k), str(attrs.ret_type)
        kept = shape[axis] if kept < 1 else kept
        places = "" if kind == "values" else str(attrs.dtype)
        return kernel(shape, axis, kept, bool(attrs.largest), dtype_of(x), kind != "indices", places)
    places = str(attrs.dtype) if name == "argsort" else ""
    return kernel(shape, axis, shape[axis], bool(attrs.descending), dtype_of(x), name == "sort", places)


def _nothing(builder: relax.BlockBuilder, found: Sort) -> relax.Expr:
    """What is left of no values."""
    parts = [builder.emit(relax.op.zeros(list(each.shape), each.dtype)) for each in found.outputs()]
    return parts[0] if len(parts) == 1 else builder.emit(relax.Tuple(parts))


def _place_by_comparison(builder: relax.BlockBuilder, call: relax.Call, out: Sequence[int]) -> relax.Expr:
    """The first place that holds the extreme; of NaN, which is the extreme where there is one."""
    emit, op, name = builder.emit, relax.op, call.op.name.rpartition(".")[2]
    x, axis = call.args[0], call.attrs.axis
    if axis is None:
        x, axis = emit(op.reshape(x, [-1])), 0
    shape, axis = shape_of(x), int(axis) % len(shape_of(x))
    extreme = emit(PLACES[name](x, [axis], True))
    found = emit(op.equal(x, extreme))
    if dtype_of(x).startswith("float"):
        found = emit(op.logical_or(found, emit(op.not_equal(x, x))))
    places = np.arange(shape[axis], dtype="int64").reshape([-1 if at == axis else 1 for at in range(len(shape))])
    first = emit(op.where(found, relax.const(places, "int64"), relax.const(shape[axis], "int64")))
    least = emit(op.min(first, [axis], True))
    return emit(op.reshape(least, list(out)))
