"""Gates of squeeze and excitation: a layer multiplies its input by them itself, so that no such product is stored."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from dance_tvm.ir.graph import Graph, is_tensor, shape_of
from dance_tvm.schedules.epilogue import STEPS

from .activations import MOST_STEPS, activation_behind
from .sites import Site, Sites


def absorb_gates(graph: Graph, sites: Sites, takes: Callable[[Site], bool]) -> None:
    """Let each site that ``takes`` a gate begin before the product of its input with one, if it alone reads that and
    what lies between."""
    for site in sites.by_end.values():
        if not site.linear and takes(site):
            _absorb_gate(graph, sites, site, takes)


def _absorb_gate(graph: Graph, sites: Sites, site: Site, takes: Callable[[Site], bool]) -> None:
    data = site.data
    if graph.only_reader(data) is None:
        return
    for product in _products(graph, data):
        gated = _gated(graph, product)
        if gated is None:
            continue
        chain = None if product.same_as(data) else activation_behind(graph, product)
        between = [] if chain is None else chain.bindings
        ends_here = product.same_as(data) or (chain is not None and chain.bindings[-1].same_as(data))
        taken = [product, *between]
        if not ends_here or any(var in sites.inside or var in sites.by_end or var in sites.aliases for var in taken):
            continue
        (site.data, site.gate), site.gated = gated, data
        site.before = "" if chain is None else chain.activation
        if takes(site):  # what is known to be dead of its input may be more than of the product
            sites.inside.update(taken)
            site.absorbed += taken
            return
        site.data, site.gate, site.before, site.gated = data, None, "", None


def _products(graph: Graph, data: relax.Var) -> list[relax.Var]:
    """The multiplications that ``data`` may be an activation of, itself the first."""
    found: list[relax.Var] = []
    waiting = [data]
    while waiting and len(found) <= 2 * MOST_STEPS:
        var = waiting.pop(0)
        if var in found or graph.op(var).removeprefix("nn.") not in STEPS:
            continue
        found.append(var)
        waiting += [arg for arg in graph.call(var).args if isinstance(arg, relax.Var)]
    return [var for var in found if graph.op(var) == "multiply"]


def _gated(graph: Graph, product: relax.Var) -> tuple[relax.Var, relax.Var] | None:
    """What is multiplied with what, where one of the two has a value for each clip and channel alone."""
    left, right = graph.call(product).args
    shape = shape_of(product)
    of_gate = (shape[0], *(1 for _ in shape[1:-1]), shape[-1])
    for data, gate in ((left, right), (right, left)):
        tensors = all(isinstance(each, relax.Var) and is_tensor(each) for each in (data, gate))
        if tensors and shape_of(data) == shape and shape_of(gate) == of_gate and of_gate != shape:
            return data, gate
    return None
