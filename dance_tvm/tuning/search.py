"""The search within one layer: MetaSchedule's evolutionary search over the family's tuning space.

The real kernels are written by Python, not by schedule primitives, so the space is put on a stand-in: an implicit
GEMM of the same extents as one S-TIR block. A ``ScheduleFn`` samples the decisions there and tiles the block by them,
which gives MetaSchedule traces to evolve and features to learn from; what is built and measured is the real kernel.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.logging import get_logging_func
from tvm.script import tirx as T

from dance_tvm.schedules.space import Space
from dance_tvm.schedules.workload import Decisions, Workload

POPULATION, GENERATIONS = 48, 2
#: Trials before the cost model says anything.
FEWEST_TO_FIT = 8
_PREFIX = "dance."


def stand_in(workload: Workload) -> tvm.tirx.PrimFunc:
    """The workload as one S-TIR block: ``Y[row, oc] += X[row + offset(tap), ic] * W[tap, ic, oc]`` at its density, as
    many input channels as there are columns of a kernel group at a tap."""
    lists, density = workload.lists, workload.density

    def alive(extent: int, *axes: str) -> int:
        return max(1, round(extent * density)) if set(axes) & set(lists) else extent

    rows = alive(workload.window.positions_out, "out_frames", "positions")
    depth = max(1, round(alive(workload.depth, "in_channels") * workload.kept))
    outs = alive(workload.channels_out, "out_channels")
    taps, sources = workload.window.taps, workload.window.positions_in + workload.window.positions_out

    @T.prim_func(s_tir=True)
    def implicit_gemm(  # type: ignore[no-untyped-def]  # TVMScript
        x: T.Buffer((sources, depth), "float32"),  # type: ignore[valid-type]  # TVMScript
        rows_in: T.Buffer((rows,), "int32"),  # type: ignore[valid-type]  # TVMScript
        offsets: T.Buffer((taps,), "int32"),  # type: ignore[valid-type]  # TVMScript
        w: T.Buffer((taps, depth, outs), "float32"),  # type: ignore[valid-type]  # TVMScript
        y: T.Buffer((rows, outs), "float32"),  # type: ignore[valid-type]  # TVMScript
    ):
        T.func_attr({"global_symbol": "main", "tir.noalias": True})
        for r, o, t, c in T.grid(rows, outs, taps, depth):
            with T.sblock("conv"):
                vr, vo, vt, vc = T.axis.remap("SSRR", [r, o, t, c])
                with T.init():
                    y[vr, vo] = T.float32(0)
                y[vr, vo] = y[vr, vo] + x[rows_in[vr] + offsets[vt], vc] * w[vt, vc, vo]

    return implicit_gemm.with_attr("dance.family", workload.family)


def schedule(sch: s_tir.Schedule, space: Space, part: Mapping[str, Sequence[int]], pinned: Mapping[str, int]) -> None:
    """Tile the stand-in by decisions sampled from a part of the space, or given by ``pinned``, and note them on its
    block."""
    block = sch.get_sblock("conv")
    chosen: dict[str, Any] = {}
    for name in space.names:
        values = list(part[name])
        decision = values.index(pinned[name]) if pinned else None
        chosen[name] = sch.sample_categorical(values, [1.0 / len(values)] * len(values), decision=decision)
        sch.annotate(block, _PREFIX + name, chosen[name])
    space.tile_loops(sch, sch.get_loops(block), chosen)


@derived_object
class MutateDecision(ms.mutator.PyMutator):
    """Draw one decision of a trace again; MetaSchedule's own mutators know only tile sizes of perfect splits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        pass

    def apply(self, trace: s_tir.schedule.Trace, _: Any) -> s_tir.schedule.Trace | None:
        """The trace with another value for one decision."""
        picks = [inst for inst in trace.insts if inst.kind.name == "SampleCategorical" and len(inst.attrs[0]) > 1]
        if not picks:
            return None
        inst = self.random.choice(picks)
        return trace.with_decision(inst, self.random.randrange(len(inst.attrs[0])), remove_postproc=False)

    def clone(self) -> Any:
        """A mutator of its own random numbers."""
        return MutateDecision(self.random.randrange(1 << 30))


