"""The dense network that a pruned one starts from, as its teacher."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from dance_tvm.sparsity.clips import Batch
from dance_tvm.sparsity.method import Context


class Teacher:
    """A copy of `network` as it stands, before anything is inserted into it. What it says of a clip is remembered."""

    def __init__(self, network: nn.Module, context: Context) -> None:
        self._network = copy.deepcopy(network).eval().requires_grad_(False).to(context.device)
        self._said: dict[int, Tensor] = {}
        self._clips_vary = hasattr(context.train, "set_epoch")

    def distance(self, outputs: Tensor, batch: Batch) -> Tensor:
        """KL(teacher || pruned), the mean over the batch; `outputs` (N, classes) are the pruned network's scores."""
        indices = batch.index.tolist()
        if self._clips_vary or not all(index in self._said for index in indices):
            with torch.no_grad():
                said = self._network(batch.clips).float().log_softmax(1)
            self._said |= dict(zip(indices, said, strict=True))
        truth = torch.stack([self._said[index] for index in indices])
        return functional.kl_div(outputs.float().log_softmax(1), truth, reduction="batchmean", log_target=True)
