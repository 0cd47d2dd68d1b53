"""Which operators keep the source's layout, channels first: one decision for a whole network.

Operators that read each other's values share a layout, and so do those between which values are only moved; changes
stand where such a part of the network ends. Kernels with channels innermost are the rule. A part of nothing but
pointwise convolutions, max pools and what needs no layout has kernels for either, and keeps that of the source: no
change at its ends.
"""

from __future__ import annotations

import math

from tvm import relax

from dance_tvm.ir.graph import Graph, constant, dtype_of, is_tensor, lies_along, shape_of, variables
from dance_tvm.ir.reasons import Reasons
from dance_tvm.ir.windows import CONVOLUTIONS, MAX_POOLS, is_planar_convolution, is_planar_pool, planar_window_of
from dance_tvm.liveness.rules import ELEMENTWISE
from dance_tvm.schedules.geometry import WIDTH

#: Ranks of tensors that have a layout.
RANKS = (4, 5)
#: Positions of a clip, and of a line that is pooled, from which on they fill vectors as well as channels do.
FEWEST_POSITIONS, SHORTEST_LINE = 96, 14
#: Operators that move values.
MOVES = {"reshape", "permute_dims", "expand_dims", "squeeze", "flatten", "split"}


def planar(graph: Graph, reasons: Reasons) -> set[relax.Var]:
    """The operators that keep channels first: of parts with a convolution or pool whose every operator can.

    Where a part has convolutions or pools that could and an operator that cannot, the first of them gives the reason.
    """
    parts = _Parts(graph)
    unable: dict[relax.Var, relax.Var] = {}
    windows: set[relax.Var] = set()
    could: dict[relax.Var, relax.Var] = {}
    for var in parts.parent:
        first, able = parts.first(var), _able(graph, var)
        if not able:
            unable.setdefault(first, var)
        if graph.op(var) in CONVOLUTIONS | MAX_POOLS:
            windows.add(first)
            if able:
                could.setdefault(first, var)
    for first, var in could.items():
        if (other := unable.get(first)) is not None:
            reasons.add(var, f"channels innermost: {other.name}, which shares its layout, has no kernel for others")
    return {var for var in parts.parent if (first := parts.first(var)) in windows and first not in unable}


class _Parts:
    """Variables that read each other's values, but for what is neither tensor of a rank that has a layout nor moved
    from one; ``parent`` leads to each part's first one."""

    def __init__(self, graph: Graph) -> None:
        self.parent: dict[relax.Var, relax.Var] = {}
        for var in graph.order:
            data = [read for read in variables(graph.value[var]) if read in self.parent]
            if _moves(graph, var) or any(is_tensor(each) and len(shape_of(each)) in RANKS for each in (var, *data)):
                self.parent[var] = var
                for each in data:
                    self.parent[self.first(each)] = self.first(var)

    def first(self, var: relax.Var) -> relax.Var:
        """The variable that stands for the part of ``var``."""
        path = []
        while not (above := self.parent[var]).same_as(var):
            path.append(var)
            var = above
        self.parent.update(dict.fromkeys(path, var))  # long networks are long chains
        return var


def _moves(graph: Graph, var: relax.Var) -> bool:
    """Whether ``var`` has the values that it reads, in another shape or order: changes of layout at either end are
    parts of the same copy."""
    return graph.op(var) in MOVES or not isinstance(graph.value[var], relax.Call)


def _able(graph: Graph, var: relax.Var) -> bool:
    """Whether an operator has a kernel for channels first that is as fast as that for channels innermost."""
    if _moves(graph, var):
        return not _moves_channels(graph, var)
    name, call = graph.op(var), graph.call(var)
    if not name or not is_tensor(var) or dtype_of(var) != "float32":
        return False
    if name in CONVOLUTIONS:
        return is_planar_convolution(graph, var) and math.prod(shape_of(var)[2:]) >= FEWEST_POSITIONS
    if name in MAX_POOLS:
        window = planar_window_of(graph, var)
        return window is not None and is_planar_pool(graph, var) and window.out[WIDTH] >= SHORTEST_LINE
    if name == "nn.instance_norm":
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


def _moves_channels(graph: Graph, var: relax.Var) -> bool:
    """Whether the source itself changes between channels first and last."""
    if graph.op(var) != "permute_dims":
        return False
    rank = len(shape_of(var))
    axes = [int(axis) for axis in graph.call(var).attrs.axes or ()]
    return rank in RANKS and axes in ([0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)])
