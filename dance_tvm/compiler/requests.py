"""A build's request, checked before TVM and PyTorch are loaded: what cannot be built is refused at once."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dance_tvm.artifact.preprocess import Preprocess
from dance_tvm.artifact.staging import require_writable
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_folder
from dance_tvm.core.input_files import read_archive
from dance_tvm.device import why_no_emulator
from dance_tvm.machines.target import Target
from dance_tvm.models import registry
from dance_tvm.models.network_files import require_network
from dance_tvm.models.network_inputs import Declared, declared_inputs, require_shape

#: Architectures that kernels, linker and artifacts know, and what begins the triples of their code.
MACHINES = {"x86_64": ("x86_64",), "aarch64": ("aarch64", "arm64")}
KINDS = ("llvm", "cuda", "opencl")


@dataclass(frozen=True)
class Request:
    """What the command line asks a build for, as far as it can be refused beforehand; ``out`` is where it goes."""

    model: str
    target: Target
    out: Path
    weights: Path | None
    shapes: Mapping[str, Sequence[int]]
    batch: int | None
    dtype: str
    numerics: str
    conv: str
    memory: str
    weights_dtype: str
    io: str
    prepared: bool
    static: bool
    check: bool | None
    check_inputs: Sequence[Path]
    calibrate: Sequence[Path]
    layer_errors: bool
    logs: Path | None
    debug_dump: Path | None


def require(request: Request) -> None:
    """Raise DanceError for what cannot be built, checked or written, and for options that would do nothing."""
    target = request.target
    require_buildable(target, "float32" if request.dtype == "auto" else request.dtype)
    require_program(target, request.weights_dtype, request.prepared, request.static, request.memory)
    require_agreement(request)
    if request.layer_errors:
        require_layers_seen(target)
    require_checkable(target, request.check)
    require_network(request.model, request.weights)
    declared = declared_inputs(Path(request.model)) if Path(request.model).suffix in registry.NETWORK_FILES else None
    shapes = input_shapes(request, declared)
    require_inputs(request, shapes, declared)
    require_writable(request.out)
    require_logs(request.logs)
    if request.debug_dump is not None:
        require_folder(request.debug_dump, "--debug-dump")


def require_logs(logs: Path | None) -> None:
    """Raise DanceError for a folder of tuning logs that is not there."""
    if logs is not None and not logs.is_dir():
        raise DanceError(f"there is no folder of tuning logs {logs}: `dance-tvm tune --logs` makes one")


def require_agreement(request: Request) -> None:
    """Raise DanceError for options that contradict one another, and for inputs that nothing would look at."""
    is_half, is_checked = request.dtype != "float32", request.check is not False
    if request.numerics == "exact" and request.conv == "winograd":
        raise DanceError("--numerics exact keeps the order of sums, which --conv winograd changes: leave one out")
    if request.dtype == "auto" and not is_checked:
        raise DanceError("--dtype auto takes what the check passes in: leave --no-check out, or name the type")
    if request.calibrate and (request.target.gpu or not is_half):
        raise DanceError(
            "--calibrate shows what a processor's --dtype float16 has no range for: give that too, or leave it out"
        )
    if request.check_inputs and not (is_checked or request.layer_errors or is_half):
        raise DanceError("--check-inputs are for the check: leave --no-check out")


def input_shapes(request: Request, declared: Declared | None) -> Mapping[str, tuple[int, ...]]:
    """The shape of each input of a file that declares them. Raises DanceError for ``--shape`` and ``--batch`` that do
    not fit, and for shapes of a network of the zoo, which leaves none open."""
    if declared is not None:
        return require_shape(declared.shapes, request.shapes, request.batch)
    model = request.model
    if request.shapes and Path(model).suffix not in registry.NETWORK_FILES:
        raise DanceError(f"--shape fixes what a file leaves open, and {model} leaves nothing open but --batch")
    return {}


def require_inputs(request: Request, shapes: Mapping[str, tuple[int, ...]], declared: Declared | None) -> None:
    """Raise DanceError for files of real inputs that are none, or whose shapes and types are not the network's where
    those are known."""
    model = request.model
    if Path(model).suffix in registry.NETWORK_FILES:
        known, types = shapes, declared.types if declared else {}
    else:
        entry = registry.entry(model)
        known, types = {"": entry.input_shape}, {"": entry.dtype_name}
    for option, paths in (("--check-inputs", request.check_inputs), ("--calibrate", request.calibrate)):
        for path in paths:
            arrays = read_archive(path)
            single = next(iter(known)) if len(known) == len(arrays) == 1 else None
            for name, array in arrays.items():
                said = f"{option} {path}: {name} has"
                of = name if single is None else single
                _require_fitting(said, model, array, known.get(of), is_clip=of == "")
                dtype = "float16" if request.io == "float16" and types.get(of) == "float32" else types.get(of)
                if dtype is not None and str(array.dtype) != dtype:
                    mended = f"convert it by .astype('{dtype}')"
                    raise DanceError(f"{said} type {array.dtype}, and {model} takes {dtype}: {mended}")


def _require_fitting(said: str, model: str, array: np.ndarray, shape: tuple[int, ...] | None, is_clip: bool) -> None:
    """Raise DanceError for an array of another shape; that of a ``clip`` has no axis of the batch."""
    if shape is not None and (array.shape[1:] if is_clip else array.shape) != shape:
        raise DanceError(f"{said} shape {array.shape}, and {model} takes {'clips of ' if is_clip else ''}{shape}")


def require_checkable(target: Target, check: bool | None) -> None:
    """Raise DanceError where a check that the user insists on needs a device that is not there."""
    is_emulated = target.gpu is None and target.link.machine == "aarch64" != platform.machine()
    if check and is_emulated and (reason := why_no_emulator()):
        raise DanceError(f"the build cannot be checked: {reason}; leave --check out to build without")


def require_buildable(target: Target, dtype: str = "float32") -> None:
    """Raise DanceError where no code can be made for the target, or not with these options."""
    kind = target.tvm.get("kind")
    if kind not in KINDS:
        raise DanceError(f"target {target.name} is of kind {kind!r}: kernels are made for {', '.join(KINDS)}")
    if target.link.machine not in MACHINES:
        known = " and ".join(MACHINES)
        raise DanceError(f"target {target.name} is a {target.link.machine} machine: kernels are made for {known}")
    host = target.tvm if kind == "llvm" else target.host or {}
    triple = str(host.get("mtriple", ""))
    if triple and not triple.startswith(MACHINES[target.link.machine]):
        raise DanceError(
            f"target {target.name} says that it is a {target.link.machine} machine (link.machine) and that its code is "
            f"for {triple} (mtriple): correct one of them"
        )
    if dtype == "float16" and not (target.gpu.fp16 if target.gpu else target.vector.fp16):
        raise DanceError(
            f"{target.name} cannot compute in half precision: leave --dtype out, or name a target with fp16"
        )


def require_program(target: Target, weights_dtype: str, prepared: bool, static: bool, memory: str = "balanced") -> None:
    """Raise DanceError where an option is given that only artifacts for processors have."""
    given = {
        "--weights-dtype": weights_dtype != "float32",
        "--prepared": prepared,
        "--static": static,
        "--memory": memory != "balanced",
    }
    for option, is_given in given.items():
        if is_given and target.gpu:
            raise DanceError(f"{option} is for processors and {target.name} is a GPU: leave it out")


def require_layers_seen(target: Target) -> None:
    """Raise DanceError unless what each layer of a build writes can be seen: in programs that run on this machine."""
    here = target.link.machine == platform.machine() and "android" not in target.tvm.get("mtriple", "")
    if target.gpu or not here:
        raise DanceError(
            f"--layer-errors looks at the layers of a program on this machine, which does not run {target.name}: "
            "build for host with the same options"
        )


def known_preprocess(model: object) -> Preprocess | None:
    """How frames of a video become the input of a network of the zoo; None where it is not known."""
    if not isinstance(model, (str, Path)) or Path(model).suffix:
        return None
    fields = registry.entry(str(model)).preprocess
    return Preprocess.model_validate(fields) if fields else None


def is_untrained(model: str, weights: Path | None) -> bool:
    """Whether a build would take the zoo's network with the random weights that it was made with."""
    if weights is not None or Path(model).suffix:
        return False
    known = registry.entry(model)
    return known.pretrained is None and not known.trained


def default_out(model: str, target: Target) -> Path:
    """Where a build goes by default: ``model.pt2``, as every training leaves one, is named after its folder."""
    path = Path(model)
    named = path.absolute().parent.name if path.suffix in registry.NETWORK_FILES and path.stem == "model" else path.stem
    return Path("artifacts") / f"{named}-{target.name}"
