"""Where a sparse kernel goes: a convolution, linear layer or pool with everything that is fused behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tvm import relax

from dance_tvm.ir.graph import Graph, constant, dtype_of, is_tensor, shape_of
from dance_tvm.ir.transposed import TRANSPOSED, Ordinary, turned
from dance_tvm.ir.windows import CONVOLUTIONS, POOLS, is_planar_convolution, planar_window_of, window_of
from dance_tvm.liveness.analysis import Liveness
from dance_tvm.liveness.expressions import EVERYWHERE, Live
from dance_tvm.schedules.geometry import Triple, Window, triple
from dance_tvm.schedules.plans import MOST_DYNAMIC_FRAME_TAPS
from dance_tvm.schedules.spread import Spread

from .activations import activation_behind

#: Relax operators that a kernel applies before it stores, by the name the schedules use.
FUSED_ACTIVATIONS = {"nn.relu": "relu", "sigmoid": "sigmoid", "nn.silu": "silu", "nn.relu6": "relu6"}


class SiteLists(NamedTuple):
    """Which lists a kernel walks where masks allow them: live input and output channels, and living input positions."""

    inputs: bool = True
    outputs: bool = True
    positions: bool = False


@dataclass(frozen=True)
class PoolBehind:
    """A max pool that alone reads a site: its result, its window, and what lies between, products with masks.

    ``together``: masks leave out all that is under one window, or nothing.
    """

    end: relax.Var
    window: Window
    between: tuple[relax.Var, ...]
    together: bool


@dataclass
class Site:
    """A convolution or linear layer: ``end`` is the last binding that its kernel replaces."""

    start: relax.Var
    end: relax.Var
    data: relax.Var
    weight: np.ndarray  # (C_out, C_in / groups, KT, KH, KW)
    window: Window
    groups: int = 1
    bias: np.ndarray | None = None
    residual: relax.Var | None = None
    activation: str = ""
    #: What the data is multiplied by for each clip and channel, and the activation between that and the layer.
    gate: relax.Var | None = None
    before: str = ""
    #: What the weights are multiplied with where that is not the data itself.
    gated: relax.Var | None = None
    #: Of a transposed convolution: how far apart the window sees the input's positions.
    spread: Triple | None = None
    #: Whether its tensors have channels first.
    planar: bool = False
    #: The max pool behind it that its kernel computes too.
    pool: PoolBehind | None = None
    absorbed: list[relax.Var] = field(default_factory=list)
    masked: bool = False
    lists: SiteLists = field(default_factory=SiteLists)
    unlisted: list[str] = field(default_factory=list)

    @property
    def linear(self) -> bool:
        """Whether it came from a matrix product."""
        return self.weight.ndim == 2

    @property
    def whole(self) -> bool:
        """Whether its kernel reads and computes everything, whatever masks say."""
        return self.linear or self.spread is not None or self.planar

    @property
    def channels_out(self) -> int:
        """Output channels."""
        return int(self.weight.shape[0])

    @property
    def channels_in(self) -> int:
        """Input channels."""
        return int(self.weight.shape[1]) * self.groups

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer, padding included, as papers count them."""
        positions = self.window.positions_out
        if self.spread is not None:  # a transposed convolution multiplies each position of its input
            positions = self.window.batch * math.prod(Spread(self.window, self.spread).size)
        return positions * self.window.taps * self.channels_out * int(self.weight.shape[1])


#: Which lists a site walks, its input alive and its output wanted there.
Lists = Callable[[Site, Live, Live], SiteLists]


