"""What bench is asked for, looked at before a device is opened: what cannot be measured is refused at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from dance_tvm.artifact.folder import Artifact, Manifest, load_artifact, require_artifact
from dance_tvm.benchmarking.accuracy import scores_of
from dance_tvm.benchmarking.baseline import require_known
from dance_tvm.benchmarking.clips import require_clips, require_fitting_clips
from dance_tvm.benchmarking.plan import Role, shapes_of
from dance_tvm.benchmarking.results import Results
from dance_tvm.core.errors import DanceError
from dance_tvm.device import require_runnable
from dance_tvm.machines.target import load_target


def require_measurable(
    paths: Sequence[Path],
    dense: Path | None,
    devices: Sequence[str],
    *,
    cluster: str | None = None,
    cpus: Sequence[int] | None = None,
    clips: str | None = None,
    classes: Mapping[str, int] = MappingProxyType({}),
    against: Results | None = None,
) -> list[tuple[Artifact, Role]]:
    """The artifacts, verified, and what each is. Raises DanceError for those that are damaged or that a device does not
    run, for a dense form that is none, for processors that are not there, for clips and classes that do not fit, and a
    baseline without these networks."""
    for path in [*paths, *([dense] if dense else [])]:
        require_artifact(path)
    if clips:
        require_clips(clips)
    known = verified(paths, dense)
    if against is not None:
        for spec in devices:
            require_known(against, spec, known)
    for artifact, _ in known:
        for spec in devices:
            require_runnable(artifact, spec)
        if clips:
            require_fitting_clips(clips, artifact.manifest)
        if classes:
            _require_classes(classes, artifact.manifest)
    if cluster:
        require_cluster(known[0][0].manifest.target.name, cluster)
    if cpus and "local" in devices and (absent := sorted(set(cpus) - os.sched_getaffinity(0))):
        raise DanceError(f"this machine has no CPUs {absent}: it has {sorted(os.sched_getaffinity(0))}")
    return known


def verified(paths: Sequence[Path], dense: Path | None) -> list[tuple[Artifact, Role]]:
    """The artifacts, every byte of them verified, the dense form last. Raises DanceError where one is damaged, and
    where the dense form is none."""
    known: list[tuple[Artifact, Role]] = [(load_artifact(path), "sparse" if dense else "other") for path in paths]
    if dense is not None:
        known.append((load_artifact(dense), "dense"))
        for artifact, _ in known[:-1]:
            require_twin(artifact, known[-1][0])
    return known


def require_twin(sparse: Artifact, dense: Artifact) -> None:
    """Raise DanceError where a network is not a dense form of the other: their times would say nothing together."""
    ours, theirs = sparse.manifest, dense.manifest
    differs = [
        f"its {side} are {shapes_of(getattr(theirs, side))} and not {shapes_of(getattr(ours, side))}"
        for side in ("inputs", "outputs")
        if shapes_of(getattr(ours, side)) != shapes_of(getattr(theirs, side))
    ]
    if theirs.target.fingerprint != ours.target.fingerprint:
        differs.append(f"it is built for {theirs.target.name} and not for {ours.target.name}")
    if theirs.target.threads != ours.target.threads:
        differs.append(f"it is built for {theirs.target.threads} threads and not for {ours.target.threads}")
    if differs:
        raise DanceError(f"--dense {dense.path} is not a dense form of {sparse.path}: {', and '.join(differs)}")


def require_cluster(target: str, name: str) -> None:
    """Raise DanceError for a cluster that the target has not."""
    clusters = [cluster.name for cluster in load_target(target).clusters]
    if name not in clusters:
        raise DanceError(f"target {target} has no cluster {name!r}: it has {', '.join(clusters)}")


def _require_classes(classes: Mapping[str, int], manifest: Manifest) -> None:
    """Raise DanceError where the network gives no scores, or fewer than there are classes."""
    known = scores_of(manifest).shape[1]
    for name, number in classes.items():
        if number >= known:
            raise DanceError(f"--truth: {name} is of class {number}, and {manifest.name} knows {known}")
