"""One call of bench: artifacts on devices, validated, measured in turns, profiled, compared."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil

from dance_tvm.artifact.folder import LIBRARY, Artifact
from dance_tvm.artifact.video_windows import doubt_of_scale
from dance_tvm.benchmarking import accuracy, peers, sensing
from dance_tvm.benchmarking.baseline import digest, earlier, verdicts_of
from dance_tvm.benchmarking.clips import frames_of, load_clips, pictures_of, strip
from dance_tvm.benchmarking.layers import profile
from dance_tvm.benchmarking.loading import measure_loading
from dance_tvm.benchmarking.measure import Contender, in_turns, single_stream
from dance_tvm.benchmarking.plan import Entry, Plan, Role
from dance_tvm.benchmarking.requests import verified
from dance_tvm.benchmarking.results import (
    Alive,
    Clip,
    Device,
    Energy,
    Measured,
    OverClips,
    Pair,
    Picture,
    Profile,
    Results,
)
from dance_tvm.benchmarking.statistics import paired_ratio
from dance_tvm.benchmarking.trace import events, write_trace
from dance_tvm.benchmarking.validation import validate
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import DeviceSession, open_device
from dance_tvm.machines.target import Target, load_target

CLIP_ROUNDS, CLIP_RUNS = 3, 3
ENERGY_RUNS = 5
PROFILE_RUNS = 7
EXPLAINED_BOUND = 0.2
MOST_PICTURED_LAYERS = 3


def run(
    plan: Plan,
    progress: Callable[[str], Any] = lambda _sentence: None,
    artifacts: list[tuple[Artifact, Role]] | None = None,
) -> Results:
    """Measure everything; ``artifacts`` are the plan's where they were verified already.

    Raises DanceError where an artifact is damaged, wrong or unfit, or a device fails.
    """
    artifacts = artifacts or verified(plan.artifacts, plan.dense)
    results = Results(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=plan.command,
        host={"machine": platform.machine(), "system": platform.platform(), "cpus": psutil.cpu_count()},
        devices=[],
    )
    traced: list[dict[str, Any]] = []
    for spec in plan.devices:
        progress(f"waiting for {spec}")
        with open_device(spec, timeout=plan.timeout, call_timeout=plan.call_timeout) as session:
            device, entries = _on_device(plan, spec, session, artifacts, progress, results)
        results.devices.append(device)
        for entry in entries:
            title = f"{entry.artifact.path} on {spec}, {entry.input}"
            traced += events(len(traced), title, entry.artifact.manifest, entry.calls)
    if plan.trace is not None:
        write_trace(plan.trace, traced)
    return results


def _on_device(
    plan: Plan,
    spec: str,
    session: DeviceSession,
    artifacts: Sequence[tuple[Artifact, Role]],
    progress: Callable[[str], Any],
    results: Results,
) -> tuple[Device, list[Entry]]:
    """One device's figures; what compares artifacts is added to ``results``."""
    before = session.sensors()
    _pin(plan, session, artifacts[0][0], before)
    entries = []
    for artifact, role in artifacts:
        progress(f"{spec}: loading and validating {artifact.path}")
        entries.append(_load(plan, spec, session, artifact, role))
    old = earlier(plan, spec, session, entries)
    others = _peers(plan, entries[0], progress)
    progress(f"{spec}: measuring in turns")
    contenders = [entry.contender for entry in entries] + [contender for contender, _ in old.values()]
    contenders += [contender for contender, _ in others.values()]

    def between() -> None:
        if plan.cool_down:
            sensing.cool_down(session.sensors, before, plan.cool_down)

    in_turns(contenders, plan.runs, plan.seconds, between)
    _time_clips(entries)
    measured = []
    for entry in entries:
        progress(f"{spec}: looking into {entry.artifact.path}")
        measured.append(_measured(plan, session, entry))
    after = session.sensors()
    figures = {item.artifact: item.latency for item in measured}
    device = Device(
        spec=spec,
        facts=session.facts(),
        sensors_before=before,
        sensors_after=after,
        warnings=sensing.warnings(before, after, figures),
        measured=measured,
    )
    results.pairs += _pairs(spec, entries, measured)
    results.verdicts += verdicts_of(plan, spec, entries, measured, old)
    first = measured[0]
    results.peers += peers.judged(others, entries[0].contender, spec, first.artifact, first.threads)
    return device, entries


def _peers(plan: Plan, entry: Entry, progress: Callable[[str], Any]) -> dict[str, tuple[Contender, float]]:
    """The other engines, on the first artifact's input."""
    if not plan.peers:
        return {}
    progress(f"loading {', '.join(plan.peers)}")
    manifest, inputs = entry.artifact.manifest, entry.contender.inputs
    threads = plan.threads or manifest.target.threads
    ours = entry.contender.network.run(inputs)
    return peers.load_peers(plan.peers, plan.peer_model, manifest, threads, inputs, ours)


