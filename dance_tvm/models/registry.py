"""The names of the zoo and what stands behind each, known without loading PyTorch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dance_tvm.core.errors import DanceError

if TYPE_CHECKING:
    import torch


#: Files that networks are read from.
NETWORK_FILES = (".pt2", ".onnx")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")


@dataclass(frozen=True)
class ModelEntry:
    """How to build one network: ``factory`` is ``module:function``, called with ``num_classes`` and ``options``.

    ``input_shape`` is one sample without the batch axis: (C, T, H, W) for clips, (T, H, W, C) for TransNetV2.
    ``outputs`` are the name and the meaning of each result; ``pretrained`` is ``module:function`` that returns the
    published state dict, ``video`` one that gives the path of a published video; ``input_range``: the input's least and
    greatest value where they are known; ``trained``: the factory itself gives trained weights. ``preprocess`` are the
    fields of :class:`dance_tvm.artifact.preprocess.Preprocess` by which frames of a video become the input.
    """

    factory: str
    input_shape: tuple[int, ...]
    description: str
    num_classes: int = 400
    dtype_name: str = "float32"
    pretrained: str | None = None
    input_meaning: str = "clips (N, C, T, H, W), normalised as in training"
    outputs: tuple[tuple[str, str], ...] = (("scores", "class scores (N, classes), before softmax"),)
    trained: bool = False
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    input_range: tuple[float, float] | None = None
    video: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the input's elements."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype_name)
        return found


#: The DANCE supplement (section 10), as `dance_tvm.sparsity.video` has it: every fourth frame, the middle of 128 x 171.
_CLIPS = {"resize": (128, 171), "every": 4}
_PIXELS = {**_CLIPS, "divisor": 1.0}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}

_REGISTRY: dict[str, ModelEntry] = {
    "c3d": ModelEntry(
        "dance_tvm.models.c3d:C3D",
        (3, 16, 112, 112),
        "C3D, eight 3x3x3 convolutions",
        487,
        preprocess=_PIXELS,
    ),
    "c3d-mini": ModelEntry("dance_tvm.models.c3d:C3DMini", (1, 16, 32, 32), "C3D's plan at a tenth of its width", 10),
    "dance-c3d-mini": ModelEntry(
        "dance_tvm.sparsity.dance.trained:dance_c3d_mini",
        (1, 16, 32, 32),
        "c3d-mini pruned for each clip by DANCE, trained on motion digits",
        8,
        input_meaning="clips (N, 1, T, H, W) of motion digits, values 0 to 1",
        input_range=(0.0, 1.0),
        trained=True,
    ),
    "r2plus1d-18": ModelEntry(
        "dance_tvm.models.r2plus1d:r2plus1d_18",
        (3, 16, 112, 112),
        "R(2+1)D-18, residual, 1x3x3 then 3x1x1",
        preprocess={**_CLIPS, **_IMAGENET},
    ),
    "r2plus1d-mini": ModelEntry(
        "dance_tvm.models.r2plus1d:r2plus1d_mini", (1, 16, 32, 32), "R(2+1)D with one narrow block a stage", 10
    ),
    "s3d": ModelEntry(
        "dance_tvm.models.s3d:S3D",
        (3, 16, 112, 112),
        "S3D, separable Inception",
        preprocess={**_CLIPS, **_IMAGENET},
    ),
    "transnetv2": ModelEntry(
        "dance_tvm.models.transnetv2:TransNetV2",
        (100, 27, 48, 3),
        "TransNetV2, shot boundaries, published weights",
        1,
        "uint8",
        "dance_tvm.models.transnetv2:published_state",
        "frames (N, T, 27, 48, RGB), bytes",
        (
            ("single_frame", "probability (N, T) that a shot ends at the frame"),
            ("all_frames", "probability (N, T) that the frame is part of a transition"),
        ),
        preprocess={"divisor": 1.0},
        video="dance_tvm.models.transnetv2:clip_path",
    ),
}
#: What the frames of a ResNet know of one another, by the end of its name.
_TEMPORAL = {
    "tsn": "scores averaged (TSN)",
    "tsm": "channels shifting both ways in time (TSM)",
    "tsm-online": "channels shifting from the past only",
}
for _temporal, _said in _TEMPORAL.items():
    for _depth in (18, 50):
        _REGISTRY[f"resnet{_depth}-{_temporal}"] = ModelEntry(
            f"dance_tvm.models.resnet:resnet{_depth}",
            (3, 8, 224, 224),
            f"ResNet-{_depth} on 8 frames, {_said}",
            options={"temporal": _temporal},
            preprocess=_IMAGENET,
        )
    _REGISTRY["resnet-mini" if _temporal == "tsm-online" else f"resnet-mini-{_temporal}"] = ModelEntry(
        "dance_tvm.models.resnet:resnet_mini",
        (1, 8, 32, 32),
        f"ResNet for small clips, {_said}",
        8,
        options={"temporal": _temporal},
    )


def register(name: str, entry: ModelEntry) -> None:
    """Add a network to the zoo, or replace one."""
    _REGISTRY[name] = entry


def names() -> list[str]:
    """The names that ``create`` takes."""
    return sorted(_REGISTRY)


def entry(name: str) -> ModelEntry:
    """The registry's entry for ``name``. Raises DanceError, suggesting the nearest name, where there is none."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names())}"
        raise DanceError(f"there is no network called {name!r}: {hint}")
    return _REGISTRY[name]


def require_source(model: str) -> None:
    """Raise DanceError unless ``model`` is a file of a kind that networks are read from, or a name of the zoo; what the
    file holds is its reader's."""
    path = Path(model)
    if path.suffix in _PICKLES:
        raise DanceError(
            f"{path} holds weights or pickled code, not a network: give a .pt2 or .onnx file, or a network's name "
            "with --weights"
        )
    if path.is_dir() and model not in _REGISTRY:
        raise DanceError(f"{path} is a folder, not a model file: give a .pt2 or an .onnx file, or a network's name")
    is_path = path.suffix in NETWORK_FILES or (path.suffix and path.parent != Path("."))
    if is_path and not path.is_file():
        raise DanceError(f"there is no model file {path}: check the path")
    if path.is_file() and path.suffix not in NETWORK_FILES:
        raise DanceError(f"{path} is not a model file of a known kind: give a .pt2 or an .onnx file")
    if path.suffix not in NETWORK_FILES:
        entry(model)
