"""Fold inference batch norm into the convolution before it, so that no pass has to look through it."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, emit, emit_as, lies_along, replace_each, shape_of, substitute, value_of
from dance_tvm.ir.reasons import Reasons
from dance_tvm.ir.transposed import TRANSPOSED

CONVOLUTIONS = ("nn.conv1d", "nn.conv2d", "nn.conv3d")
#: A convolution and the bias added to it.
_Convolution = tuple[relax.Var, np.ndarray]


@tvm.transform.module_pass(opt_level=0, name="FoldBatchNorm")
class FoldBatchNorm:
    """``bn(conv(x, W) + b)`` becomes ``conv(x, W · s) + (b − mean) · s + beta`` with ``s = gamma / √(var + ε)``.

    A batch norm that does not follow a convolution read by it alone becomes a multiply and an add by constants.
    """

    def __init__(self, reasons: Reasons) -> None:
        self.reasons = reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        norms = {var: call for var in graph.order if (call := _batch_norm(graph, var, self.reasons)) is not None}
        folded: dict[relax.Var, _Convolution] = {}
        for var, call in norms.items():
            found = _convolution_before(graph, call)
            if isinstance(found, str):
                self.reasons.add(var, f"a batch norm apart from convolutions: {found}")
            else:
                folded[var] = found

        def make(
            builder: relax.BlockBuilder, var: relax.Var, call: relax.Call, new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr:
            scale, shift = _scale_and_shift(call)
            if var not in folded:
                source = substitute(call.args[0], new)
                scaled = builder.emit(relax.op.multiply(source, _per_channel(scale, source, call)))
                return emit(builder, relax.op.add(scaled, _per_channel(shift, source, call)), var.name)
            conv_var, bias = folded[var]
            conv = graph.call(conv_var)
            weight = value_of(conv.args[1])
            channels = 1 if graph.op(conv_var) in TRANSPOSED else 0
            lies = [-1 if axis == channels else 1 for axis in range(weight.ndim)]
            scaled_weight = (weight * scale.reshape(lies)).astype(weight.dtype)
            data = substitute(conv.args[0], new)
            conv_call = relax.Call(conv.op, [data, relax.const(scaled_weight)], conv.attrs)
            result = emit_as(builder, conv_call, conv_var.name)
            total = bias * scale + shift
            return emit(builder, relax.op.add(result, _per_channel(total, result, call)), var.name)

        return replace_each(mod, norms, make)


def _batch_norm(graph: Graph, var: relax.Var, reasons: Reasons) -> relax.Call | None:
    """The batch norm whose first result ``var`` is, if all its parameters are constants."""
    value = graph.value[var]
    if not isinstance(value, relax.TupleGetItem) or value.index != 0:
        return None
    source = value.tuple_value
    call = graph.value.get(source) if isinstance(source, relax.Var) else source
    if call is None or graph.op(call) != "nn.batch_norm":
        return None
    if any(constant(arg) is None for arg in call.args[1:]):
        reasons.add(var, "a batch norm of its own: its parameters are not constant")
        return None
    return call


def _convolution_before(graph: Graph, call: relax.Call) -> _Convolution | str:
    """The convolution that only this batch norm reads, and the bias added between them; or why there is none."""
    var = call.args[0]
    bias: np.ndarray = np.zeros(1)
    if graph.op(var) == "add":
        left, right = graph.call(var).args
        conv, other = (left, right) if constant(left) is None else (right, left)
        added = constant(other)
        if added is None or not lies_along(added.shape, shape_of(var), 1) or shape_of(conv) != shape_of(var):
            return "it follows a sum that is not a convolution's bias"
        if not _read_once(graph, var):
            return "what it normalises has other readers"
        bias, var = added.reshape(-1).astype("float64"), conv
    if int(call.attrs.axis) % len(shape_of(var)) != 1:
        return "its channels are not the second axis"
    if graph.op(var) not in CONVOLUTIONS and not (
        graph.op(var) in TRANSPOSED and int(graph.call(var).attrs.groups) == 1
    ):
        return "it does not follow a convolution, or a transposed one of one group"
    if not _read_once(graph, var):
        return "what it normalises has other readers"
    if constant(graph.call(var).args[1]) is None:
        return "the convolution's weights are not constant"
    return var, bias


def _read_once(graph: Graph, var: relax.Expr) -> bool:
    return isinstance(var, relax.Var) and graph.only_reader(var) is not None


def _scale_and_shift(call: relax.Call) -> tuple[np.ndarray, np.ndarray]:
    gamma, beta, mean, variance = (value_of(arg).astype("float64") for arg in call.args[1:])
    scale = 1 / np.sqrt(variance + float(call.attrs.epsilon))
    if call.attrs.scale:
        scale = scale * gamma
    shift = -mean * scale
    return scale, shift + beta if call.attrs.center else shift


def _per_channel(values: np.ndarray, data: relax.Expr, call: relax.Call) -> relax.Expr:
    """A constant that broadcasts along the channel axis of ``data``."""
    shape = [1] * len(shape_of(data))
    shape[int(call.attrs.axis)] = -1
    return relax.const(values.astype("float32").reshape(shape))
