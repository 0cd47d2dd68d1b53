"""Replace norms, softmaxes and reductions of floats by kernels of our own, exact where TVM's are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, dtype_of, emit, is_tensor, rewrite, shape_of, substitute
from dance_tvm.ir.reasons import Reasons
from dance_tvm.schedules.cpu.extremes import VectorExtreme
from dance_tvm.schedules.cpu.moments import VectorReduction
from dance_tvm.schedules.cpu.norm import Norm
from dance_tvm.schedules.cpu.softmax import Softmax
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.emit import FLOAT, HALF
from dance_tvm.schedules.gpu.reduce import BlockReduction
from dance_tvm.schedules.gpu.tiles import Gpu
from dance_tvm.schedules.reduction import Reduction
from dance_tvm.transform.store_halves import narrows, widens

from .activations import activation_behind
from .calls import call_kernel
from .norm_forms import Span, folded, form_of, runs_of, seen_as, without
from .sites import FUSED_ACTIVATIONS

#: Reductions that have kernels here, by the name of the Relax operator.
REDUCTIONS = ("mean", "sum", "variance", "std")
#: The same of processors alone.
EXTREMES = ("max", "min")
NORMS = ("nn.instance_norm", "nn.group_norm", "nn.layer_norm", "nn.rms_norm")
SOFTMAXES = ("nn.softmax", "nn.log_softmax")


@tvm.transform.module_pass(opt_level=0, name="LowerNorms")
class LowerNorms:
    """Every float32 norm, softmax and reduction of ``main`` becomes a call of a kernel; one norm takes the residual and
    the activation behind it with it."""

    def __init__(self, machine: Machine | Gpu, threads: int, reasons: Reasons) -> None:
        self.machine, self.threads, self.reasons = machine, threads, reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        lowering = _Lowering(graph, self.machine, self.threads, self.reasons)
        if not lowering.found:
            return mod
        return relax.transform.DeadCodeElimination()(rewrite(mod, lowering.visit))


@dataclass
class NormSite:
    """A norm, and what its kernel takes over behind it: ``end`` is the last binding that it replaces."""

    start: relax.Var
    end: relax.Var
    residual: relax.Expr | None = None
    activation: str = ""


@dataclass
class _Lowering:
    graph: Graph
    machine: Machine | Gpu
    threads: int
    reasons: Reasons
    ends: dict[relax.Var, NormSite] = field(default_factory=dict)
    inside: set[relax.Var] = field(default_factory=set)
    #: What holds a widened value in half precision.
    halves: dict[relax.Expr, relax.Expr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found = any(self._is_ours(var) for var in self.graph.order)
        if isinstance(self.machine, Machine):
            for var in self.graph.order:
                if self.graph.op(var) in NORMS and self._is_ours(var):
                    site = self._site(var)
                    self.ends[site.end] = site

    def _is_ours(self, var: relax.Var) -> bool:
        name = self.graph.op(var)
        if name in EXTREMES and (not isinstance(self.machine, Machine) or 0 in shape_of(self.graph.call(var).args[0])):
            return False
        ours = name in (*REDUCTIONS, *EXTREMES, *NORMS, *SOFTMAXES)
        return ours and is_tensor(var) and dtype_of(var) == "float32"

    def _site(self, var: relax.Var) -> NormSite:
        """The norm that begins at ``var`` with what may be fused behind it."""
        site = NormSite(var, var)
        if isinstance(plan := _plan(self.graph.call(var), self.machine, self.threads), str):
            self.reasons.add(var, f"a norm in parts: {plan}")
            return site
        while not site.activation and (reader := self.graph.only_reader(site.end)) is not None:
            name = self.graph.op(reader)
            if reader in self.inside or reader in self.ends:  # another norm's: the sum of two
                break
            if not name or not is_tensor(reader) or shape_of(reader) != shape_of(var):
                break
            if name in FUSED_ACTIVATIONS:
                site.activation = FUSED_ACTIVATIONS[name]
            elif name != "add" or site.residual is not None or not self._take_residual(site, reader):
                break
            self.inside.add(site.end)
            site.end = reader
        chain = None if site.activation else activation_behind(self.graph, site.end)
        if chain is not None and not any(each in self.inside or each in self.ends for each in chain.bindings):
            site.activation = chain.activation
            self.inside.update([site.end, *chain.bindings[:-1]])
            site.end = chain.bindings[-1]
        return site

    def _take_residual(self, site: NormSite, reader: relax.Var) -> bool:
        left, right = self.graph.call(reader).args
        other = right if left.same_as(site.end) else left
        whole = isinstance(other, relax.Var) and is_tensor(other) and not other.same_as(site.end)
        if not whole or shape_of(other) != shape_of(reader) or dtype_of(other) != "float32":
            return False
        site.residual = other
        return True

    # -- rewriting ---------------------------------------------------------------------------------------------------

    def visit(
        self, builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, new: dict[relax.Var, relax.Expr]
    ) -> relax.Expr | None:
        if isinstance(self.machine, Machine) and widens(self.graph, var):
            wide = emit(builder, value, var.name)
            self.halves[wide] = value.args[0]
            return wide
        if var in self.inside:
            return value.args[0]  # computed with what is read behind it; itself never read
        if var in self.ends:
            site = self.ends[var]
            return self._norm(builder, substitute(self.graph.call(site.start), new), site, new)
        if not self._is_ours(var):
            return None
        name = self.graph.op(var)
        if name in NORMS:
            return self._by_parts(builder, value)
        if name in SOFTMAXES:
            return self._softmax(builder, value)
        data, squared = value.args[0], False
        if name in ("mean", "sum") and (root := self._squared(self.graph.call(var).args[0])) is not None:
            data, squared = substitute(root, new), True
        return self.reduce(builder, data, value.attrs.axis, name, bool(value.attrs.keepdims), squared)

    def _squared(self, expr: relax.Expr) -> relax.Expr | None:
        """What ``expr`` is the square of, if nothing else reads the square."""
        if not isinstance(expr, relax.Var) or expr not in self.graph.value or self.graph.only_reader(expr) is None:
            return None
        name, args = self.graph.op(expr), self.graph.call(expr).args if self.graph.op(expr) else []
        if name == "multiply" and args[0].same_as(args[1]):
            return args[0]
        if name == "square":
            return args[0]
        exponent = constant(args[1]) if name == "power" else None
        same = exponent is not None and exponent.size == 1 and float(exponent.reshape(())) == 2.0
        return args[0] if same and shape_of(args[0]) == shape_of(expr) else None

    def reduce(
        self,
        builder: relax.BlockBuilder,
        data: relax.Expr,
        axes: Any,
        kind: str,
        keepdims: bool,
        squared: bool = False,
    ) -> relax.Expr:
        """``data`` reduced over ``axes`` (None: all), one run of adjacent axes after the other, from the last on."""
        shape = shape_of(data)
        reduced = set(range(len(shape))) if axes is None else {int(axis) % len(shape) for axis in axes}
        runs = runs_of(shape, reduced)
        spans = [span for span in runs if span.reduced]
        if len(spans) > 1 and (kind in ("variance", "std") or squared):
            order = [*(axis for axis in range(len(shape)) if axis not in reduced), *sorted(reduced)]
            moved = builder.emit(relax.op.permute_dims(data, order))
            last = list(range(len(shape) - len(reduced), len(shape)))
            value = self.reduce(builder, moved, last, kind, False, squared)
            return builder.emit(relax.op.reshape(value, without(shape, reduced, keepdims)))
        if not spans:  # axes of extent 1 alone
            spans = [Span(True, len(shape), 1)]
        for span in reversed(spans):
            final = span is spans[0]
            out = without(shape, reduced, keepdims) if final else folded(shape_of(data), span)
            now = shape_of(data)
            fields = {
                "shape": now,
                "out_shape": out,
                "outer": math.prod(now[: span.first]),
                "reduced": math.prod(now[span.first : span.first + span.axes]),
                "inner": math.prod(now[span.first + span.axes :]),
                "statistic": kind,
                "squared": squared,
            }
            data = self.halves.get(data, data)
            if dtype_of(data) != FLOAT:
                fields["dtype"] = dtype_of(data)
            data = call_kernel(builder, self._reduction(fields), {"x": data}, self.threads)
        return data

    def _reduction(self, fields: dict[str, Any]) -> Reduction:
        """The machine's reduction."""
        machine = self.machine
        if isinstance(machine, Machine) and fields["statistic"] in EXTREMES:
            return VectorExtreme(**fields, vector_floats=machine.vector_floats)
        if isinstance(machine, Machine):
            return VectorReduction(**fields, vector_floats=machine.vector_floats, threads=self.threads)
        return BlockReduction(**fields)

    def _norm(
        self, builder: relax.BlockBuilder, call: relax.Call, site: NormSite, new: dict[relax.Var, relax.Expr]
    ) -> relax.Expr:
        plan = _plan(call, self.machine, self.threads)
        if isinstance(plan, str):
            return self._by_parts(builder, call)
        spec, scales = plan
        values = {"x": call.args[0]} | {name: relax.const(array) for name, array in scales.items()}
        if site.residual is not None:
            values["residual"] = substitute(site.residual, new)
        values = {name: self.halves.get(value, value) for name, value in values.items()}
        types: dict[str, Any] = {
            f"{name}_dtype": dtype_of(values[name]) for name in ("x", "residual") if name in values
        }
        spec = replace(spec, residual=site.residual is not None, activation=site.activation, **types)
        readers = self.graph.readers[site.end]
        if site.end in self.graph.outputs or not all(narrows(self.graph, reader) for reader in readers):
            return call_kernel(builder, spec, values, self.threads)
        half = call_kernel(builder, replace(spec, y_dtype=HALF), values, self.threads)
        return builder.emit(relax.op.astype(half, FLOAT))

    def _softmax(self, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        """One kernel; on a GPU exponentials of differences from the largest, beside their sum."""
        emit, op, data, axis, log = builder.emit, relax.op, call.args[0], int(call.attrs.axis), "log" in call.op.name
        if isinstance(self.machine, Machine) and 0 not in shape_of(data):
            shape, axis = shape_of(data), axis % len(shape_of(data))
            sizes = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
            data = self.halves.get(data, data)
            spec = Softmax(shape, *sizes, log, self.machine.vector_floats, dtype_of(data))
            return call_kernel(builder, spec, {"x": data}, self.threads)
        below = emit(op.subtract(data, emit(op.max(data, [axis], True))))
        raised = emit(op.exp(below))
        total = self.reduce(builder, raised, [axis], "sum", True)
        return emit(op.subtract(below, emit(op.log(total))) if log else op.divide(raised, total))

    def _by_parts(self, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        """A norm as mean, difference, mean of squares and product, each its own operator."""
        emit, op, attrs = builder.emit, relax.op, call.attrs
        data, shape = call.args[0], shape_of(call.args[0])
        form = form_of(call)
        if form.split is not None:
            data = emit(op.reshape(data, list(form.split)))
        if form.centred:
            data = emit(op.subtract(data, self.reduce(builder, data, form.axes, "mean", True)))
        # Only for the mean of squares: what is squared has other readers.
        variance = self.reduce(builder, data, form.axes, "mean", True, squared=True)
        inverse = emit(op.rsqrt(emit(op.add(variance, relax.const(float(attrs.epsilon), "float32")))))
        result = emit(op.multiply(data, inverse))
        if form.split is not None:
            result = emit(op.reshape(result, list(shape)))
        for operator, values in _scale_and_shift(call):
            if list(form.affine) != list(shape_of(values)):
                values = emit(op.reshape(values, list(form.affine)))
            result = emit(operator(result, values))
        return result


def _scale_and_shift(call: relax.Call) -> list[tuple[Callable[..., relax.Expr], relax.Expr]]:
    """What is done to the normalised values: multiply by gamma, add beta, where the norm has them."""
    operators = [relax.op.multiply, relax.op.add]
    flags = [getattr(call.attrs, "scale", True), getattr(call.attrs, "center", True)]
    return [(op, values) for op, values, has in zip(operators, call.args[1:], flags, strict=False) if has]


def _plan(call: relax.Call, machine: Machine | Gpu, threads: int) -> tuple[Norm, dict[str, np.ndarray]] | str:
    """The one kernel that does this norm, and gamma and beta as it reads them; or why there is none."""
    if not isinstance(machine, Machine):
        return "GPUs have no kernel of whole norms"
    form, shape = form_of(call), shape_of(call.args[0])
    given = {operator: constant(values) for operator, values in _scale_and_shift(call)}
    if any(value is None for value in given.values()):
        return "its scale or shift is not constant"
    size = math.prod(form.affine)
    gamma, beta = given.get(relax.op.multiply, np.ones(size)), given.get(relax.op.add, np.zeros(size))
    assert gamma is not None
    assert beta is not None
    named = {"gamma": gamma, "beta": beta}
    scales = {name: np.ascontiguousarray(value, "float32").reshape(-1) for name, value in named.items()}
    if (scales["gamma"] == 1).all() and not scales["beta"].any():
        scales = {}
    seen = seen_as(form, shape, threads, size if scales else 0)
    if seen is None:
        return "what it normalises lies in no rows or lanes that the kernel walks"
    spec = Norm(
        shape,
        seen.outer,
        seen.rows,
        seen.lanes,
        seen.group,
        float(call.attrs.epsilon),
        machine.vector_floats,
        threads,
        seen.affine,
        size if scales else 0,
        form.centred,
    )
    return spec, scales
