"""Operators of Relax that compute element by element, reduce, move or index, in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import tvm

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.interpreter_values import Kernel, Value, axis_of, dtype_named, dtype_or, ints, on_tensors


def _reduce(function: Callable[..., torch.Tensor]) -> Kernel:
    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        x = args[0]
        axes = list(range(x.ndim)) if attrs.axis is None else ints(attrs.axis)
        return function(x, axes, bool(attrs.keepdims)) if axes else x

    return run


def _prod(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _split(args: list[Value], attrs: Any) -> Value:
    x, axis = args[0], int(attrs.axis)
    sections = attrs.indices_or_sections
    if isinstance(sections, (int, tvm.tirx.IntImm)):
        return tuple(torch.tensor_split(x, int(sections), dim=axis))
    return tuple(torch.tensor_split(x, ints(sections), dim=axis))


def _squeeze(args: list[Value], attrs: Any) -> torch.Tensor:
    return args[0].squeeze() if attrs.axis is None else args[0].squeeze(tuple(ints(attrs.axis)))


def _expand_dims(args: list[Value], attrs: Any) -> torch.Tensor:
    x = args[0]
    axes = ints(attrs.axis)
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _strided_slice(args: list[Value], attrs: Any) -> torch.Tensor:
    x, axes, begin, end = args[:4]
    strides = args[4] if len(args) > 4 else (1,) * len(axes)
    for axis, low, high, step in zip(axes, begin, end, strides, strict=True):
        indices = torch.arange(x.shape[axis])[slice(int(low), int(high), int(step))] if step > 0 else None
        if indices is None:
            stop = None if high < -x.shape[axis] else int(high)
            indices = torch.tensor(range(x.shape[axis])[slice(int(low), stop, int(step))], dtype=torch.int64)
        x = x.index_select(int(axis), indices)
    return x


def _take(args: list[Value], attrs: Any) -> torch.Tensor:
    x, indices = args
    indices = torch.as_tensor(indices).long()
    if attrs.axis is None:
        return x.reshape(-1)[indices]
    axis = int(attrs.axis) % x.ndim
    picked = x.index_select(axis, _wrapped(indices, x.shape[axis]).reshape(-1))
    return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _wrapped(indices: torch.Tensor, extent: int) -> torch.Tensor:
    return torch.where(indices < 0, indices + extent, indices)


def _scatter_elements(args: list[Value], attrs: Any) -> torch.Tensor:
    x, indices, updates = args
    axis = int(attrs.axis)
    indices = _wrapped(indices.long(), x.shape[axis])
    mode = str(attrs.reduction)
    if mode == "update":
        return x.scatter(axis, indices, updates)
    torch_mode = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax", "mean": "mean"}[mode]
    return x.scatter_reduce(axis, indices, updates, torch_mode)


def _gather_nd(args: list[Value], attrs: Any) -> torch.Tensor:
    x, indices = args
    if int(attrs.batch_dims):
        raise DanceError("the interpreter has no gather_nd with batch dimensions")
    return x[tuple(indices.long().unbind(-1))]


def _scatter_nd(args: list[Value], attrs: Any) -> torch.Tensor:
    x, indices, updates = args
    mode = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}.get(str(attrs.reduction))
    where = tuple(indices.long().unbind(-1))
    if mode is None:
        return x.clone().index_put_(where, updates)
    depth = indices.shape[-1]
    steps = [math.prod(x.shape[axis + 1 : depth]) for axis in range(depth)]
    rows = sum(_wrapped(index, x.shape[axis]) * steps[axis] for axis, index in enumerate(where))
    flat = x.reshape(math.prod(x.shape[:depth]), -1)
    values = updates.reshape(-1, flat.shape[1])
    rows = torch.as_tensor(rows).reshape(-1, 1).expand(values.shape)
    return flat.scatter_reduce(0, rows, values, mode).reshape(x.shape)


def _index_put(args: list[Value], attrs: Any) -> torch.Tensor:
    x, indices, values = args
    return x.clone().index_put_(tuple(index.long() for index in indices), values, accumulate=bool(attrs.accumulate))


def _slice_scatter(args: list[Value], attrs: Any) -> torch.Tensor:
    x, source, start, end, step = args
    return torch.slice_scatter(x, source, int(attrs.axis), int(start), int(end), int(step))


def _index_tensor(args: list[Value], attrs: Any) -> torch.Tensor:
    x, indices = args
    return x[tuple(index.long() if index.dtype != torch.bool else index for index in indices)]


def _ordered(x: torch.Tensor, axis: int, descending: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and places, equal ones in the order in which they stood."""
    return torch.sort(x, dim=axis, descending=descending, stable=True)


