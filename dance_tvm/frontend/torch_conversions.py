"""ATen operators that TVM's importer lacks or converts wrongly, each as a few Relax operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_axes import AXES
from dance_tvm.frontend.torch_indexing import INDEXING
from dance_tvm.frontend.torch_order import ORDER
from dance_tvm.frontend.torch_resampling import RESAMPLING
from dance_tvm.frontend.torch_values import Conversion, Importer, arguments, cast, constant, dtype_of, name_of, shape_of

Operator = Callable[..., relax.Expr]

# Each takes an operator or two of its own.
_MOST_CELLS = 512


# --- arithmetic with PyTorch's promotion of types ---


def _operands(node: fx.Node, importer: Importer) -> tuple[relax.Expr, relax.Expr, str]:
    """Both operands of ``node`` in the type that PyTorch computes in, and that type."""
    sources: list[Any] = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args[:2]]
    common = torch.result_type(*sources)
    if "div.Tensor" in str(node.target) and len(node.kwargs) == 0 and not common.is_floating_point:
        common = torch.get_default_dtype()
    dtype = name_of(common)
    a, b = importer.retrieve_args(node)[:2]
    return cast(importer, a, dtype), cast(importer, b, dtype), dtype


def _binary(operator: Operator, on_bool: Operator | None = None) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a, b, dtype = _operands(node, importer)
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            b = importer.block_builder.emit(relax.op.multiply(b, relax.const(alpha, dtype)))
        chosen = on_bool if dtype == "bool" and on_bool else operator
        return importer.block_builder.emit(chosen(a, b))

    return convert


def _divide_rounded(node: fx.Node, importer: Importer) -> relax.Expr:
    a, b, dtype = _operands(node, importer)
    emit, mode = importer.block_builder.emit, node.kwargs.get("rounding_mode")
    if mode == "floor":
        return emit(relax.op.floor_divide(a, b))
    if mode is None:
        return emit(relax.op.divide(cast(importer, a, "float32"), cast(importer, b, "float32")))
    quotient = emit(relax.op.divide(a, b))
    return quotient if "int" in dtype else emit(relax.op.trunc(quotient))


def _not(node: fx.Node, importer: Importer) -> relax.Expr:
    value = importer.env[node.args[0]]
    operator = relax.op.logical_not if dtype_of(value) == "bool" else relax.op.bitwise_not
    return importer.block_builder.emit(operator(value))


def _logical_not(node: fx.Node, importer: Importer) -> relax.Expr:
    return importer.block_builder.emit(relax.op.logical_not(cast(importer, importer.env[node.args[0]], "bool")))


def _logical(operator: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a, b = (cast(importer, value, "bool") for value in importer.retrieve_args(node))
        return importer.block_builder.emit(operator(a, b))

    return convert


def _where(node: fx.Node, importer: Importer) -> relax.Expr:
    condition, a, b = importer.retrieve_args(node)
    dtype = name_of(node.meta["val"].dtype)
    chosen = relax.op.where(cast(importer, condition, "bool"), cast(importer, a, dtype), cast(importer, b, dtype))
    return importer.block_builder.emit(chosen)


def _shift(operator: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        value, amount = importer.retrieve_args(node)
        return importer.block_builder.emit(operator(value, cast(importer, amount, dtype_of(value))))

    return convert


# --- reductions ---


def _axes(argument: Any) -> list[int] | None:
    if argument is None or argument == []:
        return None
    return [argument] if isinstance(argument, int) else list(argument)


def _reduction(operator: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        value, *rest = importer.retrieve_args(node)
        axes = _axes(rest[0]) if rest else None
        keep = bool(rest[1]) if len(rest) > 1 else bool(node.kwargs.get("keepdim", False))
        expected = node.meta["val"]
        if isinstance(expected, torch.Tensor):
            value = cast(importer, value, name_of(expected.dtype))
        if not shape_of(value):
            return value
        return importer.block_builder.emit(operator(value, axes, keep))

    return convert


def _any(node: fx.Node, importer: Importer) -> relax.Expr:
    value, *rest = importer.retrieve_args(node)
    axes = _axes(rest[0]) if rest else None
    keep = bool(rest[1]) if len(rest) > 1 else False
    if not shape_of(value):
        return cast(importer, value, "bool")
    hits = cast(importer, cast(importer, value, "bool"), "int32")
    found = importer.block_builder.emit(relax.op.max(hits, axes, keep))
    return cast(importer, found, "bool")


def _variance_of(node: fx.Node, importer: Importer) -> tuple[relax.Expr, relax.Expr]:
    """Variance with PyTorch's correction, and mean."""
    value, *rest = importer.retrieve_args(node)
    axes = _axes(rest[0] if rest else None) or list(range(len(shape_of(value))))
    given: Any = node.kwargs.get("correction")
    correction = 1 if given is None else int(given)
    keep = bool(node.kwargs.get("keepdim", False))
    emit = importer.block_builder.emit
    count = math.prod(shape_of(value)[axis] for axis in axes)
    scale = relax.const(count / max(0, count - correction) if count > correction else math.inf, dtype_of(value))
    variance = emit(relax.op.multiply(emit(relax.op.variance(value, axes, keep)), scale))
    return variance, emit(relax.op.mean(value, axes, keep))


