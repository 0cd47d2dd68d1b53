"""The same kernels under TVM's virtual machine, which shows each tensor before it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tvm
from tvm import relax
from tvm.relax import vm_build
from tvm.tirx.build import codegen_build

from dance_tvm import Options
from dance_tvm.artifact.linker import shared_library_linker
from dance_tvm.compiler.code import compile_lowered
from dance_tvm.compiler.pipeline import lower
from dance_tvm.frontend.interface import Imported
from dance_tvm.machines.target import Target


def for_virtual_machine(
    imported: Imported, target: Target, options: Options, folder: Path
) -> tuple[Path, list[np.ndarray]]:
    """A library in ``folder``, and the weights that its ``main`` takes behind the inputs."""
    lowered = lower(imported.mod, target, options)
    (folder / "machine").mkdir()
    code = compile_lowered(lowered, target, options, folder / "machine")
    builder = relax.ExecBuilder()
    vm_build._vmcodegen(builder, code.planned)
    tvm_target = target.tvm_target(options.threads)
    library = codegen_build(tvm.IRModule({}), tvm_target)  # without functions: the kernels join it when it is linked
    executable = relax.VMExecutable(vm_build._ffi_api.VMLink(builder, tvm_target, library, [], {}))
    path = folder / "machine" / "model.so"
    executable.export_library(str(path), fcompile=shared_library_linker(target, code.kernels))
    return path, list(lowered.weights.values())
