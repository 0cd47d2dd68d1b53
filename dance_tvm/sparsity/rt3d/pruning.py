"""One global rate: rank the units of all layers together, remove the least until the whole network's cost is reached.

Costs are exact: a weight costs one multiply-accumulate at each output position of its layer, so a layer costs its
live weights times its positions, and the network costs its layers together, the ones left dense included. Positions
at which a weight's tap falls on padding count as well, as in the paper; what a kernel executes leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from dance_tvm.core.errors import DanceError
from dance_tvm.liveness.macs import pairs_by_tap
from dance_tvm.liveness.rules import CHANNELWISE
from dance_tvm.liveness.torch_graph import module_window, operator_of
from dance_tvm.models.macs import count_layers
from dance_tvm.schedules.geometry import Window
from dance_tvm.sparsity.rt3d.options import SchemeName
from dance_tvm.sparsity.rt3d.schemes import Scheme

Budget = Literal["macs", "parameters"]

# The share of its units that a layer keeps whatever their scores: a layer pruned away cuts the network in two.
FLOOR = 0.05


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution that may be pruned. ``positions`` are the outputs a weight is multiplied for, all clips together.

    ``source`` names the layer whose filters are this layer's input channels (only channelwise operators between them),
    or is None. Convolutions that share a weight are one layer, pruned together: ``sharing`` are the others. ``windows``
    has one for each time that the weight is used.
    """

    name: str
    module: nn.Module
    positions: int
    source: str | None
    windows: tuple[Window, ...]
    sharing: tuple[nn.Module, ...] = ()

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All convolutions with its weight."""
        return self.module, *self.sharing

    @property
    def weight(self) -> Tensor:
        """(M, N, *kernel), masks applied."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


@dataclass(frozen=True, eq=False)
class Prunable:
    """The layers of a network that are pruned, and what all of it costs dense."""

    layers: tuple[Layer, ...]
    macs: int
    parameters: int
    why_dense: Mapping[str, str]

    def cost(self, budget: Budget) -> int:
        """The dense network's multiply-accumulates or parameters."""
        return self.macs if budget == "macs" else self.parameters


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer: weights and multiply-accumulates before and after; ``executed_macs`` leaves padding out."""

    name: str
    scheme: str
    weights: int
    live_weights: int
    macs: int
    live_macs: int
    executed_macs: int

    @property
    def rate(self) -> float:
        """How many times fewer multiply-accumulates."""
        return self.macs / self.live_macs if self.live_macs else float("inf")


@dataclass(frozen=True)
class PruneReport:
    """What pruning left of the whole network, layers that stayed dense included in the totals."""

    layers: tuple[LayerReport, ...]
    dense_macs: int
    macs: int
    dense_parameters: int
    parameters: int
    why_dense: Mapping[str, str]

    @property
    def rate(self) -> float:
        """Dense over remaining multiply-accumulates of the network."""
        return self.dense_macs / self.macs


def find_layers(network: nn.Module, *inputs: Tensor, skip_first: bool = True) -> Prunable:
    """The convolutions that can be pruned for ``inputs`` (only shapes matter), in the order they run.

    Grouped and transposed convolutions stay dense, since kernel groups join filters that read the same channels. So
    does the first convolution and others with as few channels, which read the input too (unless ``skip_first`` is
    false): with one to three channels a group is mostly padding; it costs under 3 % of C3D or R(2+1)D; and all features
    of the network are made of what it lets through.
    """
    counted = count_layers(network, *inputs)
    modules = dict(network.named_modules())
    sources = _channel_sources(network)
    layers: dict[int, Layer] = {}
    owners: dict[str, str] = {}
    why_dense: dict[str, str] = {}
    dense: set[int] = set()
    input_channels = 0
    for entry in counted:
        module = modules[entry.name]
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            input_channels = input_channels or module.in_channels
        why = _why_dense(module, entry.kind, input_channels if skip_first else 0)
        if why:
            why_dense[entry.name] = why
            dense.update(id(parameter) for parameter in module.parameters(recurse=False))
            continue
        weight = module.get_parameter("weight")
        windows = tuple(module_window(module, *call) for call in entry.calls)
        source = owners.get(sources.get(entry.name, ""))
        layer = Layer(entry.name, module, entry.macs // weight.numel(), source, windows)
        first = layers.get(id(weight), layer)
        layers[id(weight)] = layer if first is layer else _together(first, layer)
        owners[entry.name] = first.name
    for weight_id in dense & layers.keys():
        why_dense[layers.pop(weight_id).name] = "it shares its weight with a layer that stays dense"
    if not layers:
        raise DanceError(f"{type(network).__name__} has no convolution to prune after its first one")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Prunable(tuple(layers.values()), sum(entry.macs for entry in counted), parameters, why_dense)


def _why_dense(module: nn.Module, kind: str, input_channels: int) -> str:
    """Why a layer cannot be pruned; empty where it can. Those of up to ``input_channels`` read the input."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"{kind} is not a convolution with kernel groups"
    if module.groups > 1:
        return "its filters read different channels"
    if module.in_channels <= input_channels:
        return "it reads the input: few channels, few MACs, and every feature depends on it"
    return ""


