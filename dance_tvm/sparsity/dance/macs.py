"""Multiply-accumulates of a masked network, counted as a kernel that walks index lists executes them.

``dance_tvm.liveness`` finds what is alive and what is read by the rules that the compiler goes by, and counts what that
leaves (``liveness.macs``), so that training's budgets are those of the built network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dance_tvm.liveness.analysis import Key, Liveness
from dance_tvm.liveness.expressions import Expression, Factor
from dance_tvm.liveness.macs import ConvolutionWork, MaskValue
from dance_tvm.liveness.torch_graph import ModuleView, evaluate, module_window
from dance_tvm.schedules.geometry import Window
from dance_tvm.sparsity.dance.controller import Controller, Masks, Prune
from dance_tvm.sparsity.dance.options import AXES
from dance_tvm.sparsity.dance.sites import module_of

#: Layers that a network calls with weights of its own.
_FUNCTIONS = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)


class LayerMacs(NamedTuple):
    """One convolution's MACs: `executed` (N,) under the masks, `dense` without masks, `nominal` with padded taps."""

    name: str
    executed: Tensor
    dense: float
    nominal: float


@dataclass(frozen=True)
class Count:
    """A network's MACs. `executed` (N,) has a gradient where the masks have one.

    `whole` are those of layers that run whole whatever masks say: linear ones, transposed convolutions, those along one
    or two axes, and those that are functions with weights of the network's own.
    """

    layers: list[LayerMacs]
    whole: float
    controller: float

    @property
    def executed(self) -> Tensor:
        return torch.stack([layer.executed for layer in self.layers]).sum(0) + self.whole + self.controller

    @property
    def dense(self) -> float:
        """Of the network without masks or controller, taps on padding left out."""
        return sum(layer.dense for layer in self.layers) + self.whole

    @property
    def nominal(self) -> float:
        """Of the network without masks or controller, counted as papers do: every tap of every output."""
        return sum(layer.nominal for layer in self.layers) + self.whole


class MaskKey(NamedTuple):
    """Names a mask in the graph that is analysed: that of a site and an axis."""

    site: int
    axis: str


class _PrunedView(ModuleView):
    """A graph whose `Prune` modules are products with masks."""

    def translate(self, node: fx.Node) -> None:
        module = self.module(node)
        if not isinstance(module, Prune):
            super().translate(node)
            return
        before, decisions = node.all_input_nodes[0], tuple(node.all_input_nodes[1:])
        _, frames, height, width, channels = self.shapes[before]
        shapes = {
            "frames": (1, frames, 1, 1, 1),
            "channels": (1, 1, 1, 1, channels),
            "positions": (1, 1, height, width, 1),
        }
        product: Key = before
        for axis in AXES:
            mask = MaskKey(module.index, axis)
            if mask not in self.readers:
                self.add(mask, None, decisions, node)
                self.shapes[mask] = shapes[axis]
            result = node if axis == AXES[-1] else (node, axis)
            self.add(result, "multiply", (product, mask), node)
            product = result

    def dtype(self, key: Key) -> str:
        return "bool" if isinstance(key, MaskKey) else super().dtype(key)


