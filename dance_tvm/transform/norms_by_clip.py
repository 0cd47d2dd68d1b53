"""Undo the view through which PyTorch exports instance norm: clips as channels of one clip."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, Shape, constant, rewrite, shape_of, substitute
from dance_tvm.ir.reasons import Reasons

CLIP_NORMS = ("nn.instance_norm", "nn.batch_norm")


@tvm.transform.module_pass(opt_level=0, name="NormsByClip")
class NormsByClip:
    """``reshape(norm(reshape(x, (1, N·C, …)), gamma repeated N times, …), (N, C, …))`` is a norm of ``x`` itself.

    A batch norm by the batch's own statistics is an instance norm over the clips too."""

    def __init__(self, reasons: Reasons) -> None:
        self.reasons = reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])

        def visit(
            builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr | None:
            if graph.op(var) == "reshape" and (found := _norm_of_view(graph, var, self.reasons)) is not None:
                call, source, scales, axes = found
                data = substitute(source, new)
                return builder.emit(_norm(builder, call, data, [relax.const(each) for each in scales], axes))
            if isinstance(value, relax.TupleGetItem) and (call := _training(graph, var)) is not None:
                data, gamma, beta = (substitute(arg, new) for arg in call.args[:3])
                rank, channel = len(shape_of(data)), int(call.attrs.axis)
                axes = [axis for axis in range(rank) if axis != channel]
                return builder.emit(_instance_norm(data, gamma, beta, channel, axes, call))
            return None

        return relax.transform.DeadCodeElimination()(rewrite(mod, visit))


def _training(graph: Graph, var: relax.Var) -> relax.Call | None:
    """The batch norm by the batch's own statistics whose first result ``var`` is."""
    value = graph.value[var]
    if value.index != 0 or graph.op(value.tuple_value) != "nn.batch_norm":
        return None
    call = graph.call(value.tuple_value)
    return call if call.attrs.training else None


def _norm_of_view(
    graph: Graph, var: relax.Var, reasons: Reasons
) -> tuple[relax.Call, relax.Expr, list[np.ndarray], list[int]] | None:
    """For a view back of a norm of a view: the norm, what is normalised, parameters by channel, and axes."""
    shape, inner = shape_of(var), graph.call(var).args[0]
    if len(shape) < 3:
        return None
    value = graph.value.get(inner) if isinstance(inner, relax.Var) else None
    if isinstance(value, relax.TupleGetItem) and value.index == 0:
        value = graph.value.get(value.tuple_value)
    name = "" if value is None else graph.op(value)
    if value is None or name not in CLIP_NORMS or (name == "nn.batch_norm" and value.attrs.training):
        return None
    channel = int(value.attrs.axis if name == "nn.batch_norm" else value.attrs.channel_axis)
    view = value.args[0]
    if channel != 1 or graph.op(view) != "reshape" or shape_of(view) != (1, shape[0] * shape[1], *shape[2:]):
        return None
    source = graph.call(view).args[0]
    if shape_of(source) != shape:
        return None
    rank = len(shape)
    axes = list(range(2, rank))
    if name == "nn.instance_norm" and sorted(int(axis) % rank for axis in value.attrs.axes) != [0, *axes]:
        reasons.add(var, "a norm of clips seen as channels: it goes over other axes than the volume's")
        return None
    scales = [_one_clip(constant(arg), shape) for arg in value.args[1:]]
    known = [each for each in scales if each is not None]
    if len(known) < len(scales):
        reasons.add(var, "a norm of clips seen as channels: its parameters differ from clip to clip")
        return None
    return value, source, known, axes


def _one_clip(values: np.ndarray | None, shape: Shape) -> np.ndarray | None:
    """The channels' parameters if they are the same for each clip."""
    if values is None:
        return None
    by_clip = values.reshape(shape[0], shape[1])
    return np.ascontiguousarray(by_clip[0]) if (by_clip == by_clip[0]).all() else None


def _norm(
    builder: relax.BlockBuilder, call: relax.Call, data: relax.Expr, scales: list[relax.Expr], axes: list[int]
) -> relax.Expr:
    if len(scales) == 2:
        return _instance_norm(data, scales[0], scales[1], 1, axes, call)
    fields = {"axis": 1, "epsilon": float(call.attrs.epsilon), "training": False}
    flags = {key: bool(getattr(call.attrs, key)) for key in ("center", "scale")}
    return relax.TupleGetItem(builder.emit(relax.op.nn.batch_norm(data, *scales, **fields, **flags)), 0)


def _instance_norm(
    data: relax.Expr, gamma: relax.Expr, beta: relax.Expr, channel: int, axes: list[int], call: relax.Call
) -> relax.Expr:
    flags = {key: bool(getattr(call.attrs, key)) for key in ("center", "scale")}
    return relax.op.nn.instance_norm(data, gamma, beta, channel, axes, float(call.attrs.epsilon), **flags)
