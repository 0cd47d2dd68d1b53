"""Evaluate a Relax module's graph operators with PyTorch: exact, fast enough for whole networks, nothing compiled.

It is the second opinion on every import and every graph pass: a slow untuned build of a large 3D network would take
minutes, this takes as long as PyTorch does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.compiled_call import compiled_call
from dance_tvm.frontend.interface import tensor_of

Value = Any  # a tensor, a tuple of values, a shape (tuple of int), a scalar, or a dtype's name
Kernel = Callable[[list[Value], Any], Value]


class _Floats(NamedTuple):
    """How floats are computed: in float64 instead of what the module says; inputs, weights and what is summed a
    little off."""

    wide: bool = False
    noise: torch.Generator | None = None


_AS_TOLD = _Floats()
_floats = ContextVar("floats", default=_AS_TOLD)

#: By how much noise changes an input, a weight or a value that is summed, as a share: a few roundings of float32.
_NOISE = 2e-7

#: What sums values up, which rounds as if each value were a little off.
_SUMS = {
    *(f"relax.nn.{kind}{rank}d" for kind in ("conv", "avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3)),
    *(f"relax.nn.conv{rank}d_transpose" for rank in (1, 2, 3)),
    *("relax.cumsum", "relax.einsum", "relax.matmul", "relax.sum"),
}

#: What divides by a sum, so that whole numbers round too: a norm takes all that a constant volume has from rounding.
_MEANS = {
    *("relax.mean", "relax.std", "relax.variance"),
    *("relax.nn.group_norm", "relax.nn.instance_norm", "relax.nn.layer_norm"),
}


def evaluate(mod: tvm.IRModule, inputs: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, torch.Tensor]:
    """The value of every variable of ``main``, by its name, for ``inputs`` by parameter name; keeps all in memory.

    What PyTorch has no counterpart of is compiled by TVM, one call at a time. Raises DanceError for ``call_tir``.
    """
    return {name: value for name, value in trace(mod, inputs) if isinstance(value, torch.Tensor)}


def outputs(
    mod: tvm.IRModule,
    inputs: Mapping[str, np.ndarray | torch.Tensor],
    *,
    wide: bool = False,
    noise: torch.Generator | None = None,
) -> tuple[torch.Tensor, ...]:
    """What ``main`` returns, as a flat tuple; values are dropped as soon as nobody needs them any more.

    ``wide`` computes in float64 what the module computes in float32; ``noise`` sets inputs, weights and what is summed
    off by a few roundings, which shows how far rounding alone can move the result.
    """
    before = _floats.set(_Floats(wide, noise))
    try:
        ((_, value),) = deque(trace(mod, inputs), maxlen=1)
    finally:
        _floats.reset(before)
    return value if isinstance(value, tuple) else (value,)


class Part:
    """What some variables of ``main`` depend on, evaluated for one input after another."""

    def __init__(self, mod: tvm.IRModule, wanted: Sequence[relax.Var]) -> None:
        function = mod["main"]
        self._params, self._wanted = list(function.params), list(wanted)
        needed, self._bindings = set(wanted), []
        for binding in reversed([binding for block in function.body.blocks for binding in block.bindings]):
            if binding.var in needed:
                needed.update(relax.analysis.free_vars(binding.value))
                self._bindings.append((binding.var, binding.value))
        self._bindings.reverse()

    def values(self, inputs: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The variables' values, in order, for ``inputs`` in the order of the parameters."""
        values: dict[relax.Var, Value] = dict(zip(self._params, map(_tensor, inputs), strict=True))
        with torch.inference_mode():
            for var, expression in self._bindings:
                values[var] = _evaluate(expression, values)
        return [values[var] for var in self._wanted]


