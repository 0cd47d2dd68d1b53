"""The artifact: one folder with ``model.so``, ``manifest.json`` and, for large networks, ``weights.safetensors``.

Nothing of a folder is used before all of it is verified: the manifest by its own seal, every other file by the hash
that the manifest gives, the library by its architecture, and the versions that the generated code depends on. The
hashes reveal damage and mix-ups; they are no signature, so an artifact from a stranger is still a stranger's program.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dance_tvm.artifact.layers import KernelInfo, LayerInfo
from dance_tvm.artifact.preprocess import Preprocess
from dance_tvm.artifact.staging import MANIFEST, staged
from dance_tvm.artifact.weight_store import Store
from dance_tvm.core.agreement import HALF_ON_PROCESSOR, HALF_TOLERANCE, TOLERANCE
from dance_tvm.core.errors import DanceError
from dance_tvm.core.hashing import file_sha256
from dance_tvm.machines.host import cpu_flags

SCHEMA_VERSION = 9
_SHOWN_OUTPUTS = 8  # in words; the manifest lists all

LIBRARY, WEIGHTS = "model.so", "weights.safetensors"
REFERENCE = "reference.safetensors"
ARCHIVE = "libmodel.a"  # the same objects as the library's, where asked for

# The compiled code calls TVM's runtime by its binary interface, which changes between releases.
RUNTIME_VERSIONS = ("apache-tvm", "apache-tvm-ffi")

_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_SAME_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Tensor(_Strict):
    """One input or output of the network; ``range`` is an input's least and greatest value where they are known."""

    name: str
    shape: list[int]
    dtype: str
    meaning: str
    range: list[float] | None = None


class BuiltFor(_Strict):
    """The target as the code generator saw it; ``cpu_features`` are those that a processor must have."""

    name: str
    machine: str
    tuning_log: str
    fingerprint: str
    tvm: dict[str, Any]
    host: dict[str, Any] | None
    threads: int
    cpu_features: list[str] = []

    @property
    def is_android(self) -> bool:
        """Whether its library is linked for Android's loader, which finds symbols where others do not."""
        return "android" in str((self.host or self.tvm).get("mtriple", ""))


class OutputCheck(_Strict):
    """One output of one run of the check. All figures are shares of the output's largest value.

    ``difference`` is that from the source's own answer. Where it left doubt, ``error`` is what was built against
    float64, and ``source_error`` the source in float32 against the same: its rounding.
    """

    output: str
    input: str
    difference: float
    allowed: float
    error: float | None = None
    source_error: float | None = None


class Check(_Strict):
    """What came of running the built network against its source.

    ``difference`` and ``allowed`` are those of the output that came closest to failing. ``masks`` counts the masks that
    the network computes in every call; those of ``uniform`` were on everywhere or off everywhere in every input tried.
    ``refused`` says of inputs that the source itself does not take why. ``unclear`` are outputs of which rounding alone
    could make anything on every input tried.
    """

    status: Literal["passed", "not run"]
    device: str = ""
    difference: float | None = None
    allowed: float | None = None
    inputs: list[str] = []
    outputs: list[OutputCheck] = []
    masks: int = 0
    uniform: list[str] = []
    refused: dict[str, str] = {}
    unclear: list[str] = []
    reason: str = ""

    def lines(self) -> list[str]:
        """The same in words: how near each output came to failing, and what the check could not see."""
        if self.status != "passed":
            return [f"not run: {self.reason}"]
        lines = [f"passed on {self.device}; shares of each output's largest value:"]
        for output in self._nearest():
            line = f"{output.output} on input '{output.input}': {output.difference:.1g}, allowed {output.allowed:.1g}"
            if output.error is not None:
                line += f"; from float64 {output.error:.1g}, the source itself {output.source_error:.1g}"
            lines.append(line)
        lines += [f"the source takes no {name} input: {why}" for name, why in self.refused.items()]
        if self.uniform:
            always = f"{len(self.uniform)} of {self.masks} masks were on everywhere or off everywhere in all inputs"
            lines.append(f"{always}: name real ones with --check-inputs")
        if self.unclear:
            made = f"rounding alone could make anything of {', '.join(self.unclear)} on all inputs"
            lines.append(f"{made}: name real ones with --check-inputs")
        return lines

    def _nearest(self) -> list[OutputCheck]:
        """Of each output, the input where it came closest to failing."""
        nearest: dict[str, OutputCheck] = {}
        for output in sorted(self.outputs, key=lambda output: -output.difference):
            nearest.setdefault(output.output, output)
        return list(nearest.values())[:_SHOWN_OUTPUTS]


