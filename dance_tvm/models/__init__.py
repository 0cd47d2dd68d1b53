"""The networks this project compiles, in plain PyTorch: created by name, weights seeded or from public checkpoints.

Only their names are known without PyTorch, which is loaded by the first function that makes or fills a network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dance_tvm.models.registry import ModelEntry, entry, names, register

if TYPE_CHECKING:
    from dance_tvm.models.networks import (
        create,
        example_inputs,
        load_state,
        misfits,
        options_for,
        pretrained,
        published_video,
    )

__all__ = [
    "ModelEntry", "create", "entry", "example_inputs", "load_state", "misfits", "names", "options_for", "pretrained",
    "published_video", "register",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("dance_tvm.models.networks"), name)
