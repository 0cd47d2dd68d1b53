"""The distinct kernels of a network: it is lowered as a build would, and every choice of a tile is noted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dance_tvm.errors import DanceError
from dance_tvm.schedules.spaces import (
    GATHER,
    LISTS,
    TYPICAL_DENSITY,
    WINOGRAD,
    WORTH_TRYING,
    Advice,
    WinogradSpace,
    Workload,
)
from dance_tvm.schedules.winograd_choice import direct_seconds, why_not, winograd_seconds
from dance_tvm.tuning.calibration import density_of, kept_shares

if TYPE_CHECKING:
    from dance_tvm.schedules.tiles import Machine
    from dance_tvm.target import Target
    from dance_tvm.transform.layers import LayerInfo


@dataclass
class Layer:
    """A kernel to tune and the layers of the network that use it."""

    workload: Workload
    names: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its first layer's name, with the family and density where they are not the usual ones."""
        work = self.workload
        family = " winograd" if work.family == WINOGRAD else ""
        return f"{self.names[0]}{family}{f' at {work.density:g}' if work.lists else ''}"

    @property
    def count(self) -> int:
        """How often one call of the network runs it."""
        return len(self.names)


class _Noted:
    """A tuning log that knows nothing and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Workload] = []

    def advise(self, workload: Workload) -> Advice | None:
        """Nothing."""
        self.asked.append(workload)
        return None


def layers_of(
    model: str | Path | Any,
    target: Target,
    *,
    weights: Path | None = None,
    threads: int | None = None,
    densities: Sequence[float] = (),
    lists: Sequence[str] = (),
    only: Sequence[str] = (),
    conv: Literal["auto", "direct", "winograd"] = "auto",
    clips: str = "",
) -> list[Layer]:
    """The distinct kernels of ``model`` with the names of their layers, in order of execution.

    ``densities``: at which densities kernels that walk lists are tuned (0.5 unless given); with ``clips``, those that
    each layer has on these (see :mod:`~dance_tvm.tuning.calibration`) as well. ``lists`` tunes as though
    masks thinned these axes of every convolution. ``only`` keeps layers whose name matches one of the patterns.
    ``conv``: direct or Winograd kernels alone, or each of the two that a build may choose once it has been tuned.
    Raises DanceError where nothing is left to tune.
    """
    from dance_tvm.frontend import import_model
    from dance_tvm.transform.pipeline import Options, gpu_of, lower, machine_of

    noted = _Noted()
    imported = import_model(model, weights=weights, check=False)
    lowered = lower(imported.mod, target, Options(threads=threads or target.threads, tuning=noted))
    gpu = gpu_of(target)
    names = [layer.name for layer in lowered.layers if _asks(layer, on_gpu=gpu is not None)]
    asked = [workload for workload in noted.asked if workload.family != WINOGRAD]
    if not asked:
        raise DanceError(f"{imported.name} has no tunable layer: it holds neither convolutions nor linear layers")
    layers: dict[str, Layer] = {}
    kept = kept_shares(model, clips, weights) if clips else {}
    machine = machine_of(target)
    for name, workload in zip(names, asked, strict=True):
        if only and not any(fnmatch(name, pattern) for pattern in only):
            continue
        shown = [density_of(workload, kept[name])] if name in kept else []
        for variant in _variants(workload, [*densities, *shown], lists):
            for kernel in [variant] if gpu else _families(variant, machine, conv):
                layers.setdefault(kernel.identity, Layer(kernel)).names.append(name)
    if not layers:
        tunable = "with a Winograd kernel " if conv == "winograd" else ""
        raise DanceError(
            f"no layer of {imported.name} {tunable}matches {', '.join(only) or '*'}: it has {', '.join(names[:12])}"
        )
    return list(layers.values())


def _asks(layer: LayerInfo, on_gpu: bool) -> bool:
    """Whether the choice of the layer's kernel asks for a tile: on GPUs those of gathered convolutions alone."""
    return layer.kernel.startswith(GATHER) if on_gpu else layer.kind != "pool3d"


def _families(workload: Workload, machine: Machine, conv: str) -> list[Workload]:
    """The workload for each family worth tuning: not what is far behind the other, as the model of time has it."""
    transformed = replace(workload, family=WINOGRAD)
    space = WinogradSpace(machine, transformed)
    if conv == "direct" or why_not(space.direct):
        return [] if conv == "winograd" else [workload]
    try:
        other = winograd_seconds(space.kernel(space.default()), machine, workload.threads)
    except ValueError:
        return [] if conv == "winograd" else [workload]
    direct = direct_seconds(space.direct, machine, workload.threads)
    found = [workload] if conv == "auto" and direct <= WORTH_TRYING * other else []
    return found + ([transformed] if conv == "winograd" or other <= WORTH_TRYING * direct else [])


def _variants(workload: Workload, densities: Sequence[float], lists: Sequence[str]) -> list[Workload]:
    spatial = workload.window.positions_out > workload.window.batch
    if lists and spatial:
        kept = ("in_frames", "out_frames", "positions", "out_channels") if workload.groups == 1 else LISTS[:3]
        asked = tuple(axis for axis in LISTS if axis in lists and (axis in kept or workload.groups == 1))
        workload = replace(workload, lists=asked)
    if not workload.lists:
        return [workload.at(1.0)]
    return [workload.at(density) for density in dict.fromkeys(densities) or (TYPICAL_DENSITY,)]