@dataclass
class Sites:
    """All sites of a graph, and which bindings they replace."""

    graph: Graph
    liveness: Liveness
    by_end: dict[relax.Var, Site] = field(default_factory=dict)
    inside: set[relax.Var] = field(default_factory=set)
    aliases: dict[relax.Var, relax.Var] = field(default_factory=dict)
    by_start: dict[relax.Var, Site] = field(default_factory=dict)
    #: Whether pools leave out dead positions of their input themselves.
    pools_skip: bool = False
    #: What chains over frames begin with, and their bindings: their kernel reads it under masks of its own.
    chained: dict[relax.Var, set[relax.Var]] = field(default_factory=dict)
    _zeroed: dict[relax.Var, bool] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph, liveness: Liveness, lists: Lists | None = None, *, pools_skip: bool = False) -> Sites:
        """Find every site, extended as far as its kernel can carry on; ``lists`` decides what each lists."""
        sites = Sites(graph, liveness, pools_skip=pools_skip)
        for var in graph.order:
            site = _start(graph, var)
            if site is not None:
                sites.by_start[site.start] = site
                if lists is not None:
                    alive, wanted = sites.alive(site), sites.wanted(site)
                    site.lists = lists(site, alive, wanted)
                    listed = {"input": (alive, site.lists.inputs), "output": (wanted, site.lists.outputs)}
                    site.unlisted = [side for side, (live, on) in listed.items() if live.channels and not on]
                sites._extend(site)
                sites.by_end[site.end] = site
                sites.inside.update([site.start, *site.absorbed])
                sites.inside.discard(site.end)
        sites._find_aliases()
        return sites

    # -- extension -------------------------------------------------------------------------------------------------

    def _extend(self, site: Site) -> None:
        graph = self.graph
        while True:
            reader = graph.only_reader(site.end)
            if reader is not None and self._absorb(site, reader):
                site.absorbed.append(reader)
                site.end = reader
            elif not self._absorb_chain(site):
                return

    def _absorb_chain(self, site: Site) -> bool:
        """Take an activation into the kernel that is written as several operators."""
        if site.activation or site.masked:
            return False
        chain = activation_behind(self.graph, site.end)
        if chain is None or any(var in self.inside or var in self.by_end for var in chain.bindings):
            return False
        site.activation = chain.activation
        site.absorbed += chain.bindings
        site.end = chain.bindings[-1]
        return True

    def _absorb(self, site: Site, reader: relax.Var) -> bool:
        """Take ``reader`` into the kernel if it can be."""
        graph = self.graph
        name = graph.op(reader)
        if not name or not is_tensor(reader):
            return False
        if name == "reshape" and site.linear:  # of the rows alone: their order in memory stays
            return shape_of(reader)[-1:] == (site.channels_out,)
        if shape_of(reader) != shape_of(site.end):
            return False
        if reader in self.inside or reader in self.by_end:  # another site's: one that adds a shortcut's convolution
            return False
        if name == "multiply":
            return self._absorb_mask(site, reader)
        if site.activation or site.masked:
            return False
        if name in FUSED_ACTIVATIONS:
            site.activation = FUSED_ACTIVATIONS[name]
            return True
        if name == "add":
            return self._absorb_add(site, reader)
        return False

    def _absorb_add(self, site: Site, reader: relax.Var) -> bool:
        left, right = self.graph.call(reader).args
        other = right if left.same_as(site.end) else left
        value = constant(other)
        if value is not None:
            per_channel = value.size == 1 or _by_channel(value, site, len(shape_of(reader)))
            if not per_channel or site.residual is not None:
                return False
            added = np.broadcast_to(value.reshape(-1), (site.channels_out,)).astype("float64")
            site.bias = added + (0 if site.bias is None else site.bias)
            return True
        whole = is_tensor(other) and shape_of(other) == shape_of(reader) and dtype_of(other) == "float32"
        if not whole or site.residual is not None or other.same_as(site.end) or site.linear:
            return False
        if site.start in self.liveness.before and other not in self.liveness.before[site.start]:
            return False
        site.residual = other
        return True

    def _absorb_mask(self, site: Site, reader: relax.Var) -> bool:
        left, right = self.graph.call(reader).args
        other = right if left.same_as(site.end) else left
        if not isinstance(other, relax.Var) or site.whole or shape_of(other) == shape_of(reader):
            return False
        mask = self.liveness.mask(other, reader)
        known = self.liveness.before[site.start]
        if mask is None or mask.early(known) != mask:
            return False
        if mask.channels is not None and (site.groups > 1 or not site.lists.outputs):
            return False
        wanted = self.wanted(site)
        if wanted & mask != wanted:  # behind an activation that must see every value, the kernel computes all of them
            return False
        site.masked = True
        return True

    # -- who reads ---------------------------------------------------------------------------------------------------

    def _find_aliases(self) -> None:
        """Multiplies by masks that kernels apply themselves, by not reading."""
        graph = self.graph
        for var in reversed(graph.order):
            if graph.op(var) != "multiply" or var in self.inside or var in self.by_end or var in graph.outputs:
                continue
            source, mask = self._masked_source(var)
            if source is None or mask is None:
                continue
            if all(self._skips(reader, var, mask) for reader in graph.readers[var]):
                self.aliases[var] = source

    def _masked_source(self, var: relax.Var) -> tuple[relax.Var | None, Live | None]:
        for data, other in (self.graph.call(var).args, list(self.graph.call(var).args)[::-1]):
            if isinstance(data, relax.Var) and is_tensor(data) and shape_of(data) == shape_of(var):
                mask = self.liveness.mask(other, var) if shape_of(other) != shape_of(var) else None
                if mask is not None:
                    return data, mask
        return None, None

    def _skips(self, reader: relax.Var, var: relax.Var, mask: Live) -> bool:
        if reader in self.aliases:
            return all(self._skips(after, reader, mask) for after in self.graph.readers[reader])
        if self.pools_skip and self._is_pool(reader):
            beyond = Live(channels=mask.channels)  # a pool's own channels are dead where its input's are
            return mask.channels is None or (
                reader not in self.graph.outputs
                and all(self._skips(after, reader, beyond) for after in self.graph.readers[reader])
            )
        site = self.by_start.get(reader)
        if site is None or not site.data.same_as(var) or site.groups > 1 or site.spread is not None:
            return False
        if mask.channels is not None and not site.lists.inputs:
            return False
        if mask.positions is not None and not site.lists.positions:
            return False
        return mask.frames is None or site.window.kernel[0] <= MOST_DYNAMIC_FRAME_TAPS

    def needs_zeros(self, var: relax.Var) -> bool:
        """Whether some reader of ``var`` looks at elements that were left out, and must find zeros there."""
        if var not in self._zeroed:
            outputs, readers = self.graph.outputs, self.graph.readers[var]
            self._zeroed[var] = var in outputs or any(not self._careful(reader, var) for reader in readers)
        return self._zeroed[var]

    def needs_zero_positions(self, var: relax.Var) -> bool:
        """Whether some reader must find zeros at dead positions of live frames, as convolutions must."""
        return var in self.graph.outputs or not all(
            reader in self.chained.get(var, ()) or self._passes_over(reader) for reader in self.graph.readers[var]
        )

    def _passes_over(self, reader: relax.Var) -> bool:
        """Whether ``reader`` looks only at the positions that are alive and read: as pools of a processor do."""
        if reader in self.aliases:
            return all(self._passes_over(after) for after in self.graph.readers[reader])
        return self.pools_skip and self._is_pool(reader)

    def may_hold_anything(self, var: relax.Var) -> bool:
        """Whether dead positions of ``var`` may hold anything, so that a pool of it must know which they are."""
        stored = not self.pools_skip or var not in self.by_end or self.needs_zero_positions(var)
        return var in self.aliases or not stored

    def _is_pool(self, var: relax.Var) -> bool:
        return self.graph.op(var) in POOLS and window_of(self.graph, var) is not None

    def _careful(self, reader: relax.Var, var: relax.Var) -> bool:
        """Whether ``reader`` only looks where ``var`` is alive and read."""
        if reader in self.chained.get(var, ()):
            return True
        if reader in self.aliases:  # its readers pass over what its mask leaves out, and must over the rest
            return not self.needs_zeros(reader)
        site = self.by_start.get(reader)
        if site is not None:
            dynamic = site.window.kernel[0] <= MOST_DYNAMIC_FRAME_TAPS
            return site.data.same_as(var) and dynamic and site.lists.inputs and site.groups == 1 and not site.whole
        return self._is_pool(reader) and not self.needs_zeros(reader)

    def wanted(self, site: Site) -> Live:
        """What the site's kernel computes."""
        if site.whole:
            return EVERYWHERE
        live = self.liveness.wanted(site.start)
        return live if site.groups == 1 and site.lists.outputs else Live(live.frames, live.positions)

    def alive(self, site: Site) -> Live:
        """What the site's kernel knows to be zero of its input."""
        if site.whole:
            return EVERYWHERE
        live = self.liveness.alive_in(site.data)
        return live if site.lists.inputs else Live(live.frames, live.positions)


