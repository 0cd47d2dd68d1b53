"""The loop around the search: which layer next, build, measure, keep, verify.

MetaSchedule proposes within a layer (``search``); what surrounds it is ours, because its own loop stores records that
a kill tears, waits without deadlines and cannot overlap building with measuring.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dance_tvm.core.errors import DanceError
from dance_tvm.core.printing import counted, duration, plain_number
from dance_tvm.device.serve import end_with_parent_process
from dance_tvm.device.session import DeviceSession
from dance_tvm.records.advice import tuned_tiles
from dance_tvm.records.kernel_log import Log, append, log_path, new_record, require_writable
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.gpu.tiles import Gpu
from dance_tvm.schedules.workload import Decisions
from dance_tvm.tuning.farm import DeviceLostError, Farm, server_of
from dance_tvm.tuning.instances import Instance, Trial, interleaved
from dance_tvm.tuning.lanes import Lanes
from dance_tvm.tuning.tasks import Plan, Task
from dance_tvm.tuning.trials import build_trial, is_built, open_trial, remove_trial
from dance_tvm.tuning.workloads import Tunable

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target

BATCH = 8
#: Trials of the nearest records that a layer starts with, besides the defaults.
SEEDS = 3
BUILD_TIMEOUT_S = 120.0
#: Batches without a better tile after which a layer counts as done.
PATIENCE = 4
#: Trials that run in turns with the defaults at the end.
FINALISTS = 3
#: How much slower than as a trial the defaults may be while they are verified: else something else was running.
DISTURBED = 1.3
#: Gain from which a tile replaces the defaults: smaller ones are within the spread of good measurements.
WORTH_KEEPING = 1.01
#: How often a wait looks up whether the run is to stop, and how long lanes may take to notice that it was hung up.
GLANCE_S, LANES_PATIENCE_S = 0.1, 0.3
#: What a trial's error says that was given up.
INTERRUPTED = "interrupted"


class _StoppedError(Exception):
    """Ctrl-C: what is in flight is given up."""


class Tuner:
    """Tunes layers on a farm; ``on_event`` hears of each batch."""

    def __init__(
        self,
        target: Target,
        machine: Machine | Gpu,
        layers: list[Tunable],
        farm: Farm,
        plan: Plan,
        folder: Path | None = None,
        on_event: Callable[[str], None] = lambda _sentence: None,
    ) -> None:
        from dance_tvm.tuning.search import new_cost_model

        self.target, self.farm, self.plan, self.folder = target, farm, plan, folder
        #: What runs the kernels, as TVM calls it.
        self.kind = str(target.tvm["kind"])
        families = sorted({layer.workload.family for layer in layers})
        self.paths = {family: log_path(target, family, folder) for family in families}
        for path in self.paths.values():
            require_writable(path)
        self.on_event = on_event
        self.model, self.model_name = new_cost_model()
        self.tasks = [Task.of(layer, machine) for layer in layers]
        self.stopped = False
        self.on_stop: Callable[[], object] = lambda: None
        self.lost = ""
        self.made = 0
        self.unit: Literal["seconds", "emulated instructions"] = "seconds"
        self.problems = self._resume()

    def _resume(self) -> list[tuple[str, int, str]]:
        """Take over the trials of earlier runs and the verified records. Gives what was skipped: (file, line, why)."""
        logs = {family: Log.read(path) for family, path in self.paths.items()}
        for task in self.tasks:
            log, identity = logs[task.layer.workload.family], task.layer.workload.identity
            for record in log.records(self.target.fingerprint, identity, ("trial", "failed")):
                if task.space.allows(record.decisions):
                    task.note(record.decisions, record.seconds if record.status == "trial" else None)
        self.advice = tuned_tiles(self.target, self.folder)
        return [(self.paths[family].name, *problem) for family, log in logs.items() for problem in log.problems]

    def run(self) -> None:
        """Search until trials, time or ideas are used up, then verify what was found. Ctrl-C ends both early."""
        self.started = time.monotonic()
        trials = tempfile.TemporaryDirectory(prefix="dance_tvm_tune_", ignore_cleanup_errors=True)
        with trials as folder, self._interruptible():
            self._folder, self._number = Path(folder), 0
            self._pool, self._lanes = self._new_pool(), Lanes(max(1, self.farm.lanes))
            try:
                self._search()
                self._verify()
            except _StoppedError:
                pass
            except DeviceLostError as error:
                self.lost = str(error)
            finally:
                self._end_pool()
                self.farm.hang_up()
                self._lanes.end(LANES_PATIENCE_S)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C keeps what was measured and gives up what is in flight, the second ends at once."""

        def stop(number: int, frame: Any) -> None:
            if not self.stopped:
                self.stopped = True
                self.on_stop()
            elif callable(previous):
                previous(number, frame)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _result(self, future: Future[Any], seconds: float = math.inf) -> Any:
        """What a worker or a lane gives within this many seconds. Raises _StoppedError after Ctrl-C."""
        deadline = time.monotonic() + seconds
        while not future.done():
            if self.stopped:
                raise _StoppedError
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing came within {seconds:.0f} s")
            wait([future], timeout=GLANCE_S)
        return future.result()

    # -- searching ---------------------------------------------------------------------------------------------------

    def _over(self) -> bool:
        return self.stopped or time.monotonic() - self.started > self.plan.time_limit

    def _log(self, task: Task) -> Path:
        return self.paths[task.layer.workload.family]

    def _next(self) -> Task | None:
        open_tasks = [
            task
            for task in self.tasks
            if task.trials < self.plan.trials and not task.exhausted and task.stale < PATIENCE
        ]
        return max(open_tasks, key=lambda task: task.expected_gain, default=None)

    def _search(self) -> None:
        """Batches in turn. On devices of their own, a batch is measured while the next one is proposed and built."""
        pending: tuple[Task, list[tuple[Decisions, Future[Any]]]] | None = None
        while not self._over():
            task = self._next()
            if pending is not None and (task is None or task is pending[0] or self.farm.is_here):
                self._collect(*pending)
                pending = None
                continue
            if task is None:
                break
            batch = self._propose(task)
            if not batch:
                task.exhausted = True
                continue
            started = self._start(task, batch)
            if pending is not None:
                self._collect(*pending)
            pending = (task, started)
        if pending is not None:
            self._collect(*pending)

    def _propose(self, task: Task) -> list[Decisions]:
        from dance_tvm.tuning.search import new_search

        room = min(BATCH, self.plan.trials - task.trials)
        if task.search is None:
            threads = task.layer.workload.threads
            tvm_target = self.target.tvm_target(threads)
            task.search = new_search(task.space, tvm_target, self.model, BATCH, self.plan.seed)
            known = [(dict(zip(task.space.names, key, strict=True)), seconds) for key, seconds in task.results.items()]
            task.search.tell(known)
            seeds = self._seeds(task)
            if seeds:
                return seeds[:room]
        return task.search.propose()[:room]

    def _seeds(self, task: Task) -> list[Decisions]:
        """The defaults and what was best for the nearest layers, of this run too."""
        near = [record.decisions for _, _, record in self.advice.ranked(task.layer.workload)[:SEEDS]]
        family = task.layer.workload.family
        done = [other for other in self.tasks if other is not task and other.best_decisions]
        done = [other for other in done if other.layer.workload.family == family]
        done.sort(key=lambda other: task.layer.workload.distance(other.layer.workload))
        near += [other.best_decisions for other in done[:SEEDS]]
        found: dict[tuple[int, ...], Decisions] = {}
        for decisions in [task.space.default(), *(task.space.normal(decisions) for decisions in near)]:
            key = task.key(decisions)
            if task.space.allows(decisions) and key not in task.results:
                found[key] = decisions
        return list(found.values())[: SEEDS + 1]

    # -- building and measuring --------------------------------------------------------------------------------------

    def _new_pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        place = (str(self._folder),)
        return ProcessPoolExecutor(self.plan.jobs, mp_context=context, initializer=_start_worker, initargs=place)

    def _end_pool(self) -> None:
        workers = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            with suppress(OSError, ValueError):
                worker.kill()

    def _build(self, task: Task, decisions: Decisions) -> tuple[Instance, Path, Future[Any]]:
        self._number += 1
        path = self._folder / f"trial-{self._number}.so"
        instance = Instance(task.layer.workload, task.kernel.sized(decisions))
        return instance, path, self._pool.submit(build_trial, instance, self.target, path, self.farm.servers)

    def _start(self, task: Task, batch: list[Decisions]) -> list[tuple[Decisions, Future[Any]]]:
        """Build the batch, and measure each trial as soon as it is built, or after all where cores are shared."""
        builds = [(decisions, *self._build(task, decisions)) for decisions in batch]
        all_built = threading.Event()
        if not self.farm.is_here:
            all_built.set()
        measured = [
            (decisions, self._lanes.submit(partial(self._measure, task, instance, path, build, all_built)))
            for decisions, instance, path, build in builds
        ]
        if self.farm.is_here:
            for *_, build in builds:
                with suppress(Exception):
                    self._result(build, BUILD_TIMEOUT_S)
            all_built.set()
        return measured

    def _measure(
        self, task: Task, instance: Instance, path: Path, build: Future[Any], all_built: threading.Event
    ) -> tuple[list[float], str, str]:
        """Times, the device's name and, where there are none, why."""
        try:
            build.result(BUILD_TIMEOUT_S)
        except Exception as error:  # the compiler raises many kinds, and a worker may be killed
            if self.stopped:
                return [], "", INTERRUPTED
            return [], "", f"not built: {str(error).strip().splitlines()[-1] if str(error).strip() else error!r}"
        all_built.wait(BUILD_TIMEOUT_S)
        said = ""
        for _attempt in range(3):
            if self.stopped:
                break
            try:
                with self.farm.session(instance.workload.threads) as session:
                    best = None if task.best == math.inf else task.best
                    loaded = self._opened(session, instance, path)
                    self.unit = loaded.unit
                    return loaded.measure(best), loaded.origin, ""
            except DeviceLostError as error:
                said = f"lost: {error}"
            except DanceError as error:
                if not self.stopped:  # a stopped run hangs up
                    return [], "", str(error)
            finally:
                if not said:
                    remove_trial(path)
        return [], "", INTERRUPTED if self.stopped else said

    def _opened(self, session: DeviceSession, instance: Instance, path: Path) -> Trial:
        """The trial on a device, built for its server where that is the first of its kind."""
        server = server_of(session)
        if not is_built(path, server):
            self._pool.submit(build_trial, instance, self.target, path, frozenset({server})).result(BUILD_TIMEOUT_S)
        return open_trial(session, instance, path, self.kind)

    def _collect(self, task: Task, measured: list[tuple[Decisions, Future[Any]]]) -> None:
        """Keep the results of a batch: in the log first, one by one, as they come."""
        before, results = task.best, []
        for decisions, future in measured:
            try:
                times, device, error = self._result(future)
            except _StoppedError:
                continue
            if error == INTERRUPTED or error.startswith("lost"):
                self.lost = error if error != INTERRUPTED else self.lost
                continue
            status = "trial" if times else "failed"
            rest = {"status": status, "error": error, "trials": task.trials + 1, "unit": self.unit}
            rest["origin"] = device or self.farm.specs[0]
            append(self._log(task), [new_record(task.layer.workload, self.target, decisions, times, **rest)])
            seconds = statistics.median(times) if times else None
            task.note(decisions, seconds)
            results.append((decisions, seconds))
            self.made += 1
        task.search.tell(results)
        task.stale = 0 if task.best < before * 0.99 else task.stale + 1
        if self.lost and not results:
            raise DeviceLostError(self.lost)
        if isinstance(getattr(self._pool, "_broken", False), str):
            self._end_pool()
            self._pool = self._new_pool()
        self.on_event(self._batch_sentence(task, results))

    def _batch_sentence(self, task: Task, results: list[tuple[Decisions, float | None]]) -> str:
        failed = sum(seconds is None for _, seconds in results)
        best = f"best {self.shown(task.best)}" if task.best < math.inf else "nothing measured yet"
        lost = f", {failed} failed" if failed else ""
        return f"{task.layer.title}: {counted(task.trials, 'trial')}{lost}, {best}"

    # -- verifying ---------------------------------------------------------------------------------------------------

    def _verify(self) -> None:
        """Measure the best of each layer in turns with the defaults; only what wins there is what builds will use."""
        for task in self.tasks:
            if self.stopped:
                return
            if task.best_decisions and not self._is_verified(task):
                try:
                    self._verify_task(task)
                except BrokenProcessPool:
                    self._pool = self._new_pool()
                except DeviceLostError:
                    raise
                except DanceError as error:
                    if not self.stopped:  # a stopped run hangs up
                        self._leave(task, str(error))

    def _is_verified(self, task: Task) -> bool:
        """Whether the layer was verified after its last trial."""
        identity = task.layer.workload.identity
        for workload, record in self.advice.records:
            if workload.identity == identity and record.trials >= task.trials:
                task.before, task.after = record.default_seconds or record.seconds, record.seconds
                return True
        return False

    def _finalists(self, task: Task) -> list[Decisions]:
        """The defaults, then the fastest trials: the very fastest may owe it to chance."""
        default = task.space.default()
        ranked = sorted((seconds, key) for key, seconds in task.results.items() if seconds is not None)
        best = [dict(zip(task.space.names, key, strict=True)) for _, key in ranked]
        return [default, *[decisions for decisions in best if decisions != default][:FINALISTS]]

    def _verify_task(self, task: Task) -> None:
        finalists = self._finalists(task)
        built = [self._build(task, decisions) for decisions in finalists]
        for *_, build in built:
            self._result(build, BUILD_TIMEOUT_S)
        trials = [(instance, path) for instance, path, _ in built]
        measured, digests, origin = self._result(self._lanes.submit(partial(self._in_turns, task, trials)))
        before, chosen, after = measured[0], finalists[0], measured[0]
        for decisions, digest, times in zip(finalists[1:], digests[1:], measured[1:], strict=True):
            if digest != digests[0]:
                self.on_event(f"{task.layer.title}: {decisions} computes something else than the defaults; not kept")
            elif _is_faster(times, before) and statistics.median(times) < statistics.median(after):
                chosen, after = decisions, times
        slow, known = statistics.median(before), task.results.get(task.key(finalists[0]))
        if known is not None and slow > DISTURBED * known:
            took = f"{self.shown(known)} before, {self.shown(slow)} now"
            self._leave(task, f"the device was disturbed (defaults {took})")
            return
        rest = {"default_seconds": float(f"{slow:.4g}"), "trials": task.trials, "origin": origin, "unit": self.unit}
        record = new_record(task.layer.workload, self.target, chosen, after, status="verified", **rest)
        if not record.steady:
            self._leave(task, f"the times differ too much ({record.spread:.0%} from their median)")
            return
        append(self._log(task), [record])
        task.before, task.after = slow, statistics.median(after)
        self.on_event(f"{task.layer.title}: {self.shown(slow)} before, {self.shown(task.after)} after")

    def _in_turns(
        self, task: Task, trials: list[tuple[Instance, Path]]
    ) -> tuple[list[list[float]], list[int | None], str]:
        """Times and digests of trials that take turns in one session, and the device's name."""
        with self.farm.session(task.layer.workload.threads, 4 * self.farm.trial_timeout) as session:
            loaded = [self._opened(session, instance, path) for instance, path in trials]
            self.unit = loaded[0].unit
            digests = [each.digest() for each in loaded]
            return interleaved(loaded), digests, loaded[0].origin

    def _leave(self, task: Task, why: str) -> None:
        """Leave what was found to another run."""
        task.unverified = why
        self.on_event(f"{task.layer.title}: {why}; to be verified by another run")

    def shown(self, value: float) -> str:
        """What one call takes, in words."""
        return duration(value) if self.unit == "seconds" else f"{plain_number(1e-6 * value)} M instructions"


def _is_faster(times: list[float], than: list[float]) -> bool:
    """Whether both the median and the fastest run gain enough: chance seldom moves the two alike."""
    return all(WORTH_KEEPING * figure(times) <= figure(than) for figure in (statistics.median, min))


def _start_worker(folder: str) -> None:
    """A worker ends with us, leaves Ctrl-C to us, and keeps its files where we remove them when it was killed."""
    tempfile.tempdir = folder
    end_with_parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