def trace(mod: tvm.IRModule, inputs: Mapping[str, np.ndarray | torch.Tensor]) -> Iterator[tuple[str, Value]]:
    """Each variable's name and value, in the order of evaluation; the result comes last, under the name ``return``.

    A value is let go once the caller and the steps that follow no longer need it.
    """
    function = mod["main"]
    values: dict[relax.Var, Value] = {}
    for param in function.params:
        if param.name not in inputs:
            raise DanceError(f"Input {param.name!r} is missing: give one array for each of the network's inputs.")
        values[param] = _tensor(inputs[param.name])
        yield param.name, values[param]
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    last_use = _last_uses(bindings, function.body.body)
    with torch.inference_mode():
        for step, binding in enumerate(bindings):
            expression = binding.value
            value = _evaluate(expression, values)
            values[binding.var] = value
            yield binding.var.name, value
            for var in last_use.get(step, ()):
                values.pop(var, None)
        yield "return", _evaluate(function.body.body, values)


def _last_uses(bindings: list[Any], result: relax.Expr) -> dict[int, list[relax.Var]]:
    """For each step the variables that no later step reads."""
    last: dict[relax.Var, int] = {}
    for step, binding in enumerate(bindings):
        last[binding.var] = step
        for var in relax.analysis.free_vars(binding.value):
            last[var] = step
    for var in relax.analysis.free_vars(result):
        last.pop(var, None)
    dying: dict[int, list[relax.Var]] = {}
    for var, step in last.items():
        dying.setdefault(step, []).append(var)
    return dying


def _tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    return _as_computed(array if isinstance(array, torch.Tensor) else tensor_of(array))


def _as_computed(tensor: torch.Tensor) -> torch.Tensor:
    """An input or constant as it takes part: wide, or a little off, where that is asked for."""
    if not tensor.is_floating_point():
        return tensor
    wide, noise = _floats.get()
    if noise is not None and bool((tensor != tensor.round()).any()):  # whole numbers are compared with, and mean them
        tensor = _a_little_off(tensor, noise)
    return tensor.double() if wide else tensor


def _wide(value: Value) -> Value:
    """Floats that were computed as the module says, for those that are computed in float64 where that is asked for."""
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    widened = _floats.get().wide and isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if widened else value


def _a_little_off(tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    return tensor * (1 + _NOISE * torch.randn(tensor.shape, generator=noise)).to(tensor.dtype)


def _as_summed(name: str, arguments: list[Value]) -> list[Value]:
    """The arguments of an operator, what it sums off by as much as its rounding amounts to where noise is asked for."""
    noise, first = _floats.get().noise, arguments[0] if arguments else None
    if noise is None or not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return arguments
    if name in _MEANS or (name in _SUMS and bool((first != first.round()).any())):
        return [_a_little_off(first, noise), *arguments[1:]]
    return arguments


def _evaluate(expression: Any, values: Mapping[relax.Var, Value]) -> Value:
    if isinstance(expression, relax.Var):
        return values[expression]
    if isinstance(expression, tvm.ir.expr.GenericConst):
        # A copy: TVM's arrays may be read-only, PyTorch's never are.
        return _as_computed(torch.from_numpy(expression.value.numpy().copy()))
    if isinstance(expression, relax.Tuple):
        return tuple(_evaluate(field, values) for field in expression.fields)
    if isinstance(expression, relax.TupleGetItem):
        return _evaluate(expression.tuple_value, values)[expression.index]
    if isinstance(expression, relax.ShapeExpr):
        return tuple(int(extent) for extent in expression.values)
    if isinstance(expression, relax.Call):
        name = getattr(expression.op, "name", str(expression.op))
        arguments = _as_summed(name, [_evaluate(argument, values) for argument in expression.args])
        kernel = _KERNELS.get(name)
        return kernel(arguments, expression.attrs) if kernel else _wide(compiled_call(expression, arguments))
    if isinstance(expression, (tvm.tirx.IntImm, tvm.tirx.FloatImm)):
        return expression.value
    if isinstance(expression, tvm.ir.StringImm):
        return expression.value
    raise DanceError(f"The interpreter cannot evaluate {type(expression).__name__}.")


_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint64": torch.uint64,
    "uint32": torch.uint32,
    "uint16": torch.uint16,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def _dtype(name: Any) -> torch.dtype:
    text = str(name).removeprefix("T.").strip("\"'")
    if text not in _DTYPES:
        raise DanceError(f"The interpreter does not know the dtype {text}.")
    dtype = _DTYPES[text]
    return torch.float64 if _floats.get().wide and dtype.is_floating_point else dtype


def _chosen(name: Any, otherwise: torch.Tensor) -> torch.dtype:
    return otherwise.dtype if name is None else _dtype(name)


def _ints(array: Any) -> list[int]:
    return [int(item) for item in array]


def _axis(attrs: Any) -> int | None:
    return None if attrs.axis is None else int(attrs.axis)


def _padded(x: torch.Tensor, padding: Any, rank: int, value: float) -> torch.Tensor:
    """``x`` padded on its last ``rank`` axes by TVM's (before..., after...) or symmetric padding."""
    amounts = _ints(padding)
    before, after = (amounts, amounts) if len(amounts) == rank else (amounts[:rank], amounts[rank:])
    flat = [amount for axis in reversed(range(rank)) for amount in (before[axis], after[axis])]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(rank: int) -> Kernel:
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]

    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        _require_layout(attrs.data_layout, rank)
        x = _padded(args[0], attrs.padding, rank, 0.0)
        return function(
            x, args[1], stride=_ints(attrs.strides), dilation=_ints(attrs.dilation), groups=int(attrs.groups)
        )

    return run


