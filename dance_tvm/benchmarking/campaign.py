"""One call of bench: artifacts on devices, validated, measured in turns, profiled, compared."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from dance_tvm.artifact.folder import LIBRARY, Artifact, Tensor, load_artifact
from dance_tvm.benchmarking import sensing
from dance_tvm.benchmarking.clips import (
    MOST_CLIPS,
    NamedClips,
    doubt_of_scale,
    frames_of,
    load_clips,
    pictures_of,
    strip,
)
from dance_tvm.benchmarking.layers import profile
from dance_tvm.benchmarking.measure import Contender, Inputs, in_turns, single_stream
from dance_tvm.benchmarking.results import (
    Alive,
    Clip,
    Device,
    Energy,
    Measured,
    Pair,
    Picture,
    Profile,
    Results,
    Validation,
    Verdict,
)
from dance_tvm.benchmarking.statistics import judge, paired_ratio, unpaired_ratio
from dance_tvm.benchmarking.trace import events, write_trace
from dance_tvm.benchmarking.validation import validate
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import DeviceSession, KernelTime, open_device
from dance_tvm.machines.target import Target, load_target

CLIP_RUNS = 5
ENERGY_RUNS = 5
PROFILE_RUNS = 7
EXPLAINED_BOUND = 0.2
MOST_PICTURED_LAYERS = 3
RANDOM_INPUT = "random input"
Role = Literal["sparse", "dense", "other"]


@dataclass(frozen=True)
class Plan:
    """What a call of bench asks for; `seconds` are for each artifact."""

    artifacts: list[Path]
    dense: Path | None = None
    devices: list[str] = field(default_factory=lambda: ["local"])
    runs: int = 20
    seconds: float = 2.0
    single_stream: bool = False
    clips: str | None = None
    most_clips: int = MOST_CLIPS
    layers: bool = True
    threads: int | None = None
    cluster: str | None = None
    cpus: list[int] | None = None
    cool_down: float = 0.0
    timeout: float = 600.0
    call_timeout: float = 600.0
    against: Results | None = None
    threshold: float = 0.05
    trace: Path | None = None
    command: str = ""


@dataclass
class _Entry:
    """One artifact in the measurement of one device."""

    artifact: Artifact
    role: Role
    contender: Contender
    validation: Validation
    clips: NamedClips
    notes: list[str] = field(default_factory=list)
    calls: list[KernelTime] = field(default_factory=list)

    @property
    def input(self) -> str:
        """What it is measured on."""
        return self.clips[0][0] if self.clips else RANDOM_INPUT

    @property
    def library_sha256(self) -> str:
        """Which code it is."""
        return self.artifact.manifest.files[LIBRARY].sha256


def run(plan: Plan, progress: Callable[[str], Any] = lambda _sentence: None) -> Results:
    """Measure everything. Raises DanceError where an artifact is damaged, wrong or unfit, or a device fails."""
    artifacts: list[tuple[Artifact, Role]] = [
        (load_artifact(path), "sparse" if plan.dense else "other") for path in plan.artifacts
    ]
    if plan.dense:
        artifacts.append((load_artifact(plan.dense), "dense"))
        for artifact, role in artifacts:
            if role == "sparse":
                _require_twin(artifact, artifacts[-1][0])
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
            device, pairs, verdicts, entries = _on_device(plan, spec, session, artifacts, progress)
        results.devices.append(device)
        results.pairs += pairs
        results.verdicts += verdicts
        for entry in entries:
            title = f"{entry.artifact.path} on {spec}, {entry.input}"
            traced += events(len(traced), title, entry.artifact.manifest, entry.calls)
    if plan.trace is not None:
        write_trace(plan.trace, traced)
    return results


def _require_twin(sparse: Artifact, dense: Artifact) -> None:
    """Raise DanceError where a network is no dense form of the other: their times would say nothing together."""
    ours, theirs = sparse.manifest, dense.manifest
    differs = [
        f"its {side} are {_shapes(getattr(theirs, side))} and not {_shapes(getattr(ours, side))}"
        for side in ("inputs", "outputs")
        if _shapes(getattr(ours, side)) != _shapes(getattr(theirs, side))
    ]
    if theirs.target.fingerprint != ours.target.fingerprint:
        differs.append(f"it is built for {theirs.target.name} and not for {ours.target.name}")
    if theirs.target.threads != ours.target.threads:
        differs.append(f"it is built for {theirs.target.threads} threads and not for {ours.target.threads}")
    if differs:
        raise DanceError(f"--dense {dense.path} is no dense form of {sparse.path}: {', and '.join(differs)}")


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tensor.dtype} {'x'.join(map(str, tensor.shape))}" for tensor in tensors)


def _on_device(
    plan: Plan,
    spec: str,
    session: DeviceSession,
    artifacts: Sequence[tuple[Artifact, Role]],
    progress: Callable[[str], Any],
) -> tuple[Device, list[Pair], list[Verdict], list[_Entry]]:
    before = session.sensors()
    _pin(plan, session, artifacts[0][0], before)
    entries = []
    for artifact, role in artifacts:
        progress(f"{spec}: loading and validating {artifact.path}")
        entries.append(_load(plan, spec, session, artifact, role))
    old = _baseline(plan, spec, session, entries)
    progress(f"{spec}: measuring in turns")
    contenders = [entry.contender for entry in entries] + [contender for contender, _ in old.values()]

    def between() -> None:
        if plan.cool_down:
            sensing.cool_down(session.sensors, before, plan.cool_down)

    in_turns(contenders, plan.runs, plan.seconds, between)
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
    return device, _pairs(spec, entries, measured), _verdicts(plan, spec, entries, measured, old), entries


def _pin(plan: Plan, session: DeviceSession, artifact: Artifact, sensors: dict[str, Any]) -> None:
    cpus = plan.cpus
    if plan.cluster:
        cpus = sensing.cpus_of_cluster(load_target(artifact.manifest.target.name), plan.cluster, sensors)
    session.pin(cpus, plan.threads or artifact.manifest.target.threads)


def _load(plan: Plan, spec: str, session: DeviceSession, artifact: Artifact, role: Role) -> _Entry:
    network = session.load(artifact)
    validation = validate(artifact, network, spec)
    clips = load_clips(plan.clips, artifact.manifest, plan.most_clips) if plan.clips else []
    inputs = clips[0][1] if clips else random_inputs(artifact.manifest.inputs)
    entry = _Entry(artifact, role, Contender(network, inputs), validation, clips)
    if validation.status == "not stored":
        entry.notes.append("the build stored no outputs to compare with: built without a check")
    if plan.clips and (doubt := doubt_of_scale(plan.clips, artifact.manifest)):
        entry.notes.append(doubt)
    if not clips:
        entry.notes.append("random input: a dynamic network may keep more or less of real clips, give --clips")
    return entry


def _measured(plan: Plan, session: DeviceSession, entry: _Entry) -> Measured:
    manifest, contender = entry.artifact.manifest, entry.contender
    latency = contender.figures()
    profiled = _profile(entry) if plan.layers else None
    looked = [_clip(name, inputs, entry, plan) for name, inputs in entry.clips]
    clips = [clip for clip, _ in looked]
    target = _target_of(entry.artifact)
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
        input_sha256=_digest(contender.inputs),
        peak_gflops=_peak(target, plan.threads or manifest.target.threads),
        executed_macs=profiled.executed_macs if profiled else None,
        peak_memory_bytes=contender.network.peak_memory(contender.inputs),
        energy=_energy(session, entry, profiled, target),
        profile=profiled,
        clips=clips,
        pictures=_pictures(entry, [seen for _, seen in looked]),
        single_stream=_stream(entry) if plan.single_stream else None,
        notes=entry.notes,
    )


def _profile(entry: _Entry) -> Profile | None:
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


def _clip(name: str, inputs: Inputs, entry: _Entry, plan: Plan) -> tuple[Clip, Profile | None]:
    """A clip's latency, and what its index lists kept."""
    network, manifest = entry.contender.network, entry.artifact.manifest
    network.time(inputs, 1)
    p50, p90 = np.percentile(network.time(inputs, CLIP_RUNS), [50, 90])
    seen = None
    if plan.layers and manifest.macs:
        with contextlib.suppress(DanceError):  # the profile's own note says why there is none
            seen = profile(manifest, network.kernels(inputs, repeats=0), 0.0, name)
    executed = seen.executed_macs if seen else None
    kept = None if executed is None else executed / manifest.macs
    return Clip(name=name, p50=float(p50), p90=float(p90), executed_macs=executed, kept=kept), seen


