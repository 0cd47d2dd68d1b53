"""From a trained network to a verified artifact: import, lower, compile, link, check, write."""

from __future__ import annotations

import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm.target import codegen

from dance_tvm.artifact.folder import (
    Artifact,
    Check,
    Manifest,
    Tensor,
    load_artifact,
    record_check,
)
from dance_tvm.artifact.preprocess import Preprocess
from dance_tvm.artifact.staging import require_writable
from dance_tvm.artifact.video_windows import require_prepared
from dance_tvm.compiler.code import compile_lowered
from dance_tvm.compiler.gpu_code import compile_for_gpu
from dance_tvm.compiler.pipeline import Measure, Options, lower
from dance_tvm.compiler.program import built_for, write_program
from dance_tvm.compiler.requests import (
    known_preprocess,
    require_buildable,
    require_layers_seen,
    require_logs,
    require_program,
)
from dance_tvm.core.errors import DanceError, DanceWarning, unexpected_told
from dance_tvm.core.hashing import file_sha256
from dance_tvm.core.input_files import read_inputs
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.core.versions import versions
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import Target, load_target
from dance_tvm.records.advice import tuned_tiles
from dance_tvm.records.places import digest_of_logs

if TYPE_CHECKING:
    import torch

    from dance_tvm.compiler.layer_errors import LayerErrors
    from dance_tvm.frontend import Imported
    from dance_tvm.frontend.interface import Arrays

#: Options that the manifest always records, and those that it records elsewhere or that change no byte.
ALWAYS_TOLD = ("numerics", "conv", "sparsity")
TOLD_ELSEWHERE = ("threads", "debug_dump", "tuning", "logs", "cache")


@dataclass(frozen=True)
class Built:
    """An artifact and what it cost: seconds by phase and the largest resident memory of this process in bytes; and how
    far its layers are from the source's, where that was asked for."""

    artifact: Artifact
    seconds: dict[str, float]
    peak_memory_bytes: int
    layer_errors: LayerErrors | None = None


@dataclass
class _Clock:
    """Reports each phase to the listener and records its seconds."""

    listener: Callable[[str], None] | None
    seconds: dict[str, float] = field(default_factory=dict)
    phase: str = ""
    _since: float = 0.0

    def start(self, phase: str) -> None:
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now
        if self.listener and phase:
            self.listener(phase)


