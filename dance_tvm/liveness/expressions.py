"""The small algebra that liveness is computed in: masks as expressions over tensors of a network.

An activation (N, T, H, W, C) is alive where the product of three factors is: a mask of frames, one of positions and
one of channels. Each is an expression over tensors that the network computes itself; whoever needs one evaluates it.

Equal expressions are one object, made once: comparing and hashing them is comparing identities, and an expression that
many others hold is held once. So work on expressions is linear in the number of operators that made them, however
often residual connections join what they have split.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from dance_tvm.schedules.geometry import Window

Shape = tuple[int, ...]

_MADE: WeakValueDictionary[tuple[Hashable, ...], Any] = WeakValueDictionary()


class _Unique(type):
    """Gives the object that was made of equal arguments before, if it is still there."""

    def __call__(cls, *args: Any) -> Any:
        key = (cls, *args)
        made = _MADE.get(key)
        if made is None:
            made = _MADE[key] = super().__call__(*args)
        return made


class Expression(metaclass=_Unique):
    """A mask: nonzero where something may be alive. ``shape`` is (N, T, H, W, C), extent 1 where it does not vary;
    ``leaves`` are the tensors of the network that it reads; ``inputs`` the expressions that it is made of."""

    shape: Shape
    leaves: frozenset[Any]
    inputs: tuple[Expression, ...] = ()

    def _of(self, shape: Shape, *inputs: Expression) -> None:
        self.shape, self.inputs = shape, inputs
        leaves = {inner.leaves for inner in inputs}
        self.leaves = next(iter(leaves)) if len(leaves) == 1 else frozenset[Any]().union(*leaves)


class Factor(Expression):
    """A tensor of the network that is a mask: ``var`` as it stands there, axes reordered to N, T, H, W, C."""

    def __init__(self, var: Any, shape: Shape) -> None:
        self.var, self.shape, self.leaves = var, shape, frozenset([var])


class Both(Expression):
    """Alive where both are."""

    def __init__(self, left: Expression, right: Expression) -> None:
        self.left, self.right = left, right
        self._of(_broadcast(left, right), left, right)


class Either(Expression):
    """Alive where one of them is."""

    def __init__(self, left: Expression, right: Expression) -> None:
        self.left, self.right = left, right
        self._of(_broadcast(left, right), left, right)


class Grown(Expression):
    """A mask carried through a sliding window: ``forward`` to what its entries reach, else to what they read."""

    def __init__(self, inner: Expression, window: Window, forward: bool, shape: Shape) -> None:
        self.inner, self.window, self.forward = inner, window, forward
        self._of(shape, inner)


class Part(Expression):
    """The channels ``begin`` to ``end`` of a mask: what it says of one part of a concatenation."""

    def __init__(self, inner: Expression, begin: int, end: int) -> None:
        self.inner, self.begin, self.end = inner, begin, end
        self._of((*inner.shape[:-1], end - begin), inner)


class Joined(Expression):
    """Masks of channels side by side, as of the parts of a concatenation: each with its number of channels, None where
    all of them may be alive."""

    def __init__(self, parts: tuple[tuple[Expression | None, int], ...]) -> None:
        self.parts = parts
        masks = [mask for mask, _ in parts if mask is not None]
        extents = (max(extent) for extent in zip(*(mask.shape[:-1] for mask in masks), strict=True))
        self._of((*extents, sum(channels for _, channels in parts)), *masks)


def _broadcast(left: Expression, right: Expression) -> Shape:
    return tuple(max(pair) for pair in zip(left.shape, right.shape, strict=True))


# -- making them: None is everything -----------------------------------------------------------------------------------


def both(left: Expression | None, right: Expression | None) -> Expression | None:
    """Intersection."""
    if left is None or right is None:
        return left if right is None else right
    if covers(left, right):
        return right
    return left if covers(right, left) else Both(left, right)


def either(left: Expression | None, right: Expression | None) -> Expression | None:
    """Union."""
    if left is None or right is None:
        return None
    if covers(left, right):
        return left
    return right if covers(right, left) else Either(left, right)


def joined(parts: Sequence[tuple[Expression | None, int]]) -> Expression | None:
    """Masks of channels side by side, each with its number of channels."""
    return None if all(mask is None for mask, _ in parts) else Joined(tuple(parts))


def part(whole: Expression | None, begin: int, end: int) -> Expression | None:
    """The channels ``begin`` to ``end`` of ``whole``."""
    return None if whole is None else Part(whole, begin, end)


def grown(expression: Expression | None, window: Window, forward: bool) -> Expression | None:
    """``expression`` seen from the other side of ``window``; None where every place is touched anyway."""
    if expression is None:
        return None
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
    shape = (n, *(target[axis] if spans[axis] else 1 for axis in range(3)), c)
    if all(extent == 1 for extent in shape[1:4]):
        return None
    return Grown(expression, window, forward, shape)


def covers(outer: Expression, inner: Expression) -> bool:
    """Whether ``outer`` is seen at once to be alive wherever ``inner`` is. False says nothing."""
    while True:
        if outer is inner or (isinstance(inner, Both) and outer in inner.inputs):
            return True
        if isinstance(outer, Either) and inner in outer.inputs:
            return True
        if not isinstance(outer, Grown) or not _keeps_place(outer.window):
            return False
        outer = outer.inner


def _keeps_place(window: Window) -> bool:
    """Whether each place of the output reads the same place of the input, so that growing takes nothing away."""
    return window.size == window.out and all(
        stride == 1 and padding % dilation == 0 and padding // dilation < kernel
        for kernel, stride, padding, dilation in zip(
            window.kernel, window.stride, window.padding, window.dilation, strict=True
        )
    )


# -- working on them ---------------------------------------------------------------------------------------------------


def nodes(expression: Expression, enter: Callable[[Expression], bool] = lambda _: True) -> Iterator[Expression]:
    """The expressions that ``expression`` is made of, each once, parts before what they are parts of, itself last.

    Those for which ``enter`` is false are given, but not what they are made of.
    """
    seen: set[Expression] = set()
    stack = [(expression, False)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if enter(node):
                stack += [(inner, False) for inner in reversed(node.inputs)]


def early(expression: Expression | None, known: Collection[Any]) -> Expression | None:
    """The smallest superset of ``expression`` that reads only tensors in ``known``."""
    known = known if isinstance(known, set | frozenset) else set(known)
    if expression is None or expression.leaves <= known:
        return expression
    found: dict[Expression, Expression | None] = {}
    for node in nodes(expression, lambda node: not node.leaves <= known):
        found[node] = node if node.leaves <= known else _early(node, found)
    return found[expression]


def _early(node: Expression, found: dict[Expression, Expression | None]) -> Expression | None:
    if isinstance(node, Both):
        return both(found[node.left], found[node.right])
    if isinstance(node, Either):
        return either(found[node.left], found[node.right])
    if isinstance(node, Grown):
        return grown(found[node.inner], node.window, node.forward)
    if isinstance(node, Part):
        return part(found[node.inner], node.begin, node.end)
    if isinstance(node, Joined):
        return joined([(None if mask is None else found[mask], channels) for mask, channels in node.parts])
    return None


@dataclass(frozen=True)
class Live:
    """Where an activation may be nonzero (or is read): the product of three masks, None meaning everywhere."""

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
        return Live(grown(self.frames, window.along_frames, forward), grown(self.positions, window, forward))

    def early(self, known: Collection[Any]) -> Live:
        """What of it is decided by tensors in ``known``."""
        return Live(early(self.frames, known), early(self.positions, known), early(self.channels, known))

    @property
    def axes(self) -> list[str]:
        """Names of the axes that are thinned."""
        return [name for name in ("frames", "positions", "channels") if getattr(self, name) is not None]


EVERYWHERE = Live()