def _pin(plan: Plan, session: DeviceSession, artifact: Artifact, sensors: dict[str, Any]) -> None:
    cpus = plan.cpus
    if plan.cluster:
        cpus = sensing.cpus_of_cluster(load_target(artifact.manifest.target.name), plan.cluster, sensors)
    session.pin(cpus, plan.threads or artifact.manifest.target.threads)


def _load(plan: Plan, spec: str, session: DeviceSession, artifact: Artifact, role: Role) -> Entry:
    network = session.load(artifact)
    validation = validate(artifact, network, spec)
    clips = load_clips(plan.clips, artifact.manifest, plan.most_clips) if plan.clips else []
    if plan.labels is not None:
        accuracy.require_labelled(clips, plan.classes, str(plan.labels))
    inputs = clips[0][1] if clips else random_inputs(artifact.manifest.inputs)
    entry = Entry(artifact, role, Contender(network, inputs), validation, clips)
    if validation.status == "not stored":
        entry.notes.append("the build stored no outputs to compare with: built without a check")
    if plan.clips and (doubt := doubt_of_scale(plan.clips, artifact.manifest)):
        entry.notes.append(doubt)
    if not clips and any(layer.skips for layer in artifact.manifest.layers):
        entry.notes.append("random input: this network's masks may keep more or less of real clips, give --clips")
    return entry


def _measured(plan: Plan, session: DeviceSession, entry: Entry) -> Measured:
    manifest, contender = entry.artifact.manifest, entry.contender
    latency = contender.figures()
    profiled = _profile(entry) if plan.layers else None
    looked = [_clip(place, entry, plan) for place in range(len(entry.clips))]
    clips = [clip for clip, _ in looked]
    target = _target_of(entry.artifact)
    known = None
    if plan.labels is not None:
        known = accuracy.accuracy(contender.network, manifest, entry.clips, plan.classes, str(plan.labels))
    return Measured(
        artifact=str(entry.artifact.path),
        name=manifest.name,
        role=entry.role,
        source_sha256=manifest.source_sha256,
        library_sha256=manifest.files[LIBRARY].sha256,
        target=manifest.target.name,
        threads=plan.threads or manifest.target.threads,
        frames=frames_of(manifest),
        macs=manifest.macs,
        validation=entry.validation,
        latency=latency,
        input=entry.input,
        input_sha256=digest(contender.inputs),
        peak_gflops=_peak(target, plan.threads or manifest.target.threads),
        executed_macs=profiled.executed_macs if profiled else None,
        peak_memory_bytes=contender.network.peak_memory(contender.inputs),
        energy=_energy(session, entry, profiled, target),
        profile=profiled,
        clips=clips,
        pictures=_pictures(entry, [seen for _, seen in looked]),
        single_stream=_stream(entry) if plan.single_stream else None,
        accuracy=known,
        loading=measure_loading(entry.artifact.path) if plan.load_times else [],
        notes=entry.notes,
    )


def _profile(entry: Entry) -> Profile | None:
    contender = entry.contender
    whole = contender.network.time(contender.inputs, PROFILE_RUNS)
    try:
        calls = contender.network.kernels(contender.inputs, PROFILE_RUNS)
    except DanceError as error:
        entry.notes.append(str(error))
        return None
    whole += contender.network.time(contender.inputs, PROFILE_RUNS)
    entry.calls = calls
    found = profile(entry.artifact.manifest, calls, float(np.median(whole)), entry.input)
    if not 1 - EXPLAINED_BOUND < found.explained < 1 + EXPLAINED_BOUND:
        entry.notes.append(f"the layers' times add up to {found.explained:.0%} of the whole: disturbed, bench again")
    return found


def _time_clips(entries: Sequence[Entry]) -> None:
    """Time every clip on all artifacts in turns: what disturbs the machine disturbs all alike."""
    for place in range(max(len(entry.clips) for entry in entries)):
        able = [entry for entry in entries if place < len(entry.clips)]
        for entry in able:
            entry.contender.network.time(entry.clips[place][1], 1)
            entry.clip_seconds.append([])
        for _ in range(CLIP_ROUNDS):
            for entry in able:
                entry.clip_seconds[place] += entry.contender.network.time(entry.clips[place][1], CLIP_RUNS)


def _clip(place: int, entry: Entry, plan: Plan) -> tuple[Clip, Profile | None]:
    """A clip's latency, and what its index lists kept."""
    network, manifest = entry.contender.network, entry.artifact.manifest
    name, inputs = entry.clips[place]
    p50, p90 = np.percentile(entry.clip_seconds[place], [50, 90])
    seen = None
    if plan.layers and manifest.macs:
        with contextlib.suppress(DanceError):  # the profile's own note says why there is none
            seen = profile(manifest, network.kernels(inputs, repeats=0), 0.0, name)
    executed = seen.executed_macs if seen else None
    kept = None if executed is None else executed / manifest.macs
    return Clip(name=name, p50=float(p50), p90=float(p90), executed_macs=executed, kept=kept), seen


