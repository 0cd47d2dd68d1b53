"""Masks: which factors of a product are zero or one, and the small algebra that liveness is computed in.

An activation (N, T, H, W, C) is alive where the product of three factors is: a *field* over frames, one over positions
and one over channels. A factor is an expression over tensors of the network that are known early; it is materialised
as a small float32 tensor only if a kernel asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from tvm import relax

from dance_tvm.schedules.geometry import Window
from dance_tvm.transform.graph import Graph, Shape, constant, dtype_of, is_tensor, shape_of

COMPARISONS = {"equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "isnan", "isfinite"}
RESHAPES = {"reshape", "expand_dims", "squeeze", "permute_dims", "broadcast_to", "repeat", "tile", "flatten"}
RESHAPES |= {"strided_slice"}  # its other arguments are numbers
KEEP_BINARY = {"multiply", "maximum", "minimum", "logical_and", "logical_or", "logical_not", "astype", "clip"}
KEEP_BINARY |= {"concat", "max", "min", "where", "take", "split", "stack"}


@dataclass(frozen=True)
class Factor:
    """A mask over some axes of an activation: ``var`` as it stands in the graph, axes reordered to N, T, H, W, C."""

    var: relax.Var
    shape: Shape  # (N, T, H, W, C), extent 1 where it does not vary

    def leaves(self) -> frozenset[relax.Var]:
        """Network tensors that the expression reads."""
        return frozenset([self.var])


@dataclass(frozen=True)
class Both:
    """Alive where both are."""

    left: Expression
    right: Expression

    @cached_property
    def shape(self) -> Shape:
        """Broadcast shape."""
        return tuple(max(pair) for pair in zip(self.left.shape, self.right.shape, strict=True))

    def leaves(self) -> frozenset[relax.Var]:
        """Network tensors that the expression reads."""
        return self.left.leaves() | self.right.leaves()


@dataclass(frozen=True)
class Either(Both):
    """Alive where one of them is."""


@dataclass(frozen=True)
class Grown:
    """A mask carried through a sliding window."""

    inner: Expression
    window: Window
    forward: bool
    shape: Shape

    def leaves(self) -> frozenset[relax.Var]:
        """Network tensors that the expression reads."""
        return self.inner.leaves()


@dataclass(frozen=True)
class Part:
    """The channels ``begin`` to ``end`` of a mask: what it says of one part of a concatenation."""

    inner: Expression
    begin: int
    end: int

    @property
    def shape(self) -> Shape:
        """That of the whole but for the channels."""
        return (*self.inner.shape[:-1], self.end - self.begin)

    def leaves(self) -> frozenset[relax.Var]:
        """Network tensors that the expression reads."""
        return self.inner.leaves()


@dataclass(frozen=True)
class Joined:
    """Masks of channels side by side, as of the parts of a concatenation: each with its number of channels, None where
    all of them may be alive."""

    parts: tuple[tuple[Expression | None, int], ...]

    @cached_property
    def shape(self) -> Shape:
        """That of the largest part, all channels together."""
        shapes = [part.shape for part, _ in self.parts if part is not None]
        extents = (max(extent) for extent in zip(*(shape[:-1] for shape in shapes), strict=True))
        return (*extents, sum(channels for _, channels in self.parts))

    def leaves(self) -> frozenset[relax.Var]:
        """Network tensors that the expression reads."""
        return frozenset[relax.Var]().union(*(part.leaves() for part, _ in self.parts if part is not None))


Expression = Factor | Both | Grown | Part | Joined


def both(left: Expression | None, right: Expression | None) -> Expression | None:
    """Intersection; None is everything."""
    if left is None or right is None or left == right:
        return left if right is None else right
    return Both(left, right)


def either(left: Expression | None, right: Expression | None) -> Expression | None:
    """Union; None is everything."""
    if left is None or right is None:
        return None
    return left if left == right else Either(left, right)


def joined(parts: Sequence[tuple[Expression | None, int]]) -> Expression | None:
    """Masks of channels side by side, each with its number of channels; None is everything."""
    return None if all(part is None for part, _ in parts) else Joined(tuple(parts))


def early(expression: Expression | None, known: frozenset[relax.Var] | set[relax.Var]) -> Expression | None:
    """The smallest superset of ``expression`` that reads only tensors in ``known``."""
    if expression is None or expression.leaves() <= known:
        return expression
    if isinstance(expression, Either):
        return either(early(expression.left, known), early(expression.right, known))
    if isinstance(expression, Both):
        return both(early(expression.left, known), early(expression.right, known))
    if isinstance(expression, Grown | Part):
        inner = early(expression.inner, known)
        return None if inner is None else replace(expression, inner=inner)
    if isinstance(expression, Joined):
        return joined([(early(part, known), channels) for part, channels in expression.parts])
    return None


@dataclass(frozen=True)
class Live:
    """Where an activation may be nonzero (or is read): the product of three factors, None meaning everywhere."""

    frames: Expression | None = None
    positions: Expression | None = None
    channels: Expression | None = None

    def __and__(self, other: Live) -> Live:
        return Live(
            both(self.frames, other.frames),
            both(self.positions, other.positions),
            both(self.channels, other.channels),
        )

    def __or__(self, other: Live) -> Live:
        return Live(
            either(self.frames, other.frames),
            either(self.positions, other.positions),
            either(self.channels, other.channels),
        )

    def through(self, window: Window, forward: bool) -> Live:
        """Frames and positions carried through a sliding window; channels do not pass."""

        def grow(expression: Expression | None) -> Expression | None:
            return None if expression is None else grown(expression, window, forward)

        return Live(grow(self.frames), grow(self.positions))

    def early(self, known: frozenset[relax.Var] | set[relax.Var]) -> Live:
        """What of it is decided by tensors in ``known``."""
        return Live(early(self.frames, known), early(self.positions, known), early(self.channels, known))

    @property
    def axes(self) -> list[str]:
        """Names of the axes that are thinned."""
        return [name for name in ("frames", "positions", "channels") if getattr(self, name) is not None]


EVERYWHERE = Live()


def grown(expression: Expression, window: Window, forward: bool) -> Expression | None:
    """``expression`` seen from the other side of ``window``; None where every place is touched anyway."""
    if window.kernel == (1, 1, 1) and window.stride == (1, 1, 1) and window.padding == (0, 0, 0):
        return expression
    source, target = (window.size, window.out) if forward else (window.out, window.size)
    n, *extents, c = expression.shape
    spans = [extent != 1 or source[axis] == 1 for axis, extent in enumerate(extents)]
    moved = [
        axis
        for axis in range(3)
        if spans[axis] and (window.kernel[axis], window.stride[axis], window.padding[axis]) != (1, 1, 0)
    ]
    if not moved:
        return expression
    shape = (n, *(target[axis] if spans[axis] and extents[axis] != 1 else 1 for axis in range(3)), c)
    if all(extent == 1 for extent in shape[1:4]):
        return None
    return Grown(expression, window, forward, shape)


@dataclass
class Masks:
    """Finds the masks of a graph, and why what looks like one is none."""

    graph: Graph
    refused: dict[relax.Var, str] = field(default_factory=dict)
    _binary: dict[relax.Expr, bool] = field(default_factory=dict)

    def is_binary(self, expr: relax.Expr) -> bool:
        """Whether every element is zero or one, whatever the input."""
        if isinstance(expr, relax.Tuple):
            return all(self.is_binary(item) for item in expr.fields)
        if not isinstance(expr, relax.Var):
            value = constant(expr)
            return value is not None and bool(np.isin(value, (0, 1)).all())
        if expr not in self._binary:
            self._binary[expr] = False  # a cycle cannot occur; this only guards the recursion
            self._binary[expr] = self._find_binary(expr)
        return self._binary[expr]

    def _find_binary(self, var: relax.Var) -> bool:
        name = self.graph.op(var)
        if is_tensor(var) and dtype_of(var) == "bool":
            return True
        if name in COMPARISONS or name == "one_hot":
            return True
        if name in ("zeros", "ones", "zeros_like", "ones_like"):
            return True
        value = self.graph.value.get(var)
        if isinstance(value, relax.TupleGetItem):
            return isinstance(value.tuple_value, relax.Var) and self.is_binary(value.tuple_value)
        if isinstance(value, relax.Tuple):
            return all(self.is_binary(item) for item in value.fields)
        if name == "round":
            return self._within_unit(self.graph.call(var).args[0])
        if name == "subtract":
            left, right = self.graph.call(var).args
            ones = constant(left)
            return ones is not None and bool((ones == 1).all()) and self.is_binary(right)
        if name in RESHAPES:
            return self.is_binary(self.graph.call(var).args[0])
        if name == "where":
            return all(self.is_binary(arg) for arg in self.graph.call(var).args[1:])
        if name == "add":  # a value and what a straight-through estimator adds and takes away again
            return False
        if name in KEEP_BINARY:
            args = [arg for arg in self.graph.call(var).args if isinstance(arg.ty, relax.TensorType | relax.TupleType)]
            return bool(args) and all(self.is_binary(arg) for arg in args)
        return False

    def _within_unit(self, expr: relax.Expr) -> bool:
        """Whether every element lies in [0, 1]."""
        name = self.graph.op(expr)
        if name in ("sigmoid", "nn.softmax"):
            return True
        if name in RESHAPES:
            return self._within_unit(self.graph.call(expr).args[0])
        return self.is_binary(expr)

    def live(self, expr: relax.Expr, shape: Shape) -> Live | None:
        """Where ``expr``, as a factor of an activation of ``shape`` (N, …, C), is nonzero; None if it is no mask.

        A mask is binary and varies along the frames, the positions or the channels, or is a product of such.
        """
        if not isinstance(expr, relax.Var) or not is_tensor(expr):
            return None
        own = (1,) * (len(shape) - len(shape_of(expr))) + shape_of(expr)
        if len(own) != len(shape) or own == (1,) * len(own):
            return None
        if self.graph.op(expr) == "multiply":
            one, other = (self.live(arg, shape) for arg in self.graph.call(expr).args)
            if one is not None and other is not None:
                return one & other
        if not self.is_binary(expr):
            return None
        factor = Factor(expr, as_video(own))
        _, t, h, w, c = factor.shape
        spatial = h > 1 or w > 1
        if c > 1 and not spatial and t == 1:
            return Live(channels=factor)
        if spatial and c == 1:
            return Live(positions=factor)
        if t > 1 and not spatial and c == 1:
            return Live(frames=factor)
        self.refused[expr] = f"its mask varies along several axes at once, shape {own}"
        return None


def as_video(shape: Shape) -> Shape:
    """(N, H, W, C) or (N, T, H, W, C) as the latter."""
    return (shape[0], 1, *shape[1:]) if len(shape) == 4 else shape
