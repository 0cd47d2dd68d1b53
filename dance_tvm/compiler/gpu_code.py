"""Artifacts for GPUs, which have no C interface yet: TVM's virtual machine runs them (`device/virtual_machine.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from dance_tvm.artifact.device_code import embed_device_code
from dance_tvm.artifact.folder import Artifact, Check, Manifest, write_artifact
from dance_tvm.artifact.linker import shared_library_linker
from dance_tvm.compiler.pipeline import Options
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.lowering.machine import host_code_of
from dance_tvm.machines.target import Target


@dataclass(frozen=True)
class GpuCode:
    """``executable`` is what the virtual machine walks, with the kernels in it; ``planned`` is the module whose memory
    is planned."""

    executable: relax.VMExecutable
    planned: tvm.IRModule


def compile_for_gpu(lowered: Lowered, machine: Target, options: Options) -> GpuCode:
    """Plan memory and compile."""
    target, planned = machine.tvm_target(options.threads), []

    @tvm.transform.module_pass(opt_level=0, name="PlanAndRemember")
    def pipeline(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        planned.append(_pipeline(target)(module))
        return planned[-1]

    with tvm.transform.PassContext(config=host_code_of(machine)):
        return GpuCode(relax.build(lowered.mod, target, relax_pipeline=pipeline), planned[0])


def write_for_gpu(
    out: str | Path,
    lowered: Lowered,
    code: GpuCode,
    manifest: Manifest,
    machine: Target,
    options: Options,
    check: Callable[[Artifact], Check] | None = None,
    reference: Mapping[str, np.ndarray] | None = None,
) -> Artifact:
    """Write the artifact of ``lowered``, compiled into ``code``. Raises DanceError as ``write_artifact`` does."""
    manifest.memory_peak_bytes = _memory(lowered, code.planned)
    packing, manifest.device_code = embed_device_code(code.executable, machine, options.device_code == "compiled")
    linker = shared_library_linker(machine)

    def export(path: Path) -> None:
        code.executable.export_library(str(path), fcompile=linker, **packing)

    return write_artifact(out, export, lowered.weights, manifest, check, reference)


def _pipeline(target: tvm.target.Target) -> tvm.transform.Pass:
    """From kernels to the virtual machine; TVM's own pipeline for GPUs would schedule and fold once more."""
    from tvm.relax.backend import gpu_generic

    return tvm.transform.Sequential(gpu_generic.dataflow_lower_passes(target) + gpu_generic.finalize_passes(target))


def _memory(lowered: Lowered, planned: tvm.IRModule) -> int:
    """Bytes of all weights and planned activations."""
    weights = _constant_bytes(lowered.mod) + sum(array.nbytes for array in lowered.weights.values())
    return weights + _planned_storage(planned)


def _constant_bytes(mod: tvm.IRModule) -> int:
    """Bytes of the constants inside ``main``."""
    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        if isinstance(node, tvm.ir.GenericConst):
            total += node.value.numpy().nbytes

    relax.analysis.post_order_visit(mod["main"], visit)
    return total


def _planned_storage(mod: tvm.IRModule) -> int:
    """Bytes of all storages of static size that ``main`` allocates."""
    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        if isinstance(node, relax.Call) and getattr(node.op, "name", "") == "relax.vm.alloc_storage":
            sizes = node.args[0]
            if isinstance(sizes, relax.ShapeExpr):
                with suppress(TypeError):  # a symbolic size is not known before the call
                    total += int(np.prod([int(size) for size in sizes.values]))

    relax.analysis.post_order_visit(mod["main"], visit)
    return total
