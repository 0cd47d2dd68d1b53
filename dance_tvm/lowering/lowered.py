"""What lowering a network gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import tvm

from dance_tvm.artifact.layers import KernelInfo, LayerInfo
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.layer import Limits
from dance_tvm.schedules.preparation import Source
from dance_tvm.schedules.workload import Workload


class LayerCall(NamedTuple):
    """The call of a layer's kernel: its variable, and the variable of the module before it with the same value."""

    var: str
    source: str


@dataclass(frozen=True)
class Lowered:
    """A module ready for ``tvm.compile``, the decisions taken, and the weights lifted out of it (by parameter name).

    ``workloads``: what the sizes of a layer's kernel were chosen for, by the layer's name; layers whose kernels have
    nothing to choose are not there. ``sources``: what packed weights were made of, by their digest.
    ``kernels``: every function of the module by its symbol. ``source``: the network in its own layouts. ``calls``: that
    of each layer's kernel, by the layer's name. ``limits``: of a layer's memory, where the network's are shared out.
    ``machine``: the facts of a processor that its kernels were chosen by.
    """

    mod: tvm.IRModule
    layers: list[LayerInfo] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    workloads: dict[str, Workload] = field(default_factory=dict)
    sources: dict[bytes, Source] = field(default_factory=dict)
    kernels: dict[str, KernelInfo] = field(default_factory=dict)
    calls: dict[str, LayerCall] = field(default_factory=dict)
    source: tvm.IRModule | None = None
    limits: dict[str, Limits] = field(default_factory=dict)
    machine: Machine | None = None