def _variance(node: fx.Node, importer: Importer) -> relax.Expr:
    return _variance_of(node, importer)[0]


def _deviation(node: fx.Node, importer: Importer) -> relax.Expr:
    return importer.block_builder.emit(relax.op.sqrt(_variance_of(node, importer)[0]))


def _variance_and_mean(node: fx.Node, importer: Importer) -> relax.Expr:
    return importer.block_builder.emit(relax.Tuple(list(_variance_of(node, importer))))


def _argument_of(operator: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        given = arguments(node)
        x, axis, keep = importer.env[node.args[0]], given.get("dim"), bool(given.get("keepdim", False))
        if not shape_of(x):
            return relax.const(0, "int64")
        return importer.block_builder.emit(operator(x, axis, keep))

    return convert


def _bucketize(node: fx.Node, importer: Importer) -> relax.Expr:
    """How many boundaries lie below each value; NaN lies above all."""
    given = arguments(node)
    emit, dtype = importer.block_builder.emit, name_of(node.meta["val"].dtype)
    x, bounds = importer.retrieve_args(node)[:2]
    x = cast(importer, x, dtype_of(bounds))
    beyond = relax.op.greater if given.get("right") else relax.op.greater_equal
    above = emit(beyond(bounds, emit(relax.op.expand_dims(x, len(shape_of(x))))))
    return emit(relax.op.sum(cast(importer, emit(relax.op.logical_not(above)), dtype), [-1]))


def _extreme_with_index(value_of: Operator, index_of: Operator) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        value, axis, *rest = importer.retrieve_args(node)
        keep, emit = bool(rest and rest[0]), importer.block_builder.emit
        if not shape_of(value):
            return emit(relax.Tuple([value, relax.const(0, "int64")]))
        return emit(relax.Tuple([emit(value_of(value, [axis], keep)), emit(index_of(value, axis, keep))]))

    return convert


# --- convolution and pooling ---


def _spread(argument: Any, rank: int) -> list[int]:
    values = [argument] if isinstance(argument, int) else list(argument)
    return values * rank if len(values) == 1 else values


_LAYOUTS = {1: ("NCW", "OIW"), 2: ("NCHW", "OIHW"), 3: ("NCDHW", "OIDHW")}
_CONVOLUTIONS: dict[int, Operator] = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}


