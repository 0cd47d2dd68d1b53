"""Clips to train on, in batches: tensors (C, T, H, W) of float32 with their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """clips (N, C, T, H, W) float32; labels (N,) int64, or what the data's task takes; index (N,) of each clip."""

    clips: Tensor
    labels: Tensor
    index: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in (self.clips, self.labels, self.index)))


class Clips(Protocol):
    """A data set of clips: `clips[i]` is (clip (C, T, H, W) float32, label), the same for the same i every time.

    `classes` names the labels; `shape` is (C, T, H, W). Training sets that augment have `set_epoch(epoch)`.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]: ...


@dataclass(frozen=True)
class Splits:
    """What `--data` names. `task` is "classification" (labels are class numbers) or "distillation" (none)."""

    name: str
    train: Clips
    held_out: Clips
    task: str = "classification"
