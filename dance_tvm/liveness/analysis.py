"""Liveness of a graph of any kind: what is known to be zero, and what is never read.

Forward, a mask's zeros pass through operators that keep them; backward, what all readers mask out or never touch need
not be computed. Both are supersets. ``rules`` knows the operators, a ``View`` the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .expressions import EVERYWHERE, Factor, Live, Shape
from .rules import Operation, Values, alive_after, reads, values_of

#: Names a tensor of a graph: anything hashable.
Key = Any

#: Operators with kernels that leave out what is known to be unread before they run.
THINNED = {
    *("nn.conv2d", "nn.conv3d", "matmul"),
    *("nn.max_pool2d", "nn.max_pool3d", "nn.avg_pool2d", "nn.avg_pool3d"),
}

#: Operators that are nonzero where both of two masks are.
PRODUCTS = {"multiply", "logical_and", "minimum"}


class View(Protocol):
    """What the analysis asks of a graph. Its tensors are named by hashable keys, in the order they are computed.

    ``readers`` are those tensors whose operation reads one; ``operation`` gives None where nothing is known of how a
    tensor is made, ``shape`` None for what is no tensor of known shape. Shapes have channels innermost.
    """

    @property
    def params(self) -> Sequence[Key]: ...
    @property
    def order(self) -> Sequence[Key]: ...
    @property
    def outputs(self) -> Collection[Key]: ...
    @property
    def readers(self) -> Mapping[Key, Sequence[Key]]: ...
    def operation(self, key: Key) -> Operation | None: ...
    def shape(self, key: Key) -> Shape | None: ...
    def dtype(self, key: Key) -> str: ...
    def constant(self, key: Key) -> NDArray[Any] | None: ...


@dataclass
class Masks:
    """Finds the masks of a graph, and why what looks like one is none."""

    view: View
    refused: dict[Key, str] = field(default_factory=dict)
    _values: dict[Key, Values] = field(default_factory=dict)
    _live: dict[tuple[Key, Shape], Live | None] = field(default_factory=dict)

    def values(self, key: Key) -> Values:
        """BITS, UNIT or ANY: what all elements are, whatever the input, NaN aside."""
        if key not in self._values:
            self._values[key] = Values.ANY  # what a graph without cycles never asks for
            self._values[key] = self._find_values(key)
        return self._values[key]

    def is_binary(self, key: Key) -> bool:
        """Whether every element is zero or one."""
        return self.values(key) is Values.BITS

    def _find_values(self, key: Key) -> Values:
        value = self.view.constant(key)
        if value is not None:
            inside = bool(((value >= 0) & (value <= 1)).all())
            return Values.BITS if np.isin(value, (0, 1)).all() else Values.UNIT if inside else Values.ANY
        if self.view.dtype(key) == "bool":
            return Values.BITS
        operation = self.view.operation(key)
        if operation is None:
            return Values.ANY
        asked: list[Callable[[], Values]] = [partial(self.values, operand) for operand in operation.operands]
        return values_of(operation, asked)

    def live(self, key: Key, shape: Shape) -> Live | None:
        """Where ``key``, as a factor of an activation of ``shape`` (N, …, C), is nonzero; None if it is no mask.

        A mask is binary and varies along the frames, the positions or the channels, or is a product of such masks. One
        that tells samples of a single frame apart is a mask of frames.
        """
        if (key, shape) not in self._live:
            self._live[key, shape] = self._find_live(key, shape)
        return self._live[key, shape]

    def _find_live(self, key: Key, shape: Shape) -> Live | None:
        own = self.view.shape(key)
        if own is None or self.view.constant(key) is not None or len(own) > len(shape):
            return None
        own = (1,) * (len(shape) - len(own)) + own
        one_frame = as_video(shape)[1] == 1
        if own == (1,) * len(own) and (not one_frame or shape[0] > 1):
            return None
        operation = self.view.operation(key)
        if operation is not None and operation.name in PRODUCTS:
            one, other = (self.live(operand, shape) for operand in operation.operands)
            if one is not None and other is not None:
                return one & other
        if not self.is_binary(key):
            return None
        if operation is not None and operation.name == "astype" and self.is_binary(operation.operands[0]):
            return self.live(operation.operands[0], shape)
        factor = Factor(key, as_video(own))
        _, t, h, w, c = factor.shape
        spatial = h > 1 or w > 1
        if c > 1 and not spatial and t == 1:
            return Live(channels=factor)
        if spatial and c == 1:
            return Live(positions=factor)
        if (t > 1 or one_frame) and not spatial and c == 1:
            return Live(frames=factor)
        self.refused[key] = f"its mask varies along several axes at once, shape {own}"
        return None


def as_video(shape: Shape) -> Shape:
    """(N, H, W, C) or (N, T, H, W, C) as the latter."""
    return (shape[0], 1, *shape[1:]) if len(shape) == 4 else shape


@dataclass
class Liveness:
    """Where each activation is ``alive`` (may be nonzero) and ``read`` (some reader uses it): products of three masks.

    ``before``: for each tensor that a kernel makes and may thin, the tensors that do not depend on it, whose values can
    be known before it runs.
    """

    view: View
    masks: Masks
    alive: dict[Key, Live]
    read: dict[Key, Live]
    before: dict[Key, frozenset[Key]]

    @staticmethod
    def of(view: View) -> Liveness:
        """Analyse a graph whose activations have channels innermost."""
        liveness = Liveness(view, Masks(view), {}, {}, _independent(view))
        for key in view.order:
            liveness.alive[key] = liveness._alive(key)
        for key in reversed([*view.params, *view.order]):
            liveness.read[key] = liveness._read(key)
        return liveness

    def alive_in(self, key: Key) -> Live:
        """Where ``key`` may be nonzero."""
        return self.alive.get(key, EVERYWHERE)

    def mask(self, key: Key, other: Key) -> Live | None:
        """``key`` as a mask of the activation ``other``, if it is one."""
        shape = self.view.shape(other)
        return self.masks.live(key, shape) if shape is not None and len(shape) in (4, 5) else None

    def wanted(self, key: Key) -> Live:
        """What a kernel must compute: masks that are not known before it runs cannot thin it."""
        return self.read.get(key, EVERYWHERE).early(self.before.get(key, frozenset()))

    def _alive(self, key: Key) -> Live:
        operation = self.view.operation(key)
        if operation is None or len(operation.shape) not in (4, 5):
            return EVERYWHERE
        alive = [self.alive_in(operand) for operand in operation.operands]
        return alive_after(operation, alive, self._masks_in(operation, key))

    def _masks_in(self, operation: Operation, key: Key) -> list[Live | None]:
        """Which operands are masks of the result; one of the result's own shape is thinned as any activation is."""
        if operation.name not in ("multiply", "where"):
            return [None] * len(operation.operands)
        shapes = operation.operand_shapes
        return [
            self.mask(operand, key) if shape != operation.shape else None
            for operand, shape in zip(operation.operands, shapes, strict=True)
        ]

    def _read(self, key: Key) -> Live:
        """Union over the readers of what each looks at; all is read of an output, and of what has no reader."""
        shape, readers = self.view.shape(key), self.view.readers[key]
        if key in self.view.outputs or not readers or shape is None or len(shape) not in (4, 5):
            return EVERYWHERE
        union: Live | None = None
        for reader in readers:
            looks = self._looks(reader, key)
            union = looks if union is None else union | looks
        return union or EVERYWHERE

    def _looks(self, reader: Key, key: Key) -> Live:
        """Where ``reader`` looks at ``key``, in all places where that is its operand."""
        operation = self.view.operation(reader)
        if operation is None or self.view.shape(reader) is None:
            return EVERYWHERE
        wanted = self.read.get(reader, EVERYWHERE)
        computed = self.wanted(reader) if operation.window else wanted
        alive = [self.alive_in(operand) for operand in operation.operands]
        masks = self._masks_in(operation, reader)
        places = [index for index, operand in enumerate(operation.operands) if operand == key]
        union: Live | None = None
        for index in places:
            looks = reads(operation, index, wanted, computed, alive, masks)
            union = looks if union is None else union | looks
        return union or EVERYWHERE


def _independent(view: View) -> dict[Key, frozenset[Key]]:
    """For each tensor that may be thinned, those that do not depend on it."""
    everything = [*view.params, *view.order]
    index = {key: place for place, key in enumerate(everything)}
    dependents = dict.fromkeys(everything, 0)
    for key in reversed(everything):
        bits = 1 << index[key]
        for reader in view.readers[key]:
            bits |= dependents[reader]
        dependents[key] = bits
    result = {}
    for key in view.order:
        operation = view.operation(key)
        if operation is not None and operation.name in THINNED:
            bits = dependents[key]
            result[key] = frozenset(other for other in everything if not bits >> index[other] & 1)
    return result
