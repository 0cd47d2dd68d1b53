"""Join small kernels that can run one after the other into one function.

A network that decides per clip has dozens of operators of a few hundred elements: pooled statistics, comparisons,
masks, index lists. Calling each costs more than its work does. Kernels that count as layers stay
calls of their own, so that a run can still be reported layer by layer.
"""

from __future__ import annotations

import json
import math
from typing import Any

import tvm
from tvm import relax, s_tir, tirx

from dance_tvm.ir.graph import Graph, emit, is_tensor, substitute, variables
from dance_tvm.ir.reasons import Reasons
from dance_tvm.schedules.emit import OPAQUE
from dance_tvm.schedules.kernel import DESCRIPTION, FREE_CHOICE, LAYER, PLANNER, described

#: A call that reads and writes at most this many elements is small: that much takes about as long as calling it.
SMALL_ELEMENTS = 65536
#: Bytes to which a tensor is aligned where a kernel does not say otherwise.
ALIGNMENT = 64
#: Most calls of one function: compiling it takes longer than in proportion to its length.
MOST_JOINED = 16


@tvm.transform.module_pass(opt_level=0, name="JoinSmall")
class JoinSmall:
    """Reorder the bindings of ``main`` so that small calls stand together, and make one function of each group."""

    def __init__(self, reasons: Reasons) -> None:
        self.reasons = reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        others = {gvar: func for gvar, func in mod.functions_items() if gvar.name_hint != "main"}
        builder = relax.BlockBuilder(tvm.IRModule(others))
        joining = _Joining(builder, Graph.of(mod["main"]), self.reasons)
        joining.emit(mod["main"])
        joined = relax.transform.FuseTIR()(builder.finalize())
        for gvar, func in joined.functions_items():
            if isinstance(func, tirx.PrimFunc):
                joined[gvar] = func.with_attr("tirx.is_scheduled", True)
        for name, description in joining.descriptions.items():
            joined[name] = joined[name].with_attr(DESCRIPTION, json.dumps(description))
        return relax.transform.DeadCodeElimination()(joined)


