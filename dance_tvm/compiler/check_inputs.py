"""What the check runs a network on: at least three inputs, chosen so that its masks are both on and off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import Kind, crossed_inputs, has_float_range, mixed_inputs, random_inputs
from dance_tvm.frontend.interpreter import Part
from dance_tvm.ir.graph import Graph, is_tensor, shape_of, variables
from dance_tvm.liveness.analysis import Masks
from dance_tvm.liveness.relax_graph import RelaxView

if TYPE_CHECKING:
    from dance_tvm.frontend import Imported
    from dance_tvm.frontend.interface import Arrays

    Measure = Callable[[Arrays], "_Candidate"]

#: What every network is tried on.
USUAL: tuple[Kind, ...] = ("normal", "offset", "varied")

#: Inputs with mixed masks that are kept of a network that has masks.
MIXED = 4

#: More of them, each for states of masks that no input had before: entries that are on, or off, and how many are on.
#: Kernels have other code for other numbers of rows, and for one frame's or position's state.
STATES = 4

#: Masks for which two inputs more are added, one on either side of a decision: what moves scores a little shows nowhere
#: else. They are ``_APART`` of the way between two inputs that differ in the mask from where it changes, which is far
#: more than rounding moves.
CLOSE = 4
_APART, _HALVINGS = 2.0**-10, 12

#: Multiply-accumulates that the inputs for states and for decisions may cost together.
_MORE_MACS = 4e9

#: Multiply-accumulates that the search for mixed masks may spend, and how many inputs it may try.
_SEARCH_MACS = 30e9
_FEWEST_TRIES, _MOST_TRIES = 8, 64
_PARENTS = 6

#: What a mask that is off everywhere weighs against mixed ones, and what masks weigh that no chosen input mixes yet.
_SHUT, _SEEN = 2, 2

#: Inputs that the search starts from: kinds and scales.
_STARTS: tuple[tuple[Kind, float], ...] = (
    *((kind, scale) for scale in (1.0, 0.1, 10.0, 0.01) for kind in ("varied", "picture")),
)


@dataclass
class CheckInputs:
    """Inputs and the source's answers to them, by what they are called.

    ``uniform`` are those of ``masks``, which the network computes in every call, that were on everywhere or off
    everywhere in all inputs; ``refused`` says of inputs that the source takes not why.
    """

    imported: Imported
    arrays: dict[str, Arrays] = field(default_factory=dict)
    answers: dict[str, Arrays] = field(default_factory=dict)
    masks: list[str] = field(default_factory=list)
    uniform: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, arrays: Arrays) -> None:
        """Let the source answer ``arrays``."""
        try:
            answer = self.imported.reference(arrays)
        except Exception as problem:  # PyTorch's and ONNX Runtime's own, as for an index out of range
            self.refused[name] = str(problem).strip().splitlines()[0]
        else:
            self.arrays[name], self.answers[name] = arrays, answer


def check_inputs(imported: Imported, given: Mapping[str, Arrays] | None = None) -> CheckInputs:
    """A normal, an offset and a varied input, one from the declared range, ``given`` ones, and some that mix masks.

    Raises DanceError where the source takes none of them, or not one that was given.
    """
    tried = CheckInputs(imported)
    ranged: tuple[Kind, ...] = ("ranged",) if any(map(has_float_range, imported.inputs)) else ()
    for seed, kind in enumerate(USUAL + ranged):
        tried.add(kind, random_inputs(imported.inputs, seed, kind))
    for name, arrays in (given or {}).items():
        tried.add(name, arrays)
        if name in tried.refused:
            raise DanceError(f"{imported.name} does not take {name}: {tried.refused[name]}")
    if not tried.arrays:
        raise DanceError(
            f"{imported.name} takes no random input ({tried.refused['normal']}): name real ones with --check-inputs"
        )
    _mix_masks(tried)
    return tried


def _mix_masks(tried: CheckInputs) -> None:
    """Find the masks, and add inputs on which they are mixed."""
    graph = Graph.of(tried.imported.mod["main"])
    masks = computed_masks(graph)
    if not masks:
        return
    part = Part(tried.imported.mod, masks)

    def measured(arrays: Arrays) -> _Candidate:
        return _Candidate(arrays, [value.bool().flatten().numpy() for value in part.values(list(arrays.values()))])

    pool = [measured(arrays) for arrays in tried.arrays.values()]
    uniform = set(range(len(masks))).difference(*(one.mixed for one in pool))
    _breed(pool, measured, tried.imported, _tries(graph, masks))
    more = _MORE_MACS / max(_macs(graph, graph.order), 1.0)
    known = pool[: len(tried.arrays)]
    mixed = _chosen(pool, len(known), int(min(STATES, more)))
    close = _close_calls(pool, [*known, *mixed], measured, int(min(CLOSE, (more - STATES) / 2)))
    for kind, chosen in (("mixed", mixed), ("close", close)):
        for number, found in enumerate(chosen, start=1):
            tried.add(f"{kind} {number}", found.arrays)
            uniform -= found.mixed
    tried.masks = [var.name for var in masks]
    tried.uniform = [tried.masks[index] for index in sorted(uniform)]


@dataclass(frozen=True, eq=False)
class _Candidate:
    """An input, and where each mask is on."""

    arrays: Arrays
    on: list[np.ndarray]

    @cached_property
    def shares(self) -> list[float]:
        """The share of each mask that is on."""
        return [float(mask.mean()) for mask in self.on]

    @cached_property
    def mixed(self) -> set[int]:
        """The masks that are both on and off."""
        return {index for index, share in enumerate(self.shares) if 0 < share < 1}

    @cached_property
    def shut(self) -> int:
        """How many masks are off everywhere: they hide what the kernels before them do."""
        return sum(share == 0 for share in self.shares)

    @property
    def worth(self) -> float:
        """How well kernels behind masks show in the result."""
        return len(self.mixed) - _SHUT * self.shut


def _breed(pool: list[_Candidate], measured: Measure, imported: Imported, size: int) -> None:
    """Fill ``pool`` up to ``size`` with random inputs, and then with crossings of the best."""
    generator = np.random.default_rng(len(USUAL))
    for seed, (kind, scale) in enumerate(_STARTS, start=len(USUAL)):
        if len(pool) < size:
            pool.append(measured(random_inputs(imported.inputs, seed, kind, scale)))
    while len(pool) < size:
        best = sorted(pool, key=lambda one: -one.worth)[:_PARENTS]
        one, other = (best[index] for index in generator.choice(len(best), 2, replace=False))
        pool.append(measured(crossed_inputs(generator, one.arrays, other.arrays)))


def _chosen(pool: list[_Candidate], tried: int, states: int) -> list[_Candidate]:
    """At most ``MIXED`` of ``pool``, first the worthiest, then those that mix other masks; and some for other states.

    The first ``tried`` of the pool are inputs of the check already.
    """
    chosen: list[_Candidate] = []
    known, rest = pool[:tried], pool[tried:]
    seen = set[int]().union(*(one.mixed for one in known))
    while len(chosen) < MIXED and rest:
        found = max(rest, key=lambda one: _SEEN * len(one.mixed - seen) + one.worth)
        rest.remove(found)
        chosen.append(found)
        seen |= found.mixed
    return [*chosen, *_with_new_states([*known, *chosen], rest, states)]


def _with_new_states(known: list[_Candidate], rest: list[_Candidate], most: int) -> list[_Candidate]:
    """At most ``most`` of ``rest``: those with most states of masks that are in none before.

    Each mask weighs the same: how many of its entries are on counts as much as which.
    """
    entries = [np.zeros((2, len(mask)), bool) for mask in known[0].on]
    counts: list[set[int]] = [set() for _ in entries]

    def see(one: _Candidate) -> None:
        for mask, seen, numbers in zip(one.on, entries, counts, strict=True):
            seen |= np.array([mask, ~mask])
            numbers.add(int(mask.sum()))

    def gain(one: _Candidate) -> float:
        new = [float((np.array([mask, ~mask]) & ~seen).mean()) for mask, seen in zip(one.on, entries, strict=True)]
        return sum(new) + sum(int(mask.sum()) not in numbers for mask, numbers in zip(one.on, counts, strict=True))

    for one in known:
        see(one)
    found: list[_Candidate] = []
    while len(found) < most and rest:
        best = max(rest, key=lambda one: gain(one) - _SHUT * one.shut)
        if not gain(best):
            break
        found.append(best)
        rest.remove(best)
        see(best)
    return found


def _close_calls(pool: list[_Candidate], known: list[_Candidate], measured: Measure, most: int) -> list[_Candidate]:
    """Pairs of inputs on either side of where a mask changes, for at most ``most`` masks: those with fewest states."""
    found: list[_Candidate] = []
    best = sorted(pool, key=lambda one: -one.worth)
    left = set(range(len(pool[0].on)))

    def states(index: int) -> int:
        return len({one.on[index].tobytes() for one in (*known, *found)})

    while left and len(found) < 2 * most:
        index = min(left, key=lambda index: (states(index), index))
        left.remove(index)
        other = next((one for one in best if not np.array_equal(one.on[index], best[0].on[index])), None)
        if other is not None:
            found += _either_side(best[0], other, index, measured)
    return found


def _either_side(one: _Candidate, other: _Candidate, index: int, measured: Measure) -> list[_Candidate]:
    """The two inputs between ``one`` and ``other`` nearest to where the mask changes first, by halving."""

    def between(share: float) -> _Candidate:
        return measured(mixed_inputs(one.arrays, other.arrays, share))

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if np.array_equal(between(middle).on[index], one.on[index]):
            low = middle
        else:
            high = middle
    if low == 0.0:  # a mask of so many entries that each step changes one
        return []
    return [between(max(low - _APART, 0.0)), between(min(high + _APART, 1.0))]


def _tries(graph: Graph, masks: list[relax.Var]) -> int:
    """How many inputs the search may try: what masks depend on may be nearly the whole network."""
    needed = set(masks)
    for var in reversed(graph.order):
        if var in needed:
            needed.update(variables(graph.value[var]))
    return int(min(_MOST_TRIES, max(_FEWEST_TRIES, _SEARCH_MACS / max(_macs(graph, needed), 1.0))))


def _macs(graph: Graph, needed: Iterable[relax.Var]) -> float:
    """Multiply-accumulates of those of the graph's variables."""
    macs = 0.0
    for var in set(graph.order).intersection(needed):
        if graph.op(var) in ("nn.conv2d", "nn.conv3d", "matmul"):
            weight = shape_of(graph.call(var).args[1])
            per_value = math.prod(weight[1:]) if graph.op(var) != "matmul" else weight[-2]
            macs += math.prod(shape_of(var)) * per_value
    return macs


def computed_masks(graph: Graph) -> list[relax.Var]:
    """Masks that depend on the input: tensors of zeros and ones with a reader that has other values."""
    masks, depends = Masks(RelaxView(graph)), set(graph.params)
    for var in graph.order:
        if not depends.isdisjoint(variables(graph.value[var])):
            depends.add(var)
    return [
        var
        for var in graph.order
        if var in depends
        and is_tensor(var)
        and max(shape_of(var), default=1) > 1
        and masks.is_binary(var)
        and any(not masks.is_binary(reader) for reader in graph.readers[var])
    ]