class DeviceCode(_Strict):
    """A GPU's code inside the library: PTX, or source that the device's driver compiles."""

    format: Literal["ptx", "opencl"]
    architecture: str
    version: str
    note: str


class File(_Strict):
    """Hash and size of one file of the folder."""

    sha256: str
    bytes: int


class Manifest(_Strict):
    """All that is known of an artifact; ``parameters`` are the weights that the network takes after its inputs, and
    ``preprocess`` says how frames of a video become its input, where that is known. ``kernels`` has every compiled
    function by its symbol.

    ``memory_peak_bytes`` are the weights and the planned storage of activations and workspaces during one call.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    source_sha256: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: list[str] = []
    preprocess: Preprocess | None = None
    target: BuiltFor
    options: dict[str, Any] = {}
    versions: dict[str, str]
    layers: list[LayerInfo] = []
    kernels: dict[str, KernelInfo] = {}
    device_code: DeviceCode | None = None
    memory_peak_bytes: int
    check: Check
    files: dict[str, File] = {}
    seal: str = ""

    @property
    def is_for_gpu(self) -> bool:
        """Whether the network runs on a GPU."""
        return self.target.tvm.get("kind") != "llvm"

    @property
    def tolerance(self) -> float:
        """Largest difference allowed from the source, as a share of an output's largest value."""
        if self.options.get("dtype") == "float16" and not self.is_for_gpu:
            return HALF_ON_PROCESSOR
        halved = "float16" in (self.options.get("dtype"), self.options.get("weights_dtype"))
        return HALF_TOLERANCE if halved else TOLERANCE

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense network in one call."""
        return sum(layer.macs for layer in self.layers)


#: Inode, size and time of the last change in nanoseconds; None of a file that is not there.
Stamp = tuple[int, int, int] | None


@dataclass(frozen=True)
class Artifact:
    """A verified folder."""

    path: Path
    manifest: Manifest = field(repr=False)  # pages long
    #: Of each file, by name, what changes when it is written to or replaced.
    stamps: Mapping[str, Stamp] = field(default_factory=dict, compare=False, repr=False)

    def require_unchanged(self) -> None:
        """Raise DanceError where a file is no longer the one that was verified."""
        for name, stamp in self.stamps.items():
            if _stamp(self.path / name) != stamp:
                raise DanceError(f"{self.path / name} was changed after it was verified: load the artifact again")

    @property
    def library(self) -> Path:
        """The compiled network: a shared library."""
        return self.path / LIBRARY

    def weights(self) -> list[np.ndarray]:
        """The arguments of ``main`` after the inputs, in order; empty where the library holds the weights."""
        if not self.manifest.parameters:
            return []
        arrays = load_file(self.path / WEIGHTS)
        return [arrays[name] for name in self.manifest.parameters]

    def reference(self) -> dict[str, np.ndarray]:
        """What the source network answers to the reference input, as ``output:NAME``, and ``kernels``: mean and mean
        size of what each kernel call wrote when the build was checked, (calls, 2). Empty where nothing was stored."""
        return load_file(self.path / REFERENCE) if REFERENCE in self.manifest.files else {}

    def require_machine(self, machine: str) -> None:
        """Raise DanceError unless the library is for ``machine`` (``x86_64``, ``aarch64`` or as uname says it)."""
        built = self.manifest.target
        if _SAME_MACHINE.get(machine.lower(), machine.lower()) != built.machine:
            raise DanceError(
                f"{self.path} is built for {built.name} ({built.machine}) and this device is {machine}: "
                f"rebuild it with --target, or choose another --device"
            )

    def require_this_machine(self) -> None:
        """Raise DanceError unless this machine has the architecture and the instructions that the code uses."""
        self.require_machine(platform.machine())
        present = cpu_flags()
        missing = sorted(set(self.manifest.target.cpu_features) - present)
        if present and missing:
            raise DanceError(
                f"{self.path} uses instructions that this processor lacks ({', '.join(missing)}): "
                f"rebuild it here with --target host"
            )


def load_artifact(path: str | Path) -> Artifact:
    """Verify the folder and describe it; nothing is mapped into memory.

    Raises DanceError that names the file that is missing, damaged, foreign or of another version.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    stamps = {name: _stamp(folder / name) for name in manifest.files}
    for name, expected in manifest.files.items():
        if Path(name).name != name:
            raise DanceError(f"{folder / MANIFEST} names {name!r}, which is not a file name in the folder")
        _verify_file(folder / name, expected)
    machine = _elf_machine(folder / LIBRARY)
    if machine != manifest.target.machine:
        raise DanceError(f"{folder / LIBRARY} is for {machine}, but its manifest says {manifest.target.machine}")
    if manifest.parameters:
        _verify_weight_names(folder / WEIGHTS, manifest.parameters)
    for package in RUNTIME_VERSIONS:
        if manifest.versions.get(package) != version(package):
            raise DanceError(
                f"{folder} was built with {package} {manifest.versions.get(package)} and {version(package)} is "
                f"installed: rebuild it, or install that version"
            )
    return Artifact(folder, manifest, stamps)


