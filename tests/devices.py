"""Small artifacts and real servers for tests of devices."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.artifact.folder import RUNTIME_VERSIONS, Artifact, BuiltFor, Check, Manifest, Tensor
from dance_tvm.artifact.weight_store import MOST_INLINE
from dance_tvm.compiler.code import compile_lowered
from dance_tvm.compiler.gpu_code import compile_for_gpu
from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.compiler.program import write_program
from dance_tvm.device import emulator
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import load_target

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
        lowered = Lowered(relax.get_pipeline("zero")(builder.get()))
    weights = {"w": constant} if separate_weights else {}
    shapes = [2, constant.shape[0]], [2, constant.shape[1]]
    return write(out, target_name, lowered, "matmul", *shapes, weights)


def video_artifact(
    out: Path, target_name: str = "host", *, dynamic: bool = True, size: int = 16, conv: Any = "direct", groups: int = 0
) -> Artifact:
    """Two convolutions of small integers over (1, 3, 8, size, size); frames whose mean is not positive are masked out
    of the first one's output where `dynamic`. With `groups`, one in so many columns (channel and tap) of the
    second one's weights is left, the others are zero in every filter."""
    random = np.random.default_rng(0)
    first = relax.const(random.integers(-2, 3, (8, 3, 3, 3, 3)).astype("float32"))
    weights = random.integers(1, 3, (8, 8, 1, 3, 3)).astype("float32")
    if groups:
        weights.reshape(8, 72)[:, np.arange(72) % groups != 0] = 0
    second = relax.const(weights)
    builder = relax.BlockBuilder()
    x = relax.Var("clip", relax.TensorType((1, 3, 8, size, size), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.nn.conv3d(x, first, padding=1))))
            if dynamic:
                mean = builder.emit(relax.op.mean(x, [1, 3, 4], keepdims=True))
                alive = builder.emit(relax.op.greater(mean, relax.const(0.0, "float32")))
                y = builder.emit(relax.op.multiply(y, builder.emit(relax.op.astype(alive, "float32"))))
            y = builder.emit(relax.op.nn.conv3d(y, second, padding=[0, 1, 1]))
            result = builder.emit_output(relax.Tuple([y]))
        builder.emit_func_output(result)
    target = load_target(target_name)
    lowered = lower(builder.get(), target, Options(threads=1, conv=conv))
    shapes = [1, 3, 8, size, size], [1, 8, 8, size, size]
    return write(out, target_name, lowered, "video" if dynamic else "video-dense", *shapes)


def write(
    out: Path, target_name: str, lowered: Lowered, name: str, shape_in: list[int], shape_out: list[int], weights=None
) -> Artifact:
    """The artifact of a lowered module with one input and one output."""
    target = load_target(target_name)
    meaning = "clip (N, C, T, H, W)" if len(shape_in) == 5 else "rows"
    manifest = Manifest(
        name=name,
        source_sha256="0" * 64,
        inputs=[Tensor(name="clip" if len(shape_in) == 5 else "x", shape=shape_in, dtype="float32", meaning=meaning)],
        outputs=[Tensor(name="y", shape=shape_out, dtype="float32", meaning="values")],
        target=BuiltFor(
            name=target.name,
            machine=target.link.machine,
            tuning_log="",
            fingerprint=target.fingerprint,
            tvm=target.tvm,
            host=target.host,
            threads=1,
        ),
        layers=lowered.layers,
        kernels=lowered.kernels,
        versions={package: version(package) for package in RUNTIME_VERSIONS},
        memory_peak_bytes=0,
        check=Check(status="not run"),
    )
    lowered = replace(lowered, weights=weights or {})
    options = Options(threads=1)
    with TemporaryDirectory() as folder:
        if target.gpu is None:
            code = compile_lowered(lowered, target, options, Path(folder))
        else:
            code = compile_for_gpu(lowered, target, options)
        return write_program(out, lowered, code, manifest, target, options, most_inline=0 if weights else MOST_INLINE)


def emulated(program: Path) -> list[str]:
    """The command that runs a phone's program on the emulated device, begun by glibc's loader in place of bionic's."""
    system = emulator.prepare()
    *qemu, _python = emulator.python_command(system)
    return [*qemu, str(next((system / "root").rglob("ld-linux-aarch64.so.1"))), str(program)]


def matmul_case(seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Small integers, so that the output is exact."""
    x = np.random.default_rng(seed).integers(-4, 5, (2, 3)).astype("float32")
    return {"x": x}, np.maximum(x @ CONSTANT + 1, 0)
