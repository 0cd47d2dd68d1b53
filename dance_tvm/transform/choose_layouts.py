"""Which operators keep the source's layout, channels first: one decision for a whole network.

Operators that read each other's values share a layout; changes stand where such a part of the network ends. Kernels
with channels innermost are the rule. A part of pointwise convolutions, max pools and what needs no layout alone has
kernels for either, and keeps that of the source: no change at its ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tvm import relax

from dance_tvm.ir.graph import Graph, constant, dtype_of, is_tensor, lies_along, shape_of
from dance_tvm.ir.windows import CONVOLUTIONS, MAX_POOLS, is_planar_convolution, is_planar_pool, planar_window_of
from dance_tvm.liveness.rules import ELEMENTWISE
from dance_tvm.schedules.geometry import WIDTH

#: Ranks of tensors that have a layout.
RANKS = (4, 5)
#: Positions of a clip, and of a line that is pooled, from which on they fill vectors as well as channels do.
FEWEST_POSITIONS, SHORTEST_LINE = 96, 14
#: Norms whose statistics are those of lines of positions.
NORMS_BY_CHANNEL = {"nn.instance_norm", "nn.group_norm"}
#: Operators that belong to no part: they take their data as the source has it.
OUTSIDE = {"reshape", "permute_dims", "expand_dims", "squeeze", "flatten", "matmul", "broadcast_to"}


@dataclass
class Parts:
    """The variables of a network in parts that share a layout; ``parent`` leads to each part's first one."""

    graph: Graph
    parent: dict[relax.Var, relax.Var] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph) -> Parts:
        """Those of ``graph``."""
        parts = Parts(graph)
        for var in graph.order:
            if _has_layout(graph, var):
                parts.parent[var] = var
                for data in _data(graph.call(var)):
                    if data in parts.parent:
                        parts.parent[parts.first(data)] = parts.first(var)
        return parts

    def first(self, var: relax.Var) -> relax.Var:
        """The variable that stands for the part of ``var``."""
        while not self.parent[var].same_as(var):
            var = self.parent[var]
        return var


def planar(graph: Graph) -> set[relax.Var]:
    """The operators that keep channels first: those of parts whose every operator can, a convolution or pool in each,
    and around which the source itself has channels nowhere innermost."""
    parts = Parts.of(graph)
    able: dict[relax.Var, bool] = {}
    windows: set[relax.Var] = set()
    for var in parts.parent:
        first = parts.first(var)
        able[first] = able.get(first, True) and _able(graph, var) and not _beside_a_change(graph, var)
        if graph.op(var) in CONVOLUTIONS | MAX_POOLS:
            windows.add(first)
    return {var for var in parts.parent if able[first := parts.first(var)] and first in windows}


def _has_layout(graph: Graph, var: relax.Var) -> bool:
    """Whether ``var`` is made by an operator that has a layout, of what it reads or of what it gives."""
    name = graph.op(var)
    if not name or name in OUTSIDE or not is_tensor(var):
        return False
    return len(shape_of(var)) in RANKS or any(data in graph.value for data in _data(graph.call(var)))


def _data(call: relax.Call) -> list[relax.Var]:
    """The variables of a rank with a layout that an operator reads."""
    flat: list[relax.Expr] = []
    for arg in call.args:
        flat += list(arg.fields) if isinstance(arg, relax.Tuple) else [arg]
    return [arg for arg in flat if isinstance(arg, relax.Var) and is_tensor(arg) and len(shape_of(arg)) in RANKS]


def _able(graph: Graph, var: relax.Var) -> bool:
    """Whether an operator has a kernel for channels first that is as fast as that for channels innermost."""
    name, call = graph.op(var), graph.call(var)
    if dtype_of(var) != "float32":
        return False
    if name in CONVOLUTIONS:
        return is_planar_convolution(graph, var) and math.prod(shape_of(var)[2:]) >= FEWEST_POSITIONS
    if name in MAX_POOLS:
        window = planar_window_of(graph, var)
        return window is not None and is_planar_pool(graph, var) and window.out[WIDTH] >= SHORTEST_LINE
    if name in NORMS_BY_CHANNEL:
        return int(call.attrs.channel_axis) % len(shape_of(var)) == 1
    return name in ELEMENTWISE and all(_fits(arg, shape_of(var)) for arg in call.args)


def _fits(arg: relax.Expr, shape: tuple[int, ...]) -> bool:
    """Whether an operand is a number, a value for each channel that is known, or a tensor of the result's shape: a mask
    is none of these, and liveness knows masks with channels innermost."""
    if not isinstance(arg.ty, relax.TensorType):
        return True
    value = constant(arg)
    if value is not None:
        return value.size == 1 or lies_along(value.shape, shape, 1)
    return is_tensor(arg) and shape_of(arg) == shape


def _beside_a_change(graph: Graph, var: relax.Var) -> bool:
    """Whether the source itself has channels innermost where ``var`` is read or what it reads is made."""
    reads = [data for data in _data(graph.call(var)) if _moves_channels(graph, data)]
    return bool(reads) or any(_moves_channels(graph, reader) for reader in graph.readers[var])


def _moves_channels(graph: Graph, var: relax.Var) -> bool:
    if graph.op(var) != "permute_dims":
        return False
    rank = len(shape_of(var))
    axes = [int(axis) for axis in graph.call(var).attrs.axes or ()]
    return rank in RANKS and axes in ([0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)])
