"""Zeros that a network puts around a convolution's input become the convolution's own padding."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, emit, replace_each, shape_of, substitute
from dance_tvm.ir.reasons import Reasons

CONVOLUTIONS = {f"nn.conv{rank}d" for rank in (1, 2, 3)}


@tvm.transform.module_pass(opt_level=0, name="FoldPads")
class FoldPads:
    """``conv(pad(x))`` becomes ``conv(x)`` with more padding: kernels pass over taps outside the clip, where a copy
    with zeros around it costs as much as reading it. Channels first."""

    def __init__(self, reasons: Reasons) -> None:
        self.reasons = reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        folded = {var: pads for var in graph.order if (pads := _zeros_before(graph, var, self.reasons)) is not None}

        def make(
            builder: relax.BlockBuilder, var: relax.Var, pads: _Zeros, new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr:
            call, attrs = graph.call(var), graph.call(var).attrs
            given = [int(width) for width in attrs.padding]
            geometry = {key: [int(extent) for extent in getattr(attrs, key)] for key in ("strides", "dilation")}
            layouts = {key: str(getattr(attrs, key)) for key in ("data_layout", "kernel_layout", "out_layout")}
            convolution = getattr(relax.op.nn, graph.op(var).removeprefix("nn."))(
                substitute(pads.source, new),
                substitute(call.args[1], new),
                padding=[more + own for more, own in zip(pads.widths, given, strict=True)],
                groups=int(attrs.groups),
                **geometry,
                **layouts,
            )
            return emit(builder, convolution, var.name)

        return replace_each(mod, folded, make)


@dataclass(frozen=True)
class _Zeros:
    """What zeros lie around, and how many: before the first of each axis, then behind the last."""

    source: relax.Expr
    widths: list[int]


def _zeros_before(graph: Graph, var: relax.Var, reasons: Reasons) -> _Zeros | None:
    """The zeros around the input of ``var``, a convolution; None where there are none or they are not padding."""
    if graph.op(var) not in CONVOLUTIONS:
        return None
    call = graph.call(var)
    data, rank = call.args[0], len(shape_of(call.args[0]))
    if graph.op(data) != "nn.pad" or not str(call.attrs.data_layout).startswith("NC"):
        return None
    attrs = graph.call(data).attrs
    widths = [int(width) for width in attrs.pad_width]
    if why := _why_no_padding(str(attrs.pad_mode), float(attrs.pad_value), widths):
        reasons.add(var, f"the padding before it stays a copy: {why}")
        return None
    return _Zeros(graph.call(data).args[0], [widths[2 * axis + side] for side in (0, 1) for axis in range(2, rank)])


def _why_no_padding(mode: str, value: float, widths: list[int]) -> str:
    """Why a pad cannot be a convolution's own padding; empty if it can."""
    if mode != "constant":
        return f"its mode is {mode}, and a convolution pads with zeros"
    if value != 0:
        return f"it is {value:g}, and a convolution pads with zeros"
    if any(widths[:4]):
        return "it adds clips or channels"
    return "it cuts off what lies at the edges" if min(widths) < 0 else ""
