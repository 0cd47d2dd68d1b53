"""Replace what resamples a clip axis by axis, reads at constant places and weighted sums of them, by one kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import (
    Graph,
    Shape,
    constant,
    dtype_of,
    is_tensor,
    lies_along,
    literal,
    replace_each,
    shape_of,
    substitute,
)
from dance_tvm.ir.reasons import Reasons
from dance_tvm.schedules.cpu.resample import Resample, tables
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.emit import FLOAT
from dance_tvm.schedules.geometry import triple

from .calls import call_kernel

#: Inputs of one output over all axes: more are a long sum, which is better made axis by axis.
MOST_TAPS = 16
#: One read: of what, along which axis, at which places, and by what each is multiplied.
_Term = tuple[relax.Expr, int, np.ndarray, np.ndarray]
#: Fewer outputs are left to the functions of joined small operators.
FEWEST_ELEMENTS = 4096


@tvm.transform.module_pass(opt_level=0, name="LowerResampling")
class LowerResampling:
    """Sums of ``take(x, places, axis) · weights`` with constant places and weights, one axis behind the other, become
    one call of a kernel, where channels are innermost."""

    def __init__(self, machine: Machine, threads: int, reasons: Reasons) -> None:
        self.machine, self.threads, self.reasons = machine, threads, reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        found: dict[relax.Var, _Resampled] = {}
        for var in graph.order:
            if (one := _resampled(graph, var)) is not None:
                before = found.get(one.source) if isinstance(one.source, relax.Var) else None
                found[var] = one if before is None else one.behind(before, graph)
        covered = {part for one in found.values() for part in one.parts}
        chosen: dict[relax.Var, _Resampled] = {}
        for var, one in found.items():
            if var in covered:
                continue
            if why := one.why_not(shape_of(var)):
                self.reasons.add(var, f"resampled in parts: {why}")
            else:
                chosen[var] = one
        return replace_each(mod, chosen, self._call)

    def _call(
        self, builder: relax.BlockBuilder, var: relax.Var, one: _Resampled, new: dict[relax.Var, relax.Expr]
    ) -> relax.Expr:
        """The call of the kernel."""
        shape, (batch, *size, channels) = shape_of(var), shape_of(one.source)
        missing, values = 3 - len(size), {"x": substitute(one.source, new)}
        taps, weighted = [], []
        for axis in range(3):
            extent = shape[1 + axis - missing] if axis >= missing else 1
            unit = np.arange(extent).reshape(-1, 1), np.ones((extent, 1))
            places, weights = one.axes.get(1 + axis - missing, unit) if axis >= missing else unit
            taps.append(places.shape[1])
            weighted.append(bool((weights != 1).any()))
            for name, table in zip(("places", "weights"), tables(places, weights), strict=True):
                values[f"{name}_{axis}"] = literal(table)
        before, behind = (triple([*[1] * missing, *extents]) for extents in (size, shape[1:-1]))
        given = (weighted[0], weighted[1], weighted[2])
        kernel = Resample(
            batch, before, behind, channels, triple(taps), given, self.machine.vector_floats, missing == 1
        )
        read = {operand.name for operand in kernel.inputs()}
        args = {name: value for name, value in values.items() if name in read}
        return call_kernel(builder, kernel, args, self.threads)


@dataclass(frozen=True)
class _Resampled:
    """What is made of ``source`` along some axes: places and weights (out, taps) of each. ``parts`` are the bindings
    between that are no more than parts of it."""

    source: relax.Expr
    axes: dict[int, tuple[np.ndarray, np.ndarray]]
    parts: frozenset[relax.Var] = frozenset()

    def behind(self, other: _Resampled, graph: Graph) -> _Resampled:
        """Both, one after the other, where nothing else reads the value in between."""
        source = self.source
        assert isinstance(source, relax.Var)
        if set(self.axes) & set(other.axes) or source in graph.outputs:
            return self
        joined = _Resampled(other.source, {**other.axes, **self.axes}, self.parts | other.parts | {source})
        alone = all(reader in self.parts for reader in graph.readers[source]) or len(graph.readers[source]) == 1
        return joined if alone and joined.taps <= MOST_TAPS else self

    @property
    def taps(self) -> int:
        """Inputs of one output."""
        return math.prod(places.shape[1] for places, _ in self.axes.values())

    def why_not(self, shape: Shape) -> str:
        """Why no kernel makes a result of ``shape``; empty if one does."""
        if len(shape) not in (4, 5) or not all(0 < axis < len(shape) - 1 for axis in self.axes):
            return "it goes along other axes than those between clips and channels"
        if math.prod(shape) < FEWEST_ELEMENTS:
            return f"fewer than {FEWEST_ELEMENTS} elements"
        return f"more than {MOST_TAPS} inputs of one output" if self.taps > MOST_TAPS else ""


def _resampled(graph: Graph, var: relax.Var) -> _Resampled | None:
    """``var`` as a sum of reads of one tensor at constant places of one axis, weighted or not."""
    if not is_tensor(var) or dtype_of(var) != FLOAT:
        return None
    terms, parts, waiting = list[_Term](), set[relax.Var](), [var]
    while waiting:
        each = waiting.pop()
        parts.add(each)
        if graph.op(each) == "add":
            both = graph.call(each).args
            if not all(isinstance(arg, relax.Var) and shape_of(arg) == shape_of(var) for arg in both):
                return None
            waiting += [both[1], both[0]]
        elif (term := _term(graph, each, parts)) is not None and len(terms) < MOST_TAPS:
            terms.append(term)
        else:
            return None
    source, axis, _, _ = terms[0]
    if not all(other.same_as(source) and along == axis for other, along, _, _ in terms):
        return None
    tables = np.stack([places for _, _, places, _ in terms], 1), np.stack([weights for *_, weights in terms], 1)
    return _Resampled(source, {axis: tables}, frozenset(parts - {var}))


def _term(graph: Graph, var: relax.Var, parts: set[relax.Var]) -> tuple[relax.Expr, int, np.ndarray, np.ndarray] | None:
    """The read that ``var`` is, weighted or not; what it is made of joins ``parts``."""
    line: np.ndarray | None = None
    if graph.op(var) == "multiply":
        left, right = graph.call(var).args
        read, line = (left, constant(right)) if constant(left) is None else (right, constant(left))
        if line is None or not isinstance(read, relax.Var):
            return None
        var = read
        parts.add(var)
    if graph.op(var) != "take":
        return None
    source, places = graph.call(var).args[0], constant(graph.call(var).args[1])
    if places is None or places.ndim != 1 or graph.call(var).attrs.axis is None or not is_tensor(source):
        return None
    axis, rank = int(graph.call(var).attrs.axis) % len(shape_of(source)), len(shape_of(source))
    extent = shape_of(source)[axis]
    if len(shape_of(var)) != rank or not len(places) or places.min() < 0 or places.max() >= extent:
        return None
    if line is None:
        return source, axis, places, np.ones(len(places))
    if not lies_along(line.shape, shape_of(var), axis):
        return None
    return source, axis, places, line.reshape(-1).astype("float64")
