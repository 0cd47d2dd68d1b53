"""Small artifacts and real servers for tests of devices."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from dance_tvm.artifact import RUNTIME_VERSIONS, Artifact, BuiltFor, Check, Manifest, Tensor, write_artifact
from dance_tvm.linker import shared_library_linker
from dance_tvm.target import load_target

CONSTANT = np.arange(12, dtype="float32").reshape(3, 4)


def matmul_artifact(
    out: Path, target_name: str = "host", *, separate_weights: bool = False, size: int | None = None
) -> Artifact:
    """y = relu(x @ W + 1) for integer W (3, 4), or (size, size); W inside the library, or in a file of its own."""
    constant = CONSTANT if size is None else np.ones((size, size), "float32")
    target = load_target(target_name)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, constant.shape[0]), "float32"))
    weight = relax.Var("w", relax.TensorType(constant.shape, "float32"))
    with builder.function("main", [x, weight] if separate_weights else [x]):
        w = weight if separate_weights else relax.const(constant)
        product = builder.emit(relax.op.matmul(x, w))
        added = builder.emit(relax.op.add(product, relax.const(1.0, "float32")))
        builder.emit_func_output(builder.emit(relax.Tuple([builder.emit(relax.op.nn.relu(added))])))
    with target.tvm_target(1):
        executable = tvm.compile(relax.get_pipeline("zero")(builder.get()), target.tvm_target(1))
    manifest = Manifest(
        name="matmul",
        source_sha256="0" * 64,
        inputs=[Tensor(name="x", shape=[2, constant.shape[0]], dtype="float32", meaning="rows")],
        outputs=[Tensor(name="y", shape=[2, constant.shape[1]], dtype="float32", meaning="rows")],
        target=BuiltFor(
            name=target.name,
            machine=target.link.machine,
            tuning_log="",
            fingerprint=target.fingerprint,
            tvm=target.tvm,
            host=target.host,
            threads=1,
        ),
        versions={package: version(package) for package in RUNTIME_VERSIONS},
        memory_peak_bytes=0,
        check=Check(status="not run"),
    )
    linker = shared_library_linker(target)
    return write_artifact(
        out,
        lambda path: executable.export_library(str(path), fcompile=linker),
        {"w": constant} if separate_weights else {},
        manifest,
    )


def matmul_case(seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Small integers, so that the output is exact."""
    x = np.random.default_rng(seed).integers(-4, 5, (2, 3)).astype("float32")
    return {"x": x}, np.maximum(x @ CONSTANT + 1, 0)
