"""Chains over frames: where a frame takes over what the frame before left (D-STEP), run by ``carry_frames``.

With frames as the batch axis, frame-major, a network writes ``y[t] = x[t] + masks[t] * y[t - 1]`` as a chain over
slices of one frame each, whose results are concatenated; a stream's chain has one frame, and ``y[-1]`` is an input.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tvm import relax

from dance_tvm.ir.graph import Graph, is_tensor, shape_of
from dance_tvm.liveness.analysis import Liveness
from dance_tvm.liveness.expressions import EVERYWHERE, Factor, Live

from .sites import Sites


@dataclass
class Chain:
    """One recurrence: ``end`` is the last binding that its kernel replaces, ``inside`` the others.

    ``source`` holds x of all frames where ``fresh`` says so, and anything elsewhere; ``taken`` are the masks of all
    frames under which y of the frame before is added; ``kept`` those of y itself, which multiplied it further on.
    """

    end: relax.Var
    source: relax.Var
    fresh: Live
    taken: Live
    before: relax.Var | None
    frames: int
    inside: set[relax.Var] = field(default_factory=set)
    kept: Live = EVERYWHERE


def find_chains(graph: Graph, liveness: Liveness, sites: Sites) -> list[Chain]:
    """All chains of ``graph`` that no site's kernel has a part of; ``sites`` learns which bindings they replace."""
    finder = _Finder(graph, liveness, sites)
    chains = [chain for var in graph.order if (chain := finder.chain(var)) is not None]
    for chain in chains:
        sites.chained[chain.source] = {chain.end, *chain.inside}
        sites.inside |= chain.inside
    return chains


@dataclass(frozen=True)
class _Link:
    """``y[t]``: its slice of x (x itself where there is one frame), and masks · y[t - 1] (none in the first frame)."""

    part: relax.Var
    taken: list[relax.Var]
    previous: relax.Var | None
    inside: list[relax.Var]