def _pictures(entry: _Entry, seen: Sequence[Profile | None]) -> list[Picture]:
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


def _stream(entry: _Entry) -> dict[str, float]:
    clips = [inputs for _, inputs in entry.clips] if entry.clips else [entry.contender.inputs]
    return single_stream(entry.contender.network, clips)


def _energy(session: DeviceSession, entry: _Entry, profiled: Profile | None, target: Target | None) -> Energy | None:
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


def _pairs(spec: str, entries: Sequence[_Entry], measured: Sequence[Measured]) -> list[Pair]:
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
            )
        )
    return pairs


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _energy_ratio(dense: Energy | None, sparse: Energy | None) -> float | None:
    """Only like is compared with like: both measured, or both estimated."""
    if dense is None or sparse is None or dense.kind != sparse.kind:
        return None
    return _quotient(dense.joules, sparse.joules)


def _baseline(
    plan: Plan, spec: str, session: DeviceSession, entries: Sequence[_Entry]
) -> dict[str, tuple[Contender, Measured]]:
    """The old artifacts of `--against` that are still there and differ from the new: measured in turns with them.

    Raises DanceError where the baseline has nothing of these networks, or nothing that can be compared.
    """
    found: dict[str, tuple[Contender, Measured]] = {}
    if plan.against is None:
        return found
    known = [(entry, old) for entry in entries if (old := _old(plan.against, spec, entry)) is not None]
    if not known:
        raise DanceError(f"the baseline has nothing of these networks on {spec}: bench it on the same device first")
    for entry, old in known:
        contender = None if old.library_sha256 == entry.library_sha256 else _again(session, entry, old)
        if differs := _differences(plan, entry, old, measured_again=contender is not None):
            raise DanceError(
                f"{entry.artifact.path} cannot be compared with the baseline on {spec}: {', and '.join(differs)}; "
                f"bench both alike"
            )
        if contender is not None:
            found[str(entry.artifact.path)] = contender, old
    return found


