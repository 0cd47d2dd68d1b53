"""Where the elements of a tensor that was only moved about lie in the tensor that it was made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm import relax, tirx

from dance_tvm.ir.graph import Graph, Shape, constant, is_tensor, shape_of
from dance_tvm.schedules.strided import Digit

RESHAPES = {"reshape", "expand_dims", "squeeze", "flatten"}


@dataclass(frozen=True)
class View:
    """Each axis of a tensor as digits, outermost first: an element is ``scale`` times what lies at ``base`` + the sum
    of all digits times their distances in ``source``, whose own elements lie one behind the other."""

    source: relax.Expr
    axes: tuple[tuple[Digit, ...], ...]
    base: int = 0
    scale: float = 1.0

    @staticmethod
    def whole(source: relax.Expr) -> View:
        """A tensor as it is."""
        shape = shape_of(source)
        return View(source, tuple(((extent, math.prod(shape[at + 1 :])),) for at, extent in enumerate(shape)))

    @property
    def shape(self) -> Shape:
        """The extents of the axes."""
        return tuple(math.prod(extent for extent, _ in axis) for axis in self.axes)

    def one_digit(self, axis: int) -> Digit | None:
        """An axis that lies at one distance; None for others."""
        digits = joined(self.axes[axis])
        return (digits[0] if digits else (1, 0)) if len(digits) < 2 else None

    def permuted(self, order: Sequence[int]) -> View:
        """Axes moved."""
        return replace(self, axes=tuple(self.axes[axis] for axis in order))

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """The same elements in their order under other axes; None where a digit would have to be cut unevenly."""
        axes = regrouped([digit for axis in self.axes for digit in axis], shape)
        return None if axes is None else replace(self, axes=axes)

    def broadcast(self, shape: Sequence[int]) -> View:
        """Axes of extent one, and those in front that are missing, repeated."""
        axes = [((1, 0),)] * (len(shape) - len(self.axes)) + list(self.axes)
        wide = tuple(
            ((extent, 0),) if extent != math.prod(digit for digit, _ in axis) else axis
            for axis, extent in zip(axes, shape, strict=True)
        )
        return replace(self, axes=wide)

    def cut(self, axis: int, begin: int, extent: int) -> View | None:
        """So many of one axis's elements; None where the axis has several digits."""
        digit = self.one_digit(axis)
        if digit is None:
            return None
        axes = list(self.axes)
        axes[axis] = ((extent, digit[1]),)
        return replace(self, axes=tuple(axes), base=self.base + begin * digit[1])

    def at(self, axis: int, index: int) -> View:
        """One element of an axis, which goes."""
        place = self.base
        for extent, distance in reversed(self.axes[axis]):
            place += index % extent * distance
            index //= extent
        return replace(self, axes=(*self.axes[:axis], *self.axes[axis + 1 :]), base=place)


def joined(digits: Sequence[Digit]) -> list[Digit]:
    """The same digits, those that count on from one another as one, and none of extent one."""
    found: list[Digit] = []
    for extent, distance in digits:
        if extent == 1:
            continue
        if found and found[-1][1] == extent * distance:
            found[-1] = (found[-1][0] * extent, distance)
        else:
            found.append((extent, distance))
    return found


