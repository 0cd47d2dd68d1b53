"""Forms of comparing operators that give NaN where PyTorch does: TVM's own minima and maxima ignore NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tvm
from tvm import relax, te, tirx, topi

from dance_tvm.ir.graph import constant, dtype_of, is_tensor
from dance_tvm.schedules.emit import Expr

Legalize = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]
Pick = Callable[[Expr, Expr], Expr]


def _larger(left: Expr, right: Expr) -> Expr:
    return tirx.Select(tirx.any(left > right, tirx.isnan(left)), left, right)


def _smaller(left: Expr, right: Expr) -> Expr:
    return tirx.Select(tirx.any(left < right, tirx.isnan(left)), left, right)


def _is_float(value: relax.Expr) -> bool:
    return dtype_of(value).startswith("float")


def _between(low: float | None, high: float | None, own: Legalize) -> Legalize:
    """Values below ``low`` become ``low`` and values above ``high`` become it; None: what the call's arguments say."""

    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if not _is_float(call.args[0]):
            return own(builder, call)
        bounds = [bound.value for bound in call.args[1:]] if low is None or high is None else [low, high]
        least, most = map(float, bounds)

        def clipped(x: te.Tensor) -> te.Tensor:
            def at(*index: Expr) -> Expr:
                value = x(*index)
                for bound, beyond in ((least, value < least), (most, value > most)):
                    if math.isfinite(bound):
                        value = tirx.Select(beyond, tirx.const(bound, x.dtype), value)
                return value

            return te.compute(x.shape, at, name="clip")

        return builder.call_te(clipped, call.args[0], primfunc_name_hint=_name(call))

    return legalize


def _binary(pick: Pick, own: Legalize) -> Legalize:
    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if not _is_float(call.args[0]):
            return own(builder, call)
        shape = [int(extent) for extent in call.ty.shape.values]

        def picked(left: te.Tensor, right: te.Tensor) -> te.Tensor:
            def at(*index: Expr) -> Expr:
                return pick(broadcast(left, index), broadcast(right, index))

            return te.compute(shape, at, name=_name(call))

        return builder.call_te(picked, *call.args, primfunc_name_hint=_name(call))

    return legalize


def broadcast(x: te.Tensor, index: Sequence[Expr]) -> Expr:
    """``x`` at the place of ``index`` in a shape that it is broadcast to."""
    last = index[len(index) - len(x.shape) :]
    return x(*(0 if int(extent) == 1 else at for extent, at in zip(x.shape, last, strict=True)))


def _reduced(reduce: Callable[..., Expr], x: te.Tensor, axes: Sequence[int] | None, keep: bool) -> te.Tensor:
    """``reduce`` over ``axes``, all where None."""
    rank = len(x.shape)
    over = {axis % rank for axis in (range(rank) if axes is None else axes)}
    loops = {axis: te.reduce_axis((0, x.shape[axis]), name=f"k{axis}") for axis in sorted(over)}
    shape = [1 if axis in over else extent for axis, extent in enumerate(x.shape) if keep or axis not in over]

    def at(*index: Expr) -> Expr:
        rest = iter(index)
        place = [loops[axis] if axis in over else next(rest) for axis in range(rank) if not keep]
        if keep:
            place = [loops.get(axis, at_axis) for axis, at_axis in enumerate(index)]
        return reduce(x(*place), axis=list(loops.values()))

    return te.compute(shape, at, name="extreme")


# TVM's own begin with the largest and least finite numbers, which infinities are beyond.
_MOST = te.comm_reducer(
    lambda left, right: tirx.Max(left, right), lambda dtype: tirx.const(-math.inf, dtype), name="most"
)
_LEAST = te.comm_reducer(
    lambda left, right: tirx.Min(left, right), lambda dtype: tirx.const(math.inf, dtype), name="least"
)


def _reduction(reduce: Callable[..., Expr], own: Legalize) -> Legalize:
    """The extreme of what are numbers, and NaN where one is none."""

    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        (x,), attrs = call.args, call.attrs
        if not _is_float(x):
            return own(builder, call)
        axes = None if attrs.axis is None else [int(axis) for axis in attrs.axis]

        def marked(x: te.Tensor) -> te.Tensor:
            return te.compute(x.shape, lambda *index: tirx.Cast(x.dtype, tirx.isnan(x(*index))), name="marked")

        def extreme(x: te.Tensor) -> te.Tensor:
            return _reduced(reduce, x, axes, bool(attrs.keepdims))

        def joined(found: te.Tensor, not_numbers: te.Tensor) -> te.Tensor:
            def at(*index: Expr) -> Expr:
                nan = tirx.const(math.nan, found.dtype)
                return tirx.Select(not_numbers(*index) > 0, nan, found(*index))

            return te.compute(found.shape, at, name="joined")

        marks = builder.emit(builder.call_te(marked, x, primfunc_name_hint="is_nan"))
        any_nan = builder.call_te(topi.max, marks, axes, bool(attrs.keepdims), primfunc_name_hint="any_nan")
        found = builder.call_te(extreme, x, primfunc_name_hint=_name(call))
        return builder.call_te(joined, builder.emit(found), builder.emit(any_nan), primfunc_name_hint="or_nan")

    return legalize