def _topk(args: list[Value], attrs: Any) -> Value:
    axis = int(attrs.axis)
    found, indices = (part.narrow(axis, 0, int(attrs.k)) for part in _ordered(args[0], axis, bool(attrs.largest)))
    indices = indices.to(dtype_named(attrs.dtype))
    kind = str(attrs.ret_type)
    return {"both": (found, indices), "values": found, "indices": indices}[kind]


def _one_hot(args: list[Value], attrs: Any) -> torch.Tensor:
    indices, on, off = args
    axis = int(attrs.axis)
    hot = F.one_hot(indices.long(), int(attrs.depth)).bool().movedim(-1, axis if axis >= 0 else indices.ndim)
    return torch.where(hot, torch.as_tensor(on), torch.as_tensor(off))


def _resize(rank: int) -> Kernel:
    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        x, size = args[0], args[1]
        method, transform = str(attrs.method), str(attrs.coordinate_transformation_mode)
        linear = {2: "bilinear", 3: "trilinear"}[rank]
        if method == "nearest_neighbor" and transform == "asymmetric" and str(attrs.rounding_method) == "floor":
            return F.interpolate(x, tuple(size), mode="nearest")
        if method == "linear" and transform in ("half_pixel", "pytorch_half_pixel", "align_corners"):
            return F.interpolate(x, tuple(size), mode=linear, align_corners=transform == "align_corners")
        raise DanceError(f"the interpreter has no {method} resize with {transform} coordinates")

    return run


def _matmul(args: list[Value], attrs: Any) -> torch.Tensor:
    y = torch.matmul(args[0], args[1])
    return y.to(dtype_named(attrs.out_dtype)) if attrs.out_dtype not in (None, "", "void") else y


def _divide(a: Value, b: Value) -> torch.Tensor:
    """Floats as they are, integers towards zero, as Relax does."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _through_int64(function: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``function`` on integers; PyTorch has next to no operators on unsigned ones."""
    return function(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)


def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return torch.where(condition, a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
    return torch.where(condition, a, b)


def _scan(function: Callable[..., torch.Tensor]) -> Kernel:
    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        x, axis = args[0], 0 if attrs.axis is None else int(attrs.axis)
        if attrs.exclusive:
            raise DanceError("the interpreter has no exclusive scan")
        return function(x.reshape(-1) if attrs.axis is None else x, axis)

    return run


def _argument(function: Callable[..., torch.Tensor]) -> Kernel:
    return lambda args, attrs: function(args[0], axis_of(attrs), bool(attrs.keepdims))


UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    function.__name__: function
    for function in (
        *(torch.abs, torch.acos, torch.acosh, torch.asin, torch.asinh, torch.atan, torch.atanh, torch.bitwise_not),
        *(torch.ceil, torch.cos, torch.cosh, torch.erf, torch.exp, torch.floor, torch.isfinite, torch.isinf),
        *(torch.isnan, torch.log, torch.logical_not, torch.negative, torch.round, torch.rsqrt, torch.sigmoid),
        *(torch.sign, torch.sin, torch.sinh, torch.sqrt, torch.square, torch.tan, torch.tanh, torch.trunc),
        *(torch.zeros_like, torch.ones_like),
    )
}


BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "atan2": torch.atan2,
    "bitwise_and": lambda a, b: _through_int64(torch.bitwise_and, a, b),
    "bitwise_or": lambda a, b: _through_int64(torch.bitwise_or, a, b),
    "bitwise_xor": lambda a, b: _through_int64(torch.bitwise_xor, a, b),
    "divide": _divide,
    "equal": torch.eq,
    "floor_divide": torch.floor_divide,
    "floor_mod": torch.remainder,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "left_shift": lambda a, b: _through_int64(torch.bitwise_left_shift, a, b),
    "less": torch.lt,
    "less_equal": torch.le,
    "log_add_exp": torch.logaddexp,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.fmod,
    "multiply": torch.mul,
    "not_equal": torch.ne,
    "outer": torch.outer,
    "power": torch.pow,
    "right_shift": lambda a, b: _through_int64(torch.bitwise_right_shift, a, b),
    "subtract": torch.sub,
    "where": _where,
}


