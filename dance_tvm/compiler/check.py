"""The check: what was built answers as its source does, on every input tried and for every output."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from dance_tvm.artifact.folder import Artifact, BuiltFor, Check, Manifest, OutputCheck
from dance_tvm.compiler.check_inputs import USUAL, CheckInputs, check_inputs
from dance_tvm.core.agreement import allowed_of, difference
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import dtype_of, random_inputs
from dance_tvm.frontend.rounding import MULTIPLE, Rounding

if TYPE_CHECKING:
    from dance_tvm.device.session import LoadedNetwork
    from dance_tvm.frontend import Imported
    from dance_tvm.frontend.interface import Arrays
    from dance_tvm.lowering.lowered import Lowered

#: Multiply-accumulates that an emulated processor does in a few seconds; larger networks are checked there on request.
EMULATED_MACS = 2_000_000_000

#: The same for the kernels of a GPU on a processor, through OpenCL.
INTERPRETED_MACS = 500_000_000

#: Where rounding may change an output by as much as this share of its largest value, nothing can be compared.
UNCLEAR = 1.0

#: From this share of what is allowed on, a difference leaves doubt, and float64 decides whose it is.
DOUBT = 0.25


class DisagreementError(DanceError):
    """What was built does not answer as its source does: ``what`` says where, and ``way_out`` what to try."""

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(f"{what}; nothing was written, {way_out}")
        self.what = what


def check_artifact(
    artifact: Artifact,
    imported: Imported,
    *,
    insist: bool = False,
    given: Mapping[str, Arrays] | None = None,
    on_phase: Callable[[str], None] | None = None,
    reference: dict[str, np.ndarray] | None = None,
) -> Check:
    """Run the artifact where its code runs, and its source here, on the same inputs: the usual ones and ``given`` ones.

    ``reference`` is filled with what a device's answers can be compared with later. Raises DanceError if they differ;
    a device that is not there is recorded, and raised only with ``insist``.
    """
    from dance_tvm.device import open_device, prepare_emulator, why_no_emulator

    spec, reason = _device_for(artifact.manifest, insist)
    if spec == "emulator":
        reason = why_no_emulator() or ""
    if reason and insist:
        raise DanceError(f"the build cannot be checked: {reason}; leave --check out to build without")
    stored = {} if reference is None else reference
    if reason:
        _store(stored, imported.reference(random_inputs(imported.inputs)))
        return Check(status="not run", device=spec, reason=reason)
    tried = check_inputs(imported, given)
    _store(stored, tried.answers.get("normal", {}))
    try:
        if spec == "emulator":
            prepare_emulator(on_phase or (lambda _sentence: None))
        with open_device(spec) as device:
            network = device.load(artifact)
            found = {name: network.run(arrays) for name, arrays in tried.arrays.items()}
            chosen = _by_each_kernel(network, tried) if _has_choices(artifact.manifest) else []
            calls = network.kernels(tried.arrays["normal"], repeats=0) if "normal" in found else []
    except DanceError as error:
        if insist or spec == "local":
            raise
        return Check(status="not run", device=spec, reason=str(error))
    for answer in found.values():
        _require_types(artifact.manifest, answer)
    check = compare(artifact.manifest, tried, found, spec)
    for answers in chosen:
        compare(artifact.manifest, tried, answers, spec)
    if calls:
        stored["kernels"] = np.array([[call.mean or 0.0, call.mean_size or 0.0] for call in calls])
    return check


def _has_choices(manifest: Manifest) -> bool:
    """Whether some layer has two kernels, of which each call runs one."""
    return any(kernel.is_free_choice for kernel in manifest.kernels.values())


def _by_each_kernel(network: LoadedNetwork, tried: CheckInputs) -> list[dict[str, Arrays]]:
    """Answers by the first kernel of all layers that have two, and by the second, where the device can choose."""
    names = [name for name in tried.arrays if name == "normal" or name.startswith("mixed")]
    found = [{name: network.run_choosing(tried.arrays[name], which) for name in names} for which in (0, 1)]
    return [{name: answer for name, answer in answers.items() if answer is not None} for answers in found]


def check_kernels(
    artifact: Artifact,
    lowered: Lowered,
    imported: Imported,
    *,
    insist: bool = False,
    given: Mapping[str, Arrays] | None = None,
    reference: dict[str, np.ndarray] | None = None,
) -> Check:
    """Run the kernels of a network for a GPU, built for OpenCL, on this machine, and its source, on the same inputs.

    The library itself needs its GPU; this shows that schedules and lists are right. Raises as ``check_artifact`` does.
    """
    from dance_tvm.device.opencl import OpenCLSession
    from dance_tvm.device.opencl_network import OpenCLNetwork

    manifest = artifact.manifest
    stored = {} if reference is None else reference
    if manifest.macs > INTERPRETED_MACS and not insist:
        _store(stored, imported.reference(random_inputs(imported.inputs)))
        reason = f"{manifest.macs / 1e9:.1f} G multiply-accumulates take long on a processor: give --check"
        return Check(status="not run", reason=reason)
    tried = check_inputs(imported, given)
    _store(stored, tried.answers.get("normal", {}))
    names = [tensor.name for tensor in manifest.outputs]
    try:
        session = OpenCLSession(optimise=False, emulate_half=True)
        network = OpenCLNetwork(session, lowered)
        found = {
            name: dict(zip(names, network.run(list(arrays.values())), strict=True))
            for name, arrays in tried.arrays.items()
        }
    except DanceError as error:
        if insist:
            raise
        return Check(status="not run", reason=str(error))
    return compare(manifest, tried, found, f"{session.name} over OpenCL, the kernels alone")


def was_checked(check: Check, given: Mapping[str, Arrays]) -> bool:
    """Whether ``check`` passed on the usual inputs and all of ``given``."""
    return check.status == "passed" and {*USUAL, *given} <= {*check.inputs, *check.refused}


def _store(reference: dict[str, np.ndarray], answer: Arrays) -> None:
    reference.update({f"output:{name}": np.asarray(array) for name, array in answer.items()})


def _device_for(manifest: Manifest, insist: bool) -> tuple[str, str]:
    """Where to check: a device's name and nothing, or nothing and the reason."""
    target = manifest.target
    kind = target.tvm["kind"]
    if kind != "llvm":
        return "", f"no device here runs {kind} code"
    if is_of_this_machine(target):
        return "local", ""
    if target.machine != "aarch64":
        return "", f"no device here runs {target.machine} code"
    if manifest.macs > EMULATED_MACS and not insist:
        return "", f"{manifest.macs / 1e9:.1f} G multiply-accumulates take long on an emulated device: give --check"
    return "emulator", ""


