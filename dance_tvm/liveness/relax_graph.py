"""What is known to be zero, and what nobody reads.

Forward, a mask's zeros pass through operators that keep zeros; backward, what all readers mask out or never touch
need not be computed. Both are supersets: an unknown operator is alive everywhere and reads everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm import relax

from dance_tvm.lowering.windows import CONVOLUTIONS, POOLS, window_of
from dance_tvm.transform.graph import Graph, constant, is_tensor, shape_of

from .masks import EVERYWHERE, Live, Masks, Part, joined

#: Operators of one argument that turn zero into zero.
KEEP_ZERO = {
    *("nn.relu", "nn.leakyrelu", "nn.silu", "nn.gelu", "nn.gelu_tanh", "nn.relu6", "nn.dropout", "nn.prelu"),
    *("tanh", "abs", "negative", "sqrt", "square", "sign", "round", "floor", "ceil", "trunc", "sin", "erf", "astype"),
}
#: Operators of one argument that work on each element alone, zero or not.
ELEMENTWISE = KEEP_ZERO | {"sigmoid", "exp", "log", "rsqrt", "cos", "clip", "nn.softplus", "nn.batch_norm", "nn.selu"}
#: Operators of two arguments that work on each pair of elements alone.
PAIRWISE = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "power"}


@dataclass
class Liveness:
    """Per variable: ``alive`` (may be nonzero) and ``read`` (somebody looks), as products of factors."""

    graph: Graph
    masks: Masks
    alive: dict[relax.Expr, Live]
    read: dict[relax.Expr, Live]
    before: dict[relax.Var, frozenset[relax.Var]]

    @staticmethod
    def of(graph: Graph) -> Liveness:
        """Analyse ``graph``, whose activations have channels innermost."""
        liveness = Liveness(graph, Masks(graph), {}, {}, _independent(graph))
        for var in graph.order:
            liveness.alive[var] = liveness._alive(var)
        for var in reversed([*graph.params, *graph.order]):
            liveness.read[var] = liveness._read(var)
        return liveness

    def alive_in(self, expr: relax.Expr) -> Live:
        """Where ``expr`` may be nonzero."""
        return self.alive.get(expr, EVERYWHERE)

    def mask(self, expr: relax.Expr, other: relax.Expr) -> Live | None:
        """``expr`` as a mask of ``other``, if it is one."""
        if not is_tensor(other) or len(shape_of(other)) not in (4, 5):
            return None
        return self.masks.live(expr, shape_of(other))

    # -- forward ---------------------------------------------------------------------------------------------------

    def _alive(self, var: relax.Var) -> Live:
        graph = self.graph
        name = graph.op(var)
        if not name or not is_tensor(var) or len(shape_of(var)) not in (4, 5):
            return EVERYWHERE
        args = graph.call(var).args
        if name == "multiply":
            factors = [self.mask(arg, var) if shape_of(arg) != shape_of(var) else None for arg in args]
            known = [mask or self.alive_in(arg) for mask, arg in zip(factors, args, strict=True)]
            return known[0] & known[1]
        if name == "where":
            return self._alive_where(var)
        if name in KEEP_ZERO or (name == "clip" and self._clips_to_zero(var)):
            return self.alive_in(args[0])
        if name in ("add", "subtract", "maximum", "minimum"):
            same = all(is_tensor(arg) and shape_of(arg) == shape_of(var) for arg in args)
            return self.alive_in(args[0]) | self.alive_in(args[1]) if same else EVERYWHERE
        if name == "divide":
            return self.alive_in(args[0]) if constant(args[1]) is not None else EVERYWHERE
        window = window_of(graph, var)
        if window is not None and name in POOLS:
            inner = self.alive_in(args[0])
            return replace(inner.through(window, forward=True), channels=inner.channels)
        if window is not None and name in CONVOLUTIONS:
            return self.alive_in(args[0]).through(window, forward=True)
        if name == "concat" and int(graph.call(var).attrs.axis) in (-1, len(shape_of(var)) - 1):
            return self._alive_concat(args[0])
        return EVERYWHERE

    def _alive_where(self, var: relax.Var) -> Live:
        condition, then, otherwise = self.graph.call(var).args
        zero = constant(otherwise)
        if zero is None or (zero != 0).any():
            return EVERYWHERE
        mask = self.mask(condition, var)
        return (mask & self.alive_in(then)) if mask is not None else EVERYWHERE

    def _clips_to_zero(self, var: relax.Var) -> bool:
        _, low, high = self.graph.call(var).args
        return float(low.value) <= 0 <= float(high.value)

    def _alive_concat(self, items: relax.Expr) -> Live:
        fields = self._parts(items)
        union = self.alive_in(fields[0])
        for item in fields[1:]:
            union = union | self.alive_in(item)
        channels = joined([(self.alive_in(item).channels, shape_of(item)[-1]) for item in fields])
        return Live(union.frames, union.positions, channels)

    def _parts(self, items: relax.Expr) -> Sequence[relax.Expr]:
        return self.graph.value[items].fields if isinstance(items, relax.Var) else items.fields

    # -- backward --------------------------------------------------------------------------------------------------

    def _read(self, var: relax.Expr) -> Live:
        """Union over the readers of what each looks at; nothing is read of a variable without readers."""
        graph = self.graph
        if var in graph.outputs or not graph.readers[var] or not is_tensor(var):
            return EVERYWHERE
        union: Live | None = None
        for reader in graph.readers[var]:
            looks = self._looks(reader, var)
            union = looks if union is None else union | looks
        return union or EVERYWHERE

    def _looks(self, reader: relax.Var, var: relax.Expr) -> Live:
        """Where ``reader`` looks at ``var``."""
        graph = self.graph
        name = graph.op(reader)
        if not name or len(shape_of(var)) not in (4, 5):
            return EVERYWHERE
        args = graph.call(reader).args
        wanted = self.read.get(reader, EVERYWHERE) if is_tensor(reader) else EVERYWHERE
        if name in PAIRWISE and is_tensor(reader) and shape_of(var) == shape_of(reader):
            if name == "multiply":
                other = args[1] if args[0].same_as(var) else args[0]
                own_mask = self.mask(other, reader) if shape_of(other) != shape_of(reader) else None
                return wanted & (own_mask or self.alive_in(other))
            return wanted
        if name in ELEMENTWISE and is_tensor(reader):
            return wanted
        if name == "where" and shape_of(var) == shape_of(reader):
            mask = self.mask(args[0], reader)
            return wanted & mask if mask is not None and args[1].same_as(var) else wanted
        window = window_of(graph, reader)
        if window is not None and args[0].same_as(var):
            alive = self.alive_in(var)
            done = computed(wanted, self.before[reader])
            through = done.through(window, forward=False)
            if name in POOLS:
                return replace(through, channels=done.channels)
            return replace(through & alive, channels=alive.channels)
        if name == "concat" and int(graph.call(reader).attrs.axis) in (-1, len(shape_of(reader)) - 1):
            return self._looks_at_part(wanted, self._parts(args[0]), var)
        return EVERYWHERE

    def _looks_at_part(self, wanted: Live, parts: Sequence[relax.Expr], var: relax.Expr) -> Live:
        """Where a concatenation of ``parts``, of which ``wanted`` is read, looks at ``var``."""
        begin, union = 0, None
        for part in parts:
            end = begin + shape_of(part)[-1]
            if part.same_as(var):
                channels = None if wanted.channels is None else Part(wanted.channels, begin, end)
                looks = replace(wanted, channels=channels)
                union = looks if union is None else union | looks
            begin = end
        return union or EVERYWHERE


def computed(wanted: Live, known: frozenset[relax.Var]) -> Live:
    """What is computed of what is wanted: masks that are not known before the layer runs cannot thin it."""
    return wanted.early(known)


def _independent(graph: Graph) -> dict[relax.Var, frozenset[relax.Var]]:
    """For each variable, those that do not depend on it: they can be known before it is computed."""
    everything = [*graph.params, *graph.order]
    index = {var: place for place, var in enumerate(everything)}
    dependents = dict.fromkeys(everything, 0)
    for var in reversed(everything):
        bits = 1 << index[var]
        for reader in graph.readers[var]:
            bits |= dependents[reader]
        dependents[var] = bits
    result = {}
    for var in graph.order:
        if graph.op(var) in CONVOLUTIONS or graph.op(var) in POOLS or graph.op(var) == "matmul":
            bits = dependents[var]
            result[var] = frozenset(other for other in everything if not bits >> index[other] & 1)
    return result