@derived_object
class PlainModel(ms.cost_model.PyCostModel):
    """For where xgboost is missing: a least-squares fit, over all layers of a run, of how near decisions come to their
    layer's best."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, list[list[float]]] = {}
        self.seconds: dict[int, list[float]] = {}
        self.weights: dict[int, np.ndarray] = {}  # by the number of features: families have decisions of their own

    def load(self, path: str) -> None:
        """Nothing is kept between runs: the log has every trial."""

    def save(self, path: str) -> None:
        """Nothing is kept between runs: the log has every trial."""

    def update(self, context: Any, candidates: list[Any], results: list[Any]) -> None:
        """Fit again with more trials of a layer."""
        key = tvm_ffi.structural_hash(context.mod)
        for candidate, result in zip(candidates, results, strict=True):
            if result.run_secs:
                self.rows.setdefault(key, []).append(_features(candidate))
                self.seconds.setdefault(key, []).append(float(result.run_secs[0]))
        width = len(self.rows[key][0]) if key in self.rows else 0
        alike = [key for key, rows in self.rows.items() if len(rows[0]) == width]
        matrix = np.array([row for key in alike for row in self.rows[key]])
        scores = np.array([np.log(min(self.seconds[key]) / time) for key in alike for time in self.seconds[key]])
        if len(scores) >= FEWEST_TO_FIT:
            regular = 1e-2 * np.eye(width)
            self.weights[width] = np.linalg.solve(matrix.T @ matrix + regular, matrix.T @ scores)

    def predict(self, context: Any, candidates: list[Any]) -> np.ndarray:
        """Higher is better."""
        features = np.array([_features(candidate) for candidate in candidates])
        weights = self.weights.get(features.shape[-1]) if len(candidates) else None
        if weights is None:
            return np.random.default_rng(len(candidates)).random(len(candidates))
        return features @ weights


def _features(candidate: Any) -> list[float]:
    """Logarithms of the decisions and of the tile's sums, and their squares."""
    decisions = decisions_in(candidate.sch)
    sums = math.prod(decisions.get(name, 1) for name in ("mr", "nr", "vectors"))
    logs = [float(np.log2(1 + value)) for value in [*decisions.values(), sums]]
    return [1.0, *logs, *(value * value for value in logs)]


def new_cost_model() -> tuple[Any, str]:
    """The cost model shared by all layers of a run, and its name: XGBoost's, or a plain one where it is missing."""
    if find_spec("xgboost") is None:
        return PlainModel(), "plain (xgboost is not installed: pip install xgboost-cpu)"
    logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.ERROR)
    return ms.cost_model.XGBModel(num_warmup_samples=FEWEST_TO_FIT, num_tuning_cores=1, verbose_eval=0), "xgboost"


def decisions_in(sch: s_tir.Schedule) -> Decisions:
    """The decisions that are noted on the stand-in's block."""
    notes = sch.get(sch.get_sblock("conv")).annotations
    return {name.removeprefix(_PREFIX): int(value) for name, value in notes.items() if name.startswith(_PREFIX)}


class Search(Protocol):
    """Proposes decisions for one layer."""

    def propose(self) -> list[Decisions]:
        """The next candidates, none of them proposed or measured before; empty when the space is searched through."""

    def tell(self, results: Sequence[tuple[Decisions, float | None]]) -> None:
        """What decisions took in seconds (None: they failed), whether they were proposed here or not."""


def new_search(space: Space, target: tvm.target.Target, model: Any, batch: int, seed: int = 0) -> Search:
    """The search of a layer: through all candidates where they are no more than a batch, else MetaSchedule's."""
    return WholeSpace(space) if space.size <= batch else LayerSearch(space, target, model, batch, seed)


class WholeSpace:
    """Proposes every candidate of a small space at once."""

    def __init__(self, space: Space) -> None:
        self.left: list[Decisions] = []
        for part in space.parts():
            self.left += [dict(zip(part, values, strict=True)) for values in itertools.product(*part.values())]

    def propose(self) -> list[Decisions]:
        """All that was neither proposed nor measured before."""
        proposed, self.left = self.left, []
        return proposed

    def tell(self, results: Sequence[tuple[Decisions, float | None]]) -> None:
        """Leave out what was measured already."""
        measured = [decisions for decisions, _ in results]
        self.left = [decisions for decisions in self.left if decisions not in measured]


