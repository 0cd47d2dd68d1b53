"""Trained DANCE networks: from the file that training wrote, or the one in this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx, nn

from dance_tvm import models
from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity import checkpoint
from dance_tvm.sparsity.dance.method import prune
from dance_tvm.sparsity.units import SiteUnits

SHIPPED = Path(models.__file__).parent / "weights" / "dance-c3d-mini.safetensors"


def load(path: Path) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The network of a model.safetensors that `--method aap` wrote, in evaluation mode, and its card.

    Raises DanceError when the file is missing, unreadable, or of another method.
    """
    tensors, card = checkpoint.read_checkpoint(path)
    if "dance" not in card:
        method = card.get("settings", {}).get("method", "unknown")
        raise DanceError(f"{path} was trained by --method {method}, not aap: it holds no controller to load")
    form = card["dance"] | {"units": [SiteUnits.model_validate(unit) for unit in card["dance"].get("units", ())]}
    network = prune(dense(card), tuple(card["clip_shape"]), **form)
    checkpoint.load_weights(network, checkpoint.without_prefix("network", tensors), path)
    return network.eval(), card


def dense(card: dict[str, Any]) -> nn.Module:
    """The network that a card's run started from, with fresh weights."""
    name, channels = card["settings"]["model"], card["clip_shape"][0]
    given = {} if channels == models.entry(name).input_shape[0] else {"in_channels": channels}
    return models.create(name, num_classes=len(card["classes"]), **given)


def dance_c3d_mini(num_classes: int = 8) -> nn.Module:
    """c3d-mini pruned by DANCE and trained on motion digits: scores (N, 8) of clips (N, 1, 16, 32, 32) of 0 to 1."""
    network, card = load(SHIPPED)
    if num_classes != len(card["classes"]):
        raise DanceError(
            f"dance-c3d-mini knows {len(card['classes'])} motions, not {num_classes}: leave the number out"
        )
    return network
