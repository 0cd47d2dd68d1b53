"""What a benchmark writes: JSON with a schema version, described in docs/bench.md."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dance_tvm.core.errors import DanceError
from dance_tvm.core.faults import place_of, said_of
from dance_tvm.core.files import written_whole
from dance_tvm.core.text_files import read_text

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Latency(_Strict):
    """Seconds of one run; `seconds` are all measured runs in order, `steady` says whether warm-up settled."""

    runs: int
    p50: float
    p90: float
    p99: float
    mean: float
    spread: float
    fastest: float
    warm_up_runs: int
    steady: bool
    trend: float
    seconds: list[float]


class Layer(_Strict):
    """One layer of a profiled run. `macs` are those of the dense layer, `executed_macs` those that its lists left.

    For Winograd's kernels, which multiply less often, `executed_macs` are those that a direct convolution over the
    same lists would do. Kept shares are 0 to 1, None where the kernel has no such list. `bytes` are those of the
    kernel's tensors. `why` the build chose the kernel, and which tuning record chose its sizes (`tuned`), as the
    artifact's manifest says.
    """

    name: str
    kernel: str
    seconds: float
    macs: int
    executed_macs: int
    bytes: int
    kept_frames: float | None = None
    kept_positions: float | None = None
    kept_channels_in: float | None = None
    kept_channels_out: float | None = None
    shape: list[int] = []
    alive: str = ""
    why: str = ""
    tuned: str = ""

    @property
    def gflops(self) -> float:
        """10^9 floating point operations executed a second."""
        return 2e-9 * self.executed_macs / self.seconds if self.seconds else 0.0


class Profile(_Strict):
    """One clip's layers, the whole run beside them, and the share of the whole that the layers explain."""

    clip: str
    layers: list[Layer]
    whole_seconds: float
    explained: float

    @property
    def executed_macs(self) -> int:
        """Multiply-accumulates that were done."""
        return sum(layer.executed_macs for layer in self.layers)


class Alive(_Strict):
    """Which frames and positions (T, H, W) of its output a layer computed: packed bits, deflated, base64."""

    layer: str
    shape: list[int]
    alive: str


class Picture(_Strict):
    """A clip to look at: its frames side by side as a base64 JPEG, and what layers computed of them."""

    clip: str
    strip: str
    frames: int
    layers: list[Alive]


class Clip(_Strict):
    """One clip's latency and the share of the dense multiply-accumulates that were executed for it."""

    name: str
    p50: float
    p90: float
    executed_macs: int | None
    kept: float | None


class Energy(_Strict):
    """Joules of one run; `kind` says whether they were measured, and `source` by what."""

    kind: Literal["measured", "estimate"]
    source: str
    joules: float


class Validation(_Strict):
    """How the device's outputs compare with those stored by the build."""

    status: Literal["passed", "not stored"]
    difference: float | None = None
    allowed: float | None = None


class Accuracy(_Strict):
    """Shares of labelled clips, and of videos by the mean of their clips' scores, that were classified correctly."""

    labels: str
    clips: int
    top1: float
    top5: float
    videos: int
    video_top1: float
    video_top5: float


class Loading(_Strict):
    """Seconds to verify the files, to load them, and of the first run; ``cold``: the files were not in memory."""

    cold: bool
    verify: float
    load: float
    first_run: float


