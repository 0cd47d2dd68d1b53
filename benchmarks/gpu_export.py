"""Layers for a GPU machine that has no TVM: artifacts with their weights, and a script that checks and times them.

`python -m benchmarks.gpu --export FOLDER --arch sm_90` writes them; :mod:`.gpu_layers` is the script.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dance_tvm import DanceError, Options, build_network
from dance_tvm.artifact.interface import dance_model
from dance_tvm.machines.target import Target, load_target

from .gpu_layers import weight_of
from .kernels import C3D, R2PLUS1D, Layer

#: What any machine with such a GPU has: this machine's processor may have more.
HOST = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"}
SCRIPT = Path(__file__).with_name("gpu_layers.py")
DENSITY = 0.5


@dataclass(frozen=True)
class Exported:
    """A layer, and what thins it: a mask of ``positions`` or ``channels``, or zeros in groups of so many filters."""

    layer: Layer
    masked: str = ""
    groups_of: int = 0

    @property
    def name(self) -> str:
        """Network's name of the layer, and what thins it."""
        groups = f"groups of {self.groups_of} filters" if self.groups_of else ""
        return ", ".join(filter(None, [self.layer.name, self.masked, groups]))

    @property
    def facts(self) -> dict[str, object]:
        """What the script is told."""
        one = self.layer
        sizes = {"channels_in": one.channels_in, "channels_out": one.channels_out, "kernel": one.kernel}
        sizes |= {"stride": one.stride, "padding": one.window.padding}
        file = self.name.replace(", ", "-").replace(" ", "_") + ".zip"
        thinned = {"masked": self.masked, "groups_of": self.groups_of, "density": DENSITY if self.masked else 1.0}
        return {"name": self.name, "file": file, **sizes, **thinned}


class OneLayer(nn.Module):
    """The convolution and its ReLU, of whole numbers."""

    def __init__(self, what: Exported, weight: torch.Tensor) -> None:
        super().__init__()
        one, self.masked = what.layer, what.masked
        sizes = (one.channels_in, one.channels_out, one.kernel, one.stride, one.window.padding)
        self.conv = nn.Conv3d(*sizes, bias=False)
        self.conv.weight.data = weight

    def forward(self, clip: torch.Tensor, score: torch.Tensor | None = None) -> torch.Tensor:
        mask = None if score is None else (score > 0).float()
        if mask is not None and self.masked == "channels":
            clip = clip * mask
        found = torch.relu(self.conv(clip))
        return found * mask if mask is not None and self.masked == "positions" else found


def all_layers() -> list[Exported]:
    """Every layer dense, and one thinned in each way."""
    some = C3D[3]
    thinned = [Exported(some, masked) for masked in ("positions", "channels")]
    return [*map(Exported, [*C3D, *R2PLUS1D]), *thinned, *(Exported(some, "", filters) for filters in (8, 16, 32))]


def target_of(arch: str) -> Target:
    """NVIDIA GPUs of ``arch`` or newer, whatever GPU and processor are here."""
    cuda = load_target("cuda")
    return cuda.model_copy(update={"tvm": {**cuda.tvm, "arch": arch}, "host": HOST, "name": f"cuda-{arch}"})


def export(folder: Path, target: Target, layers: list[Exported]) -> int:
    """Write layers and script; gives the bytes that they take. Layers that cannot be built are told and left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for script in (SCRIPT, Path(dance_model.__file__)):
        shutil.copy(script, folder / script.name)
    written = []
    for each in layers:
        with tempfile.TemporaryDirectory() as name:
            try:
                path = _built(each, target, Path(name) / "layer")
            except DanceError as error:
                print(f"{each.name} is left out: {error}")
                continue
            with zipfile.ZipFile(folder / str(each.facts["file"]), "w", zipfile.ZIP_DEFLATED) as packed:
                for file in sorted(path.iterdir()):
                    packed.write(file, file.name)
        written.append(each)
    (folder / "layers.json").write_text(json.dumps([each.facts for each in written], indent=1) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())


def _built(what: Exported, target: Target, out: Path) -> Path:
    one = what.layer
    clip = torch.zeros(1, one.channels_in, *one.size)
    scores = {"positions": (1, 1, 1, *one.window.out[1:]), "channels": (1, one.channels_in, 1, 1, 1)}
    given = (clip, torch.zeros(scores[what.masked])) if what.masked else (clip,)
    network = OneLayer(what, weight_of(what.facts)).eval()
    options = Options(kernel_group=(what.groups_of, 1) if what.groups_of else None)
    built = build_network(network, out, target=target, example_inputs=given, options=options, check=False)
    return built.artifact.path