def write_artifact(
    out: str | Path,
    export_library: Callable[[Path], None],
    weights: Mapping[str, np.ndarray] | Store,
    manifest: Manifest,
    check: Callable[[Artifact], Check] | None = None,
    reference: Mapping[str, np.ndarray] | None = None,
) -> Artifact:
    """Write the folder beside ``out``, check it there, then rename it: what stands at ``out`` is always whole.

    ``export_library`` writes the shared library to the path it is given. ``reference`` is read after the check, which
    may fill it: what a device's answers are compared with later. Raises DanceError where ``out`` cannot be written or
    holds something that is not an artifact.
    """
    with staged(out) as folder:
        export_library(folder / LIBRARY)
        parameters = _write_weights(weights, folder / WEIGHTS)
        names = [name for name in (LIBRARY, WEIGHTS, ARCHIVE) if (folder / name).exists()]
        manifest = manifest.model_copy(
            update={"files": {name: _describe(folder / name) for name in names}, "parameters": parameters}
        )
        _finish(folder, manifest, check, reference)
    return load_artifact(out)


def _write_weights(weights: Mapping[str, np.ndarray] | Store, path: Path) -> list[str]:
    """Write the file of weights, if there is to be one; gives the names of the tensors in it."""
    if isinstance(weights, Store):
        if weights.names:
            weights.write(path)
        return weights.names
    if weights:
        save_file({name: np.asarray(array, order="C") for name, array in weights.items()}, path)
    return list(weights)


def record_check(
    artifact: Artifact, check: Callable[[Artifact], Check], reference: Mapping[str, np.ndarray]
) -> Artifact:
    """Check an artifact that stands, and write what came of it into its manifest, with ``reference``, filled by it."""
    manifest = artifact.manifest
    kept = {name: file for name, file in manifest.files.items() if name != REFERENCE}
    with staged(artifact.path) as folder:
        for name in kept:
            shutil.copyfile(artifact.path / name, folder / name)
        _finish(folder, manifest.model_copy(update={"files": kept}), check, reference)
    return load_artifact(artifact.path)