TENSORS: dict[str, Kernel] = {
    "arange": lambda args, attrs: torch.arange(*(int(a) for a in args), dtype=dtype_named(attrs.dtype)),
    "argmax": _argument(torch.argmax),
    "argmin": _argument(torch.argmin),
    "argsort": lambda args, attrs: _ordered(args[0], int(attrs.axis), bool(attrs.descending))[1].to(
        dtype_named(attrs.dtype)
    ),
    "astype": lambda args, attrs: args[0].to(dtype_named(attrs.dtype)),
    "broadcast_to": on_tensors(torch.broadcast_to),
    "clip": on_tensors(lambda x, low, high: torch.clamp(x, float(low), float(high)).to(x.dtype)),
    "concat": lambda args, attrs: torch.cat(args[0], 0 if attrs.axis is None else int(attrs.axis)),
    "cumprod": _scan(torch.cumprod),
    "cumsum": _scan(torch.cumsum),
    "einsum": lambda args, attrs: torch.einsum(str(attrs.subscripts), *args[0]),
    "ewise_fma": on_tensors(lambda a, b, c: a * b + c),
    "expand_dims": _expand_dims,
    "flatten": on_tensors(torch.flatten),
    "flip": lambda args, attrs: torch.flip(args[0], [int(attrs.axis)]),
    "full": lambda args, attrs: torch.full(args[0], args[1].item(), dtype=dtype_or(attrs.dtype, args[1])),
    "full_like": lambda args, attrs: torch.full_like(args[0], args[1].item(), dtype=dtype_or(attrs.dtype, args[0])),
    "gather_elements": lambda args, attrs: torch.gather(
        args[0], int(attrs.axis), _wrapped(args[1].long(), args[0].shape[int(attrs.axis)])
    ),
    "gather_nd": _gather_nd,
    "image.resize2d": _resize(2),
    "image.resize3d": _resize(3),
    "index_put": _index_put,
    "index_tensor": _index_tensor,
    "matmul": _matmul,
    "max": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "mean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "min": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "one_hot": _one_hot,
    "ones": lambda args, attrs: torch.ones(args[0], dtype=dtype_named(attrs.dtype)),
    "permute_dims": lambda args, attrs: args[0].permute(
        tuple(reversed(range(args[0].ndim))) if attrs.axes is None else tuple(ints(attrs.axes))
    ),
    "prod": _reduce(_prod),
    "repeat": lambda args, attrs: torch.repeat_interleave(args[0], int(attrs.repeats), axis_of(attrs)),
    "reshape": on_tensors(lambda x, shape: x.reshape(tuple(int(extent) for extent in shape))),
    "scatter_elements": _scatter_elements,
    "scatter_nd": _scatter_nd,
    "shape_of": on_tensors(lambda x: tuple(x.shape)),
    "shape_to_tensor": on_tensors(lambda shape: torch.tensor(shape, dtype=torch.int64)),
    "slice_scatter": _slice_scatter,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda args, attrs: torch.stack(args[0], 0 if attrs.axis is None else int(attrs.axis)),
    "std": _reduce(lambda x, axes, keep: x.std(axes, correction=0, keepdim=keep)),
    "strided_slice": _strided_slice,
    "sum": _reduce(lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype)),
    "take": _take,
    "tile": lambda args, attrs: torch.tile(args[0], ints(attrs.repeats)),
    "topk": _topk,
    "tril": on_tensors(lambda x, k=0: torch.tril(x, int(k))),
    "triu": on_tensors(lambda x, k=0: torch.triu(x, int(k))),
    "variance": _reduce(lambda x, axes, keep: x.var(axes, correction=0, keepdim=keep)),
    "zeros": lambda args, attrs: torch.zeros(args[0], dtype=dtype_named(attrs.dtype)),
}
