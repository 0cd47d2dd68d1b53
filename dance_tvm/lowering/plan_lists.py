"""The lists that kernels walk: planned by calls in the network, or when compiled where no mask thins them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from dance_tvm.liveness.expressions import Expression
from dance_tvm.schedules.kernel import Count, Kernel, Operand, Weights
from dance_tvm.schedules.preparation import Source, array_digest

from .calls import call_kernel
from .masks import Masks

#: Lists that no mask thins are planned when compiled up to this many entries; longer ones in every call: rather a
#: thousandth of the time of so large a layer than megabytes in the artifact.
MOST_CONSTANT_LISTS = 1 << 18

Values = dict[str, relax.Expr]


@dataclass(frozen=True)
class Given:
    """What a kernel is called with, by the roles of its operands; ``masks`` by their axes."""

    data: relax.Expr
    masks: Mapping[str, Expression | None]
    weights: Weights | None = None
    residual: Callable[[], relax.Expr] | None = None
    gate: Callable[[], relax.Expr] | None = None


@dataclass
class Lists:
    """Plans lists, each once: kernels that need the same lists of the same masks share them.

    ``now``: whether planners can run here, when compiling; a GPU's run on the GPU alone. ``sources``: what packed
    weights were made of, by their digest.
    """

    builder: relax.BlockBuilder
    masks: Masks
    now: bool
    planned: dict[Hashable, list[relax.Expr]] = field(default_factory=dict)
    sources: dict[bytes, Source] = field(default_factory=dict)

    def of(self, kernel: Kernel, given: Given) -> Values:
        """The kernel's lists and constants, by name."""
        found: Values = {}
        for each in kernel.lists():
            found.update(zip(each.names, self._plan(each.planner, given, found), strict=True))
        constants = self._constants(kernel, given.weights)
        return found | {name: relax.const(array) for name, array in constants.items()}

    def _constants(self, kernel: Kernel, weights: Weights | None) -> dict[str, np.ndarray]:
        """The constants that a kernel prepares; notes in ``sources`` what its packed weights were made of."""
        constants = kernel.prepare(weights)
        if weights is not None and weights.weight is not None:
            weight = kernel.unprepared(weights.weight)
            for name, preparation in kernel.preparations.items():
                self.sources[array_digest(constants[name])] = Source(preparation, weight)
        return constants

    def arguments(self, kernel: Kernel, given: Given, values: Values) -> Values:
        """What the kernel reads, by name; ``values`` are its lists and constants."""
        return {operand.name: self._argument(operand, given, values) for operand in kernel.inputs()}

    def _argument(self, operand: Operand, given: Given, values: Values) -> relax.Expr:
        if operand.role == "data":
            return given.data
        if operand.role == "residual":
            assert given.residual is not None
            return given.residual()
        if operand.role == "gate":
            assert given.gate is not None
            return given.gate()
        if operand.role == "mask":
            expression = given.masks[operand.axis]
            assert expression is not None
            return self.masks.seen(expression, operand)
        return values[operand.name]

    def _plan(self, planner: Kernel, given: Given, lists: Values) -> list[relax.Expr]:
        """The lists that a planner makes: constants where it can run now, else the results of a call."""
        tables = self._constants(planner, given.weights)
        variable = [each for each in planner.inputs() if each.role != "constant"]
        args = [self._argument(each, given, lists) for each in variable]
        content = tuple(array_digest(table) for table in tables.values())
        key = (planner, content, tuple(args))
        if key not in self.planned:
            if not args and self._is_short(planner):
                self.planned[key] = [relax.const(array) for array in planned_now(planner, tables)]
            else:
                constants = {name: relax.const(table) for name, table in tables.items()}
                named = constants | {each.name: arg for each, arg in zip(variable, args, strict=True)}
                self.planned[key] = self._outputs(planner, named)
        return self.planned[key]

    def _is_short(self, planner: Kernel) -> bool:
        return (
            self.now
            and planner.foldable
            and sum(math.prod(each.shape) for each in planner.outputs()) <= MOST_CONSTANT_LISTS
        )

    def _outputs(self, planner: Kernel, args: Values) -> list[relax.Expr]:
        made, count = call_kernel(self.builder, planner, args, self.masks.threads), len(planner.outputs())
        return [made] if count == 1 else [self.builder.emit(relax.TupleGetItem(made, i)) for i in range(count)]


def planned_now(planner: Kernel, tables: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The lists of a planner that takes constants alone, which are the same in every call."""
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})  # it runs once
    run = tvm.compile(tvm.IRModule({"plan": planner.primfunc("plan")}), target=target)
    lists = [tvm.runtime.tensor(np.zeros(each.shape, each.dtype)) for each in planner.outputs()]
    run["plan"](*(tvm.runtime.tensor(tables[each.name]) for each in planner.inputs()), *lists)
    return [array.numpy() for array in lists]


def counted(builder: relax.BlockBuilder, count: Count, samples: int, values: Values) -> relax.Expr:
    """What ``count`` comes to, int32 (samples, 1)."""
    emit, op = builder.emit, relax.op
    if not count.operand:
        return relax.const(np.full((samples, 1), count.factor, "int32"))
    counts = values[count.operand]
    axes = [axis + 1 for axis in range(len(count.at))]
    value = emit(op.strided_slice(counts, axes, list(count.at), [at + 1 for at in count.at]))
    if len(count.at) > 1:
        value = emit(op.reshape(value, [int(value.ty.shape[0]), 1]))
        value = emit(op.broadcast_to(value, [samples, 1]))
    if count.factor != 1:
        value = emit(op.multiply(value, relax.const(count.factor, "int32")))
    if count.divisor != 1:
        value = emit(op.floor_divide(value, relax.const(count.divisor, "int32")))
    return value