def _convolution(node: fx.Node, importer: Importer) -> relax.Expr:
    """Any convolution; a transposed one as an ordinary one over its input spread out by zeros, weights flipped."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = importer.retrieve_args(node)
    rank = len(shape_of(x)) - 2
    stride, padding, dilation = (_spread(item, rank) for item in (stride, padding, dilation))
    before, after = padding, padding
    if transposed:
        kernel = shape_of(weight)[2:]
        weight = _turned_weight(node, importer, groups)
        x = _spread_by_zeros(importer, x, stride)
        reach = [dilation[axis] * (kernel[axis] - 1) - padding[axis] for axis in range(rank)]
        extra = _spread(output_padding, rank)
        # The spread input ends in stride - 1 zeros that the transposed convolution does not have.
        before, after = reach, [reach[axis] + extra[axis] - stride[axis] + 1 for axis in range(rank)]
        x, before, after = _crop_negative(importer, x, before, after)
        stride = [1] * rank
    data_layout, kernel_layout = _LAYOUTS[rank]
    y = importer.block_builder.emit(
        _CONVOLUTIONS[rank](
            x,
            weight,
            strides=stride,
            padding=[*before, *after],
            dilation=dilation,
            groups=groups,
            data_layout=data_layout,
            kernel_layout=kernel_layout,
        )
    )
    if bias is None:
        return y
    column = importer.block_builder.emit(relax.op.reshape(bias, (1, -1, *[1] * rank)))
    return importer.block_builder.emit(relax.op.add(y, column))


def _turned_weight(node: fx.Node, importer: Importer, groups: int) -> relax.Expr:
    """A transposed convolution's weight (in, out / groups, ...) as an ordinary one's (out, in / groups, ...)."""
    weight = importer.parameter(node.args[1])
    if weight is None:
        return _turned_at_run_time(importer, importer.env[node.args[1]], groups)
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    turned = grouped.reshape(groups * outputs, inputs // groups, *kernel).flip(tuple(range(2, weight.ndim)))
    return constant(np.ascontiguousarray(turned.numpy()))


def _turned_at_run_time(importer: Importer, weight: relax.Expr, groups: int) -> relax.Expr:
    emit = importer.block_builder.emit
    inputs, outputs, *kernel = shape_of(weight)
    rest = list(range(3, 3 + len(kernel)))
    grouped = emit(relax.op.reshape(weight, [groups, inputs // groups, outputs, *kernel]))
    turned = emit(relax.op.permute_dims(grouped, [0, 2, 1, *rest]))
    turned = emit(relax.op.reshape(turned, [groups * outputs, inputs // groups, *kernel]))
    for axis in range(2, 2 + len(kernel)):
        turned = emit(relax.op.flip(turned, axis))
    return turned


def _spread_by_zeros(importer: Importer, x: relax.Expr, stride: list[int]) -> relax.Expr:
    """``x`` with ``stride - 1`` zeros after each element of each spatial axis."""
    emit = importer.block_builder.emit
    for axis, step in enumerate(stride, start=2):
        if step == 1:
            continue
        shape = shape_of(x)
        x = emit(relax.op.expand_dims(x, axis + 1))
        width = [0] * (2 * len(shape) + 2)
        width[2 * axis + 3] = step - 1
        x = emit(relax.op.nn.pad(x, width))
        x = emit(relax.op.reshape(x, [*shape[:axis], shape[axis] * step, *shape[axis + 1 :]]))
    return x


def _crop_negative(
    importer: Importer, x: relax.Expr, before: list[int], after: list[int]
) -> tuple[relax.Expr, list[int], list[int]]:
    """Padding cannot be negative in Relax: cut instead."""
    shape = shape_of(x)[2:]
    axes = [axis for axis in range(len(before)) if before[axis] < 0 or after[axis] < 0]
    if axes:
        begin = [max(0, -before[axis]) for axis in axes]
        end = [shape[axis] - max(0, -after[axis]) for axis in axes]
        x = importer.block_builder.emit(relax.op.strided_slice(x, [axis + 2 for axis in axes], begin, end))
    return x, [max(0, pad) for pad in before], [max(0, pad) for pad in after]


_MAX_POOLS: dict[int, Operator] = {
    1: relax.op.nn.max_pool1d,
    2: relax.op.nn.max_pool2d,
    3: relax.op.nn.max_pool3d,
}
_AVG_POOLS: dict[int, Operator] = {
    1: relax.op.nn.avg_pool1d,
    2: relax.op.nn.avg_pool2d,
    3: relax.op.nn.avg_pool3d,
}


def _argument(node: fx.Node, importer: Importer, index: int, name: str, default: Any) -> Any:
    args = importer.retrieve_args(node)
    value = args[index] if len(args) > index else node.kwargs.get(name, default)
    return default if value is None or value == [] else value


def _overhang(x: relax.Expr, output: torch.Tensor, span: list[int], stride: list[int], padding: list[int]) -> list[int]:
    """How far the last window of each axis reaches past the padded input: what ceil_mode adds, often nothing."""
    rank = len(span)
    inputs, outputs = shape_of(x)[-rank:], output.shape[-rank:]
    return [max(0, (outputs[i] - 1) * stride[i] + span[i] - inputs[i] - 2 * padding[i]) for i in range(rank)]


def _max_pool(rank: int, *, with_indices: bool) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        x = importer.env[node.args[0]]
        size = _spread(node.args[1], rank)
        stride = _spread(_argument(node, importer, 2, "stride", size), rank)
        padding = _spread(_argument(node, importer, 3, "padding", 0), rank)
        dilation = _spread(_argument(node, importer, 4, "dilation", 1), rank)
        output = node.meta["val"][0] if with_indices else node.meta["val"]
        span = [dilation[i] * (size[i] - 1) + 1 for i in range(rank)]
        after = [a + b for a, b in zip(padding, _overhang(x, output, span, stride, padding), strict=True)]
        pooled = _MAX_POOLS[rank](x, size, stride, [*padding, *after], dilation, layout=_LAYOUTS[rank][0])
        pooled = importer.block_builder.emit(pooled)
        if not with_indices:
            return pooled
        places = pooled  # nobody reads them
        if any(user.args[1] == 1 and user.users for user in node.users):
            places = _places_of_maxima(importer, x, rank, [padding, after, stride, dilation, size], output)
        return importer.block_builder.emit(relax.Tuple([pooled, places]))

    return convert


def _places_of_maxima(
    importer: Importer, x: relax.Expr, rank: int, window: list[list[int]], output: torch.Tensor
) -> relax.Expr:
    """The flat position of each window's largest value, the first of equal ones and the last NaN: tap by tap."""
    padding, after, stride, dilation, size = window
    emit, extents, dtype = importer.block_builder.emit, shape_of(x)[-rank:], dtype_of(x)
    lead = len(shape_of(x)) - rank
    width = [0, 0] * lead + [amount for pair in zip(padding, after, strict=True) for amount in pair]
    lowest = -math.inf if "float" in dtype else torch.iinfo(getattr(torch, dtype)).min
    x = emit(relax.op.nn.pad(x, width, pad_value=lowest)) if any(width) else x
    grid = np.arange(math.prod(extents)).reshape(extents)
    grid = np.pad(grid, [*zip(padding, after, strict=True)], constant_values=-1)
    best, places = None, None
    for tap in product(*map(range, size)):
        begin = [tap[i] * dilation[i] for i in range(rank)]
        end = [begin[i] + (output.shape[lead + i] - 1) * stride[i] + 1 for i in range(rank)]
        value = emit(relax.op.strided_slice(x, list(range(lead, lead + rank)), begin, end, stride))
        here = grid[tuple(slice(begin[i], end[i], stride[i]) for i in range(rank))]
        at = constant(np.ascontiguousarray(here, np.int64).reshape([1] * lead + list(here.shape)))
        if best is None:
            best, places = value, emit(relax.op.broadcast_to(at, list(output.shape)))
            continue
        larger = emit(relax.op.greater(value, best))
        if "float" in dtype:
            larger = emit(relax.op.logical_or(larger, emit(relax.op.not_equal(value, value))))
        if any(width):  # where all is the lowest, a place in the padding is none
            larger = emit(relax.op.logical_or(larger, emit(relax.op.less(places, relax.const(0, "int64")))))
        best, places = emit(relax.op.where(larger, value, best)), emit(relax.op.where(larger, at, places))
    assert places is not None
    return places


