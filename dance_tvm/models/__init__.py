"""The networks this project compiles, in plain PyTorch: created by name, weights seeded or from public checkpoints."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dance_tvm.core.errors import DanceError


@dataclass(frozen=True)
class ModelEntry:
    """How to build one network: ``factory`` is ``module:function``, called with ``num_classes`` and further options.

    ``input_shape`` is one sample without the batch axis: (C, T, H, W) for clips, (T, H, W, C) for TransNetV2.
    ``outputs`` are the name and the meaning of each result; ``pretrained`` is ``module:function`` that returns the
    published state dict.
    """

    factory: str
    input_shape: tuple[int, ...]
    description: str
    num_classes: int = 400
    dtype: torch.dtype = torch.float32
    pretrained: str | None = None
    input_meaning: str = "clips (N, C, T, H, W), normalised as in training"
    outputs: tuple[tuple[str, str], ...] = (("scores", "class scores (N, classes), before softmax"),)


_REGISTRY: dict[str, ModelEntry] = {
    "c3d": ModelEntry("dance_tvm.models.c3d:C3D", (3, 16, 112, 112), "C3D, eight 3x3x3 convolutions", 487),
    "c3d-mini": ModelEntry("dance_tvm.models.c3d:C3DMini", (1, 16, 32, 32), "C3D's plan at a tenth of its width", 10),
    "dance-c3d-mini": ModelEntry(
        "dance_tvm.sparsity.dance.trained:dance_c3d_mini",
        (1, 16, 32, 32),
        "c3d-mini pruned for each clip by DANCE, trained on motion digits",
        8,
        input_meaning="clips (N, 1, T, H, W) of motion digits, values 0 to 1",
    ),
    "r2plus1d-18": ModelEntry(
        "dance_tvm.models.r2plus1d:r2plus1d_18", (3, 16, 112, 112), "R(2+1)D-18, residual, 1x3x3 then 3x1x1"
    ),
    "r2plus1d-mini": ModelEntry(
        "dance_tvm.models.r2plus1d:r2plus1d_mini", (1, 16, 32, 32), "R(2+1)D with one narrow block a stage", 10
    ),
    "s3d": ModelEntry("dance_tvm.models.s3d:S3D", (3, 16, 112, 112), "S3D, separable Inception"),
    "transnetv2": ModelEntry(
        "dance_tvm.models.transnetv2:TransNetV2",
        (100, 27, 48, 3),
        "TransNetV2, shot boundaries, published weights",
        1,
        torch.uint8,
        "dance_tvm.models.transnetv2:published_state",
        "frames (N, T, 27, 48, RGB), bytes",
        (
            ("single_frame", "probability (N, T) that a shot ends at the frame"),
            ("all_frames", "probability (N, T) that the frame is part of a transition"),
        ),
    ),
    "resnet18-tsn": ModelEntry(
        "dance_tvm.models.resnet:resnet18", (3, 8, 224, 224), "ResNet-18 on 8 frames, scores averaged (TSN)"
    ),
    "resnet18-tsm": ModelEntry(
        "dance_tvm.models.resnet:resnet18_tsm", (3, 8, 224, 224), "ResNet-18 with temporal shift (TSM)"
    ),
    "resnet18-tsm-online": ModelEntry(
        "dance_tvm.models.resnet:resnet18_tsm_online", (3, 8, 224, 224), "ResNet-18, shift from the past only"
    ),
    "resnet50-tsn": ModelEntry(
        "dance_tvm.models.resnet:resnet50", (3, 8, 224, 224), "ResNet-50 on 8 frames, scores averaged (TSN)"
    ),
    "resnet50-tsm": ModelEntry(
        "dance_tvm.models.resnet:resnet50_tsm", (3, 8, 224, 224), "ResNet-50 with temporal shift (TSM)"
    ),
    "resnet50-tsm-online": ModelEntry(
        "dance_tvm.models.resnet:resnet50_tsm_online", (3, 8, 224, 224), "ResNet-50, shift from the past only"
    ),
    "resnet-mini": ModelEntry(
        "dance_tvm.models.resnet:resnet_mini", (1, 8, 32, 32), "ResNet for small clips, shift from the past only", 8
    ),
    "resnet-mini-tsn": ModelEntry(
        "dance_tvm.models.resnet:resnet_mini_tsn", (1, 8, 32, 32), "ResNet for small clips, scores averaged", 8
    ),
    "resnet-mini-tsm": ModelEntry(
        "dance_tvm.models.resnet:resnet_mini_tsm", (1, 8, 32, 32), "ResNet for small clips, shift both ways", 8
    ),
}


def register(name: str, entry: ModelEntry) -> None:
    """Add a network to the zoo, or replace one."""
    _REGISTRY[name] = entry


def names() -> list[str]:
    """The names that ``create`` takes."""
    return sorted(_REGISTRY)


def entry(name: str) -> ModelEntry:
    """The registry's entry for ``name``. Raises DanceError, suggesting the nearest name, where there is none."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names())}."
        raise DanceError(f"There is no network called {name!r}: {hint}")
    return _REGISTRY[name]