def _comparison(of_nan: bool, other: Legalize) -> Legalize:
    """A value beside itself: equal but for NaN, which TVM's arithmetic does not know of; others as ``other``."""

    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if not (call.args[0].same_as(call.args[1]) and _is_float(call.args[0])):
            return other(builder, call)

        def compared(x: te.Tensor) -> te.Tensor:
            def at(*index: Expr) -> Expr:
                not_number = tirx.isnan(x(*index))
                return not_number if of_nan else tirx.Not(not_number)

            return te.compute(x.shape, at, name=_name(call))

        return builder.call_te(compared, call.args[0], primfunc_name_hint=_name(call))

    return legalize


def _unequal(left: Expr, right: Expr) -> Expr:
    """NaN is unequal to everything; the code that TVM writes for ``!=`` finds it unequal to nothing."""
    return tirx.Select(left == right, tirx.const(False, "bool"), tirx.const(True, "bool"))


def _negation(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """TVM takes ``not a < b`` for ``b <= a``, which NaN is not; what is chosen by a condition it leaves alone."""

    def negated(x: te.Tensor) -> te.Tensor:
        def at(*index: Expr) -> Expr:
            value = x(*index)
            truth = value if x.dtype == "bool" else value != tirx.const(0, x.dtype)
            return tirx.Select(truth, tirx.const(False, "bool"), tirx.const(True, "bool"))

        return te.compute(x.shape, at, name="logical_not")

    return builder.call_te(negated, call.args[0], primfunc_name_hint="logical_not")


def _zero(is_zero: Callable[[relax.Call], bool], own: Legalize) -> Legalize:
    """What is zero of every finite value, and NaN of infinities and NaN: a value less itself, or times zero."""

    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if not (_is_float(call) and is_zero(call)):
            return own(builder, call)
        shape = [int(extent) for extent in call.ty.shape.values]

        def zero_of(x: te.Tensor) -> te.Tensor:
            def at(*index: Expr) -> Expr:
                finite = tirx.abs(broadcast(x, index)) < tirx.const(math.inf, x.dtype)
                return tirx.Select(finite, tirx.const(0.0, x.dtype), tirx.const(math.nan, x.dtype))

            return te.compute(shape, at, name=_name(call))

        values = [arg for arg in call.args if not _is_number_zero(arg)]
        return builder.call_te(zero_of, values[0], primfunc_name_hint=_name(call))

    return legalize


def _is_number_zero(value: relax.Expr) -> bool:
    array = constant(value)
    return array is not None and array.size == 1 and float(array.reshape(())) == 0


def _is_less_itself(call: relax.Call) -> bool:
    return bool(call.args[0].same_as(call.args[1])) and constant(call.args[0]) is None


def _is_times_zero(call: relax.Call) -> bool:
    return [_is_number_zero(arg) for arg in call.args].count(True) == 1 and all(map(is_tensor, call.args))


def _name(call: relax.Call) -> str:
    return str(call.op.name.rpartition(".")[2])


def _own(name: str) -> Legalize:
    """TVM's own way, for integers."""
    return tvm.ir.Op.get(name).get_attr("FLegalize")


#: How operators that compare are legalized, by Relax's name.
KEEP_NAN: dict[str, Legalize] = {
    "relax.nn.relu": _between(0.0, math.inf, _own("relax.nn.relu")),
    "relax.clip": _between(None, None, _own("relax.clip")),
    "relax.maximum": _binary(_larger, _own("relax.maximum")),
    "relax.minimum": _binary(_smaller, _own("relax.minimum")),
    "relax.max": _reduction(_MOST, _own("relax.max")),
    "relax.min": _reduction(_LEAST, _own("relax.min")),
    "relax.equal": _comparison(of_nan=False, other=_own("relax.equal")),
    "relax.not_equal": _comparison(of_nan=True, other=_binary(_unequal, _own("relax.not_equal"))),
    "relax.logical_not": _negation,
    "relax.subtract": _zero(_is_less_itself, _own("relax.subtract")),
    "relax.multiply": _zero(_is_times_zero, _own("relax.multiply")),
}
