"""D-STEP in the training loop: `python -m dance_tvm.train --method dstep --model resnet-mini --target-flops 0.6`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dance_tvm import models
from dance_tvm.core.errors import DanceError
from dance_tvm.models.resnet import VideoResNet
from dance_tvm.sparsity import checkpoint
from dance_tvm.sparsity.clips import Batch
from dance_tvm.sparsity.dstep import flops, losses
from dance_tvm.sparsity.dstep.network import DStepOptions, DStepResNet
from dance_tvm.sparsity.dstep.options import DSTEPOptions
from dance_tvm.sparsity.dstep.policy import Decision
from dance_tvm.sparsity.method import Context, Method
from dance_tvm.sparsity.options import not_residual
from dance_tvm.sparsity.teacher import Teacher
from dance_tvm.sparsity.trained import require_trained


class DSTEP(Method):
    """Equation 3: task loss + lambda(e) * (F/F_S - D)^2 + gamma * bound loss, after a warm-up without the second."""

    name = "dstep"

    Options = DSTEPOptions
    options: DSTEPOptions

    def prepare(self, network: nn.Module, context: Context) -> nn.Module:
        if not isinstance(network, VideoResNet):
            raise DanceError(not_residual(context.model))
        chosen = self.options
        self._teacher = Teacher(network, context)
        form = DStepOptions(**{name: getattr(chosen, name) for name in DStepOptions.model_fields})
        thinned = DStepResNet(network, form)
        thinned.temperature = chosen.temperature
        self._epochs, self._clip_shape, self._epoch = context.epochs, context.clip_shape, 0
        self._dense = flops.dense_macs(thinned, context.clip_shape)
        self._needed = flops.Needed(thinned, context.clip_shape)
        least = 1 - (sum(self._dense.first) + sum(self._dense.second)) / self._dense.total
        if chosen.target_flops < least:
            raise DanceError(
                f"--target-flops {chosen.target_flops:g} is out of reach: {least:.2f} of {context.model}'s FLOPs lie "
                "outside the layers that D-STEP thins; choose more"
            )
        self._decisions: list[Decision] = []
        thinned.watch(self._decisions)
        return thinned

    def parameters(self, network: nn.Module) -> Iterable[Any]:
        assert isinstance(network, DStepResNet)
        policies = list(network.policies.parameters())
        theirs = {id(parameter) for parameter in policies}
        rest = [parameter for parameter in network.parameters() if id(parameter) not in theirs]
        return [{"params": rest}, {"params": policies, "lr_scale": self.options.policy_lr, "weight_decay": 0.0}]

    def epoch_started(self, network: nn.Module, epoch: int) -> None:
        self._epoch = epoch
        self._decisions.clear()

    def losses(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        chosen, count, decisions = self.options, len(batch.clips), self._taken()
        share = flops.network_share(self._dense, [flops.paper_shares(one.settled or one, count) for one in decisions])
        weight = losses.sparsity_weight(
            self._epoch, chosen.warmup_share * self._epochs, chosen.alpha, self._beta(chosen.beta)
        )
        terms = {"sparsity": weight * losses.sparsity_loss(share, chosen.target_flops)}
        if chosen.spatial:
            bounds = losses.density_bounds(self._epoch, chosen.relax_share * self._epochs, chosen.target_flops)
            terms["bound"] = chosen.gamma * losses.bound_loss(
                [flops.density(one.settled or one, count) for one in decisions], bounds
            )
        if chosen.distill > 0:
            terms["distill"] = chosen.distill * self._teacher.distance(outputs, batch)
        return terms

    def evaluate(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        count, decisions = len(batch.clips), self._taken()
        values = {
            "flops": flops.network_share(self._dense, [flops.paper_shares(one, count) for one in decisions]),
            "needed": flops.network_share(self._dense, self._needed.shares(decisions, count)),
            "tiles": torch.stack([flops.density(one, count) for one in decisions]).mean(0),
        }
        return values | _channel_shares(decisions, count)

    def acceptable(self, metrics: Mapping[str, float]) -> bool:
        return metrics["flops"] <= self.options.target_flops + 0.03

    def finished(self, network: nn.Module) -> nn.Module:
        assert isinstance(network, DStepResNet)
        network.watch(None)
        return network

    def card(self, network: nn.Module) -> dict[str, Any]:
        assert isinstance(network, DStepResNet)
        spatial, temporal = flops.policy_macs(network, self._clip_shape)
        return {
            "dstep": network.options.model_dump(mode="json"),
            "target_flops": self.options.target_flops,
            "dense_macs": self._dense.total,
            "policy_macs": {"spatial": spatial, "temporal": temporal},
        }

    def _beta(self, given: float | None) -> float:
        return math.log(100) / max(1, self._epochs - 1) if given is None else given

    def _taken(self) -> list[Decision]:
        """The decisions of the pass that just ended, one a block."""
        taken = list(self._decisions)
        self._decisions.clear()
        return taken


def _channel_shares(decisions: list[Decision], count: int) -> dict[str, Tensor]:
    """Shares of channels computed and reused, for each clip (N,), averaged over blocks and frames."""
    computed = [one.compute.flatten(1).unflatten(0, (-1, count)).mean((0, 2)) for one in decisions]
    reused = [one.reuse.flatten(1).unflatten(0, (-1, count)).mean((0, 2)) for one in decisions if one.reuse is not None]
    shares = {"compute": torch.stack(computed).mean(0)}
    return shares | ({"reuse": torch.stack(reused).mean(0)} if reused else {})


def load_trained(path: Path) -> tuple[DStepResNet, dict[str, Any]]:
    """The network in a `model.safetensors` that training wrote, in evaluation mode, and its card.

    Raises DanceError when the file is missing, torn, or of another method.
    """
    require_trained(path)
    tensors, card = checkpoint.read_checkpoint(path)
    base = models.create(
        card["settings"]["model"], num_classes=len(card["classes"]), **_channels(card["settings"]["model"], card)
    )
    assert isinstance(base, VideoResNet)
    network = DStepResNet(base, DStepOptions(**card["dstep"]))
    checkpoint.load_weights(network, checkpoint.without_prefix("network", tensors), path)
    return network.eval(), card


def _channels(model: str, card: Mapping[str, Any]) -> dict[str, int]:
    channels = int(card["clip_shape"][0])
    return {} if models.entry(model).input_shape[0] == channels else {"in_channels": channels}
