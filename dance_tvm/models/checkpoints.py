"""Public checkpoints' tensor names, turned into ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

# Ordered (pattern, replacement) pairs; the first that matches the start of a name renames it.
# A network lists the layouts of its public checkpoints as the class attribute ``checkpoint_rules``.
Rules = tuple[tuple[str, str], ...]


def rename(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` under our names: training wrappers' prefixes (``module.``, ``model.``) dropped, known layouts mapped.

    Names that no rule knows stay as they are, so that a wrong checkpoint is reported by its own names.
    """
    rules: Rules = getattr(model, "checkpoint_rules", ())
    prefix = _common_prefix(state)
    return {_apply(rules, key[len(prefix) :]): value for key, value in state.items()}


def _apply(rules: Rules, key: str) -> str:
    for pattern, replacement in rules:
        changed, count = re.subn("^" + pattern, replacement, key)
        if count:
            return changed
    return key


def _common_prefix(state: Mapping[str, torch.Tensor]) -> str:
    """``module.`` or ``model.`` (nested as often as wanted) where every name carries it."""
    prefix = ""
    while state:
        for wrapper in ("module.", "model."):
            if all(key.startswith(prefix + wrapper) for key in state):
                prefix += wrapper
                break
        else:
            break
    return prefix
