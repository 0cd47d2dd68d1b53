"""Which clips a process takes in which order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from dance_tvm.sparsity.clips import Clips


class ShuffledByEpoch(Sampler[int]):
    """A permutation that (seed, epoch) settles."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed, self._epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._count)
        return iter(order.tolist())


class Indexed(torch.utils.data.Dataset[tuple[Tensor, Any, int]]):
    """Clips with their index, so that a batch knows which clips it holds."""

    def __init__(self, clips: Clips) -> None:
        self._clips = clips

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        clip, label = self._clips[index]
        return clip, label, index
