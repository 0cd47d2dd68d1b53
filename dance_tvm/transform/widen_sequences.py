"""Give sequences (N, C, T) a height of one: operators along one axis become those of pictures, which have kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, emit, is_tensor, literal, rewrite, shape_of
from dance_tvm.liveness.rules import ELEMENTWISE

_CONVOLUTIONS = {"nn.conv1d": relax.op.nn.conv2d, "nn.conv1d_transpose": relax.op.nn.conv2d_transpose}
_POOLS = {"nn.max_pool1d": relax.op.nn.max_pool2d, "nn.avg_pool1d": relax.op.nn.avg_pool2d}
_NORMS = {"nn.instance_norm": relax.op.nn.instance_norm, "nn.group_norm": relax.op.nn.group_norm}
_REDUCTIONS = {"mean", "sum", "max", "min"}
#: Where the height is.
_AXIS = 2
#: Sequences with channels innermost (N, T, C), and pictures.
_SWAPPED, _TO_LAST, _TO_FIRST = [0, 2, 1], [0, 2, 3, 1], [0, 3, 1, 2]


@tvm.transform.module_pass(opt_level=0, name="WidenSequences")
class WidenSequences:
    """Rewrite convolutions and pools along one axis, and what lies between them: elementwise operators, norms,
    reductions, and what reads or joins parts."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main`` if it has any convolution along one axis."""
        graph = Graph.of(mod["main"])
        if not any(graph.op(var) in _CONVOLUTIONS for var in graph.order):
            return mod
        return relax.transform.DeadCodeElimination()(rewrite(mod, _Sequences().visit))


