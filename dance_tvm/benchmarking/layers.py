"""From kernel calls to layers: which kernel ran which layer, and how much of its work was left."""

from __future__ import annotations

from collections.abc import Sequence

from dance_tvm.artifact.folder import Manifest
from dance_tvm.artifact.layers import LayerInfo
from dance_tvm.benchmarking.results import Layer, Profile
from dance_tvm.device import KernelTime

OTHER = "other operators"
PLANNING = "index lists"
MACHINE = "virtual machine"


def profile(manifest: Manifest, calls: Sequence[KernelTime], whole_seconds: float, clip: str = "reference") -> Profile:
    """The layers of a run in order, then index lists, other operators and the virtual machine itself."""
    layers: list[Layer] = []
    rest = {PLANNING: _nothing(PLANNING), OTHER: _nothing(OTHER), MACHINE: _nothing(MACHINE)}
    waiting = list(manifest.layers)
    for call in calls:
        match = next((layer for layer in waiting if ran(layer.kernel, call.symbol)), None)
        if match is None:
            kind = _kind(call.symbol)
            moved = 0 if kind == MACHINE else call.bytes  # it hands tensors on and reads none
            rest[kind] = rest[kind].model_copy(
                update={"seconds": rest[kind].seconds + call.seconds, "bytes": rest[kind].bytes + moved}
            )
        else:
            waiting.remove(match)
            layers.append(_layer(match, call))
    everything = [*layers, *rest.values()]
    explained = sum(layer.seconds for layer in everything) / whole_seconds if whole_seconds else 0.0
    return Profile(clip=clip, layers=everything, whole_seconds=whole_seconds, explained=explained)


def ran(kernel: str, symbol: str) -> bool:
    """Whether `symbol` is the kernel's function: its name, with a number behind it where several have the name."""
    return symbol == kernel or (symbol.startswith(kernel) and symbol[len(kernel) :].lstrip("_").isdigit())


def _kind(symbol: str) -> str:
    if symbol.startswith("vm."):
        return MACHINE
    return PLANNING if symbol.startswith(("plan_", "grow_", "compact_")) else OTHER


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