def _conv_transpose(rank: int) -> Kernel:
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]

    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        _require_layout(attrs.data_layout, rank)
        amounts = _ints(attrs.padding)
        before, after = (amounts, amounts) if len(amounts) == rank else (amounts[:rank], amounts[rank:])
        full = function(
            args[0],
            args[1],
            stride=_ints(attrs.strides),
            output_padding=_ints(attrs.output_padding),
            dilation=_ints(attrs.dilation),
            groups=int(attrs.groups),
        )
        kept = [slice(b, full.shape[axis + 2] - a) for axis, (b, a) in enumerate(zip(before, after, strict=True))]
        window = (slice(None), slice(None), *kept)
        return full[window]

    return run


def _require_layout(layout: Any, rank: int) -> None:
    if str(layout) != ("NCW", "NCHW", "NCDHW")[rank - 1]:
        raise DanceError(f"The interpreter works on channels-first tensors, not on {layout}.")


def _windows(x: torch.Tensor, attrs: Any, rank: int, fill: float) -> torch.Tensor:
    """Every pooling window of ``x`` (N, C, ...) on trailing axes; ``ceil_mode`` may add windows past the end."""
    _require_layout(attrs.layout, rank)
    x = _padded(x, attrs.padding, rank, fill)
    size, strides, dilation = _ints(attrs.pool_size), _ints(attrs.strides), _ints(attrs.dilation)
    spans = [dilation[axis] * (size[axis] - 1) + 1 for axis in range(rank)]
    missing = []
    for axis in range(rank):
        steps = (x.shape[axis + 2] - spans[axis]) / strides[axis]
        last = (math.ceil(steps) if attrs.ceil_mode else math.floor(steps)) * strides[axis]
        missing.append(max(0, last + spans[axis] - x.shape[axis + 2]))
    x = _padded(x, [0] * rank + missing, rank, fill)
    for axis in range(rank):
        x = x.unfold(axis + 2, spans[axis], strides[axis])[..., :: dilation[axis]]
    return x


def _max_pool(rank: int) -> Kernel:
    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        x = args[0]
        fill = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        return _windows(x, attrs, rank, fill).amax(tuple(range(-rank, 0)))

    return run