def build_network(
    model: str | Path | torch.nn.Module | torch.export.ExportedProgram | Imported,
    out: str | Path,
    *,
    target: str | Path | Target = "host",
    weights: str | Path | None = None,
    example_inputs: tuple[torch.Tensor, ...] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
    threads: int | None = None,
    check: bool | None = None,
    check_inputs: Sequence[str | Path] = (),
    calibrate: Sequence[str | Path] = (),
    options: Options | None = None,
    debug_dump: str | Path | None = None,
    logs_from: str | Path | None = None,
    reuse: bool = False,
    layer_errors: bool = False,
    preprocess: Preprocess | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> Built:
    """Compile ``model`` for ``target`` into the artifact folder ``out``.

    ``model`` is a name of the zoo, a ``.pt2`` or ``.onnx`` file, a network in memory (with ``example_inputs``), or one
    that was imported before; ``shapes`` fix what its inputs leave open, ``batch`` how many clips a call takes.
    ``check`` runs the built network against its source, on this machine or on the emulated device; None does so unless
    that would take long. ``check_inputs`` are ``.npz`` files of real inputs, which the check takes beside its own;
    ``calibrate`` more of them, which with them show the layers that half precision has no range for. Tile
    sizes come from the target's tuning logs, or from those of the target ``logs_from``. With ``reuse`` an intact
    artifact at ``out`` that the same network, target, options and versions made is kept as it is; it is checked if it
    was not, or on fewer inputs. ``layer_errors`` compares each layer with the source's, on the first of the real inputs
    given or a random one. ``preprocess`` says how frames of videos become the input, for the manifest. Raises
    DanceError for bad input, with nothing left behind.
    """
    _require_kinds(options, preprocess, check_inputs, calibrate)
    machine = target if isinstance(target, Target) else load_target(target)
    if options is not None and options.dtype == "auto":
        build = partial(
            build_network,
            _import(model, weights, example_inputs, shapes, batch),
            out,
            target=machine,
            threads=threads,
            check=check,
            check_inputs=check_inputs,
            calibrate=calibrate,
            debug_dump=debug_dump,
            logs_from=logs_from,
            reuse=reuse,
            layer_errors=layer_errors,
            preprocess=preprocess or known_preprocess(model),
            on_phase=on_phase,
        )
        return _with_best_dtype(build, machine, options, check)
    source = load_target(logs_from) if logs_from else None
    chosen = _settled(options, machine, threads, debug_dump, source)
    _require(machine, chosen, layer_errors, out)
    machine = machine.storing(chosen.dtype)
    clock = _Clock(on_phase)

    with unexpected_told(lambda: f"The phase {clock.phase!r} of the build"):
        imported = _imported(clock, chosen, model, weights, example_inputs, shapes, batch)
        manifest = new_manifest(imported, machine, chosen, source)
        manifest.preprocess = preprocess or known_preprocess(model)
        if preprocess is not None:
            require_prepared(manifest.inputs, preprocess)
        from dance_tvm.compiler.check import check_artifact, check_kernels, was_checked  # PyTorch is loaded by now

        given = _given(check_inputs, imported)
        measure = _magnitudes(imported, given | _given(calibrate, imported), machine, chosen, manifest)
        reference: dict[str, np.ndarray] = {}

        def check_there(artifact: Artifact, lowered: Lowered | None = None) -> Check:
            if machine.gpu and lowered is None:
                lowered = lower(imported.mod, machine, chosen, clock.start)
            clock.start("check")
            arguments: dict[str, Any] = {"insist": check is True, "given": given, "reference": reference}
            if lowered is not None and machine.gpu:
                return check_kernels(artifact, lowered, imported, **arguments)
            return check_artifact(artifact, imported, on_phase=clock.start, **arguments)

        if reuse and not layer_errors and (standing := _made_of(out, manifest)):
            if check is not False and not was_checked(standing.manifest.check, given):
                standing = record_check(standing, check_there, reference)
            clock.start("")
            return Built(standing, clock.seconds, _peak_memory())
        lowered = lower(imported.mod, machine, chosen, clock.start, measure)
        checked = None if check is False else lambda artifact: check_there(artifact, lowered)
        artifact = _compiled(out, lowered, manifest, machine, chosen, (checked, reference), clock)
        errors = _layer_errors(artifact, lowered, imported, given, clock) if layer_errors else None
        clock.start("")
        return Built(artifact, clock.seconds, _peak_memory(), errors)


def _require_kinds(options: Any, preprocess: Any, *lists: Any) -> None:
    """Raise DanceError for arguments that are of another kind, before anything is made of them."""
    for name, given, kind in (("options", options, Options), ("preprocess", preprocess, Preprocess)):
        if given is not None and not isinstance(given, kind):
            raise DanceError(f"{name} must be of the class {kind.__name__}, not {type(given).__name__}")
    for name, paths in zip(("check_inputs", "calibrate"), lists, strict=True):
        if isinstance(paths, str | Path):
            raise DanceError(f"{name} is a list of .npz files: give [{str(paths)!r}] for a single one")


def _require(machine: Target, chosen: Options, layer_errors: bool, out: str | Path) -> None:
    """Raise DanceError, before any work is done, for what cannot be built or written."""
    require_buildable(machine, chosen.dtype)
    require_program(machine, chosen.weights_dtype, chosen.prepared, chosen.static)
    if layer_errors:
        require_layers_seen(machine)
    require_writable(out)


def _settled(
    options: Options | None, machine: Target, threads: int | None, dump: str | Path | None, source: Target | None
) -> Options:
    """The options with the number of threads, the tuning logs and the dump's folder that hold for this build."""
    if threads is None:
        threads = options.threads if options else machine.threads
    chosen = replace(options or Options(), threads=threads)
    require_logs(chosen.logs)
    if dump := dump or chosen.debug_dump:
        chosen = replace(chosen, debug_dump=_dump_folder(dump))
    if chosen.tuning is not None:
        return chosen
    return replace(chosen, tuning=tuned_tiles(machine, options.logs if options else None, source))


def _compiled(
    out: str | Path,
    lowered: Lowered,
    manifest: Manifest,
    machine: Target,
    options: Options,
    check: tuple[Callable[[Artifact], Check] | None, dict[str, np.ndarray]],
    clock: _Clock,
) -> Artifact:
    """The artifact of ``lowered``, written once it passed ``check``: a check, and the answers that it keeps."""
    clock.start("compile")
    with tempfile.TemporaryDirectory(prefix="dance_tvm_kernels_") as folder:
        code = (
            compile_for_gpu(lowered, machine, options)
            if machine.gpu
            else compile_lowered(lowered, machine, options, Path(folder))
        )
        _describe(manifest, lowered, code.planned, options)
        clock.start("link")
        return write_program(out, lowered, code, manifest, machine, options, *check)


def _layer_errors(
    artifact: Artifact, lowered: Lowered, imported: Imported, given: dict[str, Arrays], clock: _Clock
) -> LayerErrors:
    """On the first inputs ``given``, or on random ones."""
    from dance_tvm.compiler.layer_errors import layer_errors

    clock.start("compare layers")
    return layer_errors(artifact, lowered, [*given.values(), random_inputs(imported.inputs)][0])


def _with_best_dtype(build: Callable[..., Built], machine: Target, options: Options, check: bool | None) -> Built:
    """What ``build`` gives in half precision where the target computes in it and the check, which must have been made,
    passes; else in float32, with a warning that says why."""
    from dance_tvm.compiler.check import DisagreementError

    if not (machine.gpu.fp16 if machine.gpu else machine.vector.fp16):
        why = f"{machine.name} does not compute in half precision"
    elif check is False:
        why = "half precision has to be checked"
    else:
        try:
            built = build(options=replace(options, dtype="float16"))
            if built.artifact.manifest.check.status == "passed":
                return built
            why = f"half precision could not be checked: {built.artifact.manifest.check.reason}"
        except DisagreementError as error:
            why = f"in half precision {error.what}"
    warnings.warn(f"--dtype auto takes float32: {why}", DanceWarning, stacklevel=3)
    return build(options=replace(options, dtype="float32"))


def _magnitudes(
    imported: Imported, given: dict[str, Arrays], machine: Target, options: Options, manifest: Manifest
) -> Measure | None:
    """What shows a processor's build in half precision how large values become, on inputs that the manifest names."""
    if options.dtype != "float16" or machine.gpu:
        return None
    from dance_tvm.compiler.magnitudes import measured_on

    if given:
        manifest.options["calibrated"] = ", ".join(sorted(given))
    return measured_on(imported, given.values())


def _given(paths: Sequence[str | Path], imported: Imported) -> dict[str, Arrays]:
    """Inputs from files, by the file's name and the beginning of its hash."""
    given = {}
    for path in map(Path, paths):
        arrays = read_inputs(path, imported.inputs, imported.name)
        given[f"{path.name} {file_sha256(path)[:12]}"] = arrays
    return given


def _made_of(out: str | Path, manifest: Manifest) -> Artifact | None:
    """The intact artifact at ``out`` if it was made of what ``manifest`` records before anything is compiled."""
    try:
        standing = load_artifact(out)
    except DanceError:
        return None
    keys = ("name", "preprocess", "source_sha256", "inputs", "outputs", "target", "options", "versions")
    same = all(getattr(standing.manifest, key) == getattr(manifest, key) for key in keys)
    return standing if same else None


def _peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _imported(clock: _Clock, options: Options, model: Any, *given: Any) -> Imported:
    """The network with the inputs and outputs that ``options`` want; loading what its import needs has its own time."""
    clock.start("load PyTorch's exporter")
    from dance_tvm.frontend.importer import load_exporter
    from dance_tvm.frontend.interface import Imported

    is_onnx = isinstance(model, str | Path) and Path(model).suffix == ".onnx"
    if not is_onnx and not isinstance(model, Imported):
        load_exporter()
    clock.start("import")
    imported = _import(model, *given)
    if options.io == "float16":
        from dance_tvm.frontend.half_io import with_half_io

        imported = with_half_io(imported)
    _dump(options.debug_dump, "imported", imported.mod)
    return imported


def _import(model: Any, weights: str | Path | None, example_inputs: Any, shapes: Any, batch: int | None) -> Imported:
    from dance_tvm.frontend import Imported, import_model

    if isinstance(model, Imported):
        if weights is not None or shapes or batch is not None:
            raise DanceError("the network is imported, and has its weights and shapes: give them to import_model")
        return model
    return import_model(model, weights=weights, example_inputs=example_inputs, shapes=shapes, batch=batch)


def _describe(manifest: Manifest, lowered: Lowered, planned: tvm.IRModule, options: Options) -> None:
    """What is known once memory is planned."""
    _dump(options.debug_dump, "planned", planned)
    manifest.layers, manifest.kernels = lowered.layers, lowered.kernels


def new_manifest(imported: Imported, machine: Target, options: Options, logs_from: Target | None = None) -> Manifest:
    """The manifest as far as it is known before anything is compiled."""
    chosen = _recorded(options)
    if digest := digest_of_logs(logs_from or machine, options.logs):
        chosen["tuning_logs"] = digest
    if logs_from is not None:
        chosen["logs_from"] = logs_from.name
    return Manifest(
        name=imported.name,
        source_sha256=imported.source_sha256,
        inputs=[_tensor(spec) for spec in imported.inputs],
        outputs=[_tensor(spec) for spec in imported.outputs],
        target=built_for(machine, options.threads),
        options=chosen,
        versions={**versions(), "llvm": str(codegen.llvm_version_major())},
        memory_peak_bytes=0,
        check=Check(status="not run", reason="not asked for"),
    )


def _recorded(options: Options) -> dict[str, str]:
    """The options that the artifact follows from: three always, others where they are not as usual."""
    usual = Options()
    values = {each.name: (getattr(options, each.name), getattr(usual, each.name)) for each in fields(Options)}
    return {
        name: str(value)
        for name, (value, default) in values.items()
        if name not in TOLD_ELSEWHERE and (name in ALWAYS_TOLD or value != default)
    }


def _tensor(spec: Any) -> Tensor:
    return Tensor(
        name=spec.name,
        shape=list(spec.shape),
        dtype=str(spec.dtype),
        meaning=spec.meaning,
        range=None if spec.range is None else list(spec.range),
    )


def _dump_folder(folder: str | Path) -> Path:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DanceError(f"--debug-dump {path} cannot be made: {error.strerror}") from None
    return path


def _dump(folder: Path | None, name: str, mod: tvm.IRModule) -> None:
    if folder is not None:
        path = folder / f"{name}.py"
        beside = path.with_suffix(f".new-{os.getpid()}")
        beside.write_text(mod.script(show_meta=False), encoding="utf-8")
        beside.replace(path)
