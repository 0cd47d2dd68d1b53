"""``--method kgs``: train a network into kernel-group sparsity by one of RT3D's three algorithms (section 4).

The epochs of a run fall into phases:

    ordinary training     the first ``dense`` share; 0 when started from a trained network (--init)
    pruning               lasso and reweighted: the penalty is in the loss; reweighted sets it anew ``rounds`` times
    cut                   the least units go, all layers ranked together, until the network costs ``rate`` times less
    retraining            the last ``retrain`` share with the masks fixed: what was cut stays exactly zero

The heuristic has nothing to train before the cut, so it cuts at once and retrains longer: every algorithm gets the
same number of epochs, as in the paper's comparison.

The group size is no setting of the training: it is the one measured best on ``target`` (section 3), unless given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dance_tvm.machines.target import load_target
from dance_tvm.records.group_choice import best_group
from dance_tvm.records.group_log import measurements_for
from dance_tvm.sparsity.clips import Batch
from dance_tvm.sparsity.method import Context, Method
from dance_tvm.sparsity.rt3d.importance import importance
from dance_tvm.sparsity.rt3d.masks import add_mask, bake_masks, set_mask
from dance_tvm.sparsity.rt3d.options import KGSOptions
from dance_tvm.sparsity.rt3d.penalty import Penalty
from dance_tvm.sparsity.rt3d.pruning import (
    Prunable,
    find_layers,
    layer_rms,
    magnitude,
    report,
    select,
    weight_masks,
)
from dance_tvm.sparsity.rt3d.schemes import Scheme

# The paper's preference for SIMD of today's phones, where nothing was measured.
DEFAULT_GROUP = (8, 4)


def measured_group(target: str) -> tuple[int, int]:
    """The group to prune in for a target, from its tuning log. Raises DanceError for an unknown target."""
    machine = load_target(target)
    measurements = measurements_for(machine)
    return best_group(measurements) if measurements else DEFAULT_GROUP


class KGS(Method):
    """RT3D pruning inside the training loop."""

    name: ClassVar[str] = "kgs"

    Options = KGSOptions
    options: KGSOptions

    def prepare(self, network: nn.Module, context: Context) -> nn.Module:
        options = self.options
        gm, gn = measured_group(options.target)
        self._scheme = Scheme(options.scheme, options.gm or gm, options.gn or gn)
        one_clip = context.train[0][0]
        self._prunable: Prunable = find_layers(network, one_clip[None], skip_first=options.skip_first)
        options.require_epochs(context.epochs)
        self._start, self._cut = options.phases(context.epochs)
        count = min(options.calibration, len(context.train))
        self._clips = torch.stack([context.train[index][0] for index in range(count)])
        self._penalty = Penalty(
            self._prunable,
            self._scheme,
            strength=options.strength,
            mix=options.mix,
            epsilon=options.epsilon,
            budget=options.budget,
        )
        self._keep: dict[str, Tensor] = {}
        self._pressing = False
        for layer in self._prunable.layers:
            for module in layer.modules:
                add_mask(module)
        return network

    def epoch_started(self, network: nn.Module, epoch: int) -> None:
        self._pressing = self._start <= epoch < self._cut
        if epoch == self._start and not self._keep:
            self._penalty.reference = {layer.name: layer_rms(layer.weight) for layer in self._prunable.layers}
        if self._pressing and self.options.algorithm == "reweighted" and epoch in self._round_starts():
            self._penalty.reweight()
        if epoch == self._cut:
            self._cut_off(network)

    def losses(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"groups": self._penalty()} if self._pressing else {}

    def epoch_ended(self, network: nn.Module, epoch: int, metrics: Mapping[str, float]) -> dict[str, float]:
        left = report(self._prunable, self._scheme, self._keep or self._everything())
        return {"macs": float(left.macs), "rate": left.rate}

    def acceptable(self, metrics: Mapping[str, float]) -> bool:
        return metrics["epoch"] >= self._cut

    def tensors(self, network: nn.Module) -> dict[str, Tensor]:
        parts = {"keep": self._keep, "penalty": self._penalty.penalties, "reference": self._penalty.reference}
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def load_tensors(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(prefix + "/")}

        self._keep = part("keep")
        for layer in self._prunable.layers:
            self._penalty.reference[layer.name] = part("reference")[layer.name].to(layer.weight)
            if layer.name in part("penalty"):
                self._penalty.penalties[layer.name] = part("penalty")[layer.name].to(layer.weight)

    def finished(self, network: nn.Module) -> nn.Module:
        return bake_masks(network)

    def card(self, network: nn.Module) -> dict[str, Any]:
        left = report(self._prunable, self._scheme, self._keep or self._everything())
        return {
            "pruning": {
                "algorithm": self.options.algorithm,
                "scheme": str(self._scheme),
                "rate": left.rate,
                "macs": left.macs,
                "dense_macs": left.dense_macs,
                "parameters": left.parameters,
                "dense_parameters": left.dense_parameters,
                "layers": {
                    row.name: {"rate": row.rate, "macs": row.live_macs, "weights": row.live_weights}
                    for row in left.layers
                },
                "dense_layers": dict(left.why_dense),
            }
        }

    def _round_starts(self) -> set[int]:
        """The epochs at which penalties are set anew: evenly spread over the pruning phase, the first included."""
        length = self._cut - self._start
        return {self._start + round * length // self.options.rounds for round in range(self.options.rounds)}

    def _cut_off(self, network: nn.Module) -> None:
        if self.options.algorithm == "heuristic":
            clips = self._clips.to(next(network.parameters()).device)
            scores = importance(network, self._prunable, self._scheme, clips)
        else:
            scores = magnitude(self._prunable, self._scheme)
        self._keep = select(self._prunable, self._scheme, scores, self.options.rate, self.options.budget)
        masks = weight_masks(self._prunable, self._scheme, self._keep)
        for layer in self._prunable.layers:
            for module in layer.modules:
                set_mask(module, masks[layer.name])

    def _everything(self) -> dict[str, Tensor]:
        return {
            layer.name: torch.ones_like(self._scheme.sizes(layer.weight), dtype=torch.bool)
            for layer in self._prunable.layers
        }