def _avg_pool(rank: int) -> Kernel:
    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        x = args[0]
        over = tuple(range(-rank, 0))
        total = _windows(x, attrs, rank, 0.0).sum(over)
        inside = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
        if attrs.count_include_pad:
            inside = _padded(inside, attrs.padding, rank, 1.0)
            counted = _windows(inside, _Unpadded(attrs, rank), rank, 0.0)
        else:
            counted = _windows(inside, attrs, rank, 0.0)
        return total / counted.sum(over)

    return run


class _Unpadded:
    """Pooling attributes without their padding, for an input that carries it already."""

    def __init__(self, attrs: Any, rank: int) -> None:
        self._attrs = attrs
        self.padding = [0] * rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attrs, name)


def _adaptive_pool(rank: int) -> Kernel:
    function: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[rank - 1]

    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        _require_layout(attrs.layout, rank)
        size = args[0].shape[2:] if attrs.output_size is None else _ints(attrs.output_size)
        return function(args[0], size[0] if rank == 1 else tuple(size))

    return run


def _batch_norm(args: list[Value], attrs: Any) -> Value:
    x, gamma, beta, mean, var = args
    if attrs.training:
        raise DanceError("The interpreter evaluates networks in inference mode: batch norm is in training mode.")
    shape = [1] * x.ndim
    shape[int(attrs.axis)] = -1
    scale = torch.rsqrt(var + float(attrs.epsilon)) * (gamma if attrs.scale else 1)
    y = (x - mean.reshape(shape)) * scale.reshape(shape)
    return (y + beta.reshape(shape) if attrs.center else y), mean, var


def _normalise(x: torch.Tensor, axes: list[int], epsilon: float) -> torch.Tensor:
    mean = x.mean(axes, keepdim=True)
    return (x - mean) * torch.rsqrt(x.var(axes, correction=0, keepdim=True) + epsilon)


def _layer_norm(args: list[Value], attrs: Any) -> torch.Tensor:
    x, gamma, beta = args
    axes = [axis % x.ndim for axis in _ints(attrs.axes)]
    y = _normalise(x, axes, float(attrs.epsilon))
    shape = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    y = y * gamma.reshape(shape) if attrs.scale else y
    return y + beta.reshape(shape) if attrs.center else y


def _group_norm(args: list[Value], attrs: Any) -> torch.Tensor:
    x, gamma, beta = args
    groups, channel = int(attrs.num_groups), int(attrs.channel_axis) % x.ndim
    shape = [*x.shape[:channel], groups, x.shape[channel] // groups, *x.shape[channel + 1 :]]
    axes = [channel + 1, *(axis + 1 if axis > channel else axis for axis in (a % x.ndim for a in _ints(attrs.axes)))]
    y = _normalise(x.reshape(shape), sorted(set(axes)), float(attrs.epsilon)).reshape(x.shape)
    spread = [1] * x.ndim
    spread[channel] = -1
    y = y * gamma.reshape(spread) if attrs.scale else y
    return y + beta.reshape(spread) if attrs.center else y


def _instance_norm(args: list[Value], attrs: Any) -> torch.Tensor:
    x, gamma, beta = args
    spread = [1] * x.ndim
    spread[int(attrs.channel_axis)] = -1
    y = _normalise(x, _ints(attrs.axes), float(attrs.epsilon))
    y = y * gamma.reshape(spread) if attrs.scale else y
    return y + beta.reshape(spread) if attrs.center else y


def _pad(args: list[Value], attrs: Any) -> torch.Tensor:
    x, width = args[0], _ints(attrs.pad_width)
    value = float(attrs.pad_value)
    flat = [amount for axis in reversed(range(x.ndim)) for amount in (width[2 * axis], width[2 * axis + 1])]
    mode = str(attrs.pad_mode)
    if mode == "constant":
        return F.pad(x, flat, value=value)
    torch_mode = {"reflect": "reflect", "replicate": "replicate", "edge": "replicate", "circular": "circular"}[mode]
    while flat and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, mode=torch_mode)