class _Sequences:
    """The rewrite's state: of each sequence that a picture was computed for, the picture (N, C, 1, T)."""

    def __init__(self) -> None:
        self.pictures: dict[relax.Expr, relax.Expr] = {}
        self.norms: set[relax.Expr] = set()

    def visit(
        self, builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr, _new: dict[relax.Var, relax.Expr]
    ) -> relax.Expr | None:
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self.norms:
            return self._sequence(builder, value, var.name) if value.index == 0 else None
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            return None
        name = value.op.name.removeprefix("relax.")
        if name == "expand_dims" and value.args[0] in self.pictures:
            axes = [int(axis) % len(shape_of(var)) for axis in value.attrs.axis]
            return self.pictures[value.args[0]] if axes == [_AXIS] else None
        if name == "nn.batch_norm" and value.args[0] in self.pictures:
            norm = emit(builder, relax.Call(value.op, [self.pictures[value.args[0]], *value.args[1:]], value.attrs))
            self.norms.add(norm)
            return norm
        if name == "permute_dims" and len(shape_of(var)) == len(_SWAPPED):
            return self._swapped(builder, var, value)
        found = self._picture(builder, name, value)
        if found is None:
            found = self._moved(builder, name, value)
        if found is None or (name in _REDUCTIONS and not value.attrs.keepdims):
            return None if found is None else emit(builder, found, var.name)
        return self._sequence(builder, found, var.name)

    def _swapped(self, builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        """A network's own change between (N, C, T) and (N, T, C), as a picture's, which layouts may do without."""
        data, axes = call.args[0], [int(axis) for axis in call.attrs.axes or ()]
        if axes != _SWAPPED:
            return None
        if data in self.pictures:
            last = builder.emit(relax.op.permute_dims(self.pictures[data], _TO_LAST))
            return emit(builder, relax.op.squeeze(last, 1), var.name)
        last = builder.emit(relax.op.expand_dims(data, 1))
        return self._sequence(builder, relax.op.permute_dims(last, _TO_FIRST), var.name)

    def _sequence(self, builder: relax.BlockBuilder, picture: relax.Expr, name: str) -> relax.Expr:
        """The sequence in a picture, for who reads it as one."""
        picture = emit(builder, picture, name)
        sequence = builder.emit(relax.op.squeeze(picture, _AXIS))
        self.pictures[sequence] = picture
        return sequence

    def _picture(self, builder: relax.BlockBuilder, name: str, call: relax.Call) -> relax.Expr | None:
        """What computes the result of a call as a picture; None where the call is left alone."""
        attrs = call.attrs
        if name in _CONVOLUTIONS:
            sizes: dict[str, Any] = {"strides": _wide(attrs.strides, 1), "dilation": _wide(attrs.dilation, 1)}
            if "transpose" in name:
                sizes["output_padding"] = _wide(attrs.output_padding, 0)
            weight = self._widened(builder, call.args[1])
            sizes |= {"padding": _around(attrs.padding), "groups": int(attrs.groups)}
            return _CONVOLUTIONS[name](self._widened(builder, call.args[0]), weight, **sizes)
        if name in _POOLS:
            sizes = {"strides": _wide(attrs.strides, 1), "dilation": _wide(attrs.dilation, 1)}
            sizes |= {"padding": _around(attrs.padding), "ceil_mode": bool(attrs.ceil_mode)}
            sizes["count_include_pad"] = bool(attrs.count_include_pad)
            return _POOLS[name](self._widened(builder, call.args[0]), _wide(attrs.pool_size, 1), **sizes)
        if name in ELEMENTWISE and any(arg in self.pictures for arg in call.args) and max(map(_rank, call.args)) == 3:
            return relax.Call(call.op, [self._beside(builder, arg) for arg in call.args], attrs)
        return None

    def _moved(self, builder: relax.BlockBuilder, name: str, call: relax.Call) -> relax.Expr | None:
        """The same of operators that name axes of a sequence."""
        if name == "concat":
            return self._joined(builder, call)
        if not call.args or call.args[0] not in self.pictures:
            return None
        picture, attrs = self.pictures[call.args[0]], call.attrs
        if name in _NORMS:
            if [int(axis) for axis in attrs.axes] != [2]:
                return None
            groups = [int(attrs.num_groups)] if name == "nn.group_norm" else []
            flags = {"epsilon": float(attrs.epsilon), "center": bool(attrs.center), "scale": bool(attrs.scale)}
            return _NORMS[name](picture, *call.args[1:], *groups, channel_axis=1, axes=[2, 3], **flags)
        if name in _REDUCTIONS and attrs.axis is not None:
            axes = sorted(int(axis) % 3 for axis in attrs.axis)
            along = [each for axis in axes for each in ([2, 3] if axis == 2 else [axis])]
            whole = along[-1] == 3 or attrs.keepdims  # else the height would be left
            return getattr(relax.op, name)(picture, along, bool(attrs.keepdims)) if whole else None
        if name == "nn.pad":
            widths = [int(width) for width in attrs.pad_width]
            return relax.op.nn.pad(
                picture, [*widths[:4], 0, 0, *widths[4:]], str(attrs.pad_mode), float(attrs.pad_value)
            )
        if name == "strided_slice":
            axes = [_past(int(axis.value)) for axis in call.args[1].fields]
            return relax.op.strided_slice(picture, axes, *call.args[2:])
        if name == "take" and attrs.axis is not None and len(shape_of(call.args[1])) == 1:
            return relax.op.take(picture, call.args[1], _past(int(attrs.axis)), str(attrs.mode))
        return None

    def _joined(self, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr | None:
        parts = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
        if not any(part in self.pictures for part in parts):
            return None
        return relax.op.concat([self._widened(builder, part) for part in parts], _past(int(call.attrs.axis)))

    def _widened(self, builder: relax.BlockBuilder, sequence: relax.Expr) -> relax.Expr:
        if sequence not in self.pictures:
            value = constant(sequence)
            self.pictures[sequence] = (
                builder.emit(relax.op.expand_dims(sequence, _AXIS))
                if value is None
                else literal(np.ascontiguousarray(np.expand_dims(value, _AXIS)))
            )
        return self.pictures[sequence]

    def _beside(self, builder: relax.BlockBuilder, operand: relax.Expr) -> relax.Expr:
        """An operand of an elementwise operator: sequences, and what is spread along them, as pictures."""
        rank = _rank(operand)
        if rank < 2:  # a number, or along T alone
            return operand
        return self._widened(builder, operand) if rank == 3 else builder.emit(relax.op.expand_dims(operand, 1))


def _rank(operand: relax.Expr) -> int:
    return len(shape_of(operand)) if is_tensor(operand) else 0


def _past(axis: int) -> int:
    """An axis of a sequence as that of its picture."""
    axis %= 3
    return axis + (axis >= _AXIS)


def _wide(values: Sequence[Any], height: int) -> list[int]:
    """Sizes of a window along T as those of a picture's."""
    return [height, int(values[0])]


def _around(padding: Sequence[Any]) -> list[int]:
    """Padding before and behind T, as top, left, bottom and right."""
    return [0, int(padding[0]), 0, int(padding[-1])]
