"""An artifact: kernels, ``main`` as a table, and what runs it, linked into one library without TVM."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dance_tvm.artifact.c_interface import compile_interface
from dance_tvm.artifact.c_program import Names, program_of
from dance_tvm.artifact.folder import ARCHIVE, Artifact, BuiltFor, Check, Manifest, write_artifact
from dance_tvm.artifact.linker import archive, link_program
from dance_tvm.artifact.weight_store import MOST_INLINE, Store, store_of
from dance_tvm.compiler.code import Code
from dance_tvm.compiler.kernel_cache import KernelCache
from dance_tvm.compiler.pipeline import Options
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.host import needed_flags
from dance_tvm.machines.target import Target


def built_for(target: Target, threads: int) -> BuiltFor:
    """What a manifest says of the target, for a call on this many threads."""
    return BuiltFor(
        name=target.name,
        machine=target.link.machine,
        tuning_log=target.tuning_log,
        fingerprint=target.fingerprint,
        tvm=target.tvm,
        host=target.host,
        threads=threads,
        cpu_features=needed_flags(target.tvm_target(threads)),
    )


def write_program(
    out: str | Path,
    lowered: Lowered,
    code: Code,
    manifest: Manifest,
    machine: Target,
    options: Options,
    check: Callable[[Artifact], Check] | None = None,
    reference: Mapping[str, np.ndarray] | None = None,
    most_inline: int = MOST_INLINE,
) -> Artifact:
    """Write the artifact of ``lowered``, compiled into ``code``.

    Up to ``most_inline`` bytes of weights lie within the library. Raises DanceError as ``write_artifact`` does.
    """
    with tempfile.TemporaryDirectory(prefix="dance_tvm_objects_") as folder:
        store, objects = program_objects(lowered, code, manifest, machine, options, Path(folder), most_inline)

        def link(library: Path) -> None:
            link_program(library, objects, machine)
            if options.static:
                archive(library.with_name(ARCHIVE), objects)

        return write_artifact(out, link, store, manifest, check, reference)


def program_objects(
    lowered: Lowered,
    code: Code,
    manifest: Manifest,
    machine: Target,
    options: Options,
    folder: Path,
    most_inline: int = MOST_INLINE,
) -> tuple[Store, list[str]]:
    """The weights of a program and the object files to link, those of them that are new in ``folder``; ``manifest`` is
    told what memory a call takes."""
    program = program_of(code.planned, list(lowered.weights.values()))
    program.count_work(lowered.layers, lowered.kernels)
    if code.gpu is not None:
        program.run_on_gpu(code.gpu)
    manifest.device_code = code.gpu_facts
    manifest.memory_peak_bytes = program.arena_bytes + sum(array.nbytes for array in program.weights)
    sources = {} if options.prepared else lowered.sources
    store = store_of(program.weights, sources, most_inline, halve=options.weights_dtype == "float16")
    names = Names(
        [tensor.name for tensor in manifest.inputs],
        [tensor.name for tensor in manifest.outputs],
        f"{manifest.name} for {machine.name}, dance_tvm {manifest.versions.get('dance-tvm', '')}",
        manifest.target.threads,
        manifest.target.cpu_features,
        str(machine.tvm.get("arch", "")),
    )
    cache = KernelCache() if options.cache else None
    return store, [*compile_interface(program, store, names, machine, folder, cache), *code.kernels]
