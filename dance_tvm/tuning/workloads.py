"""The distinct kernels of a network: it is lowered as by a build, which shows what each kernel was chosen for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dance_tvm.core.errors import DanceError
from dance_tvm.schedules import layer
from dance_tvm.schedules.cpu.choice import settled, settled_direct
from dance_tvm.schedules.cpu.space import WORTH_TRYING
from dance_tvm.schedules.cpu.winograd_choice import transformed, why_no_winograd
from dance_tvm.schedules.workload import (
    DEPTHWISE,
    GATHER,
    KERNEL_GROUPS,
    LINE,
    LISTS,
    PLANAR,
    POINTWISE,
    POOL,
    TRANSPOSED,
    TYPICAL_DENSITY,
    WINOGRAD,
    Workload,
)
from dance_tvm.tuning.calibration import density_of, kept_shares

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target
    from dance_tvm.schedules.cpu.tiles import Machine

#: What the title of a layer adds for families whose layers may be tuned as another one too.
KINDS = {WINOGRAD: " winograd", KERNEL_GROUPS: " kernel groups"}


@dataclass
class Tunable:
    """A kernel to tune and the layers of the network that use it."""

    workload: Workload
    names: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its first layer's name, with the family and density where they are not the usual ones."""
        work = self.workload
        return f"{self.names[0]}{KINDS.get(work.family, '')}{f' at {work.density:g}' if work.lists else ''}"

    @property
    def count(self) -> int:
        """How often one call of the network runs it."""
        return len(self.names)


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
    dtype: Literal["float32", "float16"] = "float32",
) -> list[Tunable]:
    """The distinct kernels of ``model`` with the names of their layers, in order of execution.

    ``densities``: at which densities kernels that walk lists are tuned (0.5 unless given); with ``clips``, those that
    each layer has on these (see :mod:`~dance_tvm.tuning.calibration`) as well. ``lists`` tunes as though
    masks thinned these axes of every convolution. ``only`` keeps layers whose name matches one of the patterns.
    ``conv``: only direct or only Winograd kernels, or each of the two that a build may choose once it has been tuned.
    ``dtype``: how kernels store activations and weights. Raises DanceError where nothing is left to tune.
    """
    from dance_tvm.compiler.pipeline import Options, lower
    from dance_tvm.frontend import import_model
    from dance_tvm.lowering.machine import gpu_of

    imported = import_model(model, weights=weights, check=False)
    lowered = lower(imported.mod, target, Options(threads=threads or target.threads, dtype=dtype))
    workloads, machine = lowered.workloads, lowered.machine
    if not workloads:
        raise DanceError(f"{imported.name} has no tunable layer: it holds no convolutions, linear layers or pools")
    layers: dict[str, Tunable] = {}
    kept = kept_shares(model, clips, weights) if clips else {}
    assert machine is not None
    gpu = gpu_of(target)
    for name, workload in workloads.items():
        if only and not any(fnmatch(name, pattern) for pattern in only):
            continue
        shown = [density_of(workload, kept[name])] if name in kept else []
        for variant in _variants(workload, [*densities, *shown], lists):
            for kernel in [variant] if gpu else _families(variant, machine, conv):
                layers.setdefault(kernel.identity, Tunable(kernel)).names.append(name)
    if not layers:
        tunable = "with a Winograd kernel " if conv == "winograd" else ""
        known = ", ".join([*workloads][:12])
        raise DanceError(f"no layer of {imported.name} {tunable}matches {', '.join(only) or '*'}: it has {known}")
    return list(layers.values())


def _families(workload: Workload, machine: Machine, conv: str) -> list[Workload]:
    """The workload for each family worth tuning: not what is far behind the other, as the cost model has it."""
    if workload.family not in (GATHER, KERNEL_GROUPS) or conv == "direct":
        return [] if conv == "winograd" else [workload]
    direct = settled_direct(layer.Layer.of(workload), machine).kernel
    if why_no_winograd(direct):
        return [] if conv == "winograd" else [workload]
    start = transformed(settled_direct(layer.Layer.of(workload.direct), machine).kernel)
    try:
        winograd = settled(start, machine, workload.winograd, None).kernel
        other = winograd.predict(machine, workload.threads)
    except ValueError:
        return [] if conv == "winograd" else [workload]
    seconds = direct.predict(machine, workload.threads)
    found = [workload] if conv == "auto" and seconds <= WORTH_TRYING * other else []
    return found + ([workload.winograd] if conv == "winograd" or other <= WORTH_TRYING * seconds else [])


def _variants(workload: Workload, densities: Sequence[float], lists: Sequence[str]) -> list[Workload]:
    spatial = workload.window.positions_out > workload.window.batch
    if lists and spatial:
        workload = replace(workload, lists=tuple(axis for axis in _thinnable(workload) if axis in lists))
        walks_none = workload.family in (POINTWISE, LINE) and workload.lists
        skips_more = workload.family == DEPTHWISE and not set(workload.lists) <= set(LISTS[:2])
        workload = workload.direct if walks_none or skips_more else workload
    if not workload.lists:
        return [workload.at(1.0)]
    return [workload.at(density) for density in dict.fromkeys(densities) or (TYPICAL_DENSITY,)]


def _thinnable(workload: Workload) -> tuple[str, ...]:
    """Axes that masks may thin; kernels of grouped convolutions walk all channels, pools all positions as well."""
    if workload.family in (TRANSPOSED, PLANAR):
        return ()
    if workload.family == POOL:
        return LISTS[:2]
    if workload.groups > 1:
        return LISTS[:3]
    return LISTS if workload.window.kernel[0] == 1 else LISTS[:-1]  # input positions thin only windows of one frame
