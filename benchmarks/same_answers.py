"""Does an artifact answer as TVM's virtual machine does, to the bit, on networks of every kind?

    python -m benchmarks.same_answers

Each network is built, and its lowered module compiled once more by TVM alone for its virtual machine. Random inputs and
zeros go through both, and hashes of the answers are compared. `benchmarks/results/same_answers.json` holds those of
artifacts that the virtual machine ran itself, with the kernels of then.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tvm
import typer
from torch import nn
from tvm import relax

from benchmarks.random_policies import Mix, example_clip, with_mix
from dance_tvm import DanceError, Options, build_network, import_model, open_device
from dance_tvm.compiler.pipeline import lower
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.machines.target import load_target
from dance_tvm.models.networks import create, example_inputs
from dance_tvm.models.resnet import BasicBlock, VideoResNet
from dance_tvm.sparsity.dstep.network import DStepOptions, Stream
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate

KEPT = Path(__file__).with_name("results") / "same_answers.json"
Given = tuple[nn.Module, tuple[torch.Tensor, ...]]


class Bottlenecks(nn.Module):
    """X3D's blocks: narrow, depthwise over frames and positions, squeezed and excited, wide again."""

    def __init__(self, width: int = 24, inner: int = 54) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, width, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
        self.narrow, self.wide = nn.Conv3d(width, inner, 1, bias=False), nn.Conv3d(inner, width, 1, bias=False)
        self.depthwise = nn.Conv3d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm3d(inner), nn.BatchNorm3d(inner), nn.BatchNorm3d(width)])
        self.squeeze, self.excite = nn.Conv3d(inner, 8, 1), nn.Conv3d(8, inner, 1)
        self.scores = nn.Linear(width, 10)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        stem = self.stem(clip)
        x = self.norms[1](self.depthwise(torch.relu(self.norms[0](self.narrow(stem)))))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3, 4), keepdim=True)))))
        x = stem + self.norms[2](self.wide(nn.functional.silu(x)))
        return self.scores(torch.relu(x).mean((2, 3, 4)))


def _zoo(name: str) -> Given:
    return create(name), example_inputs(name)


def _pruned() -> Given:
    network, (clip,) = _zoo("c3d-mini")
    prune_to_rate(network, (clip,), "kgs", 2.5, 8, 4)
    return network, (clip,)


def _stream() -> Given:
    torch.manual_seed(0)
    base = VideoResNet(BasicBlock, (1, 1), temporal="tsm-online", num_classes=4, in_channels=1, width=16, stem="small")
    clip = example_clip((1, 4, 16, 16), seed=2)
    thinned = with_mix(base.eval(), clip, Mix(0.5, 0.5, 0.2), options=DStepOptions(tile=(3, 3), hidden=8), seed=1)
    streaming = Stream(thinned, (1, 16, 16)).eval()
    return streaming, (clip[:, :, 0], *streaming.start())


def _bottlenecks() -> Given:
    torch.manual_seed(0)
    return Bottlenecks().eval(), (torch.randn(1, 3, 8, 32, 32),)


NETWORKS: dict[str, Callable[[], Given]] = {
    "C3D at a tenth of its width": lambda: _zoo("c3d-mini"),
    "the same under DANCE's masks": lambda: _zoo("dance-c3d-mini"),
    "the same pruned by kernel groups": _pruned,
    "a D-STEP stream": _stream,
    "X3D's blocks": _bottlenecks,
}


def digests(name: str, threads: int) -> tuple[str, str]:
    """Of what the artifact answers, and of what the virtual machine does."""
    network, example = NETWORKS[name]()
    imported, target, options = (
        import_model(network, example_inputs=example),
        load_target("host"),
        Options(threads=threads),
    )
    tried = [random_inputs(imported.inputs, seed) for seed in range(3)]
    tried.append({each.name: np.zeros(each.shape, each.dtype) for each in imported.inputs})
    with tempfile.TemporaryDirectory() as folder, open_device("local") as device:
        built = build_network(imported, Path(folder) / "artifact", options=options, check=False)
        network_here = device.load(built.artifact)
        found = [list(network_here.run(arrays).values()) for arrays in tried]
    lowered = lower(imported.mod, target, options)
    machine = relax.VirtualMachine(tvm.compile(lowered.mod, target.tvm_target(threads)), tvm.cpu())
    weights = [tvm.runtime.tensor(array) for array in lowered.weights.values()]
    told = [_flat(machine["main"](*map(tvm.runtime.tensor, arrays.values()), *weights)) for arrays in tried]
    return _digest(found), _digest(told)


def _flat(answer: tvm.runtime.Tensor | list[tvm.runtime.Tensor]) -> list[np.ndarray]:
    return [each.numpy() for each in ([answer] if isinstance(answer, tvm.runtime.Tensor) else answer)]


def _digest(answers: list[list[np.ndarray]]) -> str:
    hashed = hashlib.sha256()
    for arrays in answers:
        for array in arrays:
            hashed.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()


def main(threads: int = 2, keep: bool = False) -> None:
    """Compare; with --keep, write the hashes down."""
    found: dict[str, str] = {}
    for name in NETWORKS:
        found[name], machine = digests(name, threads)
        if found[name] != machine:
            raise DanceError(f"{name}: the artifact and TVM's virtual machine answer differently")
        print(f"{name}: equal to the bit")
    if keep:
        KEPT.write_text(json.dumps({"host": load_target("host").fingerprint, **found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