class _Finder:
    def __init__(self, graph: Graph, liveness: Liveness, sites: Sites) -> None:
        self.graph, self.liveness, self.sites = graph, liveness, sites
        self.claimed: set[relax.Var] = {*sites.inside, *sites.by_end, *sites.aliases}

    def chain(self, var: relax.Var) -> Chain | None:
        """The chain that ends in ``var``."""
        items = self._frames(var)
        if items is None or var in self.claimed:
            return None
        linked = [self._link(item, items[:index]) for index, item in enumerate(items)]
        links = [link for link in linked if link is not None]
        if len(links) < len(items):
            return None
        found = self._joined(var, items, links)
        if found is None:
            return None
        self._extend(found)
        self.claimed |= {found.end, *found.inside}
        return found

    def _frames(self, var: relax.Var) -> list[relax.Var] | None:
        """The values that ``var`` concatenates along the batch, or ``var`` itself if it is a sum."""
        graph = self.graph
        if not is_tensor(var) or len(shape_of(var)) != 4:
            return None
        if graph.op(var) == "add":
            return [var] if graph.call(var).args[0] in self.sites.by_end else None
        if graph.op(var) != "concat" or int(graph.call(var).attrs.axis) != 0:
            return None
        joined = graph.call(var).args[0]
        items = list((graph.value[joined] if isinstance(joined, relax.Var) else joined).fields)
        alike = all(isinstance(item, relax.Var) and shape_of(item) == shape_of(items[0]) for item in items)
        return items if alike and len(items) > 1 else None

    def _link(self, item: relax.Var, earlier: list[relax.Var]) -> _Link | None:
        graph = self.graph
        if graph.op(item) == "strided_slice":
            return _Link(item, [], None, []) if not earlier else None
        if graph.op(item) != "add":
            return None
        part, product = graph.call(item).args
        taken, inside, previous = [], [], product
        while graph.op(previous) == "multiply" and (factors := self._masked(previous)) is not None:
            inside.append(previous)
            taken.append(factors[1])
            previous = factors[0]
        if not taken or not isinstance(previous, relax.Var) or (earlier and not previous.same_as(earlier[-1])):
            return None
        return _Link(part, taken, previous, inside)

    def _masked(self, product: relax.Var) -> tuple[relax.Var, relax.Var] | None:
        """What a product multiplies, and by which mask."""
        args = self.graph.call(product).args
        for data, other in (args, list(args)[::-1]):
            if isinstance(data, relax.Var) and shape_of(data) == shape_of(product) != shape_of(other):
                return (data, other) if self.liveness.mask(other, product) is not None else None
        return None

    def _joined(self, var: relax.Var, items: list[relax.Var], links: list[_Link]) -> Chain | None:
        """The chain of all links, if they slice one x, their masks are slices of masks, and nothing else reads them."""
        graph, frames, count = self.graph, len(links), shape_of(items[0])[0]
        inside = {bound for link in links for bound in link.inside}
        if frames == 1:
            source = links[0].part
        else:
            slices = [found for link in links if (found := _slice(graph, link.part)) is not None]
            if [begin for _, begin in slices] != [index * count for index in range(frames)]:
                return None
            source = slices[0][0]
            alike = all(data.same_as(source) for data, _ in slices)
            if not alike or shape_of(source) != shape_of(var):
                return None
            inside |= {*(link.part for link in links), *items}
        known = {*inside, var}
        if any(bound in graph.outputs or not known.issuperset(graph.readers[bound]) for bound in inside):
            return None
        taken = self._taken(var, links)
        if taken is None:
            return None
        fresh = self.liveness.alive_in(source)
        return Chain(var, source, fresh, taken, links[0].previous, frames, inside)

    def _taken(self, var: relax.Var, links: list[_Link]) -> Live | None:
        """The masks of all frames together; those of the first are not asked for where nothing comes before it."""
        with_masks = [link for link in links if link.taken]
        if len({len(link.taken) for link in with_masks}) != 1:
            return None
        skipped = len(links) - len(with_masks)
        together = EVERYWHERE
        for masks in zip(*(link.taken for link in with_masks), strict=True):
            live = self._whole(list(masks), skipped, shape_of(var))
            if live is None:
                return None
            together = together & live
        return together

    def _whole(self, masks: list[relax.Var], skipped: int, shape: tuple[int, ...]) -> Live | None:
        """The mask of all frames whose slices ``masks`` are those from frame ``skipped`` on."""
        if skipped == 0 and len(masks) == 1:
            return self.liveness.masks.live(masks[0], shape)
        bases = []
        for index, mask in enumerate(masks):
            moved = self.graph.op(mask) == "permute_dims"
            part = _slice(self.graph, self.graph.call(mask).args[0] if moved else mask)
            if part is None or part[1] != (index + skipped) * shape_of(mask)[0]:
                return None
            bases.append(part[0])
        own = (shape[0], *shape_of(masks[0])[1:])
        same = all(base.same_as(bases[0]) for base in bases) and shape_of(bases[0])[0] == shape[0]
        if not same or [e for e in shape_of(bases[0]) if e > 1] != [e for e in own if e > 1]:
            return None
        factor = Factor(bases[0], (own[0], 1, *own[1:]))
        if not self.liveness.masks.is_binary(bases[0]):
            return None
        spatial = max(own[1:3]) > 1
        if own[3] == 1:
            return Live(positions=factor) if spatial else Live(frames=factor)
        return Live(channels=factor) if not spatial else None

    def _extend(self, chain: Chain) -> None:
        """Take in products with masks before x, which the kernel's own masks make needless, and behind y."""
        graph = self.graph
        while graph.op(chain.source) == "multiply" and chain.source not in self.claimed:
            factors = self._masked(chain.source)
            readers = graph.readers[chain.source]
            if factors is None or chain.source in graph.outputs or not {*chain.inside, chain.end}.issuperset(readers):
                break
            chain.inside.add(chain.source)
            chain.source = factors[0]
        while (reader := graph.only_reader(chain.end)) is not None and reader not in self.claimed:
            masked = self._masked(reader) if graph.op(reader) == "multiply" else None
            mask = self.liveness.mask(masked[1], reader) if masked and masked[0].same_as(chain.end) else None
            if mask is None:
                break
            chain.kept = chain.kept & mask
            chain.inside.add(chain.end)
            chain.end = reader


def _slice(graph: Graph, var: relax.Expr) -> tuple[relax.Var, int] | None:
    """What ``var`` is a slice of, along the batch alone, and where it begins there."""
    if graph.op(var) != "strided_slice":
        return None
    data, axes, begin, _, *strides = graph.call(var).args
    stepless = all(int(step.value) == 1 for tuple_ in strides for step in tuple_.fields)
    if [int(axis.value) for axis in axes.fields] != [0] or not stepless or not isinstance(data, relax.Var):
        return None
    return data, int(begin.fields[0].value)
