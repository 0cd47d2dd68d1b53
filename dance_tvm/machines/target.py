"""The machines that networks are built for: TOML files in ``targets/``, validated here; ``host`` is detected."""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dance_tvm.core.errors import DanceError
from dance_tvm.core.faults import place_of, said_of
from dance_tvm.core.text_files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from tvm.target import Target as TVMTarget

TARGETS = Path(__file__).parents[1] / "targets"


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cluster(_Facts):
    """Cores of one kind; ``fma_per_cycle`` counts fp32 vector fused multiply-adds of one core."""

    name: str
    cores: int = Field(ge=1)
    mcpu: str
    max_ghz: float = Field(gt=0)
    fma_per_cycle: float = Field(gt=0)


class Caches(_Facts):
    """Bytes; ``l1d`` and ``l2`` belong to one core of the big cluster, ``l3`` is shared (0: none)."""

    l1d: int = Field(gt=0)
    l2: int = Field(ge=0)
    l3: int = Field(ge=0)


class Vector(_Facts):
    """fp32 lanes of one vector register (4 NEON, 8 AVX2, 16 AVX-512) and the number of such registers; ``fp16``:
    whether it multiplies twice as many halves at once (Armv8.2's FP16, AVX-512's FP16)."""

    floats: int = Field(ge=1)
    registers: int = Field(ge=1)
    fp16: bool = False


class Link(_Facts):
    """How an object file becomes a shared library: ELF machine, page size in bytes, sonames for DT_NEEDED."""

    machine: str
    page_size: int = Field(default=4096, ge=4096)
    needed: list[str] = []
    android: bool = False


class Gpu(_Facts):
    """A GPU beside the CPU that the other facts are about.

    Of one unit (multiprocessor, shader processor): ``lanes`` are fp32 multiply-adds a cycle, ``registers`` are 32-bit
    ones, ``shared`` bytes; ``block_threads``, ``block_registers`` and ``block_shared`` are the most that one block may
    have; ``warp`` threads run in step. ``ptx`` is the newest PTX that the device's driver takes, which follows from
    ``driver``. ``assumed``: these are limits that all such devices keep, not the facts of this one.
    """

    name: str
    units: int = Field(ge=1)
    lanes: int = Field(ge=1)
    max_ghz: float = Field(gt=0)
    warp: int = Field(ge=1)
    unit_threads: int = Field(ge=1)
    block_threads: int = Field(ge=1)
    registers: int = Field(ge=1)
    block_registers: int = Field(ge=1)
    shared: int = Field(ge=1)
    block_shared: int = Field(ge=1)
    fp16: bool
    assumed: bool = False
    ptx: str = ""
    driver: str = ""

    @property
    def peak_gflops(self) -> float:
        """GFLOP/s in fp32, two operations per multiply-add."""
        return 2 * self.units * self.lanes * self.max_ghz


class Energy(_Facts):
    """Estimates, never measurements: picojoules of one fp32 multiply-accumulate and of one byte of main memory."""

    pj_per_mac: float = Field(gt=0)
    pj_per_byte: float = Field(gt=0)


class Target(_Facts):
    """One machine: what TVM must know to generate code for it, and what schedules and reports must know of it."""

    name: str
    aliases: list[str] = []
    description: str
    threads: int = Field(ge=1, description="how many threads a build uses by default")
    tvm: dict[str, Any]
    host: dict[str, Any] | None = None
    link: Link
    clusters: list[Cluster] = Field(min_length=1)
    caches: Caches
    vector: Vector
    memory_gib: float = Field(gt=0)
    memory_gb_per_s: float = Field(gt=0)
    energy: Energy
    gpu: Gpu | None = None
    tuning_log: str = Field(default="", description="name of the tuning log; the target's own name if empty")
    half_features: list[str] = Field(default=[], description="LLVM's features that half precision needs beside `tvm`")
    sources: dict[str, str]

    def model_post_init(self, _context: Any) -> None:
        if not self.tuning_log:
            object.__setattr__(self, "tuning_log", self.name)

    @property
    def peak_gflops(self) -> float:
        """GFLOP/s of the GPU, else of the fastest ``threads`` cores at their highest clock."""
        if self.gpu is not None:
            return self.gpu.peak_gflops
        cores = [cluster for cluster in self.clusters for _ in range(cluster.cores)]
        rates = sorted((core.max_ghz * core.fma_per_cycle for core in cores), reverse=True)
        return 2 * self.vector.floats * sum(rates[: self.threads])

    @cached_property
    def fingerprint(self) -> str:
        """A stable hash of what matters for tuning: generated code, registers, caches and kinds of cores."""
        facts = {
            "tvm": self.tvm,
            "host": self.host,
            "vector": self.vector.model_dump(exclude={"fp16"}),  # a workload has its type
            "caches": self.caches.model_dump(),
            "cores": [[cluster.mcpu, cluster.fma_per_cycle] for cluster in self.clusters],
        }
        if self.gpu is not None:
            facts["gpu"] = self.gpu.model_dump(exclude={"driver"})
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def storing(self, dtype: str) -> Target:
        """The same machine, code for which may use what it has for this type: float32 code keeps to `tvm` alone."""
        if dtype != "float16" or not self.half_features:
            return self
        attributes = [*self.tvm.get("mattr", []), *(f"+{feature}" for feature in self.half_features)]
        return self.model_copy(update={"tvm": {**self.tvm, "mattr": attributes}})

    def tvm_target(self, threads: int | None = None) -> TVMTarget:
        """TVM's target for ``threads`` cores (``self.threads`` unless given)."""
        from tvm.target import Target as TVMTarget  # importing TVM takes a second: only when it is needed

        cores = {"num-cores": threads or self.threads}
        if self.host is not None:
            return TVMTarget({**self.tvm, "host": {**self.host, **cores}})
        return TVMTarget({**self.tvm, **(cores if self.tvm["kind"] == "llvm" else {})})