def _avg_pool(rank: int) -> Conversion:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        emit, x = importer.block_builder.emit, importer.env[node.args[0]]
        size = _spread(node.args[1], rank)
        stride = _spread(_argument(node, importer, 2, "stride", size), rank)
        padding = _spread(_argument(node, importer, 3, "padding", 0), rank)
        include = bool(_argument(node, importer, 5, "count_include_pad", True))
        divisor = _argument(node, importer, 6, "divisor_override", None)
        overhang = _overhang(x, node.meta["val"], size, stride, padding)
        after = [a + b for a, b in zip(padding, overhang, strict=True)]
        if divisor is None and include and any(overhang):
            # PyTorch counts padding but not what lies beyond it: pad first, then count what is there.
            x = emit(relax.op.nn.pad(x, [0, 0, 0, 0, *(p for pad in padding for p in (pad, pad))]))
            padding, after, include = [0] * rank, overhang, False
        pooled = emit(
            _AVG_POOLS[rank](
                x,
                size,
                stride,
                [*padding, *after],
                count_include_pad=include or divisor is not None,
                layout=_LAYOUTS[rank][0],
            )
        )
        if divisor is None:
            return pooled
        return emit(relax.op.multiply(pooled, relax.const(math.prod(size) / divisor, dtype_of(pooled))))

    return convert