def _start(graph: Graph, var: relax.Var) -> Site | None:
    """The site that begins at ``var``, if it is a convolution or matrix product with constant float32 weights."""
    name = graph.op(var)
    if name in TRANSPOSED:
        return _transposed(graph, var)
    if name not in CONVOLUTIONS and name != "matmul":
        return None
    call = graph.call(var)
    data, weight = call.args[0], constant(call.args[1])
    if weight is None or weight.dtype != np.float32 or not isinstance(data, relax.Var) or not is_tensor(data):
        return None
    if dtype_of(data) != "float32":
        return None
    if name == "matmul":
        first = weight[(0,) * (weight.ndim - 2)] if weight.ndim > 2 else weight
        if weight.ndim > 2 and (weight == first).all():
            weight = first  # as linear layers over permuted tensors are exported
        if weight.ndim != 2 or len(shape_of(data)) < 2 or shape_of(var)[:-1] != shape_of(data)[:-1]:
            return None
        rows = int(np.prod(shape_of(data)[:-1]))
        return Site(var, var, data, weight.T, Window(rows, (1, 1, 1), (1, 1, 1), (1, 1, 1)))
    window = window_of(graph, var)
    if window is None:
        if not is_planar_convolution(graph, var):
            return None
        window = planar_window_of(graph, var)
        assert window is not None
        return Site(var, var, data, weight.reshape(*weight.shape[:2], 1, 1, 1), window, planar=True)
    full = weight.reshape(*weight.shape[:2], *window.kernel)
    return Site(var, var, data, full, window, int(call.attrs.groups))


