"""From a lowered module to machine code: memory planned, ``main`` for the virtual machine, kernels as object files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tvm
from tvm import relax
from tvm.relax import vm_build
from tvm.tirx.build import codegen_build

from dance_tvm.artifact.linker import join_objects, target_triple
from dance_tvm.compiler.kernel_cache import KernelCache
from dance_tvm.compiler.kernels import compile_kernels
from dance_tvm.compiler.pipeline import Options
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.lowering.machine import host_code_of
from dance_tvm.machines.target import Target


@dataclass(frozen=True)
class Code:
    """``executable`` is what the virtual machine walks, ``kernels`` are object files to link with it. ``planned`` is
    the module whose memory is planned. A GPU's kernels lie within the executable."""

    executable: relax.VMExecutable
    planned: tvm.IRModule
    kernels: list[str] = field(default_factory=list)


def compile_lowered(lowered: Lowered, machine: Target, options: Options, folder: Path) -> Code:
    """Plan memory and compile; kernels of a processor become files in ``folder``."""
    target = machine.tvm_target(options.threads)
    with tvm.transform.PassContext(config=host_code_of(machine)):
        if machine.gpu:
            return _compile_for_gpu(lowered.mod, target)
        with target:
            planned = relax.get_pipeline("default_build")(lowered.mod)
        functions = vm_build._filter_tir(planned) or tvm.IRModule({})
        objects, names = compile_kernels(functions, target, folder, KernelCache() if options.cache else None)
        return assemble(planned, objects, names, machine, target, folder)


def assemble(
    planned: tvm.IRModule,
    objects: list[str],
    names: dict[str, str],
    machine: Target,
    target: tvm.target.Target,
    folder: Path,
) -> Code:
    """What ``planned`` and its compiled kernels make, joined in ``folder``; ``names``: each kernel's symbol."""
    builder = relax.ExecBuilder()
    vm_build._vmcodegen(builder, planned)
    kernels = folder / "kernels.o"
    join_objects(kernels, objects, names, target_triple(machine))
    # A library without functions: the kernels join it when it is linked.
    library = codegen_build(tvm.IRModule({}), target)
    executable = relax.VMExecutable(vm_build._ffi_api.VMLink(builder, target, library, [], {}))
    return Code(executable, planned, [str(kernels)])


def _compile_for_gpu(mod: tvm.IRModule, target: tvm.target.Target) -> Code:
    planned: list[tvm.IRModule] = []

    @tvm.transform.module_pass(opt_level=0, name="PlanAndRemember")
    def pipeline(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        planned.append(_gpu_pipeline(target)(module))
        return planned[-1]

    return Code(relax.build(mod, target, relax_pipeline=pipeline), planned[0])


def _gpu_pipeline(target: tvm.target.Target) -> tvm.transform.Pass:
    """From kernels to the virtual machine; TVM's own pipeline for GPUs would schedule and fold once more."""
    from tvm.relax.backend import gpu_generic

    return tvm.transform.Sequential(gpu_generic.dataflow_lower_passes(target) + gpu_generic.finalize_passes(target))