class MacCounter:
    """Counts a traced network's MACs from the masks of its last forward pass.

    `graph` must carry shapes (`sites.trace`) and may carry `Prune` modules and a `controller`.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        view = _PrunedView(graph)
        liveness = Liveness.of(view)
        self.layers: list[CountedLayer] = []
        for key in view.order:
            node = key[0] if isinstance(key, tuple) and not isinstance(key, MaskKey) else key
            conv = view.module(node) if isinstance(node, fx.Node) else None
            operation = view.operation(key)
            if isinstance(conv, nn.Conv3d) and operation is not None and operation.window is not None:
                work = ConvolutionWork(
                    operation.window,
                    conv.in_channels,
                    conv.out_channels,
                    conv.groups,
                    liveness.alive_in(operation.operands[0]),
                    liveness.wanted(key),
                )
                self.layers.append(CountedLayer(node, conv, work))
        self._whole = sum(_whole_macs(module_of(graph, node), node) for node in graph.graph.nodes)
        self._controller = controller_macs(graph)

    def count(self, decisions: Sequence[Masks], clips: int) -> Count:
        """The MACs of `clips` clips whose masks are `decisions` (one entry a site; none: the dense network)."""
        masks, one = self.masks(decisions)
        return Count([layer.count(masks, clips, one) for layer in self.layers], self._whole, self._controller)

    def masks(self, decisions: Sequence[Masks]) -> tuple[MaskValue, Tensor]:
        """What gives the mask of an expression under the `decisions`, and one that leaves everything."""
        given = next((mask for site in decisions for mask in site if mask is not None), None)
        one = torch.ones(1, 1, 1, 1, 1, device=_device(self._graph) if given is None else given.device)

        def value(factor: Factor) -> Tensor:
            mask = getattr(decisions[factor.var.site], factor.var.axis) if decisions else None
            return one.expand(factor.shape) if mask is None else mask.movedim(1, 4)

        known: dict[Expression, Tensor] = {}
        return partial(evaluate, value=value, known=known), one


@dataclass(frozen=True)
class CountedLayer:
    """A convolution of the graph and what is left of it."""

    node: fx.Node
    conv: nn.Conv3d
    work: ConvolutionWork

    def count(self, masks: MaskValue, clips: int, one: Tensor) -> LayerMacs:
        """Its MACs by clip; `one` is a mask that leaves everything."""
        outputs = self.node.meta["tensor_meta"].shape[1:].numel()
        nominal = float(outputs * self.conv.weight[0].numel())
        return LayerMacs(str(self.node.target), self.work.macs(masks, clips, one), float(self.work.dense), nominal)


def _whole_macs(module: nn.Module | None, node: fx.Node) -> float:
    """MACs for one clip of a layer that masks do not thin; a transposed convolution multiplies each of its inputs."""
    if isinstance(module, nn.Linear):
        return float(module.weight.numel() * node.meta["tensor_meta"].shape[:-1].numel())
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        n, _, *positions = _shape(node.all_input_nodes[0])
        return float(n * math.prod(positions) * module.weight.numel())
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _window_macs(module, node, module.weight.shape)
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return 0.0
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    weight = _shape(given["weight"])
    if node.target is functional.linear:
        return float(weight.numel() * node.meta["tensor_meta"].shape[:-1].numel())
    sizes = {"kernel_size": weight[2:], "stride": 1, "padding": 0, "dilation": 1, **given}
    return _window_macs(SimpleNamespace(**sizes), node, weight)


def _window_macs(sizes: nn.Module | SimpleNamespace, node: fx.Node, weight: torch.Size) -> float:
    """MACs of a convolution of these ``sizes``, as a module has them, taps on padding left out."""
    window = module_window(sizes, _shape(node.all_input_nodes[0]), _shape(node))
    return float(window.tap_positions * weight[:2].numel())


def _shape(node: Any) -> torch.Size:
    shape: torch.Size = node.meta["tensor_meta"].shape
    return shape


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
            pairs = _window(module, inputs[0].shape, output.shape).tap_positions
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


def _window(conv: nn.Conv2d, taken: torch.Size, given: torch.Size) -> Window:
    """The convolution's window over one clip, from inputs and outputs (N, C, H, W)."""
    assert isinstance(conv.padding, tuple)
    sizes = (taken[2:], given[2:], conv.kernel_size)
    size, out, kernel = ((1, int(height), int(width)) for height, width in sizes)
    strides, padding, dilation = ((int(a), int(b)) for a, b in (conv.stride, conv.padding, conv.dilation))
    return Window(1, size, out, kernel, (1, *strides), (0, *padding), (1, *dilation))


def _device(graph: fx.GraphModule) -> torch.device:
    return next(graph.parameters()).device
