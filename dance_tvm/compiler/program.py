"""The artifact of a CPU target: kernels, ``main`` as a table, and what runs it, linked into one library without TVM."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from dance_tvm.artifact.c_interface import compile_interface
from dance_tvm.artifact.c_program import Names, program_of
from dance_tvm.artifact.folder import Artifact, Check, Manifest, write_artifact
from dance_tvm.artifact.linker import link_program
from dance_tvm.artifact.weight_store import MOST_INLINE, store_of
from dance_tvm.compiler.code import Code
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import Target


def write_program(
    out: str | Path,
    lowered: Lowered,
    code: Code,
    manifest: Manifest,
    machine: Target,
    check: Callable[[Artifact], Check] | None = None,
    reference: Mapping[str, np.ndarray] | None = None,
    most_inline: int = MOST_INLINE,
) -> Artifact:
    """Write the artifact of ``lowered``, compiled into ``code``.

    Up to ``most_inline`` bytes of weights lie within the library. Raises DanceError as ``write_artifact`` does.
    """
    program = program_of(code.planned, list(lowered.weights.values()))
    store = store_of(program.weights, lowered.sources, most_inline)
    names = Names(
        [tensor.name for tensor in manifest.inputs],
        [tensor.name for tensor in manifest.outputs],
        f"{manifest.name} for {machine.name}, dance_tvm {manifest.versions.get('dance-tvm', '')}",
        manifest.target.threads,
    )
    with tempfile.TemporaryDirectory(prefix="dance_tvm_objects_") as folder:
        objects = [*compile_interface(program, store, names, machine, Path(folder)), *code.kernels]
        link = partial(link_program, objects=objects, target=machine)
        return write_artifact(out, link, store, manifest, check, reference)