def regrouped(digits: Sequence[Digit], shape: Sequence[int]) -> tuple[tuple[Digit, ...], ...] | None:
    """Digits shared out over axes of ``shape``, cut where an axis ends inside one; None where that leaves a rest."""
    waiting, axes = joined(digits), []
    for extent in shape:
        axis: list[Digit] = []
        left = extent
        while left > 1:
            if not waiting:
                return None
            here, distance = waiting.pop(0)
            shared = math.gcd(here, left)
            if shared == here:
                axis.append((here, distance))
            elif left == shared:  # the axis takes the outer part of the digit
                axis.append((left, distance * (here // left)))
                waiting.insert(0, (here // left, distance))
            else:
                return None
            left //= shared
        axes.append(tuple(axis) or ((1, 0),))
    return None if waiting else tuple(axes)


def moved(graph: Graph, var: relax.Expr, view: View) -> View | None:
    """What the operator that defines ``var`` makes of the view of its input; None where it does more than move it."""
    name = graph.op(var)
    if name in RESHAPES:
        return view.reshaped(shape_of(var))
    if name == "permute_dims":
        axes = graph.call(var).attrs.axes
        rank = len(view.axes)
        return view.permuted([int(axis) % rank for axis in axes] if axes else list(reversed(range(rank))))
    if name == "broadcast_to":
        return view.broadcast(shape_of(var))
    if name == "take":
        return _taken(graph, var, view)
    if name == "strided_slice":
        return _sliced(graph, var, view)
    return None


def _taken(graph: Graph, var: relax.Expr, view: View) -> View | None:
    """One element of an axis."""
    call = graph.call(var)
    index, axis = constant(call.args[1]), call.attrs.axis
    if index is None or index.ndim or axis is None:
        return None
    axis = int(axis) % len(view.axes)
    place, extent = int(index), view.shape[axis]
    return view.at(axis, place % extent) if -extent <= place < extent else None


def _sliced(graph: Graph, var: relax.Expr, view: View) -> View | None:
    """Runs of axes."""
    _, *listed = graph.call(var).args
    if not all(isinstance(values, relax.Tuple) for values in listed):
        return None
    axes, begins, ends, *steps = ([int(value.value) for value in values.fields] for values in listed)
    if any(step != 1 for each in steps for step in each):
        return None
    found: View | None = view
    for axis, begin, end in zip(axes, begins, ends, strict=True):
        if found is None:
            return None
        first, past, _ = slice(begin, end).indices(found.shape[axis % len(found.axes)])
        found = found.cut(axis % len(found.axes), first, max(0, past - first))
    return found if found is not None and found.shape == shape_of(var) else None


def _split(graph: Graph, var: relax.Expr) -> tuple[relax.Expr, int, int] | None:
    """Of a part of a split: what is split, along which axis, and where the part begins."""
    value = graph.value.get(var)
    if not isinstance(value, relax.TupleGetItem) or graph.op(value.tuple_value) != "split":
        return None
    call = graph.call(value.tuple_value) if isinstance(value.tuple_value, relax.Var) else value.tuple_value
    axis, parts = int(call.attrs.axis) % len(shape_of(var)), call.attrs.indices_or_sections
    if isinstance(parts, int | tirx.IntImm):
        return call.args[0], axis, value.index * shape_of(var)[axis]
    return call.args[0], axis, [0, *(int(part) for part in parts)][value.index]


def _multiple(graph: Graph, var: relax.Var) -> tuple[relax.Expr, float] | None:
    """What ``var`` is a constant multiple of, and the factor."""
    if graph.op(var) not in ("multiply", "divide"):
        return None
    left, right = graph.call(var).args
    for source, other in ((left, right), (right, left)) if graph.op(var) == "multiply" else ((left, right),):
        value = constant(other)
        if value is not None and value.size == 1 and is_tensor(source) and shape_of(source) == shape_of(var):
            number = float(value.reshape(()))
            return source, number if graph.op(var) == "multiply" else 1 / number
    return None


def view_of(graph: Graph, expr: relax.Expr, scaled: bool = False) -> View:
    """Where the elements of ``expr`` lie in whatever it is only a moved form of (``scaled``: or a multiple of one); at
    the least in itself."""
    if not isinstance(expr, relax.Var) or expr not in graph.value or not is_tensor(expr):
        return View.whole(expr)
    found: View | None = None
    value = graph.value[expr]
    if (part := _split(graph, expr)) is not None:
        source, axis, begin = part
        found = view_of(graph, source, scaled).cut(axis, begin, shape_of(expr)[axis])
    elif isinstance(value, relax.Var):
        found = view_of(graph, value, scaled)
    elif scaled and (multiple := _multiple(graph, expr)) is not None:
        source, factor = multiple
        inner = view_of(graph, source, scaled)
        found = replace(inner, scale=inner.scale * factor)
    elif graph.op(expr) and (reads := [arg for arg in value.args if isinstance(arg.ty, relax.TensorType)]):
        found = moved(graph, expr, view_of(graph, reads[0], scaled)) if is_tensor(reads[0]) else None
    return View.whole(expr) if found is None else found
