"""The two steps of DANCE as training methods: AVA makes activations uneven, AAP learns what to leave out of each clip.

python -m dance_tvm.train --method dense --out dense
python -m dance_tvm.train --method ava --init dense/model.safetensors --out ava
python -m dance_tvm.train --method aap --init ava/model.safetensors --target-macs 0.4 --out aap
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic_core import to_json
from torch import Tensor, fx, nn
from torch.nn import functional

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.clips import Batch, Clips
from dance_tvm.sparsity.dance.adaptors import TINY, Adaptor
from dance_tvm.sparsity.dance.controller import Controller, Prune
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dance.options import AXES, AAPOptions, AVAOptions
from dance_tvm.sparsity.dance.predicted_time import TimeCounter
from dance_tvm.sparsity.dance.sites import Site, insert, module_of, node_named, trace
from dance_tvm.sparsity.dance.start import leave_out_least, refit
from dance_tvm.sparsity.method import Context, Method
from dance_tvm.sparsity.teacher import Teacher
from dance_tvm.sparsity.units import SiteUnits, read_units, require_same_sites

#: Share of the dense work below which nothing of a network would be left.
_LEAST_TARGET = 0.01
_SUPPLEMENT_WEIGHTS = (1 / 3, 2 / 3, 1 / 3)


class AVA(Method):
    """Activation variability amplification: adaptors after each convolution, and a loss that rewards uneven activity.

    The term is -weight * (std_t / 3 + 2 std_ch / 3 + std_sp / 3), averaged over clips and convolutions. Each deviation
    counts relative to its value before AVA: shares of 16 frames deviate a hundred times as much as shares of 16,384
    positions, and would be all that is trained. The weight grows linearly over the first `ramp` of the epochs. The
    saved model has the adaptors' scales folded into its weights.
    """

    name: ClassVar[str] = "ava"

    Options = AVAOptions
    options: AVAOptions

    def prepare(self, network: nn.Module, context: Context) -> nn.Module:
        self._plain, self._epochs, self._weight = network, context.epochs, 0.0
        graph, self._sites = trace(network, context.clip_shape)
        graph.add_submodule("adaptors", nn.ModuleList())
        for index, site in enumerate(self._sites):
            channels, frames, height, width = site.shape
            insert(graph, site, f"adaptors.{index}", Adaptor(channels, frames, height, width))
        graph.recompile()
        self._adaptors = [module for module in graph.modules() if isinstance(module, Adaptor)]
        self._before = torch.zeros(3)
        return graph

    def epoch_started(self, network: nn.Module, epoch: int) -> None:
        ramp = max(1.0, self.options.ramp * self._epochs)
        self._weight = self.options.variability * min(1.0, (epoch + 1) / ramp)

    def losses(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        found = self._variability().mean(dim=1)
        if not self._before.any():
            self._before = found.detach()
        relative = found / self._before.to(found.device).clamp(min=TINY)  # an axis of one entry deviates nowhere
        return {"variability": -self._weight * (relative * relative.new_tensor(_SUPPLEMENT_WEIGHTS)).sum()}

    def evaluate(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        found = self._variability()
        names = ("std_frames", "std_channels", "std_positions")
        return dict(zip(names, found, strict=True)) | {"variability": found.sum(0)}

    def _variability(self) -> Tensor:
        """(3, N): frames, channels, positions, averaged over the convolutions."""
        return torch.stack([torch.stack(adaptor.variability) for adaptor in self._adaptors]).mean(0)

    def tensors(self, network: nn.Module) -> dict[str, Tensor]:
        return {"before": self._before}

    def load_tensors(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._before = tensors["before"]

    def finished(self, network: nn.Module) -> nn.Module:
        assert isinstance(network, fx.GraphModule)
        for site, adaptor in zip(self._sites, self._adaptors, strict=True):
            _fold_scale(network, site, adaptor.channel_scale())
        return self._plain


class AAP(Method):
    """Adaptive activation pruning: the controller's masks at every site, trained to a target share of the dense MACs.

    Two terms join the task's: `compute`, weight * |share / target - 1| (rounded off within a tenth) for the batch's
    mean share of the dense MACs (or, with `target_time`, of the dense time as predicted), whose target falls linearly
    from 1 over the first `ramp` of the epochs; and `guide`, which teaches the controller the relative activity of each
    frame, channel group and tile and fades over the same time. The compute term pulls both ways: a network that has
    pruned itself dead gets no other gradient to recover.
    With `distill` the network it starts from, dense, is its teacher: weight * KL(teacher || pruned) joins the loss.
    With `freeze` the backbone rests for that last share of the epochs, batch norm statistics included.
    With `hint` what the pruned network keeps of each site is drawn to the dense network's activations.
    With `start` the budget is met before the first step, by channels alone (see `dance/start.py`); `ramp` should be 0.
    """

    name: ClassVar[str] = "aap"

    Options = AAPOptions
    options: AAPOptions

    def prepare(self, network: nn.Module, context: Context) -> nn.Module:
        options = self.options
        self._teacher = Teacher(network, context)
        self._dense = _Activations(network, context) if options.hint > 0 else None
        self._form: dict[str, Any] = {"axes": options.axes, "group": options.group, "grid": options.grid}
        units = read_units(options.units) if options.units else None
        if units:
            self._form["units"] = units.sites
        graph = prune(network, context.clip_shape, **self._form)
        self._controller = controller_of(graph)
        self._prunes = [module for module in graph.modules() if isinstance(module, Prune)]
        for site in self._prunes:
            site.hinted = options.hint > 0
        self._norms = [m for m in graph.modules() if isinstance(m, nn.BatchNorm3d) and m is not self._controller.norm]
        for module in (*self._norms, self._controller.norm):
            module.momentum = options.momentum
        self._counter = MacCounter(graph)
        self._times = TimeCounter(self._counter, units) if units and (units.layers or options.target_time) else None
        self._epochs, self._steps, self._step = context.epochs, context.steps_per_epoch, 0
        dense = self._counter.count([], 1).dense
        self._target = options.target_macs if options.target_macs <= 1 else options.target_macs / dense
        self._target = options.target_time or self._target
        if not _LEAST_TARGET <= self._target <= 1:
            raise DanceError(
                f"--target-macs {options.target_macs:g} is {self._target:.3g} of {context.model}'s {dense / 1e6:.4g}M "
                f"dense MACs: give a share from {_LEAST_TARGET:g} to 1, or as many MACs"
            )
        if options.start:
            graph.to(context.device)
            clips = _evenly(context.train, options.start).to(context.device)
            leave_out_least(graph, clips, context.task.probe, target=self._target, floor=options.floor)
            if options.refit:
                refit(graph, _evenly(context.train, options.refit).to(context.device), seed=context.seed)
        return graph

    def parameters(self, network: nn.Module) -> Iterable[Any]:
        options, controller = self.options, self._controller
        rest = [parameter for name, parameter in controller.named_parameters() if name != "theta"]
        owned = {id(parameter) for parameter in controller.parameters()}
        backbone = [parameter for parameter in network.parameters() if id(parameter) not in owned]
        return [
            {"params": backbone, "lr_scale": options.backbone_rate},
            {"params": rest, "lr_scale": options.controller_rate},
            {"params": [controller.theta], "lr_scale": options.threshold_rate, "weight_decay": 0.0},
        ]

    def finished(self, network: nn.Module) -> nn.Module:
        for module in self._prunes:
            module.watching = False  # what runs later, and what is exported, keeps nothing of a call
        return network

    def epoch_started(self, network: nn.Module, epoch: int) -> None:
        self._step = epoch * self._steps
        for module in self._prunes:
            module.watching = self._guide_weight() > 0
        frozen = epoch >= self._epochs * (1 - self.options.freeze)
        owned = {id(parameter) for parameter in self._controller.parameters()}
        for parameter in network.parameters():
            parameter.requires_grad_(not frozen or id(parameter) in owned)
        if frozen:
            network.eval()
            self._controller.train()
        elif self.options.keep_norm:
            for norm in self._norms:
                norm.eval()

    def _progress(self) -> float:
        """How far the target has fallen: 0 at the first step, 1 once `ramp` of all steps are done."""
        ramp = self.options.ramp * self._epochs * self._steps
        return min(1.0, self._step / ramp) if ramp > 0 else 1.0

    def _guide_weight(self) -> float:
        return self.options.guide * (1 - self._progress())

    def losses(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        relative = self._share(len(batch.clips)).mean() / (1 - (1 - self._target) * self._progress())
        excess = functional.smooth_l1_loss(relative, torch.ones_like(relative), beta=0.1)
        terms = {"compute": self.options.compute * excess}
        if self._guide_weight() > 0:
            terms["guide"] = self._guide_weight() * self._guide()
        if self.options.distill > 0 and isinstance(outputs, Tensor):
            terms["distill"] = self.options.distill * self._teacher.distance(outputs, batch)
        if self._dense:
            terms["hint"] = self.options.hint * self._distance_of_activations(self._dense.of(batch.clips))
        return terms

    def _share(self, clips: int) -> Tensor:
        """(clips,): of the dense work that the budget is of, in the last forward pass."""
        decisions = self._controller.decisions
        if self._times and self.options.target_time:
            return self._times.seconds(decisions, clips) / self._times.dense
        count = self._counter.count(decisions, clips)
        return count.executed / count.dense

    def stepped(self, network: nn.Module) -> None:
        self._step += 1

    def _guide(self) -> Tensor:
        """Mean squared distance of the scores from each entry's activity, relative to the clip's largest."""
        distances = []
        for scores, module in zip(self._controller.scores, self._prunes, strict=True):
            for score, activity in zip(scores, module.activity, strict=True):
                if score is not None:
                    distances.append(functional.mse_loss(score, _relative(activity, score)))
        return torch.stack(distances).mean()

    def _distance_of_activations(self, dense: list[Tensor]) -> Tensor:
        """What each site's kept activations lack of the `dense` ones (N, C, T, H, W), squared, relative to those."""
        distances = []
        for truth, module in zip(dense, self._prunes, strict=True):
            kept = truth.new_ones(())
            for mask in module.decided(self._controller.decisions):
                kept = kept if mask is None else kept * mask.detach()
            lacking = ((module.seen - truth).square() * kept).sum()
            distances.append(lacking / (truth.square() * kept).sum().clamp(min=1e-12))
        return torch.stack(distances).mean()

    def evaluate(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        decisions = self._controller.decisions
        count = self._counter.count(decisions, len(batch.clips))
        values = {"macs": count.executed, "share": count.executed / count.dense}
        if self._times:
            seconds = self._times.seconds(decisions, len(batch.clips))
            values |= {"predicted_seconds": seconds, "time_share": seconds / self._times.dense}
        for axis, name in enumerate(AXES):
            masks = [mask for mask in (site[axis] for site in decisions) if mask is not None]
            if masks:
                values[f"kept_{name}"] = torch.stack([mask.flatten(1).mean(1) for mask in masks]).mean(0)
        return values

    def epoch_ended(self, network: nn.Module, epoch: int, metrics: Mapping[str, float]) -> dict[str, float]:
        return {"theta": float(self._controller.threshold.detach())}

    def acceptable(self, metrics: Mapping[str, float]) -> bool:
        return metrics["time_share" if self.options.target_time else "share"] <= 1.03 * self._target

    def card(self, network: nn.Module) -> dict[str, Any]:
        count, by_time = self._counter.count([], 1), self.options.target_time is not None
        target = {} if by_time else {"target": self._target * count.dense}
        times = {}
        if self._times:
            aim = {"target": self._target * self._times.dense} if by_time else {}
            times = {"predicted_seconds": {"dense": self._times.dense, **aim}}
        return {
            "macs": {
                "dense": count.dense,
                "nominal": count.nominal,
                "controller": count.controller,
                **target,
            },
            **times,
            "theta": float(self._controller.threshold.detach()),
            "dance": json.loads(to_json(self._form)),
        }


class _Activations(fx.Interpreter):
    """The activations of each site in `network` as it stands, before anything is inserted into it."""

    def __init__(self, network: nn.Module, context: Context) -> None:
        graph, sites = trace(copy.deepcopy(network), context.clip_shape)
        super().__init__(graph.eval().requires_grad_(False).to(context.device))
        self._found: dict[str, Tensor | None] = dict.fromkeys(site.node for site in sites)

    @torch.no_grad()
    def of(self, clips: Tensor) -> list[Tensor]:
        """(N, C, T, H, W) for each site, in their order."""
        self.run(clips)
        return [cast(Tensor, activation) for activation in self._found.values()]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._found:
            self._found[n.name] = value
        return value


def prune(
    network: nn.Module,
    clip_shape: tuple[int, ...],
    *,
    axes: Iterable[str] = AXES,
    group: int = 8,
    grid: int = 8,
    units: Sequence[SiteUnits] = (),
) -> fx.GraphModule:
    """`network` with a controller on its first activation and masks at every site; it shares `network`'s weights.

    The options are those of `Controller`. Raises DanceError when the network cannot be traced, has no two convolutions
    with a ReLU, or has other sites than the `units` are of.
    """
    graph, sites = trace(network, clip_shape)
    if units:
        require_same_sites(units, sites)
    controller = Controller(sites, axes=tuple(axes), group=group, grid=grid, units=units)
    graph.add_submodule("controller", controller)
    first = node_named(graph, sites[0].node)
    with graph.graph.inserting_after(first):
        decisions = graph.graph.call_module("controller", (first,))
    graph.add_submodule("prunes", nn.ModuleList())
    for index, site in enumerate(sites):
        insert(graph, site, f"prunes.{index}", Prune(index), decisions)
    graph.recompile()
    return graph


def controller_of(graph: nn.Module) -> Controller:
    """The controller of a network that `prune` made."""
    controller = graph.get_submodule("controller")
    assert isinstance(controller, Controller)
    return controller


def _evenly(clips: Clips, count: int) -> Tensor:
    """`count` of the clips, or all where there are fewer, evenly chosen: (count, …)."""
    count = min(count, len(clips))
    return torch.stack([clips[place * len(clips) // count][0] for place in range(count)])


def _relative(activity: Tensor, score: Tensor) -> Tensor:
    """Activity (N, entries…) pooled to the score's entries, over the clip's largest one."""
    if activity.ndim == 3:
        pooled = functional.adaptive_avg_pool2d(activity, (score.shape[1], score.shape[2]))
    else:
        pooled = functional.adaptive_avg_pool1d(activity[:, None], score.shape[1])[:, 0]
    largest = pooled.flatten(1).amax(1).clamp(min=1e-12)
    return pooled / largest.reshape(-1, *[1] * (pooled.ndim - 1))


@torch.no_grad()
def _fold_scale(graph: fx.GraphModule, site: Site, scale: Tensor) -> None:
    """Multiplies what feeds the site's ReLU by `scale` (C,), never negative: relu(s x) = s relu(x).

    After a residual sum or a concatenation there is no one layer to fold into; that scale is left to retraining.
    """
    source = node_named(graph, site.node).all_input_nodes[0]
    layer = module_of(graph, source)
    if isinstance(layer, nn.BatchNorm3d):
        layer.weight.mul_(scale)
        layer.bias.mul_(scale)
    elif isinstance(layer, nn.Conv3d):
        layer.weight.mul_(scale.reshape(-1, 1, 1, 1, 1))
        if layer.bias is not None:
            layer.bias.mul_(scale)
