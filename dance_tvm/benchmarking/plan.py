"""What a call of bench asks for, and the artifacts that it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dance_tvm.artifact.folder import LIBRARY, Artifact, Tensor
from dance_tvm.benchmarking.clips import MOST_CLIPS, NamedClips
from dance_tvm.benchmarking.measure import Contender
from dance_tvm.benchmarking.results import Results, Validation
from dance_tvm.device import KernelTime

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
    peers: list[str] = field(default_factory=list)
    peer_model: Path | None = None
    labels: Path | None = None
    classes: Mapping[str, int] = field(default_factory=dict)
    load_times: bool = False
    command: str = ""


@dataclass
class Entry:
    """One artifact in the measurement of one device."""

    artifact: Artifact
    role: Role
    contender: Contender
    validation: Validation
    clips: NamedClips
    notes: list[str] = field(default_factory=list)
    calls: list[KernelTime] = field(default_factory=list)
    clip_seconds: list[list[float]] = field(default_factory=list)

    @property
    def input(self) -> str:
        """What it is measured on."""
        return self.clips[0][0] if self.clips else RANDOM_INPUT

    @property
    def library_sha256(self) -> str:
        """Which code it is."""
        return self.artifact.manifest.files[LIBRARY].sha256


def shapes_of(tensors: Sequence[Tensor]) -> str:
    """Types and shapes in words."""
    return ", ".join(f"{tensor.dtype} {'x'.join(map(str, tensor.shape))}" for tensor in tensors)