def _adaptive_max_pool(rank: int) -> Conversion:
    """Axis by axis: the largest of each stretch, the stretches as PyTorch cuts them."""

    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        emit, x = importer.block_builder.emit, importer.env[node.args[0]]
        if any(user.args[1] == 1 and user.users for user in node.users):
            return _adaptive_max_with_places(importer, x, node.meta["val"][0].shape[-rank:])
        lead = len(shape_of(x)) - rank
        for axis, parts in enumerate(node.meta["val"][0].shape[-rank:], start=lead):
            extent = shape_of(x)[axis]
            cuts = [(i * extent // parts, -((i + 1) * extent // -parts)) for i in range(parts)]
            slices = [emit(relax.op.strided_slice(x, [axis], [low], [high])) for low, high in cuts]
            largest = [emit(relax.op.max(piece, [axis], True)) for piece in slices]
            x = largest[0] if parts == 1 else emit(relax.op.concat(largest, axis))
        return emit(relax.Tuple([x, x]))

    return convert


def _adaptive_max_with_places(importer: Importer, x: relax.Expr, cells: tuple[int, ...]) -> relax.Expr:
    """Each cell's largest value and its flat position, cell by cell."""
    emit, shape, rank = importer.block_builder.emit, shape_of(x), len(cells)
    if math.prod(cells) > _MOST_CELLS:
        raise DanceError(f"the indices of adaptive max pooling to more than {_MOST_CELLS} cells are not supported")
    lead, extents = shape[:-rank], shape[-rank:]
    grid = np.arange(math.prod(extents)).reshape(extents)
    values, places = [], []
    for cell in product(*map(range, cells)):
        low = [i * extent // parts for i, extent, parts in zip(cell, extents, cells, strict=True)]
        high = [-((i + 1) * extent // -parts) for i, extent, parts in zip(cell, extents, cells, strict=True)]
        piece = emit(relax.op.strided_slice(x, list(range(len(lead), len(shape))), low, high))
        line = emit(relax.op.reshape(piece, [*lead, -1]))
        best = emit(relax.op.argmax(line, len(lead), True))
        most = emit(relax.op.max(line, [len(lead)], True))
        if dtype_of(x).startswith("float"):
            best = _last_nan_or(importer, line, most, best)
        here = grid[tuple(map(slice, low, high))].reshape(-1).astype(np.int64)
        values.append(most)
        places.append(emit(relax.op.take(constant(here), best, 0)))
    joined = [emit(relax.op.concat(parts, len(lead))) if len(parts) > 1 else parts[0] for parts in (values, places)]
    return emit(relax.Tuple([emit(relax.op.reshape(each, [*lead, *cells])) for each in joined]))


def _last_nan_or(importer: Importer, line: relax.Expr, most: relax.Expr, best: relax.Expr) -> relax.Expr:
    """The place of the last NaN along the last axis where ``most`` is NaN; else ``best``."""
    emit, axis = importer.block_builder.emit, len(shape_of(line)) - 1
    backwards = emit(relax.op.argmax(emit(relax.op.flip(line, axis)), axis, True))
    last = emit(relax.op.subtract(relax.const(shape_of(line)[axis] - 1, "int64"), backwards))
    return emit(relax.op.where(emit(relax.op.not_equal(most, most)), last, best))


def _elu(node: fx.Node, importer: Importer) -> relax.Expr:
    """``scale * x`` above zero, ``scale * alpha * (exp(input_scale * x) - 1)`` below (SELU and CELU too)."""
    x, *factors = importer.retrieve_args(node)
    alpha, scale, input_scale = [*factors, 1.0, 1.0, 1.0][:3] if factors else (1.0, 1.0, 1.0)
    emit, dtype = importer.block_builder.emit, dtype_of(x)
    below = emit(relax.op.minimum(x, relax.const(0.0, dtype)))
    below = below if input_scale == 1 else emit(relax.op.multiply(below, relax.const(input_scale, dtype)))
    below = emit(relax.op.subtract(emit(relax.op.exp(below)), relax.const(1.0, dtype)))
    below = below if scale * alpha == 1 else emit(relax.op.multiply(below, relax.const(scale * alpha, dtype)))
    above = emit(relax.op.nn.relu(x))
    above = above if scale == 1 else emit(relax.op.multiply(above, relax.const(scale, dtype)))
    return emit(relax.op.add(above, below))


def _norm_without_statistics(node: fx.Node, importer: Importer) -> relax.Expr:
    """Batch norm by the batch's own mean and variance, as instance norm is exported."""
    given = arguments(node)
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    batch, channels, *extents = shape_of(x)
    weight, bias = _scale_and_shift(given, importer, channels)
    axes = [*([0] if batch > 1 else []), *range(2, 2 + len(extents))]
    y = emit(relax.op.nn.instance_norm(x, weight, bias, 1, axes, given["eps"]))
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise DanceError("the mean and deviation that it returns are not supported")
    return emit(relax.Tuple([y, weight, bias]))


def _group_norm(node: fx.Node, importer: Importer) -> relax.Expr:
    """Also without weight and bias, or with one of them."""
    given = arguments(node)
    x, emit = importer.env[node.args[0]], importer.block_builder.emit
    weight, bias = _scale_and_shift(given, importer, shape_of(x)[1])
    axes = list(range(2, len(shape_of(x))))
    y = emit(relax.op.nn.group_norm(x, weight, bias, given["group"], 1, axes, given["eps"]))
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise DanceError("the mean and deviation that it returns are not supported")
    return emit(relax.Tuple([y, weight, bias]))


def _scale_and_shift(given: dict[str, Any], importer: Importer, channels: int) -> tuple[relax.Expr, relax.Expr]:
    """A norm's weight and bias; ones and zeros where it has none."""
    weight, bias = (importer.env[given[name]] if given.get(name) is not None else None for name in ("weight", "bias"))
    ones, zeros = constant(np.ones(channels, "float32")), constant(np.zeros(channels, "float32"))
    return (ones if weight is None else weight), (zeros if bias is None else bias)


# --- activations and arithmetic that Relax lacks ---


def _clamp(node: fx.Node, importer: Importer) -> relax.Expr:
    """Both bounds numbers: one clip. Else a maximum and a minimum, in the type that PyTorch gives the result."""
    given = arguments(node)
    dtype, emit = name_of(node.meta["val"].dtype), importer.block_builder.emit
    x = cast(importer, importer.env[node.args[0]], dtype)
    low, high = bounds = given.get("min"), given.get("max")
    if "float" in dtype and isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return emit(relax.op.clip(x, float(min(low, high)), float(high)))
    for bound, operator in zip(bounds, (relax.op.maximum, relax.op.minimum), strict=True):
        if bound is not None:
            bound = importer.env[bound] if isinstance(bound, fx.Node) else bound
            x = emit(operator(x, cast(importer, bound, dtype)))
    return x


def _composed(compute: Callable[..., relax.Expr]) -> Conversion:
    """An elementwise operator as a formula over Relax's: ``compute(emit, number, *tensors)``."""

    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        dtype = name_of(node.meta["val"].dtype)
        operands = [cast(importer, value, dtype) for value in importer.retrieve_args(node)]

        def number(value: float) -> relax.Expr:
            return relax.const(value, dtype)

        return compute(importer.block_builder.emit, number, *operands)

    return convert


def _erfc(emit: Any, number: Any, x: relax.Expr) -> relax.Expr:
    return emit(relax.op.subtract(number(1), emit(relax.op.erf(x))))


def _exp2(emit: Any, number: Any, x: relax.Expr) -> relax.Expr:
    return emit(relax.op.exp(emit(relax.op.multiply(x, number(math.log(2))))))


def _hypot(emit: Any, number: Any, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    squares = [emit(relax.op.multiply(value, value)) for value in (a, b)]
    return emit(relax.op.sqrt(emit(relax.op.add(*squares))))


def _copysign(emit: Any, number: Any, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    size = emit(relax.op.abs(a))
    # Of the two zeros only the reciprocal tells the sign.
    tells = emit(relax.op.where(emit(relax.op.equal(b, number(0))), emit(relax.op.divide(number(1), b)), b))
    return emit(relax.op.where(emit(relax.op.less(tells, number(0))), emit(relax.op.negative(size)), size))


def _number_preferred(operator: Operator) -> Callable[..., relax.Expr]:
    """The larger or smaller of two, where one is NaN the other."""

    def compute(emit: Any, number: Any, a: relax.Expr, b: relax.Expr) -> relax.Expr:
        either = emit(operator(a, b))
        either = emit(relax.op.where(emit(relax.op.isnan(b)), a, either))
        return emit(relax.op.where(emit(relax.op.isnan(a)), b, either))

    return compute


def _batch_product_summed(node: fx.Node, importer: Importer) -> relax.Expr:
    """``beta * x + alpha * sum over the batch of a @ b``."""
    given, emit = arguments(node), importer.block_builder.emit
    x, a, b = (importer.env[node.args[i]] for i in range(3))
    total = emit(relax.op.sum(emit(relax.op.matmul(a, b)), [0]))
    for name, at in (("alpha", 1), ("beta", 0)):
        factor = given.get(name, 1)
        if factor != 1:
            scale = relax.const(factor, dtype_of(x))
            total, x = (emit(relax.op.multiply(total, scale)), x) if at else (total, emit(relax.op.multiply(x, scale)))
    return emit(relax.op.add(x, total)) if given.get("beta", 1) != 0 else total


def _trilinear(node: fx.Node, importer: Importer) -> relax.Expr:
    """The product of three tensors, each with axes of one put in, summed over some axes: a bilinear layer."""
    given, emit, result = arguments(node), importer.block_builder.emit, None
    for index in (1, 2, 3):
        value, axes = importer.env[given[f"i{index}"]], list(given[f"expand{index}"])
        value = emit(relax.op.expand_dims(value, axes)) if axes else value
        result = value if result is None else emit(relax.op.multiply(result, value))
    return emit(relax.op.sum(result, list(given["sumdim"])))


def _arithmetic() -> dict[str, Conversion]:
    operators: dict[str, Conversion] = {
        "add": _binary(relax.op.add, relax.op.logical_or),
        "sub": _binary(relax.op.subtract),
        "mul": _binary(relax.op.multiply, relax.op.logical_and),
        "div": _binary(relax.op.divide),
        "eq": _binary(relax.op.equal),
        "ne": _binary(relax.op.not_equal),
        "lt": _binary(relax.op.less),
        "le": _binary(relax.op.less_equal),
        "gt": _binary(relax.op.greater),
        "ge": _binary(relax.op.greater_equal),
        "remainder": _binary(relax.op.floor_mod),
        "bitwise_and": _binary(relax.op.bitwise_and, relax.op.logical_and),
        "bitwise_or": _binary(relax.op.bitwise_or, relax.op.logical_or),
        "bitwise_xor": _binary(relax.op.bitwise_xor, relax.op.logical_xor),
        "__and__": _binary(relax.op.bitwise_and, relax.op.logical_and),
        "__or__": _binary(relax.op.bitwise_or, relax.op.logical_or),
        "__xor__": _binary(relax.op.bitwise_xor, relax.op.logical_xor),
        "__lshift__": _shift(relax.op.left_shift),
        "__rshift__": _shift(relax.op.right_shift),
        "bitwise_left_shift": _shift(relax.op.left_shift),
        "bitwise_right_shift": _shift(relax.op.right_shift),
    }
    return {
        f"{name}.{overload}": conversion
        for name, conversion in operators.items()
        for overload in ("Tensor", "Scalar", "Tensor_Scalar")
    }


CONVERSIONS: dict[str, Conversion] = {
    **_arithmetic(),
    "maximum.default": _binary(relax.op.maximum, relax.op.logical_or),
    "minimum.default": _binary(relax.op.minimum, relax.op.logical_and),
    "div.Tensor_mode": _divide_rounded,
    "div.Scalar_mode": _divide_rounded,
    "floor_divide.default": _binary(relax.op.floor_divide),
    "pow.Tensor_Tensor": _binary(relax.op.power),
    "logical_and.default": _logical(relax.op.logical_and),
    "logical_or.default": _logical(relax.op.logical_or),
    "logical_xor.default": _logical(relax.op.logical_xor),
    "logical_not.default": _logical_not,
    "bitwise_not.default": _not,
    "where.self": _where,
    "amax.default": _reduction(relax.op.max),
    "amin.default": _reduction(relax.op.min),
    "sum.default": _reduction(relax.op.sum),
    "sum.dim_IntList": _reduction(relax.op.sum),
    "prod.default": _reduction(relax.op.prod),
    "prod.dim_int": _reduction(relax.op.prod),
    "mean.default": _reduction(relax.op.mean),
    "mean.dim": _reduction(relax.op.mean),
    "argmax.default": _argument_of(relax.op.argmax),
    "argmin.default": _argument_of(relax.op.argmin),
    "bucketize.Tensor": _bucketize,
    "max.default": _reduction(relax.op.max),
    "min.default": _reduction(relax.op.min),
    "any.default": _any,
    "any.dim": _any,
    "any.dims": _any,
    "max.dim": _extreme_with_index(relax.op.max, relax.op.argmax),
    "min.dim": _extreme_with_index(relax.op.min, relax.op.argmin),
    "var.correction": _variance,
    "std.correction": _deviation,
    "var_mean.correction": _variance_and_mean,
    "convolution.default": _convolution,
    **{f"max_pool{rank}d.default": _max_pool(rank, with_indices=False) for rank in (1, 2, 3)},
    **{f"max_pool{rank}d_with_indices.default": _max_pool(rank, with_indices=True) for rank in (2, 3)},
    **{f"avg_pool{rank}d.default": _avg_pool(rank) for rank in (1, 2, 3)},
    **{f"adaptive_max_pool{rank}d.default": _adaptive_max_pool(rank) for rank in (2, 3)},
    "elu.default": _elu,
    "_native_batch_norm_legit.no_stats": _norm_without_statistics,
    "native_group_norm.default": _group_norm,
    "clamp.default": _clamp,
    "clamp.Tensor": _clamp,
    "clamp_min.default": _clamp,
    "clamp_min.Tensor": _clamp,
    "clamp_max.default": _clamp,
    "clamp_max.Tensor": _clamp,
    "copy_strided.default": lambda node, importer: importer.env[node.args[0]],  # strides are no part of a value here
    "erfc.default": _composed(_erfc),
    "exp2.default": _composed(_exp2),
    "hypot.default": _composed(_hypot),
    "copysign.Tensor": _composed(_copysign),
    "copysign.Scalar": _composed(_copysign),
    "fmax.default": _composed(_number_preferred(relax.op.maximum)),
    "fmin.default": _composed(_number_preferred(relax.op.minimum)),
    "addbmm.default": _batch_product_summed,
    "_trilinear.default": _trilinear,
    **RESAMPLING,
    **AXES,
    **INDEXING,
    **ORDER,
}