def create(name: str, *, num_classes: int | None = None, seed: int = 0, **options: Any) -> nn.Module:
    """A network in evaluation mode whose weights depend on ``seed`` alone.

    ``num_classes`` defaults to the published network's; ``options`` go to the network's constructor.
    Raises DanceError for an unknown name.
    """
    found = entry(name)
    factory: Callable[..., nn.Module] = _resolve(found.factory)
    classes = found.num_classes if num_classes is None else num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(num_classes=classes, **options).eval()


def pretrained(name: str, **options: Any) -> nn.Module:
    """The network with its published weights, fetched on first use, in evaluation mode.

    Raises DanceError where no weights are published in a place that needs no account (``entry(name).pretrained``
    is None) or where they cannot be fetched.
    """
    found = entry(name)
    if found.pretrained is None:
        raise DanceError(f"{name} has no published weights that can be fetched: give a checkpoint with --weights.")
    model = create(name, **options)
    load_state(model, _resolve(found.pretrained)())
    return model


def options_for(name: str, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The ``num_classes`` and ``in_channels`` that make the network fit ``state``, where its own do not."""
    from dance_tvm.models.checkpoints import rename

    with torch.device("meta"):
        model = create(name)
    own, state = model.state_dict(), rename(model, state)
    first, last = next(iter(own)), list(own)[-1]
    options = {}
    if last in state and state[last].ndim == 1 and state[last].shape != own[last].shape:
        options["num_classes"] = state[last].shape[0]
    if first in state and state[first].ndim == own[first].ndim and state[first].shape[1] != own[first].shape[1]:
        options["in_channels"] = state[first].shape[1]
    return options


def _resolve(where: str) -> Any:
    module, function = where.split(":")
    return getattr(importlib.import_module(module), function)


def example_inputs(name: str, *, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random input of the right shape and dtype: normal floats, or bytes 0..255 where the network takes pixels."""
    found = entry(name)
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *found.input_shape)
    if found.dtype == torch.uint8:
        return (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),)
    return (torch.randn(shape, generator=generator),)


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load ``state``, whose names may be ours or those of a public checkpoint of the same network.

    Raises DanceError that lists missing and unexpected tensors, or tensors of another shape.
    """
    from dance_tvm.models.checkpoints import rename

    own = model.state_dict()
    state = rename(model, state)
    # BatchNorm's step counter never enters inference and older checkpoints lack it.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    wrong = [
        f"{key} is {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    problems = [
        f"{kind}: {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if keys
    ]
    if problems:
        raise DanceError(f"The weights do not fit {type(model).__name__}: {'; '.join(problems)}.")
    model.load_state_dict(dict(state), strict=False)
