"""Time kernel-group sizes on a device.

RT3D (section 3) settles the group size "offline with actual mobile testings using synthesized CNN layers": each layer
is compiled for the target, dense and in every candidate group, and run on the device (local, emulator or TVM RPC).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dance_tvm.liveness.kernel_groups import fitting_groups
from dance_tvm.machines.target import Target
from dance_tvm.records.group_choice import (
    SYNTHESISED,
    Dtype,
    GroupMeasurement,
    Measure,
    SynthesisedLayer,
    lanes_of,
    measure_groups,
    require_fitting,
)

if TYPE_CHECKING:
    from dance_tvm.device import DeviceSession


def measure_on(
    target: Target,
    device: str = "local",
    *,
    threads: int | None = None,
    rate: float = 3.0,
    repeats: int = 10,
    layers: Sequence[SynthesisedLayer] = SYNTHESISED,
    candidates: Iterable[tuple[int, int]] | None = None,
    dtype: Dtype = "float32",
    on_phase: Callable[[str], object] = lambda _name: None,
) -> list[GroupMeasurement]:
    """Measurements of ``layers`` in ``candidates`` (all that fit, by default) on a device, ready for the target's log.

    ``on_phase`` hears of each layer and group before it is built.

    Raises DanceError where the device cannot be reached or runs no code for the target, and for groups whose filters
    do not fill its vectors.
    """
    candidates = tuple(candidates or fitting_groups(lanes_of(target, dtype)))
    require_fitting(target, candidates, dtype)
    from dance_tvm.device import open_device

    used = threads or target.threads
    with tempfile.TemporaryDirectory() as folder, open_device(device) as session:
        timed = timed_build(session, target, used, Path(folder), repeats, dtype)

        def measure(layer: SynthesisedLayer, weight: NDArray[np.float32], group: tuple[int, int] | None) -> float:
            on_phase(f"{layer.channels_in}>{layer.channels_out} {'x'.join(map(str, group)) if group else 'dense'}")
            return timed(layer, weight, group)

        return measure_groups(
            measure, fingerprint=target.fingerprint, device=device, threads=used, layers=layers,
            candidates=candidates, rate=rate, dtype=dtype,
        )  # fmt: skip


def timed_build(
    session: DeviceSession, target: Target, threads: int, folder: Path, repeats: int, dtype: Dtype = "float32"
) -> Measure:
    """A ``Measure`` that builds each layer into ``folder`` and takes the median of ``repeats`` runs on ``session``."""
    from dance_tvm.compiler.build import build_network
    from dance_tvm.compiler.pipeline import Options

    # Direct on both sides: a build weighs the groups against Winograd's algorithm layer by layer.
    options = Options(threads=threads, conv="direct", dtype=dtype)

    def measure(layer: SynthesisedLayer, weight: NDArray[np.float32], group: tuple[int, int] | None) -> float:
        network, clip = one_convolution(layer, weight)
        name = f"{'x'.join(map(str, weight.shape))}-{'x'.join(map(str, group or ('dense',)))}"
        built = build_network(
            network,
            folder / name,
            target=target,
            example_inputs=(clip,),
            options=replace(options, kernel_group=group or (1, 1)),
            check=False,
        )
        loaded = session.load(built.artifact)
        tensor = loaded.manifest.inputs[0]
        return statistics.median(loaded.time({tensor.name: clip.numpy()}, repeats))

    return measure


def one_convolution(layer: SynthesisedLayer, weight: NDArray[np.float32]) -> tuple[nn.Module, torch.Tensor]:
    """A network of just the layer, and a clip for it."""
    depth, height, width = layer.kernel
    padding = (depth // 2, height // 2, width // 2)
    conv = nn.Conv3d(layer.channels_in, layer.channels_out, layer.kernel, padding=padding)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(weight))
        conv.get_parameter("bias").zero_()
    clip = torch.randn(1, layer.channels_in, *layer.size, generator=torch.Generator().manual_seed(0))
    return nn.Sequential(conv, nn.ReLU()).eval(), clip