def _by_channel(value: np.ndarray, site: Site, rank: int) -> bool:
    """Whether a constant has one value for each of a site's channels, which lie on the last axis or on the second."""
    axis = 1 - rank if site.planar else -1
    return value.size == site.channels_out and value.ndim >= -axis and value.shape[axis] == value.size


def _transposed(graph: Graph, var: relax.Var) -> Site | None:
    """The site of a transposed convolution whose data has channels innermost."""
    call = graph.call(var)
    data, weight = call.args[0], constant(call.args[1])
    if weight is None or not str(call.attrs.data_layout).endswith("C") or not isinstance(data, relax.Var):
        return None
    ordinary, full = Ordinary.of(call), turned(weight)
    rank = full.ndim - 2

    def whole(values: Sequence[int], fill: int) -> Triple:
        return triple([*[fill] * (3 - rank), *values])

    spread = whole(ordinary.strides, 1)
    size = whole([(n - 1) * step + 1 for n, step in zip(shape_of(data)[1:-1], ordinary.strides, strict=True)], 1)
    kernel, out = whole(full.shape[2:], 1), whole(shape_of(var)[1:-1], 1)
    window = Window(shape_of(data)[0], size, out, kernel, (1, 1, 1), whole(ordinary.before, 0))
    ordered = full.reshape(*full.shape[:2], *kernel)[..., Spread(window, spread).width_taps]
    return Site(var, var, data, np.ascontiguousarray(ordered), window, spread=spread)