def _together(first: Layer, second: Layer) -> Layer:
    """Two uses of one weight as one layer; it has a source only if both read the same one's channels."""
    return replace(
        first,
        positions=first.positions + second.positions,
        source=first.source if first.source == second.source else None,
        windows=(*first.windows, *second.windows),
        sharing=(*first.sharing, second.module),
    )


def select(
    prunable: Prunable, scheme: Scheme, scores: Mapping[str, Tensor], rate: float, budget: Budget = "macs"
) -> dict[str, Tensor]:
    """Which units to keep so that the network's cost falls ``rate`` times: the fewest removals, least scores first.

    ``scores`` has one value a unit and layer, larger is more important, comparable between layers. Returns boolean
    units by layer. Raises DanceError for a rate under 1, or one beyond what the layers left dense allow.
    """
    if rate < 1:
        raise DanceError(f"a pruning rate of {rate:g} adds work; choose 1 (dense) or more")
    flat = torch.cat([_with_floor(scores[layer.name].detach().flatten().double().cpu()) for layer in prunable.layers])
    order = flat.argsort(stable=True)
    dense = prunable.cost(budget)
    target = dense / rate

    def units(removed: int) -> dict[str, Tensor]:
        keep = torch.ones(len(flat), dtype=torch.bool)
        keep[order[:removed]] = False
        parts = keep.split([scores[layer.name].numel() for layer in prunable.layers])
        return {
            layer.name: part.reshape(scores[layer.name].shape)
            for layer, part in zip(prunable.layers, parts, strict=True)
        }

    removable = int(torch.isfinite(flat).sum())
    if scheme.name == "filter":
        # A filter's channel leaves the next layer too, so costs do not add up and each count is taken anew.
        removed = _smallest(removable, lambda count: _cost(prunable, scheme, units(count), budget) <= target)
    else:
        saved = torch.cat([_unit_costs(layer, scheme, budget) for layer in prunable.layers])[order].cumsum(0)
        removed = int((saved < dense - target).sum()) + (target < dense)
    removed = min(removed, removable)
    left = _cost(prunable, scheme, units(removed), budget)
    if left > target:
        raise DanceError(
            f"a rate of {rate:g} cannot be reached with {scheme}: what must stay allows at most {dense / left:.2f}"
        )
    return units(removed)


