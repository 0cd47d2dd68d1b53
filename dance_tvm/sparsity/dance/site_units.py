"""The units of a network's sites: of the layers whose results a site masks, what all of them can leave out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from torch import fx, nn

from dance_tvm.core.errors import DanceError
from dance_tvm.schedules.cpu.units import Serving
from dance_tvm.schedules.workload import Workload
from dance_tvm.sparsity.dance.sites import has_units, module_of, node_named, trace
from dance_tvm.sparsity.units import LayerTimes, SiteUnits


def site_units(
    network: nn.Module, clip_shape: tuple[int, ...], workloads: Mapping[str, Workload], chosen: Mapping[str, Serving]
) -> list[SiteUnits]:
    """The units of each site of ``network``, whose layers were built for ``workloads`` and are served as ``chosen``.

    A site's unit is the least common multiple of its layers'. Raises DanceError where the layers are not those of the
    network.
    """
    graph, sites = trace(network, clip_shape)
    layers = _layers(graph, workloads)
    found = []
    for site in sites:
        relu = node_named(graph, site.node)
        units = {
            axis: [chosen[layers[conv]].units for conv in _computed_for(graph, relu, sides) if conv in layers]
            for axis, sides in (("channels", ()), ("frames", (0,)), ("positions", (1, 2)))
        }
        channels, frames, height, width = site.shape
        rows, columns = ([unit[2][side] for unit in units["positions"]] for side in (0, 1))
        found.append(
            SiteUnits(
                node=site.node,
                shape=site.shape,
                frames=_common([unit[0] for unit in units["frames"]], frames),
                channels=_common([unit[1] for unit in units["channels"]], channels),
                positions=(_common(rows, height), _common(columns, width)),
            )
        )
    return found


def layer_times(
    network: nn.Module, clip_shape: tuple[int, ...], workloads: Mapping[str, Workload], chosen: Mapping[str, Serving]
) -> list[LayerTimes]:
    """What each convolution of ``network`` is predicted to take, in its own order; the rest as above."""
    graph, _ = trace(network, clip_shape)
    found = []
    for node, name in _layers(graph, workloads).items():
        serving = chosen[name]
        frames, channels, positions = serving.units
        found.append(
            LayerTimes(
                layer=str(node.target),
                kernel=serving.kernel,
                unit_frames=frames,
                unit_channels=channels,
                unit_positions=positions,
                frames=serving.seconds["frames"],
                channels=serving.seconds["channels"],
                positions=serving.seconds["positions"],
            )
        )
    return found


def _common(units: list[int], size: int) -> int:
    """The least that is whole units of each of ``units``, or all of an axis of ``size``."""
    return min(size, math.lcm(*units))


def _layers(graph: fx.GraphModule, workloads: Mapping[str, Workload]) -> dict[fx.Node, str]:
    """The layer's name of each convolution: its module's, numbered from the second call on (`frontend/names.py`)."""
    calls: Counter[str] = Counter()
    layers = {}
    for node in graph.graph.nodes:
        conv = module_of(graph, node)
        if isinstance(conv, nn.Conv3d):
            module = str(node.target)
            name = f"{module}_{calls[module]}" if calls[module] else module
            calls[module] += 1
            if not has_units(node):
                continue
            if name not in workloads or not _is_of(workloads[name], conv, node):
                raise DanceError(f"{name} of {type(graph).__name__} is not a separate layer of the built network")
            layers[node] = name
    return layers


def _is_of(workload: Workload, conv: nn.Conv3d, node: fx.Node) -> bool:
    window = workload.window
    mine = (workload.channels_in, workload.channels_out, workload.groups, window.kernel, window.stride, window.out)
    shape = tuple(node.meta["tensor_meta"].shape[2:])
    return mine == (conv.in_channels, conv.out_channels, conv.groups, conv.kernel_size, conv.stride, shape)


def _computed_for(graph: fx.GraphModule, relu: fx.Node, sides: tuple[int, ...]) -> list[fx.Node]:
    """The convolutions that need not compute what a mask of the ReLU leaves out.

    Their results reach it through batch norms, sums and concatenations, and through convolutions whose windows are 1
    long along the masked ``sides`` (of frames, height, width; none: channels, which no convolution passes on).
    """
    found, waiting, seen = [], list(relu.all_input_nodes), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        module = module_of(graph, node)
        if isinstance(module, nn.Conv3d):
            found.append(node)
            if sides and all(_passes(module, side) for side in sides):
                waiting.extend(node.all_input_nodes)
        elif node.op != "placeholder" and not isinstance(module, nn.ReLU) and _keeps_shape(node, relu):
            waiting.extend(node.all_input_nodes)
    return found


def _passes(conv: nn.Conv3d, side: int) -> bool:
    return (conv.kernel_size[side], conv.stride[side], conv.padding[side]) == (1, 1, 0)


def _keeps_shape(node: fx.Node, relu: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return meta is not None and tuple(meta.shape[2:]) == tuple(relu.meta["tensor_meta"].shape[2:])