def _again(session: DeviceSession, entry: _Entry, old: Measured) -> Contender | None:
    """The old artifact on the new one's input, if it is still there."""
    try:
        artifact = load_artifact(old.artifact)
    except DanceError:
        return None
    fits = _shapes(artifact.manifest.inputs) == _shapes(entry.artifact.manifest.inputs)
    if artifact.manifest.files[LIBRARY].sha256 != old.library_sha256 or not fits:
        return None
    return Contender(session.load(artifact), entry.contender.inputs)


def _differences(plan: Plan, entry: _Entry, old: Measured, measured_again: bool) -> list[str]:
    """What forbids a comparison, each as "… now, … then"."""
    manifest = entry.artifact.manifest
    pairs = [
        ("network", manifest.name, old.name),
        ("target", manifest.target.name, old.target),
        ("threads", plan.threads or manifest.target.threads, old.threads),
    ]
    differs = [f"{what} {now} now, {then} then" for what, now, then in pairs if now != then]
    if not measured_again and _digest(entry.contender.inputs) != old.input_sha256:
        differs.append(f"measured on {entry.input} now, on {old.input or 'an unknown input'} then")
    return differs


def _digest(inputs: Inputs) -> str:
    """A hash of what a network is measured on."""
    digest = hashlib.sha256()
    for name, array in sorted(inputs.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _old(against: Results, spec: str, entry: _Entry) -> Measured | None:
    """The baseline's measurement on the same device: of the same folder, else of the same network."""
    known = [item for device in against.devices if device.spec == spec for item in device.measured]
    same_path = [item for item in known if item.artifact == str(entry.artifact.path)]
    same_name = [item for item in known if item.name == entry.artifact.manifest.name and item.role == entry.role]
    return next(iter(same_path or same_name), None)


def _verdicts(
    plan: Plan,
    spec: str,
    entries: Sequence[_Entry],
    measured: Sequence[Measured],
    old: dict[str, tuple[Contender, Measured]],
) -> list[Verdict]:
    if plan.against is None:
        return []
    verdicts = []
    for entry, item in zip(entries, measured, strict=True):
        if item.artifact in old:
            ratio = paired_ratio(entry.contender.rounds, old[item.artifact][0].rounds)
            verdicts.append(judge(spec, item.artifact, ratio, plan.threshold, interleaved=True))
        elif (before := _old(plan.against, spec, entry)) is not None:
            ratio = unpaired_ratio(item.latency.seconds, before.latency.seconds)
            verdict = judge(spec, item.artifact, ratio, plan.threshold, interleaved=False)
            if before.library_sha256 == item.library_sha256:
                verdict = verdict.model_copy(update={"identical": True, "verdict": "same"})
            verdicts.append(verdict)
    return verdicts