class _Joining:
    """One walk over ``main``."""

    def __init__(self, builder: relax.BlockBuilder, graph: Graph, reasons: Reasons) -> None:
        self.builder, self.graph, self.reasons = builder, graph, reasons
        self.new: dict[relax.Expr, relax.Expr] = {}
        self.small = {var for var in graph.order if self._is_small(var)}
        self.descriptions: dict[str, dict[str, Any]] = {}  # of the functions made here, by their names

    def emit(self, main: relax.Function) -> None:
        params = [relax.Var(param.name, param.ty) for param in main.params]
        self.new.update(zip(main.params, params, strict=True))
        with self.builder.function("main", params, attrs=dict(main.attrs or {})):
            with self.builder.dataflow():
                for group in self._groups():
                    if sum(map(self._is_call, group)) > 1:
                        self._emit_joined(group)
                    else:
                        self._emit_each(group)
                result = self.builder.emit_output(substitute(self.graph.output, self.new))
            self.builder.emit_func_output(result)

    def _is_small(self, var: relax.Var) -> bool:
        value = self.graph.value[var]
        if isinstance(value, relax.TupleGetItem):
            return isinstance(value.tuple_value, relax.Var) and self._is_small(value.tuple_value)
        if self.graph.op(var) != "call_tir":
            return False
        description = described(self.builder.get()[value.args[0]])
        if description is not None and description["kind"] in (LAYER, FREE_CHOICE):
            return False
        results = var.ty.fields if isinstance(var.ty, relax.TupleType) else [var.ty]
        small = sum(map(_elements, [*(read.ty for read in value.args[1].fields), *results])) <= SMALL_ELEMENTS
        if small and not all(map(_is_whole, self.builder.get()[value.args[0]].params)):
            self.reasons.add(
                var, "a small call of its own: its kernel reads at an offset or stride that a caller gives"
            )
            return False
        return small

    def _is_call(self, var: relax.Var) -> bool:
        return not isinstance(self.graph.value[var], relax.TupleGetItem)

    def _groups(self) -> list[list[relax.Var]]:
        """The bindings in an order in which each comes after what it reads: large ones alone, in the order they had,
        and before one that waits for small ones, all small ones that are ready."""
        groups = []
        done = set(self.graph.params)
        waiting = list(self.graph.order)
        while waiting:
            large = next((var for var in waiting if var not in self.small), None)
            ready_large = large is not None and done.issuperset(variables(self.graph.value[large]))
            group = [large] if ready_large else self._ready(waiting, done)
            groups.append(group)
            done.update(group)
            waiting = [var for var in waiting if var not in done]
        return groups

    def _ready(self, waiting: list[relax.Var], done: set[relax.Var]) -> list[relax.Var]:
        """Small bindings that can be computed one after the other now; results of a call stay with it."""
        group: list[relax.Var] = []
        known, room = set(done), MOST_JOINED
        for var in waiting:
            if var in self.small and known.issuperset(variables(self.graph.value[var])):
                room -= self._is_call(var)
                if room >= 0 or not self._is_call(var):
                    group.append(var)
                    known.add(var)
        return group

    def _emit_each(self, group: list[relax.Var]) -> None:
        for var in group:
            self.new[var] = emit(self.builder, substitute(self.graph.value[var], self.new), var.name)

    def _emit_joined(self, group: list[relax.Var]) -> None:
        group = self._with_every_result(group)
        members = set(group)
        given = [read for var in group for read in _reads(self.graph.value[var]) if read not in members]
        given = list(dict.fromkeys(given))
        left = [var for var in group if is_tensor(var) and self._is_left(var, members)]
        callee = self._function(group, given, left)
        self.descriptions[callee.name_hint] = self._description(group)
        call = self.builder.emit(relax.Call(callee, [substitute(read, self.new) for read in given]), name_hint="small")
        for index, var in enumerate(left):
            one = len(left) == 1
            self.new[var] = call if one else emit(self.builder, relax.TupleGetItem(call, index), var.name)

    def _description(self, group: list[relax.Var]) -> dict[str, Any]:
        """What is known of the joined function: the kernels that it runs in order. It plans if any of them does."""
        called = [self.builder.get()[self.graph.value[var].args[0]] for var in group if self._is_call(var)]
        parts = [part for part in map(described, called) if part is not None]
        kind = PLANNER if any(part["kind"] == PLANNER for part in parts) else "other"
        return {"kind": kind, "parts": [part["name"] for part in parts]}

    def _with_every_result(self, group: list[relax.Var]) -> list[relax.Var]:
        """``group``, and a name for each unread result of a kernel written by hand."""
        named = []
        for var in group:
            named.append(var)
            if isinstance(var.ty, relax.TupleType) and self._is_opaque(var):
                read = {self.graph.value[reader].index for reader in self.graph.readers[var]}
                for index, kind in enumerate(var.ty.fields):
                    if index not in read:
                        unread = relax.DataflowVar("unread", kind)
                        self.graph.value[unread] = relax.TupleGetItem(var, index)
                        self.graph.readers[unread] = []
                        named.append(unread)
        return named

    def _is_left(self, var: relax.Var, members: set[relax.Var]) -> bool:
        """Whether ``var`` becomes a result of the joined function rather than memory of its own.

        Kernels written by hand see whole tensors as one dimension, and TVM overlooks what is read or written through
        such a view: it would give the memory to another tensor too soon, or cut it down to what it sees being read.
        """
        readers = self.graph.readers[var]
        if var in self.graph.outputs or any(reader not in members for reader in readers):
            return True
        return any(map(self._is_opaque, [self._call(var), *(reader for reader in readers if self._is_call(reader))]))

    def _call(self, var: relax.Var) -> relax.Var:
        """The binding of the call that ``var`` is a result of."""
        value = self.graph.value[var]
        return value.tuple_value if isinstance(value, relax.TupleGetItem) else var

    def _is_opaque(self, var: relax.Var) -> bool:
        """Whether ``var`` calls a kernel written by hand."""
        attrs = self.builder.get()[self.graph.value[var].args[0]].attrs
        return bool(attrs and int(attrs.get("op_pattern", 0)) == OPAQUE)

    def _function(self, group: list[relax.Var], given: list[relax.Expr], left: list[relax.Var]) -> tvm.ir.GlobalVar:
        """The group as a function of what it is given, which FuseTIR makes one kernel of."""
        params = [relax.Var(f"given{place}", read.ty) for place, read in enumerate(given)]
        inner: dict[relax.Expr, relax.Expr] = dict(zip(given, params, strict=True))
        bindings = []
        called: set[tvm.ir.GlobalVar] = set()
        for var in group:
            value = substitute(self.graph.value[var], inner)
            if self._is_call(var):
                value = self._called_once(value, called)
            inner[var] = relax.DataflowVar(var.name, var.ty)
            bindings.append(relax.VarBinding(inner[var], value))
        one = len(left) == 1
        result = inner[left[0]] if one else relax.Tuple([inner[var] for var in left])
        out = relax.Var("out", left[0].ty if one else relax.TupleType([var.ty for var in left]))
        bindings.append(relax.VarBinding(out, result))
        body = relax.SeqExpr([relax.DataflowBlock(bindings)], out)
        attrs = tvm.ir.make_node("ir.DictAttrs", Primitive=True)
        return self.builder.add_func(relax.Function(params, body, out.ty, attrs=attrs), "small_operators")

    def _called_once(self, call: relax.Call, called: set[tvm.ir.GlobalVar]) -> relax.Call:
        """``call`` with a copy of a function that the group calls already: the buffers of a body are defined once."""
        callee = call.args[0]
        if callee in called:
            copy = s_tir.renew_defs(self.builder.get()[callee]).with_attr("copy", len(called))
            callee = self.builder.add_func(copy, callee.name_hint)
        called.add(callee)
        return relax.Call(call.op, [callee, *call.args[1:]], call.attrs, call.ty_args)


def _reads(value: relax.Expr) -> list[relax.Expr]:
    """Variables and constants that a call or the choice of one of its results reads."""
    return [value.tuple_value] if isinstance(value, relax.TupleGetItem) else list(value.args[1].fields)


def _is_whole(param: tirx.Var) -> bool:
    """Whether a kernel takes a tensor as it lies from its beginning, aligned as all are; FuseTIR hands on no other
    (scatter reads at an offset that its caller would give)."""
    kind = param.ty
    if not isinstance(kind, tirx.BufferType):
        return True
    whole = not kind.strides and isinstance(kind.elem_offset, tirx.IntImm) and kind.data_alignment == ALIGNMENT
    return whole and all(str(extent.ty) == "int64" for extent in kind.shape)


def _elements(kind: relax.TensorType) -> float:
    return (
        math.prod(int(extent) for extent in kind.shape.values) if isinstance(kind.shape, relax.ShapeExpr) else math.inf
    )
