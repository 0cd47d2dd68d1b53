"""What a network is trained for: classes, or another network's answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dance_tvm.sparsity.clips import Batch


class Task(Protocol):
    """What the outputs are compared with: `loss` a scalar, `score` values of each clip (N,); larger `key` is better.

    Where it `imitates`, the network trains as it is used: without dropout, with the batch norm it came with.
    `probe` is a random mixture of the outputs, each as important as to the loss: the mean square of its gradient says
    how much the outputs change.
    """

    key: str
    imitates: bool

    def loss(self, outputs: Any, batch: Batch) -> Tensor: ...

    def score(self, outputs: Any, batch: Batch) -> dict[str, Tensor]: ...

    def probe(self, outputs: Any) -> Tensor: ...


class Classification:
    """One label a clip; cross-entropy, accuracy 0 to 1."""

    key = "accuracy"
    imitates = False

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(outputs, batch.labels)

    def score(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {
            "accuracy": (outputs.argmax(1) == batch.labels).float(),
            "task": functional.cross_entropy(outputs, batch.labels, reduction="none"),
        }

    def probe(self, outputs: Tensor) -> Tensor:
        return (torch.randn_like(outputs) * outputs).sum()


class Logits(nn.Module):
    """A network whose forward pass ends before its sigmoid: calls `logits` where the network has it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> Any:
        if hasattr(self.network, "logits"):
            return self.network.logits(clips)  # type: ignore[operator]  # a Module's attributes are untyped
        return self.network(clips)


def sequences_of_logits(outputs: Any) -> list[Tensor]:
    """A network's outputs (one tensor, a tuple, or TransNetV2's nested dictionary) as a flat list of tensors."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = [outputs[key] for key in sorted(outputs)]
    return [tensor for part in outputs for tensor in sequences_of_logits(part)]


class Distillation:
    """No labels: the dense network's logits on the same clip are the truth (binary per entry, as TransNetV2's).

    Entries weigh by what the teacher says: those of boundaries together as much as all others together, however few
    they are. Where the network says the same as its teacher there is no loss, so dropout, which would make one, is off;
    and batch norm rests, because a batch is a window or two of one film.
    `agreement` is the share of entries on the same side of probability 0.5 and `difference` the largest difference
    of probability in the clip, both on the first output. `hits`, `extra` and `missed` count boundary frames for F1.
    What the teacher said of a clip is remembered; `varying` training clips, which differ by epoch, are asked anew.
    """

    key = "likeness"
    imitates = True

    def __init__(self, teacher: nn.Module, *, varying: bool = False) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._varying = varying
        self._said: dict[tuple[str, int], list[Tensor]] = {}

    def _truth(self, batch: Batch, split: str) -> list[Tensor]:
        """The teacher's logits, sequence by sequence, (N, …)."""
        keys = [(split, index) for index in batch.index.tolist()]
        if not all(key in self._said for key in keys) or (self._varying and split == "train"):
            with torch.no_grad():
                said = sequences_of_logits(self._teacher.to(batch.clips.device)(batch.clips))
            self._said |= {key: [tensor[place] for tensor in said] for place, key in enumerate(keys)}
        return [torch.stack(tensors) for tensors in zip(*(self._said[key] for key in keys), strict=True)]

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        truth = self._truth(batch, "train")
        ours = sequences_of_logits(outputs)
        return torch.stack([_balanced(mine.float(), true) for mine, true in zip(ours, truth, strict=True)]).sum()

    def score(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        mine = sequences_of_logits(outputs)[0].float().flatten(1).sigmoid()
        true = self._truth(batch, "held out")[0].flatten(1).sigmoid()
        found, real = mine > 0.5, true > 0.5
        return {
            "difference": (mine - true).abs().amax(1),
            "agreement": (found == real).float().mean(1),
            "likeness": 1 - (mine - true).abs().mean(1),
            "hits": (found & real).float().sum(1),
            "extra": (found & ~real).float().sum(1),
            "missed": (~found & real).float().sum(1),
        }

    def probe(self, outputs: Any) -> Tensor:
        sequences = [tensor.float() for tensor in sequences_of_logits(outputs)]
        weights = (_weights(tensor.detach().sigmoid()) for tensor in sequences)
        return torch.stack(
            [
                (torch.randn_like(tensor) * weight.sqrt() * tensor).sum()
                for tensor, weight in zip(sequences, weights, strict=True)
            ]
        ).sum()


def _balanced(ours: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || ours) of binary entries, two logits of one shape; see `Distillation` for their weights."""
    said = teacher.sigmoid()
    distance = functional.binary_cross_entropy_with_logits(ours, said, reduction="none")
    return (
        _weights(said) * (distance - functional.binary_cross_entropy_with_logits(teacher, said, reduction="none"))
    ).sum()


def _weights(said: Tensor) -> Tensor:
    """Weights of entries by the probabilities `said` of them: those of boundaries sum to one, as those of the rest."""
    return said / said.sum().clamp(min=1) + (1 - said) / (1 - said).sum().clamp(min=1)
