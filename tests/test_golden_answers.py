"""Answers to the bit, by target: a change of any of them shows, be it of a kernel, of tiles, of weights or of the order
of sums. What such a change does on purpose is written anew by `--refresh-golden`.

Nothing of this machine enters: targets are fixed ones, so that equal processors of other machines answer the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dance_tvm import Options, build_network, open_device
from dance_tvm.machines.host import cpu_flags
from dance_tvm.machines.target import Target, load_target

GOLDEN = Path(__file__).parent / "golden" / "answers.json"
CLIP = (1, 3, 4, 14, 14)


class Branches(nn.Module):
    """Networks of several kinds beside each other, each with an output: masks known in the call, kernel groups,
    Winograd's transform, depthwise under a gate, attention, a transposed convolution and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, 3, padding=1)
        self.masked = nn.Conv3d(16, 16, 3, padding=1)
        self.grouped = nn.Conv3d(16, 16, 3, padding=1)
        with torch.no_grad():  # each four filters leave out the same columns
            kept = torch.ones(4, 4, 16, 3, 3, 3)
            kept[:, :, :, :] *= (torch.rand(4, 1, 16, 3, 3, 3) < 0.4).float()
            self.grouped.weight.mul_(kept.reshape(16, 16, 3, 3, 3))
        self.depthwise = nn.Conv3d(16, 16, 3, padding=1, groups=16)
        self.gate = nn.Conv3d(16, 16, 1)
        self.norm = nn.BatchNorm3d(16)
        self.enlarge = nn.ConvTranspose3d(16, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.score = nn.Linear(16, 10)

    def forward(self, clip: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = torch.relu(self.stem(clip))
        alive = (clip.mean((1, 3, 4), keepdim=True) > 0).float()
        masked = self.masked(x * alive)
        gated = self.norm(self.depthwise(x)) * torch.sigmoid(self.gate(x.mean((2, 3, 4), keepdim=True)))
        words = nn.functional.max_pool3d(x, 2).flatten(2).transpose(1, 2)
        attended = self.attention(words, words, words, need_weights=False)[0]
        return (
            masked,
            self.grouped(x),
            nn.functional.silu(gated),
            self.enlarge(gated),
            attended,
            torch.softmax(self.score(nn.functional.gelu(masked).mean((2, 3, 4))), 1),
        )


def x86(mcpu: str, floats: int, registers: int) -> Target:
    """A processor of x86-64 with fixed facts and no tuning records."""
    board = load_target("aarch64-linux")
    cluster = board.clusters[0].model_copy(update={"mcpu": mcpu})
    return board.model_copy(
        update={
            "name": f"x86-64 {mcpu}",
            "tvm": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu},
            "link": board.link.model_copy(update={"machine": "x86_64", "page_size": 4096, "needed": []}),
            "clusters": [cluster],
            "vector": board.vector.model_copy(update={"floats": floats, "registers": registers, "fp16": False}),
            "tuning_log": "none",
        }
    )


def targets() -> dict[str, Target]:
    """By their key in the file."""
    return {
        "x86-64 AVX2": x86("haswell", 8, 16),
        "x86-64 AVX-512": x86("skylake-avx512", 16, 32),
        "aarch64": load_target("aarch64-linux").model_copy(update={"tuning_log": "none"}),
    }


def digests(target: Target, device: str, folder: Path) -> dict[str, str]:
    """SHA-256 of each output, by its number; -0 counts as 0."""
    torch.manual_seed(20)
    network = Branches().eval()
    options = Options(threads=1, conv="auto")
    built = build_network(
        network, folder, example_inputs=(torch.zeros(CLIP),), target=target, threads=1, check=False, options=options
    )
    clip = np.random.default_rng(21).random(CLIP, "float32") - np.float32(0.5)
    with open_device(device) as opened:
        found = opened.load(built.artifact).run({built.artifact.manifest.inputs[0].name: clip})
    return {str(at): hashlib.sha256((found[name] + 0.0).tobytes()).hexdigest() for at, name in enumerate(found)}


@pytest.mark.parametrize("key", ["x86-64 AVX2", "x86-64 AVX-512", pytest.param("aarch64", marks=pytest.mark.device)])
def test_answers_are_the_same_to_the_bit(key: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    target, device = targets()[key], "local"
    if key == "aarch64":
        device = request.getfixturevalue("emulator").tracker
    else:
        wanted = {"haswell": {"avx2", "fma"}, "skylake-avx512": {"avx512f", "avx512vl"}}[target.tvm["mcpu"]]
        if missing := wanted - cpu_flags():
            pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    found = digests(target, device, tmp_path / "network")
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--refresh-golden"):
        GOLDEN.write_text(json.dumps({**kept, key: found}, indent=1, sort_keys=True) + "\n")
    else:
        assert found == kept[key], (
            "answers changed: if that is meant, pytest tests/test_golden_answers.py --refresh-golden"
        )