def _pictures(entry: Entry, seen: Sequence[Profile | None]) -> list[Picture]:
    """The clips with the least, the median and the most work left, where lists leave anything out."""
    known = [(found.executed_macs, index, found) for index, found in enumerate(seen) if found is not None]
    by_work = sorted(known, key=lambda one: one[:2])
    chosen = {by_work[place][1]: by_work[place][2] for place in (0, len(known) // 2, -1)} if known else {}
    pictures = []
    for index in sorted(chosen):
        thinned = [layer for layer in chosen[index].layers if (layer.kept_positions or 1.0) < 1.0]
        shown = thinned[:: max(1, len(thinned) // MOST_PICTURED_LAYERS)][:MOST_PICTURED_LAYERS]
        layers = [Alive(layer=layer.name, shape=layer.shape, alive=layer.alive) for layer in shown]
        name, inputs = entry.clips[index]
        tensor = entry.artifact.manifest.inputs[0]
        if layers and len(tensor.shape) == 5:
            frames = pictures_of(inputs[tensor.name], tensor)
            pictures.append(Picture(clip=name, strip=strip(frames), frames=len(frames), layers=layers))
    return pictures


def _stream(entry: Entry) -> dict[str, float]:
    clips = [inputs for _, inputs in entry.clips] if entry.clips else [entry.contender.inputs]
    return single_stream(entry.contender.network, clips)


def _energy(session: DeviceSession, entry: Entry, profiled: Profile | None, target: Target | None) -> Energy | None:
    contender = entry.contender
    before, watcher, seconds = session.sensors(), sensing.Watcher(session.sensors), 0.0
    if before.get("microjoules") or before.get("milliwatts"):
        runs = max(ENERGY_RUNS, contender.burst)
        for _ in range(ENERGY_RUNS):
            seconds += sum(contender.network.time(contender.inputs, runs))
            watcher.look()
        found = sensing.energy(before, session.sensors(), watcher.watts, seconds, runs * ENERGY_RUNS)
        if found:
            return found
    if profiled is None or target is None:
        return None
    return sensing.estimate(target.energy, profiled.executed_macs, sum(layer.bytes for layer in profiled.layers))


def _target_of(artifact: Artifact) -> Target | None:
    try:
        return load_target(artifact.manifest.target.name)
    except DanceError:  # built for a target file of the user's that is not here
        return None


def _peak(target: Target | None, threads: int) -> float | None:
    return None if target is None else target.model_copy(update={"threads": threads}).peak_gflops


def _pairs(spec: str, entries: Sequence[Entry], measured: Sequence[Measured]) -> list[Pair]:
    dense = next((index for index, entry in enumerate(entries) if entry.role == "dense"), None)
    if dense is None:
        return []
    pairs = []
    for index, entry in enumerate(entries):
        if index == dense:
            continue
        ratio = paired_ratio(entries[dense].contender.rounds, entry.contender.rounds)
        ours, theirs = measured[index], measured[dense]
        pairs.append(
            Pair(
                device=spec,
                sparse=ours.artifact,
                dense=theirs.artifact,
                speed_up=ratio[0],
                low=ratio[1],
                high=ratio[2],
                mac_reduction=_quotient(theirs.executed_macs, ours.executed_macs),
                energy_ratio=_energy_ratio(theirs.energy, ours.energy),
                over_clips=_over_clips(ours.clips, theirs.clips),
            )
        )
    return pairs


def _over_clips(sparse: Sequence[Clip], dense: Sequence[Clip]) -> OverClips | None:
    """What all clips gain; None where there is one, or not the same ones."""
    if len(sparse) < 2 or [clip.name for clip in sparse] != [clip.name for clip in dense]:
        return None
    gains = np.array([theirs.p50 / ours.p50 for ours, theirs in zip(sparse, dense, strict=True)])
    saved = [_quotient(theirs.executed_macs, ours.executed_macs) for ours, theirs in zip(sparse, dense, strict=True)]
    known = [each for each in saved if each is not None]
    return OverClips(
        count=len(gains),
        speed_up=float(np.exp(np.log(gains).mean())),
        least=float(gains.min()),
        most=float(gains.max()),
        mac_reduction=float(np.exp(np.log(known).mean())) if len(known) == len(gains) else None,
    )


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _energy_ratio(dense: Energy | None, sparse: Energy | None) -> float | None:
    """Only like is compared with like: both measured, or both estimated."""
    if dense is None or sparse is None or dense.kind != sparse.kind:
        return None
    return _quotient(dense.joules, sparse.joules)