def load_target(spec: str | Path) -> Target:
    """The target of that name, alias or TOML file.

    Raises DanceError for an unknown name (suggesting the nearest) and for a file that does not hold a target.
    """
    path = Path(spec)
    if path.suffix == ".toml" or "/" in str(spec):
        return _read(path)
    names = _names()
    found = names.get(str(spec).lower())
    if found is None:
        near = difflib.get_close_matches(str(spec).lower(), names, n=1, cutoff=0.7)
        hint = f"did you mean {names[near[0]].stem!r}? " if near else ""
        known = ", ".join(sorted(path.stem for path in set(names.values())))
        raise DanceError(f"unknown target {str(spec)!r}: {hint}known targets are {known}, or give a .toml file")
    return _read(found)


def all_targets(look_for_opencl: bool = True) -> list[Target]:
    """Every target that ships with the package, by name. Without looking for an OpenCL device, which loads its
    compiler, that target has a name of no device."""
    return [_read(path, look_for_opencl) for path in sorted(TARGETS.glob("*.toml"))]


@lru_cache(maxsize=1)
def _names() -> dict[str, Path]:
    names = {}
    for path in sorted(TARGETS.glob("*.toml")):
        facts = _parse(path)
        for name in [facts.get("name", path.stem), *facts.get("aliases", [])]:
            names[str(name).lower()] = path
    return names


def _parse(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DanceError(f"no target file at {path}: check the path, or give a name from `dance-tvm targets`")
    try:
        return tomllib.loads(read_text(path, f"target file {path}"))
    except tomllib.TOMLDecodeError as error:
        raise DanceError(f"target file {path} cannot be read as TOML: {error}") from None


def _read(path: Path, look_for_opencl: bool = True) -> Target:
    facts = _parse(path)
    if facts.pop("detect", False):
        facts = _with_detected(facts, look_for_opencl)
    try:
        return Target.model_validate(facts)
    except ValidationError as error:
        wrong = "; ".join(f"{place_of(item)}: {said_of(item)}" for item in error.errors()[:4])
        raise DanceError(f"target file {path} does not describe a target: {wrong}") from None


def _with_detected(facts: dict[str, Any], look_for_opencl: bool) -> dict[str, Any]:
    """The facts of a file completed by those of this machine; of a GPU, those that its driver reports win.

    ``undetected`` is what the file is about where this machine has no such GPU.
    """
    from dance_tvm.machines.host import detect

    detected, undetected = detect(), facts.pop("undetected", "")
    for key in ("sources", "link"):
        facts[key] = {**detected.pop(key), **facts.get(key, {})}
    if "gpu" in facts:
        detected["host"] = detected.pop("tvm")
        from dance_tvm.machines.gpu import detect_cuda, detect_opencl

        opencl = detect_opencl if look_for_opencl else lambda: None
        found = detect_cuda() if facts["tvm"]["kind"] == "cuda" else opencl()
        if not found and undetected:
            facts["description"] = undetected
        for key, value in (found or {}).items():
            facts[key] = {**facts[key], **value} if isinstance(value, dict) else value
    return {**detected, **facts}
