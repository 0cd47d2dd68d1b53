"""What a pruning method adds to ordinary training.

A *method* is one class that says what it adds to ordinary training. `dance-tvm train --method NAME` imports it
lazily by the name in `options.METHODS`. Everything else is the framework's: data, task loss, schedule, mixed precision,
several processes, curves, checkpoints and resuming.

    class Thinning(Method):                              # dance_tvm/sparsity/thinning/method.py, Thinning in METHODS
        name = "thinning"
        Options = ThinningOptions                        # its settings, in options.py, which loads no PyTorch
        options: ThinningOptions
        def prepare(self, network, context): ...         # once, before the optimizer: wrap, insert masks, freeze
        def parameters(self, network): ...               # what is trained (parameters or optimizer groups)
        def epoch_started(self, network, epoch): ...     # network.train() was just called
        def losses(self, network, outputs, batch): ...   # named terms, added to the task's loss
        def stepped(self, network): ...                  # after each optimizer step, e.g. put zeros back
        def evaluate(self, network, outputs, batch): ... # named values per held-out clip, e.g. MACs; averaged
        def epoch_ended(self, network, epoch, metrics):  # more figures for the curves
        def acceptable(self, metrics): ...               # may this epoch be the best one? (e.g. budget reached)
        def tensors(self, network) / load_tensors: ...   # own state in the checkpoint, beside the network's
        def finished(self, network): ...                 # the inference network to save and export
        def card(self, network): ...                     # what the card says about it, JSON

`losses` and `evaluate` see the network that `prepare` returned, never a DDP wrapper; values that the forward pass
leaves behind (MACs, activation statistics) may be kept in the network's attributes for them. A method must be
deterministic given `context.seed` and the batches, so that a resumed run equals an uninterrupted one bit for bit: all
random generators are seeded anew at each epoch from (seed, epoch, rank), nothing else is drawn from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dance_tvm.sparsity.clips import Batch, Clips
from dance_tvm.sparsity.options import MethodOptions, checked, method_class
from dance_tvm.sparsity.tasks import Task


@dataclass(frozen=True)
class Context:
    """What a method may know when it prepares a network. `clip_shape` is (C, T, H, W)."""

    model: str
    clip_shape: tuple[int, int, int, int]
    classes: int
    epochs: int
    steps_per_epoch: int
    batch: int
    seed: int
    device: torch.device
    train: Clips
    task: Task


class Method:
    """Ordinary ("dense") training, and the base of every method: override what differs."""

    name: ClassVar[str] = "dense"

    Options: ClassVar[type[MethodOptions]] = MethodOptions

    def __init__(self, **options: Any) -> None:
        self.options = checked(self.name, self.Options, options)

    def prepare(self, network: nn.Module, context: Context) -> nn.Module:
        """The network to train: may wrap or change `network` in place. Called once, before weights are resumed."""
        return network

    def parameters(self, network: nn.Module) -> Iterable[Any]:
        """What the optimizer gets: parameters, or groups ({"params": …, "lr_scale": 10.0, "weight_decay": 0.0})."""
        return [parameter for parameter in network.parameters() if parameter.requires_grad]

    def epoch_started(self, network: nn.Module, epoch: int) -> None:
        """Called after `network.train()`, with epochs counted from 0."""

    def losses(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Scalar terms to add to the task's loss for this batch, by name (their weights already applied)."""
        return {}

    def stepped(self, network: nn.Module) -> None:
        """Called after each optimizer step."""

    def evaluate(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Values of each held-out clip (N,), by name; the framework averages them over the whole split."""
        return {}

    def epoch_ended(self, network: nn.Module, epoch: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Further figures for the curves, computed once an epoch, after evaluation."""
        return {}

    def acceptable(self, metrics: Mapping[str, float]) -> bool:
        """Whether an epoch with these metrics may become the best one."""
        return True

    def tensors(self, network: nn.Module) -> dict[str, Tensor]:
        """The method's own state beyond the network's `state_dict`, for the checkpoint."""
        return {}

    def load_tensors(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""

    def finished(self, network: nn.Module) -> nn.Module:
        """The inference network whose `state_dict` is saved as model.safetensors."""
        return network

    def card(self, network: nn.Module) -> dict[str, Any]:
        """What else card.json should say, JSON-serialisable: MACs, rates, decisions."""
        return {}


def create_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method called `name`. Raises DanceError for an unknown name, a missing method or a wrong option."""
    method: Method = method_class(name)(**options)
    return method