def _prelu(args: list[Value], attrs: Any) -> torch.Tensor:
    x, slope = args
    spread = [1] * x.ndim
    spread[int(attrs.axis)] = -1
    return torch.where(x < 0, x * slope.reshape(spread), x)


def _reduce(function: Callable[..., torch.Tensor]) -> Kernel:
    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        x = args[0]
        axes = list(range(x.ndim)) if attrs.axis is None else _ints(attrs.axis)
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
    return tuple(torch.tensor_split(x, _ints(sections), dim=axis))


def _squeeze(args: list[Value], attrs: Any) -> torch.Tensor:
    return args[0].squeeze() if attrs.axis is None else args[0].squeeze(tuple(_ints(attrs.axis)))


def _expand_dims(args: list[Value], attrs: Any) -> torch.Tensor:
    x = args[0]
    axes = _ints(attrs.axis)
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
        raise DanceError("The interpreter has no gather_nd with batch dimensions.")
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
    indices = indices.to(_dtype(attrs.dtype))
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
        raise DanceError(f"The interpreter has no {method} resize with {transform} coordinates.")

    return run


def _matmul(args: list[Value], attrs: Any) -> torch.Tensor:
    y = torch.matmul(args[0], args[1])
    return y.to(_dtype(attrs.out_dtype)) if attrs.out_dtype not in (None, "", "void") else y


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


def _tensors(function: Callable[..., Any]) -> Kernel:
    """A function of the arguments alone."""
    return lambda args, attrs: function(*args)


def _scan(function: Callable[..., torch.Tensor]) -> Kernel:
    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        x, axis = args[0], 0 if attrs.axis is None else int(attrs.axis)
        if attrs.exclusive:
            raise DanceError("The interpreter has no exclusive scan.")
        return function(x.reshape(-1) if attrs.axis is None else x, axis)

    return run


def _argument(function: Callable[..., torch.Tensor]) -> Kernel:
    return lambda args, attrs: function(args[0], _axis(attrs), bool(attrs.keepdims))


