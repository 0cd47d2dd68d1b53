"""Networks of the zoo: created by name, weights seeded or from public checkpoints."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dance_tvm.core.errors import DanceError
from dance_tvm.models.registry import ModelEntry, entry


def create(name: str, *, num_classes: int | None = None, seed: int = 0, **options: Any) -> nn.Module:
    """A network in evaluation mode whose weights depend only on ``seed``.

    ``num_classes`` defaults to the published network's; ``options`` go to the network's constructor.
    Raises DanceError for an unknown name.
    """
    found = entry(name)
    factory: Callable[..., nn.Module] = _resolve(found.factory)
    classes = found.num_classes if num_classes is None else num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(num_classes=classes, **{**found.options, **options}).eval()


def pretrained(name: str, **options: Any) -> nn.Module:
    """The network with its published weights, fetched on first use, in evaluation mode.

    Raises DanceError where no weights are published in a place that needs no account (``entry(name).pretrained``
    is None) or where they cannot be fetched.
    """
    found = entry(name)
    if found.pretrained is None:
        raise DanceError(f"{name} has no published weights that can be fetched: give a checkpoint with --weights")
    model = create(name, **options)
    load_state(model, _resolve(found.pretrained)())
    return model


def published_video(found: ModelEntry | None) -> Callable[[], Path] | None:
    """What fetches the video that was published with the network, and gives its path."""
    return _resolve(found.video) if found and found.video else None


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
    if problems := misfits(missing, unexpected, wrong):
        raise DanceError(f"the weights do not fit {type(model).__name__}: {problems}")
    model.load_state_dict(dict(state), strict=False)


def misfits(missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str]) -> str:
    """Which weights do not fit, the first of each kind by name; empty where all do."""
    return "; ".join(
        f"{kind}: {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if keys
    )
