"""Multiply-accumulates of a masked network, counted as a kernel that walks index lists executes them.

For each convolution and clip:

    rows of output that somebody reads  x  taps whose input frame is alive  x  live input channels  x  live outputs

*Alive* (read side) is what the masks before it leave; *read* (compute side) is what the masks after it leave, and what
the windows of later layers reach of that. Both are carried through ReLU, batch norm, pooling, convolutions, sums and
concatenations as three masks, of frames, positions and channels, and a union of such triples is taken axis by axis, as
index lists have to. Taps that fall on padding are
not on the lists, so they are never counted, dense or pruned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dance_tvm.sparsity.dance.controller import Controller, Masks, Prune
from dance_tvm.sparsity.dance.sites import module_of


class Live(NamedTuple):
    """Which parts of an activation are alive, or read: frames (N, T), positions (N, H, W), channels (N, C)."""

    frames: Tensor
    positions: Tensor
    channels: Tensor


class LayerMacs(NamedTuple):
    """One convolution's MACs: `executed` (N,) under the masks, `dense` without masks, `nominal` with padded taps."""

    name: str
    executed: Tensor
    dense: float
    nominal: float


@dataclass(frozen=True)
class Count:
    """A network's MACs. `executed` (N,) has a gradient where the masks have one."""

    layers: list[LayerMacs]
    linear: float
    controller: float

    @property
    def executed(self) -> Tensor:
        return torch.stack([layer.executed for layer in self.layers]).sum(0) + self.linear + self.controller

    @property
    def dense(self) -> float:
        """Of the network without masks or controller, taps on padding left out."""
        return sum(layer.dense for layer in self.layers) + self.linear

    @property
    def nominal(self) -> float:
        """Of the network without masks or controller, counted as papers do: every tap of every output."""
        return sum(layer.nominal for layer in self.layers) + self.linear


class MacCounter:
    """Counts a traced network's MACs from the masks of its last forward pass.

    `graph` must carry shapes (`sites.trace`) and may carry `Prune` modules and a `controller`.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._nodes = [node for node in graph.graph.nodes if _is_activation(node)]
        self._convolutions = [node for node in self._nodes if isinstance(module_of(graph, node), nn.Conv3d)]
        self._linear = sum(
            float(module.in_features * node.meta["tensor_meta"].shape.numel())
            for node in graph.graph.nodes
            if isinstance(module := module_of(graph, node), nn.Linear)
        )
        self._controller = controller_macs(graph)

    def count(self, decisions: Sequence[Masks], clips: int) -> Count:
        """The MACs of `clips` clips whose masks are `decisions` (one entry a site; none: the dense network)."""
        device = decisions[0][0].device if decisions and decisions[0][0] is not None else _device(self._graph)
        alive = self._alive(decisions, clips, device)
        read = self._read(decisions, clips, device, alive)
        layers = []
        for node in self._convolutions:
            conv = module_of(self._graph, node)
            assert isinstance(conv, nn.Conv3d)
            source = node.all_input_nodes[0]
            layers.append(_convolution(node, conv, alive[source], read[node]))
        return Count(layers, self._linear, self._controller)

    def _alive(self, decisions: Sequence[Masks], clips: int, device: torch.device) -> dict[fx.Node, Live]:
        """What may be other than zero after each node, from the inputs on."""
        alive: dict[fx.Node, Live] = {}
        for node in self._nodes:
            sources = [alive[source] for source in node.all_input_nodes if source in alive]
            alive[node] = self._alive_after(node, sources, decisions, clips, device)
        return alive

    def _alive_after(
        self, node: fx.Node, sources: list[Live], decisions: Sequence[Masks], clips: int, device: torch.device
    ) -> Live:
        module = module_of(self._graph, node)
        if isinstance(module, Prune):
            return _masked(sources[0], module.decided(decisions)) if decisions else sources[0]
        if isinstance(module, nn.MaxPool3d | nn.AvgPool3d):
            return _reached(sources[0], module)
        if isinstance(module, nn.Conv3d) and module.bias is None and sources:
            reached = _reached(sources[0], module)
            return reached._replace(channels=_everything(node, clips, device).channels)
        if isinstance(module, nn.ReLU | nn.Dropout | nn.Identity) or _named(node, "relu", "relu_"):
            return sources[0]
        if _named(node, "cat") and len(sources) == len(node.all_input_nodes) and _along_channels(node):
            return _concatenated(sources)
        if _named(node, "add", "iadd") and len(sources) == 2:
            return _union(sources[0], sources[1])
        return _everything(node, clips, device)

    def _read(
        self, decisions: Sequence[Masks], clips: int, device: torch.device, alive: dict[fx.Node, Live]
    ) -> dict[fx.Node, Live]:
        """Which part of each node's output some later node reads, from the outputs back."""
        read: dict[fx.Node, Live] = {}
        for node in reversed(self._nodes):
            wanted: Live | None = None
            for user in node.users:
                part = self._read_by(user, node, read, decisions, _everything(node, clips, device), alive[node])
                wanted = part if wanted is None else _union(wanted, part)
            read[node] = wanted or _everything(node, clips, device)
        return read

    def _read_by(
        self,
        user: fx.Node,
        node: fx.Node,
        read: dict[fx.Node, Live],
        decisions: Sequence[Masks],
        everything: Live,
        alive: Live,
    ) -> Live:
        if user not in read:
            return everything
        module = module_of(self._graph, user)
        if isinstance(module, Prune):
            return _masked(read[user], module.decided(decisions)) if decisions else read[user]
        if isinstance(module, nn.MaxPool3d | nn.AvgPool3d):
            return _seen_through(read[user], module, everything)
        if isinstance(module, nn.Conv3d):
            seen = _seen_through(read[user], module, everything)
            return Live(seen.frames * alive.frames, seen.positions * alive.positions, alive.channels)
        same = isinstance(module, nn.ReLU | nn.Dropout | nn.Identity | nn.BatchNorm3d)
        if same or _named(user, "relu", "relu_", "add", "iadd"):
            return read[user]
        if _named(user, "cat") and _along_channels(user):
            return _part_of_concatenation(read[user], user, node)
        return everything