class LayerSearch:
    """Proposes decisions for one layer, and learns from what they took."""

    def __init__(self, space: Space, target: tvm.target.Target, model: Any, batch: int, seed: int = 0) -> None:
        self.space, self.batch, self.model = space, batch, model
        self.parts = space.parts()
        self.mod = tvm.IRModule({"main": stand_in(space.workload)})
        self.known: set[tuple[int, ...]] = set()
        self._candidates: dict[tuple[int, ...], Any] = {}
        self._asked: list[Any] = []
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(self.mod)
        spaces = ms.space_generator.ScheduleFn(
            self._design_spaces, sch_rules=[], postprocs=[], mutator_probs={MutateDecision(seed): 1.0}
        )
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=POPULATION,
            init_min_unmeasured=POPULATION // 4,
            genetic_num_iters=GENERATIONS,
            eps_greedy=0.15,
        )
        self.context = _context(self.mod, target, spaces, strategy, 1 + seed)
        self.context.pre_tuning(1 << 20, batch, self.context.generate_design_space(), self._database, model)

    def _design_spaces(self, sch: s_tir.Schedule) -> list[s_tir.Schedule]:
        spaces = []
        for part in self.parts:
            copy = sch.copy()
            schedule(copy, self.space, part, {})
            spaces.append(copy)
        return spaces

    def propose(self) -> list[Decisions]:
        """The next generation's best, as the cost model has it."""
        found: list[Decisions] = []
        self._asked = list(self.context.generate_measure_candidates() or [])
        for candidate in self._asked:
            decisions = self.space.normal(decisions_in(candidate.sch))
            key = self.key(decisions)
            if key not in self.known:
                self.known.add(key)
                self._candidates[key] = candidate
                found.append(decisions)
        return found

    def tell(self, results: Sequence[tuple[Decisions, float | None]]) -> None:
        """Learn from what decisions took."""
        candidates, measured = [], []
        for decisions, seconds in results:
            key = self.key(decisions)
            self.known.add(key)
            candidates.append(self._candidates.get(key) or self._pinned(decisions))
            measured.append(_result(seconds))
        if self._asked:  # the strategy counts what it asked for
            self.context.notify_runner_results(self._asked, [_result(None)] * len(self._asked))
            self._asked = []
        if not candidates:
            return
        self.model.update(self.context, candidates, measured)
        for candidate, result in zip(candidates, measured, strict=True):
            if result.run_secs is not None:
                record = ms.database.TuningRecord(
                    candidate.sch.trace, self._workload, result.run_secs, self.context.target, candidate.args_info
                )
                self._database.commit_tuning_record(record)

    def key(self, decisions: Decisions) -> tuple[int, ...]:
        """The decisions in the order of the space."""
        return tuple(decisions[name] for name in self.space.names)

    def _pinned(self, decisions: Decisions) -> Any:
        """A candidate of given decisions (the defaults, or a record), or of the nearest that the space holds."""

        def far(part: Mapping[str, Sequence[int]]) -> int:
            return sum(decisions[name] not in values for name, values in part.items())

        part = min(self.parts, key=far)
        pinned = {name: min(part[name], key=lambda value: abs(value - decisions[name])) for name in self.space.names}
        sch = s_tir.Schedule(self.mod)
        schedule(sch, self.space, part, pinned)
        return ms.MeasureCandidate(sch, ms.arg_info.ArgInfo.from_entry_func(self.mod, remove_preproc=True))


def _context(mod: tvm.IRModule, target: tvm.target.Target, spaces: Any, strategy: Any, seed: int) -> ms.TuneContext:
    """A tuning context, made as ``ms.TuneContext`` makes it but for TVM's tensor intrinsics, which that imports: their
    scripts for GPUs take most of a minute to parse, and our kernels use none."""
    log = get_logging_func(logging.getLogger("tvm.s_tir.meta_schedule.tune_context"))
    made = tvm_ffi.get_global_func("s_tir.meta_schedule.TuneContext")
    context = made(mod, target, spaces, strategy, "main", 1, seed, log)
    tvm_ffi.get_global_func("s_tir.meta_schedule.TuneContextInitialize")(context)
    return context


def _result(seconds: float | None) -> Any:
    if seconds is None:
        return ms.runner.RunnerResult(None, "failed")
    return ms.runner.RunnerResult([seconds], None)
