"""How far a pruned TransNetV2 agrees with the published one on frames that no training has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from dance_tvm import models
from dance_tvm.models import transnetv2
from dance_tvm.sparsity import checkpoint
from dance_tvm.sparsity.dance.method import prune
from dance_tvm.sparsity.data import load_data
from dance_tvm.sparsity.tasks import Logits, sequences_of_logits
from dance_tvm.sparsity.units import SiteUnits


@dataclass(frozen=True)
class Agreement:
    """Boundaries found at the very same frames, and how far probabilities differ."""

    f1: float
    found: int
    boundaries: int
    extra: int
    largest: float
    mean: float

    #: Heads of `cells`.
    HEAD = ("F1 of boundaries", "boundaries found", "extra", "largest difference of probability", "mean")

    def cells(self) -> tuple[str, ...]:
        """The figures as a table tells them."""
        return (
            f"{self.f1:.3f}", f"{self.found} of {self.boundaries}", str(self.extra), f"{self.largest:.3f}",
            f"{self.mean:.4f}",
        )  # fmt: skip


class Judge:
    """The published network's answers on the held-out windows (W, T, 27, 48, 3) of `data`."""

    def __init__(self, data: str) -> None:
        held_out = load_data(data).held_out
        self.windows = torch.stack([held_out[index][0] for index in range(len(held_out))])
        self._truth = self._probabilities(Logits(models.pretrained("transnetv2")).eval())

    @property
    def frames(self) -> int:
        """How many frames are compared."""
        return self._truth.size

    def __call__(self, network: nn.Module, watch: Callable[[], object] = lambda: None) -> Agreement:
        """What `network`, which gives logits, agrees on; `watch` is called after each window."""
        said = self._probabilities(network, watch)
        real, ours = (set(transnetv2.boundaries(part)) for part in (self._truth, said))
        difference = np.abs(said - self._truth)
        f1 = 2 * len(real & ours) / max(1, len(real) + len(ours))
        return Agreement(
            f1, len(real & ours), len(real), len(ours - real), float(difference.max()), float(difference.mean())
        )

    @torch.no_grad()
    def _probabilities(self, network: nn.Module, watch: Callable[[], object] = lambda: None) -> np.ndarray:
        """The single-frame probability of each frame of all windows, flat."""
        said: list[np.ndarray] = []
        for window in self.windows:
            said.append(sequences_of_logits(network(window[None]))[0].sigmoid().flatten().numpy())
            watch()
        return np.concatenate(said)


def pruned_transnet(path: Path) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The network that training wrote to ``path``, which gives logits, and its card."""
    tensors, card = checkpoint.read_checkpoint(path)
    form = card["dance"] | {"units": [SiteUnits.model_validate(unit) for unit in card["dance"].get("units", ())]}
    network = prune(Logits(models.create("transnetv2")), tuple(card["clip_shape"]), **form)
    checkpoint.load_weights(network, checkpoint.without_prefix("network", tensors), path)
    return network.eval(), card
