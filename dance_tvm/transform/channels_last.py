"""Put channels innermost throughout the network; layouts change only at its edges."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, emit, is_tensor, literal, rewrite, shape_of
from dance_tvm.ir.reasons import Reasons
from dance_tvm.ir.transposed import TRANSPOSED, takes_kernel
from dance_tvm.liveness.rules import ELEMENTWISE

from .choose_layouts import planar

NORMS = {"nn.instance_norm", "nn.group_norm", "nn.layer_norm", "nn.rms_norm"}
SOFTMAXES = {"nn.softmax", "nn.log_softmax"}
REDUCTIONS = {"mean", "sum", "max", "min", "prod", "std", "variance"}
WINDOWS = {
    *("nn.conv2d", "nn.conv3d", "nn.max_pool2d", "nn.max_pool3d", "nn.avg_pool2d", "nn.avg_pool3d"),
    *("nn.adaptive_avg_pool2d", "nn.adaptive_avg_pool3d"),
}
LAYOUTS = {4: ("NCHW", "NHWC"), 5: ("NCDHW", "NDHWC")}


@tvm.transform.module_pass(opt_level=0, name="ChannelsLast")
class ChannelsLast:
    """Convolutions, pools, elementwise operators, reductions and concatenations run with channels innermost; with
    ``planar``, parts of the network that have kernels for channels first keep the source's layout
    (:mod:`.choose_layouts`)."""

    def __init__(self, reasons: Reasons, planar: bool = False) -> None:
        self.reasons, self.planar = reasons, planar

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        layouts = _Layouts(planar(graph, self.reasons) if self.planar else set())
        return relax.transform.CanonicalizeBindings()(rewrite(mod, layouts.visit))


class _Layouts:
    """The rewrite's state: for each old variable, its value with channels innermost (where there is one). ``kept`` are
    those that keep channels first."""

    def __init__(self, kept: set[relax.Var]) -> None:
        self.kept = kept
        self.last: dict[relax.Expr, relax.Expr] = {}
        self.first: dict[relax.Expr, relax.Expr] = {}

    def visit(
        self,
        builder: relax.BlockBuilder,
        var: relax.Var,
        value: relax.Expr,
        _new: dict[relax.Var, relax.Expr],
    ) -> relax.Expr | None:
        # Values arrive with channels first: `first` of a variable is made on demand and dropped again if unread.
        if var in self.kept or not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            return None
        name = value.op.name.removeprefix("relax.")
        if name == "permute_dims" and (moved := self._moved(builder, var, value)) is not None:
            return moved
        result = self._in_last(builder, name, value)
        if result is None:
            return None
        result = emit(builder, result, var.name)
        if not is_tensor(result) or len(shape_of(result)) not in LAYOUTS or _keeps_first(name, value):
            return result
        first = builder.emit(relax.op.permute_dims(result, _to_first(len(shape_of(result)))))
        self.last[first] = result
        return first

    def _moved(self, builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        """A network's own change between the two layouts, remembered, or undone where it was made here or before."""
        data, axes = call.args[0], [int(axis) for axis in call.attrs.axes or ()]
        if len(axes) not in LAYOUTS:
            return None
        if axes == _to_last(len(axes)):
            return self.last.get(data)
        if axes != _to_first(len(axes)):
            return None
        first = emit(builder, call, var.name)
        self.last[first] = data
        return first

    def _in_last(self, builder: relax.BlockBuilder, name: str, call: relax.Call) -> relax.Expr | None:
        """The call with channels innermost, or None where it is left alone."""
        if name in WINDOWS or (name in TRANSPOSED and takes_kernel(call)):
            return self._window(builder, call)
        tensors = _tensor_arguments(call)
        if not any(arg in self.last for arg in tensors):
            return None
        if name in ELEMENTWISE:
            return self._elementwise(builder, call)
        if name in REDUCTIONS:
            return self._reduction(builder, call)
        if name in NORMS:
            return self._norm(builder, name, call)
        if name in SOFTMAXES:
            data = call.args[0]
            softmax = getattr(relax.op.nn, name.removeprefix("nn."))
            return softmax(self._to_last(builder, data), _axis_in_last(int(call.attrs.axis), len(shape_of(data))))
        if name == "strided_slice":
            data, axes, *rest = call.args
            moved = [_axis_in_last(int(axis.value), len(shape_of(data))) for axis in axes.fields]
            return relax.op.strided_slice(self._to_last(builder, data), moved, *rest)
        if name == "take":
            return self._take(builder, call)
        if name == "nn.pad":
            return self._pad(builder, call)
        if name == "concat":
            rank = len(shape_of(tensors[0]))
            items = [self._to_last(builder, item) for item in tensors]
            return relax.op.concat(items, _axis_in_last(int(call.attrs.axis), rank))
        return None

    def _to_last(self, builder: relax.BlockBuilder, expr: relax.Expr) -> relax.Expr:
        if expr in self.last:
            return self.last[expr]
        rank = len(shape_of(expr))
        if isinstance(expr, tvm.ir.GenericConst):
            return literal(expr.value.numpy().transpose(_to_last(rank)).copy())
        self.last[expr] = builder.emit(relax.op.permute_dims(expr, _to_last(rank)))
        return self.last[expr]

    def _window(self, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        data = self._to_last(builder, call.args[0])
        return window_call(call, data, call.args[1:], LAYOUTS[len(shape_of(data))][1])

    def _elementwise(self, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        rank = max(len(shape_of(arg)) for arg in _tensor_arguments(call))
        args = []
        for arg in call.args:
            if isinstance(arg.ty, relax.TensorType) and len(shape_of(arg)) not in (0, rank):
                arg = emit(builder, relax.op.reshape(arg, [1] * (rank - len(shape_of(arg))) + list(shape_of(arg))))
            is_full = isinstance(arg.ty, relax.TensorType) and len(shape_of(arg)) == rank
            args.append(self._to_last(builder, arg) if is_full else arg)
        return relax.Call(call.op, args, call.attrs)

    def _norm(self, builder: relax.BlockBuilder, name: str, call: relax.Call) -> relax.Expr | None:
        data, attrs = call.args[0], call.attrs
        if data not in self.last:
            return None
        rank = len(shape_of(data))
        given = sorted(int(axis) % rank for axis in attrs.axes)
        axes, scales = [_axis_in_last(axis, rank) for axis in given], list(call.args[1:])
        fields: dict[str, Any] = {"axes": sorted(axes), "epsilon": float(attrs.epsilon)}
        if name in ("nn.instance_norm", "nn.group_norm"):
            fields["channel_axis"] = _axis_in_last(int(attrs.channel_axis), rank)
        elif axes != sorted(axes):  # gamma and beta lie as the axes do
            order = sorted(range(len(axes)), key=axes.__getitem__)
            scales = [emit(builder, relax.op.permute_dims(values, order)) for values in scales]
        if name != "nn.rms_norm":
            fields |= {key: bool(getattr(attrs, key)) for key in ("center", "scale")}
        if name == "nn.group_norm":
            fields["num_groups"] = int(attrs.num_groups)
        return getattr(relax.op.nn, name.removeprefix("nn."))(self.last[data], *scales, **fields)

    def _take(self, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr | None:
        """A read at constant places of one axis, as resampling has it."""
        data, places = call.args
        known, axis = constant(places), call.attrs.axis
        if data not in self.last or known is None or known.ndim != 1 or axis is None:
            return None
        moved = _axis_in_last(int(axis), len(shape_of(data)))
        return relax.op.take(self._to_last(builder, data), places, moved, str(call.attrs.mode))

    def _pad(self, builder: relax.BlockBuilder, call: relax.Call) -> relax.Call:
        data, attrs = call.args[0], call.attrs
        widths = [int(width) for width in attrs.pad_width]
        moved = [width for axis in _to_last(len(shape_of(data))) for width in widths[2 * axis : 2 * axis + 2]]
        return relax.op.nn.pad(self._to_last(builder, data), moved, str(attrs.pad_mode), float(attrs.pad_value))

    def _reduction(self, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        data = call.args[0]
        rank = len(shape_of(data))
        axes = call.attrs.axis
        axes = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes]
        in_last = [_axis_in_last(axis, rank) for axis in axes]
        reduce = getattr(relax.op, call.op.name.removeprefix("relax."))
        reduced = reduce(self._to_last(builder, data), in_last, bool(call.attrs.keepdims))
        if call.attrs.keepdims:
            return reduced
        kept_last = [axis for axis in _to_last(rank) if axis not in axes]
        order = [kept_last.index(axis) for axis in sorted(kept_last)]
        reduced = builder.emit(reduced)
        return reduced if order == sorted(order) else relax.op.permute_dims(reduced, order)


def _keeps_first(name: str, call: relax.Call) -> bool:
    """Whether a result, though of rank 4 or 5, is not an activation in either layout."""
    return name in REDUCTIONS and not call.attrs.keepdims


def _tensor_arguments(call: relax.Call) -> list[relax.Expr]:
    flat: list[relax.Expr] = []
    for arg in call.args:
        flat += list(arg.fields) if isinstance(arg, relax.Tuple) else [arg]
    return [arg for arg in flat if isinstance(arg.ty, relax.TensorType) and is_tensor(arg)]


def _to_last(rank: int) -> list[int]:
    return [0, *range(2, rank), 1]


def _to_first(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def _axis_in_last(axis: int, rank: int) -> int:
    return _to_last(rank).index(axis % rank)


def window_call(call: relax.Call, data: relax.Expr, weights: list[relax.Expr], layout: str) -> relax.Call:
    """The same convolution or pool on ``data`` in ``layout``."""
    attrs = call.attrs
    operator = getattr(relax.op.nn, call.op.name.rsplit(".", 1)[1])
    if "conv" in call.op.name:
        geometry = {key: list(getattr(attrs, key)) for key in ("strides", "padding", "dilation")}
        layouts = {"data_layout": layout, "kernel_layout": attrs.kernel_layout, "out_layout": layout}
        if "transpose" in call.op.name:
            geometry["output_padding"] = list(attrs.output_padding)
        return operator(data, *weights, **geometry, groups=int(attrs.groups), **layouts)
    if "adaptive" in call.op.name:
        size = None if attrs.output_size is None else [int(extent) for extent in attrs.output_size]
        return operator(data, size, layout, layout)
    geometry = {key: list(getattr(attrs, key)) for key in ("pool_size", "strides", "padding", "dilation")}
    flags = {key: bool(getattr(attrs, key)) for key in ("ceil_mode", "count_include_pad")}
    return operator(data, **geometry, **flags, layout=layout, out_layout=layout)