class Measured(_Strict):
    """One artifact on one device. `input` names what `latency` was measured on."""

    artifact: str
    name: str
    role: Literal["sparse", "dense", "other"]
    source_sha256: str
    library_sha256: str
    target: str
    threads: int
    frames: int
    macs: int
    validation: Validation
    latency: Latency
    input: str = ""
    input_sha256: str = ""
    peak_gflops: float | None = None
    executed_macs: int | None = None
    peak_memory_bytes: int | None = None
    energy: Energy | None = None
    profile: Profile | None = None
    clips: list[Clip] = []
    pictures: list[Picture] = []
    single_stream: dict[str, float] | None = None
    accuracy: Accuracy | None = None
    loading: list[Loading] = []
    notes: list[str] = []

    @property
    def title(self) -> str:
        """The network's name, and which of a pair it is where there is one."""
        return self.name if self.role == "other" else f"{self.name} ({self.role})"

    @property
    def frames_per_second(self) -> float:
        """Frames of video a second at the median latency."""
        return self.frames / self.latency.p50

    @property
    def gflops(self) -> float | None:
        """10^9 floating point operations executed a second at the median latency."""
        return None if self.executed_macs is None else 2e-9 * self.executed_macs / self.latency.p50

    @property
    def share_of_peak(self) -> float | None:
        """`gflops` as a share of what the target's cores can do at their highest clock."""
        return self.gflops / self.peak_gflops if self.gflops is not None and self.peak_gflops else None

    @property
    def correlation(self) -> float | None:
        """Pearson's correlation of latency and kept multiply-accumulates over the clips; None where nothing varies."""
        known = [(clip.kept, clip.p50) for clip in self.clips if clip.kept is not None]
        if len({kept for kept, _ in known}) < 2 or len({latency for _, latency in known}) < 2:
            return None
        return statistics.correlation(*zip(*known, strict=True))


class OverClips(_Strict):
    """Sparse against dense over ``count`` clips: geometric means, and the speed-ups of the clips that gain the least
    and the most."""

    count: int
    speed_up: float
    least: float
    most: float
    mac_reduction: float | None


class Pair(_Strict):
    """Sparse against dense, measured in turns on the first input: ratios above 1 are gains, with the 95% interval of
    the speed-up; and over all clips, where there are several."""

    device: str
    sparse: str
    dense: str
    speed_up: float
    low: float
    high: float
    mac_reduction: float | None
    energy_ratio: float | None = None
    over_clips: OverClips | None = None

    @property
    def efficiency(self) -> float | None:
        """Speed-up gained for each fold of work saved."""
        basis = self.over_clips or self
        return basis.speed_up / basis.mac_reduction if basis.mac_reduction else None


class Peer(_Strict):
    """Another engine on the same network, measured in turns with ``artifact``.

    ``speed_up`` is its time over ours with its 95% interval, ``difference`` that of the outputs as a share of the
    largest value.
    """

    device: str
    artifact: str
    engine: str
    version: str
    threads: int
    latency: Latency
    speed_up: float
    low: float
    high: float
    difference: float


class Verdict(_Strict):
    """New against old: `ratio` of median times (above 1 is slower) with its 95% interval.

    `identical`: the library is identical, so that a ratio reflects only the machine, and the verdict is "same".
    """

    device: str
    artifact: str
    ratio: float
    low: float
    high: float
    threshold: float
    interleaved: bool
    identical: bool = False
    verdict: Literal["faster", "same", "slower", "undecided"]


class Device(_Strict):
    """One device, what it is, and what was measured on it."""

    spec: str
    facts: dict[str, Any]
    sensors_before: dict[str, Any]
    sensors_after: dict[str, Any]
    warnings: list[str]
    measured: list[Measured]


class Results(_Strict):
    """One call of bench."""

    schema_version: int = SCHEMA_VERSION
    created: str
    command: str
    host: dict[str, Any]
    devices: list[Device]
    pairs: list[Pair] = []
    verdicts: list[Verdict] = []
    peers: list[Peer] = []


def write_results(path: Path, results: Results) -> None:
    """Write JSON whole or not at all. Raises DanceError where that fails."""
    with written_whole(path, "--out") as beside:
        beside.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> Results:
    """Results that bench wrote. Raises DanceError where the file is no such thing or of another schema."""
    no_results = f"{path} holds no results of dance-tvm bench: give the file that `bench --out` wrote"
    text = read_text(path, str(path))
    try:
        facts = json.loads(text)
        schema = facts["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DanceError(no_results) from None
    if "seal" in facts:
        raise DanceError(
            f"{path} is an artifact's manifest: `dance-tvm show {quote(str(path.parent))}` shows it; {no_results}"
        )
    if schema != SCHEMA_VERSION:
        raise DanceError(f"{path} has schema version {schema}; this dance-tvm reads {SCHEMA_VERSION}: bench again")
    try:
        return Results.model_validate(facts)
    except ValidationError as error:
        first = error.errors()[0]
        raise DanceError(f"{no_results}; {place_of(first)}: {said_of(first)}") from None
