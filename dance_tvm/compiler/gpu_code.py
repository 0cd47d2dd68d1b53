"""From a lowered module to a GPU's code: memory planned, kernels as OpenCL C or PTX, and how they are launched."""

from __future__ import annotations

from dataclasses import replace

import tvm
from tvm import tirx

from dance_tvm.artifact.device_code import described, ptx_for
from dance_tvm.compiler.code import Code
from dance_tvm.compiler.pipeline import Options
from dance_tvm.device.launches import device_code
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.lowering.machine import UNCHECKED
from dance_tvm.machines.target import Target


def compile_for_gpu(lowered: Lowered, machine: Target, options: Options) -> Code:
    """Plan memory and compile. Raises DanceError where the compiler for the GPU is missing or refuses the kernels."""
    target = machine.tvm_target(options.threads)
    with target, tvm.transform.PassContext(config=UNCHECKED):
        planned = _pipeline(target)(lowered.mod)
        functions = {name: func for name, func in planned.functions_items() if isinstance(func, tirx.PrimFunc)}
        found = device_code(tvm.IRModule(functions), target)
    if target.kind.name == "cuda":
        found = replace(found, source=ptx_for(found.source, machine))
    return Code(planned, [], found, described(found.source, machine))


def _pipeline(target: tvm.target.Target) -> tvm.transform.Pass:
    """From kernels to planned memory; TVM's own pipeline for GPUs would schedule and fold once more."""
    from tvm.relax import transform
    from tvm.relax.backend import gpu_generic

    lowering = [_views, transform.ToNonDataflow(), transform.RemovePurityChecking(), transform.CallTIRRewrite()]
    return tvm.transform.Sequential(lowering + gpu_generic.finalize_passes(target))


@tvm.transform.module_pass(opt_level=0)
def _views(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Reshapes as views of what they read; as kernels that copy where TVM's pass fails, as on C3D's conv4b."""
    try:
        return tvm.relax.transform.RewriteDataflowReshape()(mod)
    except tvm.error.InternalError:
        return mod