def is_of_this_machine(target: BuiltFor) -> bool:
    """Whether this machine's processor loads what was built for ``target``."""
    return target.machine == platform.machine() and not target.tvm.get("mtriple", "").endswith("android")


def compare(manifest: Manifest, tried: CheckInputs, found: Mapping[str, Arrays], device: str) -> Check:
    """Compare what ``device`` ``found``, by the names of the inputs ``tried``, with the source's answers.

    Raises DanceError that names the first input and output that differ.
    """
    allowed = manifest.tolerance
    judged = [output for name, answer in found.items() for output in _judge(tried, name, answer, allowed)]
    outputs = [output for output in judged if output.allowed < UNCLEAR]
    for output in outputs:
        if output.difference > output.allowed:
            raise DisagreementError(
                f"{manifest.name} as built for {manifest.target.name} differs from its source: output "
                f"{output.output} on the {output.input} input by {output.difference:.3g} of its largest value (allowed "
                f"{output.allowed:.3g})",
                _way_out(manifest),
            )
    if not outputs:
        return Check(status="not run", device=device, reason="on all inputs rounding alone could make anything of it")
    worst = max(outputs, key=_nearness)
    return Check(
        status="passed",
        device=device,
        difference=worst.difference,
        allowed=worst.allowed,
        inputs=list(tried.arrays),
        outputs=outputs,
        masks=len(tried.masks),
        uniform=tried.uniform,
        refused=tried.refused,
        unclear=sorted({output.output for output in judged} - {output.output for output in outputs}),
    )


def _way_out(manifest: Manifest) -> str:
    """What to try where a build differs from its source."""
    if manifest.options.get("dtype") == "float16":
        return "--dtype auto builds in float32 where half precision has too few digits"
    return "--debug-dump DIR shows each phase"


def _require_types(manifest: Manifest, answer: Arrays) -> None:
    """Raise DanceError where an output has another type than the manifest says."""
    for spec in manifest.outputs:
        if answer[spec.name].dtype != dtype_of(spec.dtype):
            raise DanceError(
                f"{manifest.name} as built for {manifest.target.name} differs from its source: output {spec.name} is "
                f"of {answer[spec.name].dtype}, not {spec.dtype}; nothing was written, --debug-dump DIR shows each "
                "phase"
            )


def _judge(tried: CheckInputs, name: str, found: Arrays, tolerance: float) -> list[OutputCheck]:
    """One input's outputs. Where rounding moves the source itself further than that, it sets what is allowed."""
    params = tried.imported.mod["main"].params
    arguments = {param.name: array for param, array in zip(params, tried.arrays[name].values(), strict=True)}
    rounding = Rounding(tried.imported.mod, arguments)
    exact = functools.cache(lambda: tried.imported.exact(tried.arrays[name]) if tried.imported.exact else None)
    outputs = []
    for index, (output, expected) in enumerate(tried.answers[name].items()):
        result = OutputCheck(
            output=output,
            input=name,
            difference=difference(found[output], expected),
            allowed=allowed_of(expected, tolerance),
        )
        if result.difference > DOUBT * result.allowed:
            result.error = difference(found[output], rounding.float64[index])
            result.source_error = rounding.errors[index]
            result.allowed = max(result.allowed, MULTIPLE * result.source_error)
        if result.difference > result.allowed:
            result.allowed = max(result.allowed, MULTIPLE * rounding.reach[index])
        if result.difference > result.allowed and (wide := exact()) is not None:
            _hold_against(result, found[output], expected, wide[index], tolerance)
        outputs.append(result)
    return outputs


def _hold_against(
    result: OutputCheck, found: np.ndarray, expected: np.ndarray, exact: np.ndarray, tolerance: float
) -> None:
    """Allow what the source's own float32 is off its float64, where what was built is as near to that as is asked."""
    error, source_error = difference(found, exact), difference(expected, exact)
    if error <= (asked := allowed_of(expected, tolerance)):
        result.error, result.source_error = error, source_error
        result.allowed = max(result.difference, asked + source_error)  # shares of two scales, nearly the same


def _nearness(output: OutputCheck) -> float:
    """How much of what is allowed an output's difference takes."""
    return output.difference / output.allowed if output.difference else 0.0
