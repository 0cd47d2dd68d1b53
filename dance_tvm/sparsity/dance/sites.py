"""Where a network can be pruned: the activations after each convolution, found in its torch.fx graph.

A *site* is the output of a ReLU that a convolution feeds (through batch norm, a residual sum or a concatenation). AVA
puts its adaptors there and AAP its masks, so every convolution after the first reads pruned activations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional

from dance_tvm.core.errors import DanceError

_RELU_CALLS = (functional.relu, torch.relu, functional.relu_)
_BETWEEN_CALLS = (torch.add, operator.add, operator.iadd, torch.cat, torch.concat)


@dataclass(frozen=True)
class Site:
    """One place to prune: the fx node's name and its activation's shape (C, T, H, W)."""

    node: str
    shape: tuple[int, int, int, int]


class _Tracer(fx.Tracer):
    """Looks only into modules that hold 3D convolutions: what happens elsewhere is none of pruning's business."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = any(isinstance(module, nn.Conv3d) for module in m.modules())
        return not ours or super().is_leaf_module(m, module_qualified_name)


def trace(network: nn.Module, clip_shape: tuple[int, ...]) -> tuple[fx.GraphModule, list[Site]]:
    """`network` as an fx graph with shapes for one clip (C, T, H, W), and its sites in the order they are computed.

    The graph shares the network's modules, so its state_dict keeps the network's names.
    Raises DanceError when the network cannot be traced, does not take such clips, or has fewer than two sites.
    """
    try:
        graph = fx.GraphModule(network, _Tracer().trace(network), type(network).__name__)
    except Exception as error:
        raise DanceError(f"{type(network).__name__} cannot be traced by torch.fx ({error})") from error
    _propagate_shapes(graph, network, clip_shape)
    sites = [
        Site(node.name, _shape(node)) for node in graph.graph.nodes if _is_relu(graph, node) and _follows(graph, node)
    ]
    if len(sites) < 2:
        raise DanceError(f"{type(network).__name__} has {len(sites)} activations after 3D convolutions; two are needed")
    return graph, sites


def insert(
    graph: fx.GraphModule, site: Site, name: str, module: nn.Module, decisions: fx.Node | None = None
) -> fx.Node:
    """Puts `module`, called `name`, after the site: all who read the site read its result (but for `decisions`)."""
    graph.add_submodule(name, module)
    activation = node_named(graph, site.node)
    others = [user for user in activation.users if user is not decisions]
    with graph.graph.inserting_after(decisions if decisions and site_is_first(graph, site) else activation):
        inserted = graph.graph.call_module(name, (activation,) if decisions is None else (activation, decisions))
    for user in others:
        user.replace_input_with(activation, inserted)
    inserted.meta.update(activation.meta)
    return inserted


def site_is_first(graph: fx.GraphModule, site: Site) -> bool:
    """Whether the site's activation is the one that the controller reads."""
    return any(user.op == "call_module" and user.target == "controller" for user in node_named(graph, site.node).users)


def has_units(node: fx.Node) -> bool:
    """Whether a convolution computes more than one position; else it is a linear layer, which has no units."""
    return math.prod(node.meta["tensor_meta"].shape[2:]) > 1


def node_named(graph: fx.GraphModule, name: str) -> fx.Node:
    """The node of that name. Raises StopIteration where there is none."""
    return next(node for node in graph.graph.nodes if node.name == name)


def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that the node calls; None for functions, methods and inputs."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _propagate_shapes(graph: fx.GraphModule, network: nn.Module, clip_shape: tuple[int, ...]) -> None:
    """Notes every node's shape for one clip, on fake tensors: nothing is computed."""
    training = network.training
    graph.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            ShapeProp(graph, fake_mode=mode).propagate(torch.zeros(1, *clip_shape))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DanceError(f"{type(network).__name__} does not take clips of shape {clip_shape}: {reason}") from error
    finally:
        graph.train(training)


def _shape(node: fx.Node) -> tuple[int, int, int, int]:
    _, channels, frames, height, width = node.meta["tensor_meta"].shape
    return channels, frames, height, width


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    if meta is None or not hasattr(meta, "shape") or len(meta.shape) != 5:
        return False
    if node.op == "call_module":
        return isinstance(module_of(graph, node), nn.ReLU)
    return _calls(node, _RELU_CALLS, "relu")


def _follows(graph: fx.GraphModule, relu: fx.Node) -> bool:
    """Whether a 3D convolution reaches the ReLU through batch norm, sums and concatenations alone."""
    waiting = list(relu.all_input_nodes)
    while waiting:
        node = waiting.pop()
        module = module_of(graph, node)
        if isinstance(module, nn.Conv3d):
            return True
        if isinstance(module, nn.BatchNorm3d) or _calls(node, _BETWEEN_CALLS, "add"):
            waiting.extend(node.all_input_nodes)
    return False


def _calls(node: fx.Node, functions: tuple[Callable[..., object], ...], method: str) -> bool:
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and str(node.target).rstrip("_") == method
