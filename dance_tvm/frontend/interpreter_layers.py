"""Convolutions, pools, norms and activations of Relax in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.interpreter_values import Kernel, Value, ints, on_tensors


def _padded(x: torch.Tensor, padding: Any, rank: int, value: float) -> torch.Tensor:
    """``x`` padded on its last ``rank`` axes by TVM's (before..., after...) or symmetric padding."""
    amounts = ints(padding)
    before, after = (amounts, amounts) if len(amounts) == rank else (amounts[:rank], amounts[rank:])
    flat = [amount for axis in reversed(range(rank)) for amount in (before[axis], after[axis])]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(rank: int) -> Kernel:
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]

    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        _require_layout(attrs.data_layout, rank)
        x = _padded(args[0], attrs.padding, rank, 0.0)
        return function(x, args[1], stride=ints(attrs.strides), dilation=ints(attrs.dilation), groups=int(attrs.groups))

    return run


def _conv_transpose(rank: int) -> Kernel:
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]

    def run(args: list[Value], attrs: Any) -> torch.Tensor:
        _require_layout(attrs.data_layout, rank)
        amounts = ints(attrs.padding)
        before, after = (amounts, amounts) if len(amounts) == rank else (amounts[:rank], amounts[rank:])
        full = function(
            args[0],
            args[1],
            stride=ints(attrs.strides),
            output_padding=ints(attrs.output_padding),
            dilation=ints(attrs.dilation),
            groups=int(attrs.groups),
        )
        kept = [slice(b, full.shape[axis + 2] - a) for axis, (b, a) in enumerate(zip(before, after, strict=True))]
        window = (slice(None), slice(None), *kept)
        return full[window]

    return run


def _require_layout(layout: Any, rank: int) -> None:
    if str(layout) != ("NCW", "NCHW", "NCDHW")[rank - 1]:
        raise DanceError(f"the interpreter works on channels-first tensors, not on {layout}")


def _windows(x: torch.Tensor, attrs: Any, rank: int, fill: float) -> torch.Tensor:
    """Every pooling window of ``x`` (N, C, ...) on trailing axes; ``ceil_mode`` may add windows past the end."""
    _require_layout(attrs.layout, rank)
    x = _padded(x, attrs.padding, rank, fill)
    size, strides, dilation = ints(attrs.pool_size), ints(attrs.strides), ints(attrs.dilation)
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
        size = args[0].shape[2:] if attrs.output_size is None else ints(attrs.output_size)
        return function(args[0], size[0] if rank == 1 else tuple(size))

    return run


def _batch_norm(args: list[Value], attrs: Any) -> Value:
    x, gamma, beta, mean, var = args
    if attrs.training:
        raise DanceError("the interpreter evaluates networks in inference mode: batch norm is in training mode")
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
    axes = [axis % x.ndim for axis in ints(attrs.axes)]
    y = _normalise(x, axes, float(attrs.epsilon))
    shape = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    y = y * gamma.reshape(shape) if attrs.scale else y
    return y + beta.reshape(shape) if attrs.center else y


def _group_norm(args: list[Value], attrs: Any) -> torch.Tensor:
    x, gamma, beta = args
    groups, channel = int(attrs.num_groups), int(attrs.channel_axis) % x.ndim
    shape = [*x.shape[:channel], groups, x.shape[channel] // groups, *x.shape[channel + 1 :]]
    axes = [channel + 1, *(axis + 1 if axis > channel else axis for axis in (a % x.ndim for a in ints(attrs.axes)))]
    y = _normalise(x.reshape(shape), sorted(set(axes)), float(attrs.epsilon)).reshape(x.shape)
    spread = [1] * x.ndim
    spread[channel] = -1
    y = y * gamma.reshape(spread) if attrs.scale else y
    return y + beta.reshape(spread) if attrs.center else y


def _instance_norm(args: list[Value], attrs: Any) -> torch.Tensor:
    x, gamma, beta = args
    spread = [1] * x.ndim
    spread[int(attrs.channel_axis)] = -1
    y = _normalise(x, ints(attrs.axes), float(attrs.epsilon))
    y = y * gamma.reshape(spread) if attrs.scale else y
    return y + beta.reshape(spread) if attrs.center else y


def _pad(args: list[Value], attrs: Any) -> torch.Tensor:
    x, width = args[0], ints(attrs.pad_width)
    value = float(attrs.pad_value)
    flat = [amount for axis in reversed(range(x.ndim)) for amount in (width[2 * axis], width[2 * axis + 1])]
    mode = str(attrs.pad_mode)
    if mode == "constant":
        return F.pad(x, flat, value=value)
    torch_mode = {"reflect": "reflect", "replicate": "replicate", "edge": "replicate", "circular": "circular"}[mode]
    spatial = 2 * (x.ndim - 2)  # PyTorch wants amounts for all of these axes, or for one more without a batch
    return F.pad(x, flat[: spatial + 2] if any(flat[spatial:]) else flat[:spatial], mode=torch_mode)


def _prelu(args: list[Value], attrs: Any) -> torch.Tensor:
    x, slope = args
    spread = [1] * x.ndim
    spread[int(attrs.axis)] = -1
    return torch.where(x < 0, x * slope.reshape(spread), x)


NEURAL: dict[str, Kernel] = {
    **{f"conv{rank}d": _conv(rank) for rank in (1, 2, 3)},
    **{f"conv{rank}d_transpose": _conv_transpose(rank) for rank in (1, 2, 3)},
    **{f"max_pool{rank}d": _max_pool(rank) for rank in (1, 2, 3)},
    **{f"avg_pool{rank}d": _avg_pool(rank) for rank in (1, 2, 3)},
    **{f"adaptive_avg_pool{rank}d": _adaptive_pool(rank) for rank in (1, 2, 3)},
    "batch_flatten": on_tensors(lambda x: x.flatten(1)),
    "batch_norm": _batch_norm,
    "dropout": on_tensors(lambda x: (x, torch.ones_like(x))),
    "gelu": on_tensors(F.gelu),
    "gelu_tanh": on_tensors(lambda x: F.gelu(x, approximate="tanh")),
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "leakyrelu": lambda args, attrs: F.leaky_relu(args[0], float(attrs.alpha)),
    "log_softmax": lambda args, attrs: F.log_softmax(args[0], int(attrs.axis)),
    "pad": _pad,
    "prelu": _prelu,
    "relu": on_tensors(F.relu),
    "relu6": on_tensors(F.relu6),
    "selu": on_tensors(F.selu),
    "silu": on_tensors(F.silu),
    "softmax": lambda args, attrs: F.softmax(args[0], int(attrs.axis)),
    "softplus": lambda args, attrs: F.softplus(args[0], float(attrs.beta), float(attrs.threshold)),
}