def controller_macs(graph: fx.GraphModule) -> float:
    """MACs of the controller's convolutions and linear layers for one clip, padding left out (0 without one)."""
    controller = dict(graph.named_children()).get("controller")
    if not isinstance(controller, Controller):
        return 0.0
    first = next(node for node in graph.graph.nodes if node.op == "call_module" and node.target == "controller")
    shape = first.all_input_nodes[0].meta["tensor_meta"].shape
    total = 0.0

    def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        pairs = output[0].numel() / module.weight.shape[0]
        if isinstance(module, nn.Conv2d):
            sides = (torch.ones(1, side) for side in inputs[0].shape[2:])
            pairs = math.prod(float(_live_taps(module, axis, side).sum()) for axis, side in enumerate(sides))
        total += pairs * module.weight.shape[0] * module.weight.shape[1]

    layers = [module for module in controller.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    training, scores, decisions = controller.training, controller.scores, controller.decisions
    try:
        with torch.no_grad():
            controller.eval()(torch.zeros(1, *shape[1:], device=controller.theta.device))
    finally:
        controller.train(training)
        controller.scores, controller.decisions = scores, decisions
        for handle in handles:
            handle.remove()
    return total


def _convolution(node: fx.Node, conv: nn.Conv3d, alive: Live, read: Live) -> LayerMacs:
    ones = torch.ones_like
    executed = _macs(conv, alive, read)
    dense = _macs(conv, Live(*map(ones, alive)), Live(*map(ones, read)))
    outputs = node.meta["tensor_meta"].shape[1:].numel()
    return LayerMacs(str(node.target), executed, float(dense[0].detach()), float(outputs * conv.weight[0].numel()))


def _macs(conv: nn.Conv3d, alive: Live, read: Live) -> Tensor:
    taps = _live_taps(conv, 0, alive.frames)
    rows, columns = (
        _live_taps(conv, axis, torch.ones(1, size, device=taps.device))
        for axis, size in enumerate(alive.positions.shape[1:], 1)
    )
    pairs = (taps * read.frames).sum(1) * (read.positions * rows[:, :, None] * columns[:, None]).sum(dim=(1, 2))
    return pairs * alive.channels.sum(1) * read.channels.sum(1) / conv.groups


def _live_taps(conv: nn.Conv3d | nn.Conv2d, axis: int, alive: Tensor) -> Tensor:
    """How many taps along `axis` read a live coordinate (N, inputs), for each output coordinate: (N, outputs)."""
    size, dilation = conv.kernel_size[axis], conv.dilation[axis]
    padding = conv.padding[axis] if isinstance(conv.padding, tuple) else dilation * (size - 1) // 2
    kernel = torch.ones(1, 1, size, device=alive.device)
    found = functional.conv1d(alive[:, None], kernel, None, conv.stride[axis], int(padding), dilation)
    return found[:, 0]


def _masked(live: Live, masks: Masks) -> Live:
    return Live(
        live.frames if masks.frames is None else live.frames * masks.frames[:, 0, :, 0, 0],
        live.positions if masks.positions is None else live.positions * masks.positions[:, 0, 0],
        live.channels if masks.channels is None else live.channels * masks.channels[:, :, 0, 0, 0],
    )


def _union(one: Live, other: Live) -> Live:
    return Live(*(torch.maximum(mine, theirs) for mine, theirs in zip(one, other, strict=True)))


class _Windows(NamedTuple):
    """The geometry that a pooling and a convolution share, for frames, rows and columns."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]


def _windows(layer: nn.Module) -> _Windows:
    dilation = _three(getattr(layer, "dilation", 1))
    kernel, padding = _three(layer.kernel_size), cast(Any, layer.padding)
    if isinstance(padding, str):
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)) if padding == "same" else 0
    return _Windows(kernel, _three(layer.stride), _three(padding), dilation)


def _reached(alive: Live, layer: nn.Module) -> Live:
    """Where the windows of a layer hold something alive; channels as they are."""
    kernel, stride, padding, dilation = _windows(layer)
    ceil = bool(getattr(layer, "ceil_mode", False))
    frames = functional.max_pool1d(
        _padded(alive.frames[:, None], padding[:1]), kernel[0], stride[0], 0, dilation[0], ceil_mode=ceil
    )
    positions = functional.max_pool2d(
        _padded(alive.positions[:, None], padding[1:]), kernel[1:], stride[1:], 0, dilation[1:], ceil_mode=ceil
    )
    return Live(frames[:, 0], positions[:, 0], alive.channels)


def _padded(mask: Tensor, padding: tuple[int, ...]) -> Tensor:
    return functional.pad(mask, [size for size in reversed(padding) for _ in range(2)])


def _seen_through(read: Live, layer: nn.Module, whole: Live) -> Live:
    """What a layer looks at of its input for the outputs that are read: every window's entries."""
    kernel, stride, padding, dilation = _windows(layer)
    frames = read.frames[:, None, :, None]
    frames = _spread(frames, _Axes(kernel[0], stride[0], padding[0], dilation[0], whole.frames.shape[1]), _ONE)
    rows, columns = (
        _Axes(kernel[axis], stride[axis], padding[axis], dilation[axis], whole.positions.shape[axis]) for axis in (1, 2)
    )
    return Live(frames[:, 0, :, 0], _spread(read.positions[:, None], rows, columns)[:, 0], read.channels)


class _Axes(NamedTuple):
    kernel: int
    stride: int
    padding: int
    dilation: int
    size: int


_ONE = _Axes(1, 1, 0, 1, 1)


def _spread(mask: Tensor, rows: _Axes, columns: _Axes) -> Tensor:
    """(N, 1, h, w) windows to the (N, 1, H, W) entries they cover; an entry of several windows takes the largest."""
    return _spread_along(_spread_along(mask, 2, rows), 3, columns)


def _spread_along(mask: Tensor, dim: int, axis: _Axes) -> Tensor:
    length = (mask.shape[dim] - 1) * axis.stride + 1
    room = max(axis.size + 2 * axis.padding, length + (axis.kernel - 1) * axis.dilation)
    shape = [*mask.shape[:dim], room, *mask.shape[dim + 1 :]]
    covered = mask.new_zeros(shape)
    for tap in range(axis.kernel):
        start = tap * axis.dilation
        places = torch.arange(start, start + length, axis.stride, device=mask.device)
        covered = torch.maximum(covered, mask.new_zeros(shape).index_copy(dim, places, mask))
    return covered.narrow(dim, axis.padding, axis.size)


def _concatenated(sources: list[Live]) -> Live:
    union = sources[0]
    for source in sources[1:]:
        frames, positions = (torch.maximum(a, b) for a, b in zip(union[:2], source[:2], strict=True))
        union = Live(frames, positions, union.channels)
    return union._replace(channels=torch.cat([source.channels for source in sources], dim=1))


def _part_of_concatenation(read: Live, user: fx.Node, node: fx.Node) -> Live:
    start, parts = 0, []
    for source in cast("Sequence[fx.Node]", user.args[0]):
        width = source.meta["tensor_meta"].shape[1]
        if source is node:
            parts.append(read._replace(channels=read.channels[:, start : start + width]))
        start += width
    whole = parts[0]
    for part in parts[1:]:
        whole = _union(whole, part)
    return whole


def _everything(node: fx.Node, clips: int, device: torch.device) -> Live:
    _, channels, frames, height, width = node.meta["tensor_meta"].shape
    return Live(
        torch.ones(clips, frames, device=device),
        torch.ones(clips, height, width, device=device),
        torch.ones(clips, channels, device=device),
    )


def _is_activation(node: fx.Node) -> bool:
    return len(getattr(node.meta.get("tensor_meta"), "shape", ())) == 5


def _along_channels(node: fx.Node) -> bool:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim in (1, -4)


def _named(node: fx.Node, *names: str) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    return str(getattr(node.target, "__name__", node.target)) in names


def _three(value: Any) -> tuple[int, int, int]:
    return (value, value, value) if isinstance(value, int) else tuple(value)


def _device(graph: fx.GraphModule) -> torch.device:
    return next(graph.parameters()).device