def weight_masks(prunable: Prunable, scheme: Scheme, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Boolean masks in the shape of each layer's weights.

    A pruned filter takes the channel it made out of the next layer too, as its output no longer carries anything.
    """
    masks = {}
    for layer in prunable.layers:
        device = layer.weight.device
        mask = scheme.expand(keep[layer.name].to(device), layer.weight).clone()
        if scheme.name == "filter" and layer.source is not None and layer.source in keep:
            mask &= keep[layer.source].to(device).reshape(1, -1, *[1] * (mask.dim() - 2))
        masks[layer.name] = mask
    return masks


def magnitude(prunable: Prunable, scheme: Scheme) -> dict[str, Tensor]:
    """The root mean square of each unit's weights, relative to that of its layer, so that layers can be compared."""
    scores = {}
    for layer in prunable.layers:
        weight = layer.weight.detach()
        rms = (scheme.sums(weight.square()) / scheme.sizes(weight)).sqrt()
        scores[layer.name] = rms / layer_rms(weight)
    return scores


def layer_rms(weight: Tensor) -> Tensor:
    """The root mean square of a layer's weights, never zero."""
    return weight.detach().square().mean().sqrt().clamp_min(1e-12)


@torch.no_grad()
def prune_to_rate(
    network: nn.Module,
    inputs: Sequence[Tensor],
    scheme: SchemeName = "kgs",
    rate: float = 2.6,
    gm: int = 8,
    gn: int = 4,
    *,
    budget: Budget = "macs",
    skip_first: bool = True,
) -> PruneReport:
    """Zero the least weights of ``network`` in place until it costs ``rate`` times less, without any training.

    ``inputs`` are example inputs of one call (only shapes matter). For latency work and as a baseline: accuracy needs
    the training of ``python -m dance_tvm.train --method kgs``.
    """
    chosen = Scheme(scheme, gm, gn)
    prunable = find_layers(network, *inputs, skip_first=skip_first)
    keep = select(prunable, chosen, magnitude(prunable, chosen), rate, budget)
    for name, mask in weight_masks(prunable, chosen, keep).items():
        network.get_parameter(f"{name}.weight").mul_(mask)
    return report(prunable, chosen, keep)


def report(prunable: Prunable, scheme: Scheme, keep: Mapping[str, Tensor]) -> PruneReport:
    """Exact weights and multiply-accumulates that ``keep`` leaves, by layer and in all."""
    rows = []
    for layer in prunable.layers:
        by_tap = _live_weights_by_tap(layer, scheme, keep)
        weights, live = layer.weight.numel(), int(by_tap.sum())
        pairs = sum(pairs_by_tap(window) for window in layer.windows)
        executed = int((by_tap * torch.from_numpy(pairs).flatten()).sum())
        dense, left = (count * layer.positions for count in (weights, live))
        rows.append(LayerReport(layer.name, str(scheme), weights, live, dense, left, executed))
    saved = [(row.macs - row.live_macs, row.weights - row.live_weights) for row in rows]
    return PruneReport(
        tuple(rows),
        prunable.macs,
        prunable.macs - sum(macs for macs, _ in saved),
        prunable.parameters,
        prunable.parameters - sum(weights for _, weights in saved),
        prunable.why_dense,
    )


def _unit_costs(layer: Layer, scheme: Scheme, budget: Budget) -> Tensor:
    """What each unit of a layer costs, flat, int64."""
    return scheme.sizes(layer.weight).flatten().cpu() * (layer.positions if budget == "macs" else 1)


def _cost(prunable: Prunable, scheme: Scheme, keep: Mapping[str, Tensor], budget: Budget) -> int:
    saved = 0
    for layer in prunable.layers:
        weights = layer.weight.numel() - _live_weights(layer, scheme, keep)
        saved += weights * (layer.positions if budget == "macs" else 1)
    return prunable.cost(budget) - saved


def _live_weights(layer: Layer, scheme: Scheme, keep: Mapping[str, Tensor]) -> int:
    return int(_live_weights_by_tap(layer, scheme, keep).sum())


def _live_weights_by_tap(layer: Layer, scheme: Scheme, keep: Mapping[str, Tensor]) -> Tensor:
    """int64 (taps,)."""
    units = keep[layer.name].cpu()
    if scheme.name != "filter":
        return scheme.expand(units, layer.weight).sum((0, 1)).flatten()
    linked = layer.source is not None and layer.source in keep
    channels = int(keep[layer.source or ""].sum()) if linked else layer.weight.shape[1]
    return torch.full((layer.weight[0, 0].numel(),), int(units.sum()) * channels)


def _with_floor(scores: Tensor) -> Tensor:
    """The best units of a layer can never be removed."""
    kept = max(1, round(FLOOR * len(scores)))
    scores = scores.clone()
    scores[scores.topk(kept).indices] = torch.inf
    return scores


def _smallest(limit: int, enough: Callable[[int], bool]) -> int:
    """The smallest count up to ``limit`` for which ``enough`` holds; it holds for ``limit`` and is monotone."""
    low, high = 0, limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _channel_sources(network: nn.Module) -> dict[str, str]:
    """For each convolution the one whose filters it reads at every call; none for a network that cannot be traced."""
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception:
        # Tracing runs the network's own code on proxies, which may fail in any way; no link is always safe.
        return {}
    modules = dict(network.named_modules())
    sources: dict[str, str] = {}
    several: set[str] = set()
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules.get(node.target), nn.modules.conv._ConvNd):
            continue
        name, before = str(node.target), node.args[0]
        while isinstance(before, fx.Node) and _is_channelwise(before, modules):
            before = before.args[0]
        source = str(before.target) if isinstance(before, fx.Node) and before.op == "call_module" else ""
        if sources.setdefault(name, source) != source:
            several.add(name)
    return {name: source for name, source in sources.items() if source and name not in several}


def _is_channelwise(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the channel that a filter made is, behind this operator, the channel that the next layer reads."""
    return operator_of(node, modules) in CHANNELWISE
