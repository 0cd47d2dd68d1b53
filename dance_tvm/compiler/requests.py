"""What a build is asked for, looked at before TVM and PyTorch are loaded: what cannot be is refused at once."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from dance_tvm.artifact.preprocess import Preprocess
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.target import Target
from dance_tvm.models import registry

#: Architectures that kernels, linker and artifacts know, and what begins the triples of their code.
MACHINES = {"x86_64": ("x86_64",), "aarch64": ("aarch64", "arm64")}
KINDS = ("llvm", "cuda", "opencl")


def require_files(options: Mapping[str, Path | Sequence[Path] | None]) -> None:
    """Raise DanceError for files, by the option that names them, that are not there."""
    for option, given in options.items():
        for path in [given] if isinstance(given, Path) else given or []:
            if not path.is_file():
                raise DanceError(f"there is no file {path} ({option}): check the path")


def require_logs(logs: Path | None) -> None:
    """Raise DanceError for a folder of tuning logs that is not there."""
    if logs is not None and not logs.is_dir():
        raise DanceError(f"there is no folder of tuning logs {logs}: `dance-tvm tune --logs` makes one")


def require_agreement(numerics: str, conv: str) -> None:
    """Raise DanceError for options that contradict one another."""
    if numerics == "exact" and conv == "winograd":
        raise DanceError("--numerics exact keeps the order of sums, which --conv winograd changes: leave one out")


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


def require_program(target: Target, weights_dtype: str, prepared: bool, static: bool) -> None:
    """Raise DanceError where an option is given that only artifacts for processors have."""
    given = {"--weights-dtype": weights_dtype != "float32", "--prepared": prepared, "--static": static}
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
