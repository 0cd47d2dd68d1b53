"""From a lowered module to machine code: memory planned, a processor's kernels as object files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import relax
from tvm.relax import vm_build

from dance_tvm.artifact.folder import DeviceCode as DeviceCodeFacts
from dance_tvm.artifact.gpu_launches import DeviceCode
from dance_tvm.artifact.linker import join_objects, target_triple
from dance_tvm.compiler.kernel_cache import KernelCache
from dance_tvm.compiler.kernels import compile_kernels
from dance_tvm.compiler.pipeline import Options
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.lowering.machine import UNCHECKED
from dance_tvm.machines.target import Target


@dataclass(frozen=True)
class Code:
    """``planned`` is the module whose memory is planned, ``kernels`` are object files with all of its kernels.

    For a GPU there are none: ``gpu`` is their code, and ``gpu_facts`` what the manifest says of it."""

    planned: tvm.IRModule
    kernels: list[str]
    gpu: DeviceCode | None = None
    gpu_facts: DeviceCodeFacts | None = None


def compile_lowered(lowered: Lowered, machine: Target, options: Options, folder: Path) -> Code:
    """Plan memory and compile; kernels become files in ``folder``."""
    target = machine.tvm_target(options.threads)
    with tvm.transform.PassContext(config=UNCHECKED):
        with target:
            planned = relax.get_pipeline("default_build")(lowered.mod)
        functions = vm_build._filter_tir(planned) or tvm.IRModule({})
        objects, names = compile_kernels(functions, target, folder, KernelCache() if options.cache else None)
    return joined(planned, objects, names, machine, folder)


def joined(planned: tvm.IRModule, objects: list[str], names: dict[str, str], machine: Target, folder: Path) -> Code:
    """``planned`` and its compiled kernels, joined in ``folder``; ``names``: each kernel's symbol."""
    kernels = folder / "kernels.o"
    join_objects(kernels, objects, names, target_triple(machine))
    return Code(planned, [str(kernels)])
