"""Against earlier results: what can be compared, what is measured again, and the verdicts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dance_tvm.artifact.folder import LIBRARY, Artifact, load_artifact
from dance_tvm.benchmarking.measure import Contender, Inputs
from dance_tvm.benchmarking.plan import Entry, Plan, Role, shapes_of
from dance_tvm.benchmarking.results import Measured, Results, Verdict
from dance_tvm.benchmarking.statistics import judge, paired_ratio, unpaired_ratio
from dance_tvm.core.errors import DanceError
from dance_tvm.device import DeviceSession


def earlier(
    plan: Plan, spec: str, session: DeviceSession, entries: Sequence[Entry]
) -> dict[str, tuple[Contender, Measured]]:
    """The old artifacts of `--against` that are still there and differ from the new: measured in turns with them.

    Raises DanceError where the baseline has nothing of these networks, or nothing that can be compared.
    """
    found: dict[str, tuple[Contender, Measured]] = {}
    if plan.against is None:
        return found
    require_known(plan.against, spec, [(entry.artifact, entry.role) for entry in entries])
    for entry in entries:
        if (old := _old(plan.against, spec, entry.artifact, entry.role)) is None:
            continue
        contender = None if old.library_sha256 == entry.library_sha256 else _again(session, entry, old)
        if differs := _differences(plan, entry, old, measured_again=contender is not None):
            raise DanceError(
                f"{entry.artifact.path} cannot be compared with the baseline on {spec}: {', and '.join(differs)}; "
                f"bench both alike"
            )
        if contender is not None:
            found[str(entry.artifact.path)] = contender, old
    return found


def _again(session: DeviceSession, entry: Entry, old: Measured) -> Contender | None:
    """The old artifact on the new one's input, if it is still there."""
    try:
        artifact = load_artifact(old.artifact)
    except DanceError:
        return None
    fits = shapes_of(artifact.manifest.inputs) == shapes_of(entry.artifact.manifest.inputs)
    if artifact.manifest.files[LIBRARY].sha256 != old.library_sha256 or not fits:
        return None
    return Contender(session.load(artifact), entry.contender.inputs)


def _differences(plan: Plan, entry: Entry, old: Measured, measured_again: bool) -> list[str]:
    """What forbids a comparison, each as "… now, … then"."""
    manifest = entry.artifact.manifest
    pairs = [
        ("network", manifest.name, old.name),
        ("target", manifest.target.name, old.target),
        ("threads", plan.threads or manifest.target.threads, old.threads),
    ]
    differs = [f"{what} {now} now, {then} then" for what, now, then in pairs if now != then]
    if not measured_again and digest(entry.contender.inputs) != old.input_sha256:
        differs.append(f"measured on {entry.input} now, on {old.input or 'an unknown input'} then")
    return differs


def digest(inputs: Inputs) -> str:
    """A hash of what a network is measured on."""
    digest = hashlib.sha256()
    for name, array in sorted(inputs.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def require_known(against: Results, spec: str, artifacts: Sequence[tuple[Artifact, Role]]) -> None:
    """Raise DanceError where the baseline has nothing of the artifacts on the device."""
    if not any(_old(against, spec, *each) for each in artifacts):
        raise DanceError(f"the baseline has nothing of these networks on {spec}: bench it on the same device first")


def _old(against: Results, spec: str, artifact: Artifact, role: Role) -> Measured | None:
    """The baseline's measurement on the same device: of the same folder, else of the same network."""
    known = [item for device in against.devices if device.spec == spec for item in device.measured]
    same_path = [item for item in known if item.artifact == str(artifact.path)]
    same_name = [item for item in known if item.name == artifact.manifest.name and item.role == role]
    return next(iter(same_path or same_name), None)


def verdicts_of(
    plan: Plan,
    spec: str,
    entries: Sequence[Entry],
    measured: Sequence[Measured],
    old: dict[str, tuple[Contender, Measured]],
) -> list[Verdict]:
    """New against old, for each artifact that the baseline knows."""
    if plan.against is None:
        return []
    found = []
    for entry, item in zip(entries, measured, strict=True):
        if item.artifact in old:
            ratio = paired_ratio(entry.contender.rounds, old[item.artifact][0].rounds)
            found.append(judge(spec, item.artifact, ratio, plan.threshold, interleaved=True))
        elif (before := _old(plan.against, spec, entry.artifact, entry.role)) is not None:
            ratio = unpaired_ratio(item.latency.seconds, before.latency.seconds)
            verdict = judge(spec, item.artifact, ratio, plan.threshold, interleaved=False)
            if before.library_sha256 == item.library_sha256:
                verdict = verdict.model_copy(update={"identical": True, "verdict": "same"})
            found.append(verdict)
    return found