def _finish(
    folder: Path,
    manifest: Manifest,
    check: Callable[[Artifact], Check] | None,
    reference: Mapping[str, np.ndarray] | None,
) -> None:
    """Check what ``folder`` holds, and write the rest of it."""
    _write_manifest(folder, manifest)
    if check is not None:
        manifest = manifest.model_copy(update={"check": check(load_artifact(folder))})
    if reference:
        save_file({name: np.asarray(array, order="C") for name, array in reference.items()}, folder / REFERENCE)
        manifest = manifest.model_copy(update={"files": {**manifest.files, REFERENCE: _describe(folder / REFERENCE)}})
    _write_manifest(folder, manifest)
    for path in folder.iterdir():
        path.chmod(0o644)  # whatever each writer chose


def _describe(path: Path) -> File:
    return File(sha256=file_sha256(path), bytes=path.stat().st_size)


def _verify_file(path: Path, expected: File) -> None:
    try:
        found = _describe(path)
    except OSError as error:
        raise DanceError(f"{path} cannot be read ({error.strerror}): build the artifact again") from None
    if found != expected:
        raise DanceError(f"{path} is damaged: its SHA-256 is not the manifest's; build the artifact again")


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _verify_weight_names(path: Path, parameters: list[str]) -> None:
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as weights:
            missing = set(parameters) - set(weights.keys())
    except SafetensorError as error:
        raise DanceError(f"{path} is not a safetensors file: {error}") from None
    if missing:
        raise DanceError(f"{path} lacks the weights {', '.join(sorted(missing)[:4])}: build the artifact again")


def _elf_machine(path: Path) -> str:
    """The architecture in a 64-bit little-endian ELF header."""
    with path.open("rb") as stream:
        head = stream.read(20)
    if len(head) < 20 or head[:6] != b"\x7fELF\x02\x01":
        raise DanceError(f"{path} is not a 64-bit shared library")
    (machine,) = struct.unpack_from("<H", head, 18)
    return _ELF_MACHINES.get(machine, f"ELF machine {machine}")


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    path = folder / f"{MANIFEST}.new"
    path.write_bytes(_serialise(manifest.model_copy(update={"seal": _seal(manifest)})))
    path.replace(folder / MANIFEST)


def require_artifact(folder: Path) -> None:
    """Raise DanceError where ``folder`` is no artifact; whether it is whole is for `load_artifact` to say."""
    if folder.is_file():
        raise DanceError(f"{folder} is a file: an artifact is the folder that `dance-tvm build` writes")
    if not folder.is_dir():
        raise DanceError(f"there is no artifact {folder}: `dance-tvm build` writes one")
    if not (folder / MANIFEST).exists():
        raise DanceError(f"{folder} holds no {MANIFEST}: it is not an artifact of dance-tvm build")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        require_artifact(folder)
        raise
    except OSError as error:
        raise DanceError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    damaged = DanceError(f"{path} is damaged: its seal does not fit; build the artifact again")
    try:
        facts = json.loads(raw)
        schema = facts["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if schema != SCHEMA_VERSION:
        raise DanceError(f"{path} has schema version {schema}; this dance-tvm reads {SCHEMA_VERSION}: rebuild it")
    try:
        manifest = Manifest.model_validate(facts)
    except ValidationError:
        raise damaged from None
    # The bytes must be the canonical ones, so that not even a changed space goes unseen.
    if manifest.seal != _seal(manifest) or _serialise(manifest) != raw:
        raise damaged
    if LIBRARY not in manifest.files or (manifest.parameters and WEIGHTS not in manifest.files):
        raise DanceError(f"{path} does not name every file that the network needs: build the artifact again")
    return manifest


def _serialise(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.model_dump(), indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _seal(manifest: Manifest) -> str:
    return hashlib.sha256(_serialise(manifest.model_copy(update={"seal": ""}))).hexdigest()
