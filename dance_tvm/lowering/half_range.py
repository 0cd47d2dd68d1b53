"""Which layers half precision has no range for: what they read, store or add up is too large for it, or too small."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from tvm import relax

from dance_tvm.ir.graph import Graph
from dance_tvm.schedules.cpu.tiles import HALF_TERMS

from .sites import Site

#: Half precision's largest number, and how far from it values that were seen stay: other inputs may be larger.
LARGEST = 65504.0
MARGIN = 2.0
#: Values that are all smaller lose digits: half precision's normal numbers end at 2**-14.
SMALLEST = 2.0**-12

#: Operators behind which values are the same ones elsewhere.
_MOVES = {"permute_dims", "reshape", "squeeze", "expand_dims"}
#: Names that TVM gives: they say nothing of what a variable was before a pass.
_GIVEN = re.compile(r"(lv|gv)\d*")


@dataclass
class HalfRange:
    """Judges the sites of ``graph`` by the largest magnitude that each variable was seen to have, by its name; what
    was not seen is taken to fit."""

    graph: Graph
    largest: Mapping[str, float] = field(default_factory=dict)

    def why_whole(self, site: Site) -> str:
        """Why a site stays in float32; empty where half precision will do."""
        kept = [("what it reads", site.data), ("its result", site.end)]
        others = ("what is added to it", site.residual), ("what it reads, gated,", site.gated)
        kept += [(what, var) for what, var in others if var is not None]
        for what, var in kept:
            if why := self.why_not(var, what):
                return why
        sizes = np.abs(site.weight.reshape(len(site.weight), -1))
        if why := _beyond("its largest weight", float(sizes.max(initial=0.0)), LARGEST):
            return why
        terms = -np.sort(-sizes, axis=1)[:, :HALF_TERMS].sum(1).max(initial=0.0)
        read = site.data if site.gated is None else site.gated
        return _beyond("a sum of its products may reach", float(terms) * (self._seen(read) or 0.0), LARGEST, 0.0)

    def why_not(self, var: relax.Var, what: str) -> str:
        """Why half precision does not hold ``var``, which a sentence calls ``what``; empty where it does."""
        seen = self._seen(var)
        return "" if seen is None else _beyond(f"{what} reaches", seen, LARGEST / MARGIN)

    def _seen(self, var: relax.Var) -> float | None:
        while _GIVEN.fullmatch(var.name) or var.name not in self.largest:
            if self.graph.op(var) not in _MOVES or not isinstance(self.graph.call(var).args[0], relax.Var):
                return None
            var = self.graph.call(var).args[0]
        return self.largest[var.name]


def _beyond(what: str, value: float, most: float, least: float = SMALLEST) -> str:
    if value > most:
        return f"float32: {what} {value:.3g}, half precision ends at {LARGEST:.0f}"
    if 0 < value < least:
        return f"float32: {what} {value:.3g} at most, where half precision has few digits left"
    return ""
