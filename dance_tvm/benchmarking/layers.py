"""From kernel calls to layers: which kernel ran which layer, and how much of its work was left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dance_tvm.artifact.folder import Manifest
from dance_tvm.artifact.layers import LayerInfo, layers_called
from dance_tvm.benchmarking.results import Layer, Profile
from dance_tvm.device import KernelTime

OTHER = "other operators"
PLANNING = "index lists"


def profile(manifest: Manifest, calls: Sequence[KernelTime], whole_seconds: float, clip: str = "reference") -> Profile:
    """The layers of a run in order, then index lists and other operators."""
    layers: list[Layer] = []
    rest = {PLANNING: _nothing(PLANNING), OTHER: _nothing(OTHER)}
    for call, match in layers_run(manifest, calls):
        if match is None:
            kernel = manifest.kernels.get(call.symbol)
            kind = PLANNING if kernel is not None and kernel.is_planner else OTHER
            rest[kind] = rest[kind].model_copy(
                update={"seconds": rest[kind].seconds + call.seconds, "bytes": rest[kind].bytes + call.bytes}
            )
        else:
            layers.append(_layer(match, call))
    everything = [*layers, *rest.values()]
    explained = sum(layer.seconds for layer in everything) / whole_seconds if whole_seconds else 0.0
    return Profile(clip=clip, layers=everything, whole_seconds=whole_seconds, explained=explained)


def layers_run(manifest: Manifest, calls: Sequence[KernelTime]) -> Iterator[tuple[KernelTime, LayerInfo | None]]:
    """Each call, with the layer that it runs alone."""
    return zip(calls, layers_called(manifest.layers, manifest.kernels, [call.symbol for call in calls]), strict=True)


def _nothing(name: str) -> Layer:
    return Layer(name=name, kernel="", seconds=0.0, macs=0, executed_macs=0, bytes=0)


def _layer(info: LayerInfo, call: KernelTime) -> Layer:
    work = call.work
    found = Layer(
        name=info.name,
        kernel=info.kernel,
        seconds=call.seconds,
        macs=info.macs,
        executed_macs=info.macs,
        bytes=call.bytes,
        why=info.reason,
        tuned=info.tuned,
    )
    if work is None:
        return found
    return found.model_copy(
        update={
            "executed_macs": round(work["share"] * info.macs) if work["macs"] is None else work["macs"],
            "kept_frames": work["frames"],
            "kept_positions": work["positions"],
            "kept_channels_in": work["channels_in"],
            "kept_channels_out": work["channels_out"],
            "shape": work["shape"],
            "alive": work["alive"],
        }
    )