_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    function.__name__: function
    for function in (
        *(torch.abs, torch.acos, torch.acosh, torch.asin, torch.asinh, torch.atan, torch.atanh, torch.bitwise_not),
        *(torch.ceil, torch.cos, torch.cosh, torch.erf, torch.exp, torch.floor, torch.isfinite, torch.isinf),
        *(torch.isnan, torch.log, torch.logical_not, torch.negative, torch.round, torch.rsqrt, torch.sigmoid),
        *(torch.sign, torch.sin, torch.sinh, torch.sqrt, torch.square, torch.tan, torch.tanh, torch.trunc),
        *(torch.zeros_like, torch.ones_like),
    )
}
_BINARY: dict[str, Callable[..., torch.Tensor]] = {
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
_NEURAL: dict[str, Kernel] = {
    **{f"conv{rank}d": _conv(rank) for rank in (1, 2, 3)},
    **{f"conv{rank}d_transpose": _conv_transpose(rank) for rank in (1, 2, 3)},
    **{f"max_pool{rank}d": _max_pool(rank) for rank in (1, 2, 3)},
    **{f"avg_pool{rank}d": _avg_pool(rank) for rank in (1, 2, 3)},
    **{f"adaptive_avg_pool{rank}d": _adaptive_pool(rank) for rank in (1, 2, 3)},
    "batch_flatten": _tensors(lambda x: x.flatten(1)),
    "batch_norm": _batch_norm,
    "dropout": _tensors(lambda x: (x, torch.ones_like(x))),
    "gelu": _tensors(F.gelu),
    "gelu_tanh": _tensors(lambda x: F.gelu(x, approximate="tanh")),
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "leakyrelu": lambda args, attrs: F.leaky_relu(args[0], float(attrs.alpha)),
    "log_softmax": lambda args, attrs: F.log_softmax(args[0], int(attrs.axis)),
    "pad": _pad,
    "prelu": _prelu,
    "relu": _tensors(F.relu),
    "relu6": _tensors(F.relu6),
    "selu": _tensors(F.selu),
    "silu": _tensors(F.silu),
    "softmax": lambda args, attrs: F.softmax(args[0], int(attrs.axis)),
    "softplus": lambda args, attrs: F.softplus(args[0], float(attrs.beta), float(attrs.threshold)),
}
_TENSORS: dict[str, Kernel] = {
    "arange": lambda args, attrs: torch.arange(*(int(a) for a in args), dtype=_dtype(attrs.dtype)),
    "argmax": _argument(torch.argmax),
    "argmin": _argument(torch.argmin),
    "argsort": lambda args, attrs: _ordered(args[0], int(attrs.axis), bool(attrs.descending))[1].to(
        _dtype(attrs.dtype)
    ),
    "astype": lambda args, attrs: args[0].to(_dtype(attrs.dtype)),
    "broadcast_to": _tensors(torch.broadcast_to),
    "clip": _tensors(lambda x, low, high: torch.clamp(x, float(low), float(high)).to(x.dtype)),
    "concat": lambda args, attrs: torch.cat(args[0], 0 if attrs.axis is None else int(attrs.axis)),
    "cumprod": _scan(torch.cumprod),
    "cumsum": _scan(torch.cumsum),
    "einsum": lambda args, attrs: torch.einsum(str(attrs.subscripts), *args[0]),
    "ewise_fma": _tensors(lambda a, b, c: a * b + c),
    "expand_dims": _expand_dims,
    "flatten": _tensors(torch.flatten),
    "flip": lambda args, attrs: torch.flip(args[0], [int(attrs.axis)]),
    "full": lambda args, attrs: torch.full(args[0], args[1].item(), dtype=_chosen(attrs.dtype, args[1])),
    "full_like": lambda args, attrs: torch.full_like(args[0], args[1].item(), dtype=_chosen(attrs.dtype, args[0])),
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
    "ones": lambda args, attrs: torch.ones(args[0], dtype=_dtype(attrs.dtype)),
    "permute_dims": lambda args, attrs: args[0].permute(
        tuple(reversed(range(args[0].ndim))) if attrs.axes is None else tuple(_ints(attrs.axes))
    ),
    "prod": _reduce(_prod),
    "repeat": lambda args, attrs: torch.repeat_interleave(args[0], int(attrs.repeats), _axis(attrs)),
    "reshape": _tensors(lambda x, shape: x.reshape(tuple(int(extent) for extent in shape))),
    "scatter_elements": _scatter_elements,
    "scatter_nd": _scatter_nd,
    "shape_of": _tensors(lambda x: tuple(x.shape)),
    "shape_to_tensor": _tensors(lambda shape: torch.tensor(shape, dtype=torch.int64)),
    "slice_scatter": _slice_scatter,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda args, attrs: torch.stack(args[0], 0 if attrs.axis is None else int(attrs.axis)),
    "std": _reduce(lambda x, axes, keep: x.std(axes, correction=0, keepdim=keep)),
    "strided_slice": _strided_slice,
    "sum": _reduce(lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype)),
    "take": _take,
    "tile": lambda args, attrs: torch.tile(args[0], _ints(attrs.repeats)),
    "topk": _topk,
    "tril": _tensors(lambda x, k=0: torch.tril(x, int(k))),
    "triu": _tensors(lambda x, k=0: torch.triu(x, int(k))),
    "variance": _reduce(lambda x, axes, keep: x.var(axes, correction=0, keepdim=keep)),
    "zeros": lambda args, attrs: torch.zeros(args[0], dtype=_dtype(attrs.dtype)),
}
_KERNELS: dict[str, Kernel] = {
    **{f"relax.{name}": _tensors(function) for name, function in {**_UNARY, **_BINARY}.items()},
    **{f"relax.nn.{name}": kernel for name, kernel in _NEURAL.items()},
    **{f"relax.{name}": kernel for name, kernel in _TENSORS.items()},
}
